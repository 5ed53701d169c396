//! One tunnelled connection: DATA both ways, half-close and reset.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::windows::{PeerWindows, StreamWindow};

/// Chunks below this are gathered while others wait before them, so that a stalled reader's many
/// small messages do not each keep a whole read buffer alive (nor use up what `h2` allows a
/// connection in small frames).
const COMPACTED: usize = 4 << 10;

/// Why a stream ended without END_STREAM.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer sent RST_STREAM.
    #[error("the peer reset the stream: {0}")]
    Reset(Reason),
    /// The connection that carried the stream is gone.
    #[error("the tunnel connection broke: {0}")]
    Broken(String),
    /// Sending after the end.
    #[error("the stream is already finished")]
    Finished,
}

impl StreamError {
    pub(super) fn from_h2(error: &h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => StreamError::Reset(reason),
            _ => StreamError::Broken(error.to_string()),
        }
    }
}

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Reset(_) | StreamError::Broken(_) => io::ErrorKind::ConnectionReset,
            StreamError::Finished => io::ErrorKind::BrokenPipe,
        };
        io::Error::new(kind, error)
    }
}

/// A CONNECT stream after its 200, in either role.
///
/// It counts against its connection until it is dropped. Dropping it before both directions have
/// ended resets it with CANCEL.
pub struct HboneStream {
    send: SendStream<Bytes>,
    recv: RecvStream,
    windows: Windows,
    sending: Sending,
    receiving: Receiving,
    received: VecDeque<Bytes>,
    /// The newest small chunks, not yet in `received`.
    compacted: BytesMut,
    /// Consumed bytes whose window is not yet returned.
    unreturned: usize,
}

/// Keeps the stream's place on its connection.
struct Windows {
    id: u32,
    peer: Arc<PeerWindows>,
    stream: Arc<StreamWindow>,
    sent: u64,
    waiting: bool,
    _place: Place,
}

/// Released when the stream is dropped.
pub(super) type Place = Option<Box<dyn Send + Sync>>;

#[derive(Debug, PartialEq, Eq)]
enum Sending {
    Open,
    Finished,
}

#[derive(Debug)]
enum Receiving {
    Open,
    /// END_STREAM came, with nothing or NO_ERROR after it.
    Finished,
    Failed(StreamError),
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.peer.close(self.id);
    }
}

impl HboneStream {
    pub(super) fn new(
        send: SendStream<Bytes>,
        recv: RecvStream,
        peer: Arc<PeerWindows>,
        place: Place,
    ) -> Self {
        let id = send.stream_id().as_u32();
        let stream = peer.open(id);
        let windows = Windows { id, peer, stream, sent: 0, waiting: false, _place: place };
        Self {
            send,
            recv,
            windows,
            sending: Sending::Open,
            receiving: Receiving::Open,
            received: VecDeque::new(),
            compacted: BytesMut::new(),
            unreturned: 0,
        }
    }

