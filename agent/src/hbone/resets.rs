//! Resets that let what was sent before them leave first.
//!
//! `h2` drops what it still holds of a stream when that is reset. An application that answers and
//! then resets its connection (one that closes it without reading all of the request, say) has its
//! answer delivered by TCP all the same, and so it is to be here.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use bytes::Bytes;
use h2::{Reason, SendStream};
use parking_lot::Mutex;

/// The waiting resets of one connection.
#[derive(Default)]
pub(super) struct Resets {
    some: AtomicBool,
    waiting: Mutex<Vec<(SendStream<Bytes>, Reason)>>,
}

impl Resets {
    /// Whoever adds one wakes the connection's task.
    pub(super) fn add(&self, stream: SendStream<Bytes>, reason: Reason) {
        self.waiting.lock().push((stream, reason));
        self.some.store(true, Relaxed);
    }

    /// To be called after each poll of the connection, which has passed on what it could. Data
    /// that the peer's windows held back is dropped, as TCP does.
    pub(super) fn send(&self) {
        if !self.some.load(Relaxed) || !self.some.swap(false, Relaxed) {
            return;
        }
        for (mut stream, reason) in std::mem::take(&mut *self.waiting.lock()) {
            stream.send_reset(reason);
        }
    }
}
