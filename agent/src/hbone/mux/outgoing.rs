//! Frames on their way to the socket.

use std::task::Waker;

use super::super::frame::{self, HEAD, Head, Reason, flag, kind};
use crate::blocks::{BLOCK, Block};

/// DATA that may wait, frame headers included: eight full TLS records.
pub(in crate::hbone) const DATA: usize = 8 << 14;

/// A DATA frame is not begun for less room than this, if the stream wants more.
const LEAST: usize = 8 << 10;

/// Control frames and ends of streams that may wait. Whoever provokes more does not read our
/// answers.
const CONTROL: usize = 256 << 10;

/// Two queues: control frames overtake DATA; whatever ends a stream does not.
#[derive(Debug, Default)]
pub(in crate::hbone) struct Outgoing {
    pub(in crate::hbone) control: Vec<u8>,
    data: Block,
    /// Ends of streams that found no room behind the DATA.
    tail: Vec<u8>,
    /// Streams that wait for room.
    waiting: Vec<Waker>,
}

/// What goes to the socket together, in this order.
#[derive(Debug, Default)]
pub(in crate::hbone) struct Batch {
    pub(in crate::hbone) control: Vec<u8>,
    pub(in crate::hbone) data: Block,
    pub(in crate::hbone) tail: Vec<u8>,
}

impl Outgoing {
    /// Bytes of payload that a DATA frame may have now, of `wanted`; 0 while it has to wait.
    pub(in crate::hbone) fn room(&self, wanted: usize) -> usize {
        let free = DATA.saturating_sub(self.data.len() + HEAD);
        if !self.tail.is_empty() || free < wanted.min(LEAST) { 0 } else { free.min(wanted) }
    }

    pub(in crate::hbone) fn wait(&mut self, waker: &Waker) {
        if !self.waiting.iter().any(|waiting| waiting.will_wake(waker)) {
            self.waiting.push(waker.clone());
        }
    }

    /// Appends a DATA frame whose payload, at most `room` bytes, `fill` writes; nothing when that
    /// is empty.
    pub(in crate::hbone) fn data<E>(
        &mut self,
        stream: u32,
        room: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let frame = self.data.room(HEAD + room);
        let (head, payload) = frame.split_at_mut(HEAD.min(frame.len()));
        let payload = payload.get_mut(..room).unwrap_or_default();
        let count = match fill(payload) {
            Ok(count) if count > 0 => count.min(room),
            nothing => {
                self.data.consume(0);
                return nothing;
            }
        };
        let length = u32::try_from(count).unwrap_or(u32::MAX);
        let bytes = Head { length, kind: kind::DATA, flags: 0, stream }.bytes();
        head.copy_from_slice(&bytes);
        self.data.advance(HEAD + count);
        Ok(count)
    }

    /// END_STREAM on an empty DATA frame.
    pub(in crate::hbone) fn end(&mut self, stream: u32) {
        let head = Head { length: 0, kind: kind::DATA, flags: flag::END_STREAM, stream };
        self.behind_data(&head.bytes());
    }

    pub(in crate::hbone) fn reset(&mut self, stream: u32, reason: Reason) {
        let mut frame = Vec::with_capacity(HEAD + 4);
        frame::put_reset(&mut frame, stream, reason);
        self.behind_data(&frame);
    }

    fn behind_data(&mut self, frame: &[u8]) {
        if self.tail.is_empty() && self.data.len() + frame.len() <= BLOCK {
            let room = self.data.room(frame.len());
            if let Some(room) = room.get_mut(..frame.len()) {
                room.copy_from_slice(frame);
                self.data.advance(frame.len());
                return;
            }
        }
        self.tail.extend_from_slice(frame);
    }

    pub(in crate::hbone) fn is_flooded(&self) -> bool {
        self.control.len().max(self.tail.len()) > CONTROL
    }

    pub(in crate::hbone) fn is_empty(&self) -> bool {
        self.control.is_empty() && self.data.is_empty() && self.tail.is_empty()
    }

    /// Takes all that waits, and gives the streams that find room again.
    pub(in crate::hbone) fn take(&mut self) -> (Batch, Vec<Waker>) {
        let batch = Batch {
            control: std::mem::take(&mut self.control),
            data: std::mem::take(&mut self.data),
            tail: std::mem::take(&mut self.tail),
        };
        (batch, std::mem::take(&mut self.waiting))
    }
}
