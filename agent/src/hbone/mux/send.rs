//! What streams send, what ends them, and the windows that their readers give back.

use std::task::{Context, Poll};

use super::super::frame::{self, Reason};
use super::super::stream::StreamError;
use super::{ConnectionError, State};

/// Streams of one connection that the peer may break; each costs us its setting up.
const FAULTY: usize = 1000;

impl State {
    /// How many bytes of `wanted` the stream may send now, as far as the peer allows.
    fn allowed(&mut self, cx: &Context<'_>, id: u32, wanted: usize) -> Poll<usize> {
        let limit = self.peer.unacknowledged_limit();
        let (initial, connection) = (self.send_initial, self.send_window);
        let Some(stream) = self.streams.get_mut(id) else { return Poll::Ready(0) };
        let own = match limit {
            // Unacknowledged is what the stream's window lacks.
            Some(limit) => {
                i64::try_from(limit).unwrap_or(i64::MAX) - (initial - stream.send_window)
            }
            None => stream.send_window,
        };
        let room = own.min(stream.send_window).min(connection);
        match usize::try_from(room) {
            Ok(room) if room > 0 => {
                stream.set_waiting(false);
                Poll::Ready(wanted.min(room).min(self.send_frame as usize))
            }
            _ => {
                stream.set_waiting(true);
                stream.writer = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Ready when the peer's SETTINGS are known. Before that a stream may use the default window (RFC
    /// 9113 section 6.9.2), but there are peers that hold it against us when theirs is smaller.
    pub(in crate::hbone) fn poll_introduced(&mut self, cx: &Context<'_>, id: u32) -> Poll<()> {
        match self.streams.get_mut(id) {
            Some(stream) if !self.is_introduced => {
                stream.writer = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(()),
        }
    }

    /// Sends what `fill` writes to a buffer of at most `wanted` bytes; 0 when it writes nothing.
    pub(in crate::hbone) fn poll_send<E: From<StreamError>>(
        &mut self,
        cx: &Context<'_>,
        id: u32,
        wanted: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Poll<Result<usize, E>> {
        if let Some(error) = self.streams.sending_error(id) {
            return Poll::Ready(Err(error.into()));
        }
        let Poll::Ready(allowed) = self.allowed(cx, id, wanted.max(1)) else {
            return Poll::Pending;
        };
        let room = self.out.room(allowed);
        if room == 0 {
            self.out.wait(cx.waker());
            self.wake_driver();
            return Poll::Pending;
        }
        let count = match self.out.data(id, room, fill) {
            Ok(count) if count > 0 => count,
            nothing => return Poll::Ready(nothing),
        };
        let bytes = i64::try_from(count).unwrap_or(i64::MAX);
        self.send_window -= bytes;
        if let Some(stream) = self.streams.get_mut(id) {
            stream.send_window -= bytes;
        }
        self.peer.note_sent(count as u64);
        self.wake_driver();
        Poll::Ready(Ok(count))
    }

    /// Ends the sending direction.
    pub(in crate::hbone) fn finish(&mut self, id: u32) -> Result<(), StreamError> {
        match self.streams.sending_error(id) {
            Some(StreamError::Finished) => return Ok(()),
            Some(error) => return Err(error),
            None => {}
        }
        self.out.end(id);
        self.streams.finish_sending(id);
        self.wake_driver();
        Ok(())
    }

    /// Ends both directions abnormally, after what was sent.
    pub(in crate::hbone) fn reset(&mut self, id: u32, reason: Reason) {
        let Some(stream) = self.streams.get_mut(id) else { return };
        if !stream.is_open() {
            return;
        }
        let dropped = stream.cancel(StreamError::Reset(reason));
        self.streams.note_closed(id);
        if self.failure.is_none() {
            self.out.reset(id, reason);
            self.return_connection(dropped);
            self.wake_driver();
        }
    }

    /// Resets a stream for what the peer did on it.
    pub(super) fn punish(&mut self, id: u32, reason: Reason) -> Result<(), ConnectionError> {
        self.reset(id, reason);
        self.note_fault()
    }

    pub(super) fn note_fault(&mut self) -> Result<(), ConnectionError> {
        self.faulty += 1;
        if self.faulty > FAULTY {
            let why = "too many faulty streams";
            return Err(ConnectionError::Fault(Reason::ENHANCE_YOUR_CALM, why));
        }
        Ok(())
    }

    /// The stream's handle is gone, with `held` bytes that it had not handed on: whatever has not
    /// ended is reset.
    pub(in crate::hbone) fn release(&mut self, id: u32, held: u32) {
        self.reset(id, Reason::CANCEL);
        let queued = self.streams.forget(id);
        if self.failure.is_none() {
            self.return_connection(held + queued);
            self.wake_driver();
        }
    }

    /// `count` received bytes were consumed.
    pub(in crate::hbone) fn consume(&mut self, id: u32, count: u32) {
        self.return_connection(count);
        let enough = self.peer.returned_together();
        if let Some(stream) = self.streams.get_mut(id) {
            let increment = stream.returned(count, enough);
            if increment > 0 {
                frame::put_window_update(&mut self.out.control, id, increment);
                self.wake_driver();
            }
        }
        if !self.out.control.is_empty() {
            self.wake_driver();
        }
    }

    pub(super) fn return_connection(&mut self, count: u32) {
        self.unreturned += count;
        if self.unreturned >= self.local.connection_window / 4 {
            let increment = std::mem::take(&mut self.unreturned);
            self.receive_window += i64::from(increment);
            frame::put_window_update(&mut self.out.control, 0, increment);
        }
    }
}
