//! PING keep-alive of both roles (RFC 9113 section 6.7).

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep};

/// Sends a PING some time after the establishment of the connection and after each PONG.
pub(super) struct KeepAlive {
    ping: Option<PingPong>,
    interval: Duration,
    timeout: Duration,
    awaiting: bool,
    alarm: Pin<Box<Sleep>>,
}

impl KeepAlive {
    pub(super) fn new(ping: Option<PingPong>, interval: Duration, timeout: Duration) -> Self {
        let alarm = Box::pin(tokio::time::sleep(interval));
        Self { ping, interval, timeout, awaiting: false, alarm }
    }

    /// Ready when the peer has left a PING unanswered. Errors of the connection itself are left to
    /// whoever drives it.
    pub(super) fn poll_unanswered(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(ping) = &mut self.ping else { return Poll::Pending };
        loop {
            if self.awaiting {
                match ping.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.awaiting = false;
                        self.alarm.as_mut().reset(Instant::now() + self.interval);
                    }
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => return self.alarm.as_mut().poll(cx),
                }
            }
            if self.alarm.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            if ping.send_ping(Ping::opaque()).is_err() {
                return Poll::Pending;
            }
            self.awaiting = true;
            self.alarm.as_mut().reset(Instant::now() + self.timeout);
        }
    }
}
