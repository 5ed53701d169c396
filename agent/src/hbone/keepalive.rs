//! PING keep-alive of both roles (RFC 9113 section 6.7).

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

use super::mux::Mux;

/// Sends a PING some time after the establishment of the connection and after each PONG.
pub(super) struct KeepAlive {
    interval: Duration,
    timeout: Duration,
    awaiting: bool,
    alarm: Pin<Box<Sleep>>,
}

impl KeepAlive {
    pub(super) fn new(interval: Duration, timeout: Duration) -> Self {
        let alarm = Box::pin(tokio::time::sleep(interval));
        Self { interval, timeout, awaiting: false, alarm }
    }

    /// Ready when the peer has left a PING unanswered. To be called before the connection's frames
    /// are written.
    pub(super) fn poll_unanswered(&mut self, cx: &mut Context<'_>, mux: &Mux) -> Poll<()> {
        if self.awaiting {
            if mux.lock().is_ping_awaited() {
                return self.alarm.as_mut().poll(cx);
            }
            self.awaiting = false;
            self.alarm.as_mut().reset(Instant::now() + self.interval);
        }
        if self.alarm.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        mux.lock().ping();
        self.awaiting = true;
        self.alarm.as_mut().reset(Instant::now() + self.timeout);
        self.alarm.as_mut().poll(cx)
    }
}