    /// How many bytes, at most `wanted`, may be sent now. They are set aside for this stream until
    /// they are sent or [`HboneStream::forgo_sending`] is called.
    pub fn poll_sendable(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, StreamError>> {
        if self.sending == Sending::Finished {
            return Poll::Ready(Err(StreamError::Finished));
        }
        let allowed = match self.windows.poll_allowed(cx, wanted.max(1)) {
            Poll::Ready(allowed) => allowed,
            Poll::Pending => {
                let reset = ready!(self.poll_peer_reset(cx));
                return Poll::Ready(Err(reset));
            }
        };
        self.send.reserve_capacity(allowed);
        loop {
            let capacity = self.send.capacity();
            if capacity > 0 {
                self.windows.set_waiting(false);
                return Poll::Ready(Ok(capacity.min(allowed)));
            }
            match self.send.poll_capacity(cx) {
                Poll::Ready(Some(Ok(_))) => {}
                Poll::Ready(Some(Err(error))) => {
                    return Poll::Ready(Err(StreamError::from_h2(&error)));
                }
                Poll::Ready(None) => {
                    let reset = ready!(self.poll_peer_reset(cx));
                    return Poll::Ready(Err(reset));
                }
                Poll::Pending => {
                    self.windows.set_waiting(true);
                    return Poll::Pending;
                }
            }
        }
    }

    /// Gives back what [`HboneStream::poll_sendable`] has set aside, if others could lack it.
    pub fn forgo_sending(&mut self) {
        if self.windows.peer.is_scarce() {
            self.send.reserve_capacity(0);
        }
    }

    /// Sends at most as many bytes as [`HboneStream::poll_sendable`] allowed. More would be kept
    /// in memory until the peer allows them.
    pub fn send(&mut self, data: Bytes) -> Result<(), StreamError> {
        let bytes = data.len() as u64;
        self.send.send_data(data, false).map_err(|error| self.send_failure(&error))?;
        self.windows.note_sent(bytes);
        Ok(())
    }

    /// Ends the sending direction (END_STREAM); the other one goes on.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        if self.sending == Sending::Finished {
            return Ok(());
        }
        self.send.send_data(Bytes::new(), true).map_err(|error| self.send_failure(&error))?;
        self.sending = Sending::Finished;
        Ok(())
    }

    /// Ends both directions abnormally. Data that has not left yet is dropped.
    pub fn reset(&mut self, reason: Reason) {
        self.sending = Sending::Finished;
        self.send.send_reset(reason);
    }

    /// Ends both directions abnormally, after what was sent, as far as the peer takes it at once.
    pub fn reset_after_sent(self, reason: Reason) {
        let peer = self.windows.peer.clone();
        peer.resets.add(self.send, reason);
        peer.driver.wake();
    }

    /// Takes in all that has arrived, without returning window for it. Pending while the peer may
    /// send more; ready once it has finished or the stream has failed. What is in
    /// [`HboneStream::received`] stays readable in each case.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        loop {
            match &self.receiving {
                Receiving::Failed(error) => return Poll::Ready(Err(error.clone())),
                Receiving::Finished => return Poll::Ready(Ok(())),
                Receiving::Open => {}
            }
            match ready!(self.recv.poll_data(cx)) {
                Some(Ok(chunk)) => self.take_in(chunk),
                Some(Err(error)) => {
                    self.receiving = Receiving::Failed(StreamError::from_h2(&error))
                }
                None => self.receiving = Receiving::Finished,
            }
        }
    }

    /// Ready when the peer resets the stream or the connection breaks, also while only sending.
    /// NO_ERROR after END_STREAM (RFC 9113 section 8.1) counts: nothing sent will be read.
    pub fn poll_peer_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => Poll::Ready(StreamError::Reset(reason)),
            Err(error) => Poll::Ready(StreamError::from_h2(&error)),
        }
    }

    /// Whether the peer has sent END_STREAM and all of its data was taken in.
    pub fn is_receiving_finished(&self) -> bool {
        matches!(self.receiving, Receiving::Finished)
    }

    /// Whether received bytes wait to be consumed.
    pub fn has_received(&self) -> bool {
        !self.received.is_empty() || !self.compacted.is_empty()
    }

    /// The received bytes as slices for a vectored write; returns how many slices were filled.
    pub fn received<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let tail = Some(self.compacted.as_ref()).filter(|tail| !tail.is_empty());
        let chunks = self.received.iter().map(Bytes::as_ref).chain(tail);
        let mut filled = 0;
        for (slot, chunk) in slices.iter_mut().zip(chunks) {
            *slot = IoSlice::new(chunk);
            filled += 1;
        }
        filled
    }

    /// Drops the first `count` received bytes and lets the peer send as many more.
    pub fn consume(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            match self.received.front_mut() {
                Some(chunk) if chunk.len() > left => {
                    let _ = chunk.split_to(left);
                    left = 0;
                }
                Some(chunk) => {
                    left -= chunk.len();
                    self.received.pop_front();
                }
                None => {
                    let _ = self.compacted.split_to(left.min(self.compacted.len()));
                    left = 0;
                }
            }
        }
        if !self.has_received() {
            self.compacted = BytesMut::new();
            self.received.shrink_to(4);
        }
        self.unreturned += count;
        if self.unreturned >= self.windows.peer.returned_together() {
            // Refused only for a stream that has already ended, whose window is returned anyway.
            let _ = self.recv.flow_control().release_capacity(self.unreturned);
            self.unreturned = 0;
        }
    }

    fn take_in(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        if chunk.len() < COMPACTED && self.has_received() {
            if self.compacted.capacity() - self.compacted.len() < chunk.len() {
                self.push_compacted();
                self.compacted = BytesMut::with_capacity(COMPACTED * 4);
            }
            self.compacted.put_slice(&chunk);
        } else {
            self.push_compacted();
            self.received.push_back(chunk);
        }
    }

    fn push_compacted(&mut self) {
        if !self.compacted.is_empty() {
            let compacted = std::mem::take(&mut self.compacted);
            self.received.push_back(compacted.freeze());
        }
    }

    /// `h2` answers a send after the peer's reset with a usage error; the reset is the reason.
    fn send_failure(&mut self, error: &h2::Error) -> StreamError {
        let mut cx = Context::from_waker(std::task::Waker::noop());
        match self.poll_peer_reset(&mut cx) {
            Poll::Ready(reset) => reset,
            Poll::Pending => StreamError::from_h2(error),
        }
    }
}

impl Windows {
    fn poll_allowed(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<usize> {
        let Some(limit) = self.peer.unacknowledged_limit() else { return Poll::Ready(wanted) };
        let mut room = self.room(limit);
        if room == 0 {
            self.stream.waker.register(cx.waker());
            room = self.room(limit);
        }
        if room == 0 {
            self.set_waiting(true);
            return Poll::Pending;
        }
        Poll::Ready(wanted.min(usize::try_from(room).unwrap_or(wanted)))
    }

    fn room(&self, limit: u64) -> u64 {
        limit.saturating_sub(self.sent.saturating_sub(self.stream.acknowledged()))
    }

    fn note_sent(&mut self, bytes: u64) {
        self.sent += bytes;
        self.peer.note_sent(bytes);
    }

    fn set_waiting(&mut self, waiting: bool) {
        if self.waiting != waiting {
            self.waiting = waiting;
            self.stream.set_waiting(waiting);
        }
    }
}

impl AsyncRead for HboneStream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let end = this.poll_fill(cx);
        let mut slices = [IoSlice::new(&[])];
        if this.received(&mut slices) == 0 {
            return end.map_err(io::Error::from);
        }
        let [chunk] = slices;
        let count = chunk.len().min(buf.remaining());
        buf.put_slice(chunk.get(..count).unwrap_or_default());
        this.consume(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let this = self.get_mut();
        let count = ready!(this.poll_sendable(cx, buf.len()))?;
        let data = Bytes::copy_from_slice(buf.get(..count).unwrap_or(buf));
        let count = data.len();
        this.send(data)?;
        Poll::Ready(Ok(count))
    }

    /// What is sent leaves with the next turn of the connection's task.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.get_mut().finish().map_err(io::Error::from))
    }
}
