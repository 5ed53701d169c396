//! One tunnelled connection: DATA both ways, half-close and reset.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::client::TakenPlace;
use super::frame::Reason;
use super::mux::{Mux, Received, Sink};

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

impl From<StreamError> for io::Error {
    fn from(error: StreamError) -> Self {
        let kind = match error {
            StreamError::Reset(_) | StreamError::Broken(_) => io::ErrorKind::ConnectionReset,
            StreamError::Finished => io::ErrorKind::BrokenPipe,
        };
        io::Error::new(kind, error)
    }
}

/// What stops bytes on their way between a stream and whoever fills or takes it.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The other side of the stream's user.
    #[error(transparent)]
    User(io::Error),
}

/// A CONNECT stream after its 200, in either role.
///
/// It counts against its connection until it is dropped. Dropping it before both directions have
/// ended resets it with CANCEL.
pub struct HboneStream {
    stream: Handle,
    /// Taken over from the connection and not yet consumed.
    received: VecDeque<BytesMut>,
    /// END_STREAM was seen.
    finished: bool,
    failed: Option<StreamError>,
    _place: Place,
}

/// Keeps a stream on its connection.
pub(super) struct Handle {
    pub(super) mux: Arc<Mux>,
    pub(super) id: u32,
    /// Bytes taken over and not consumed.
    pub(super) held: u32,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.mux.lock().release(self.id, self.held);
    }
}

/// Released when the stream is dropped.
pub(super) type Place = Option<TakenPlace>;

impl HboneStream {
    pub(super) fn new(stream: Handle, place: Place) -> Self {
        let received = VecDeque::new();
        Self { stream, received, finished: false, failed: None, _place: place }
    }

    /// Ready when the peer has said how much it takes.
    pub(super) fn poll_introduced(&self, cx: &Context<'_>) -> Poll<()> {
        self.stream.mux.lock().poll_introduced(cx, self.stream.id)
    }

    /// Sends what `fill` writes to a buffer of at most `wanted` bytes, as soon as the peer and the
    /// socket have room for more; gives how many bytes that were, and 0 when `fill` wrote nothing.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
        fill: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> Poll<Result<usize, TransferError>> {
        let fill = |buffer: &mut [u8]| fill(buffer).map_err(TransferError::User);
        self.stream.mux.lock().poll_send(cx, self.stream.id, wanted, fill)
    }

    /// Ends the sending direction (END_STREAM); the other one goes on.
    pub fn finish(&mut self) -> Result<(), StreamError> {
        self.stream.mux.lock().finish(self.stream.id)
    }

    /// Ends both directions abnormally, after what was sent: an application that answers and then
    /// resets (because it closes without reading all of the request, say) has its answer delivered
    /// by TCP as well.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.mux.lock().reset(self.stream.id, reason);
    }

    /// Hands what arrives to `sink` from now on, without waking whoever holds this stream. What the
    /// sink does not take at once is received here, and before anything that comes later.
    pub fn deliver_to(&mut self, sink: Arc<dyn Sink>) {
        self.stream.mux.lock().deliver_to(self.stream.id, sink);
    }

    /// Takes in all that has arrived, without returning window for it. Pending while the peer may
    /// send more; ready once it has finished or the stream has failed. What is in
    /// [`HboneStream::received`] stays readable in each case.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), TransferError>> {
        if self.finished {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = &self.failed {
            return Poll::Ready(Err(error.clone().into()));
        }
        let mut state = self.stream.mux.lock();
        let Some(stream) = state.stream(self.stream.id) else { return Poll::Ready(Ok(())) };
        self.stream.held += stream.take_queue(&mut self.received);
        let found = stream.poll_receive(cx);
        match found {
            Received::Open => Poll::Pending,
            Received::Finished => {
                self.finished = true;
                Poll::Ready(Ok(()))
            }
            Received::Failed(error) => {
                self.failed = Some(error.clone());
                Poll::Ready(Err(error.into()))
            }
            Received::Undelivered(error) => Poll::Ready(Err(TransferError::User(error))),
        }
    }

    /// Ready when the peer resets the stream or the connection breaks, also while only sending.
    /// NO_ERROR after END_STREAM (RFC 9113 section 8.1) counts: nothing sent will be read.
    pub fn poll_peer_reset(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        match self.stream.mux.lock().stream(self.stream.id) {
            Some(stream) => stream.poll_reset(cx),
            None => Poll::Ready(StreamError::Finished),
        }
    }

    /// Whether the peer has sent END_STREAM and all of its data was taken in.
    pub fn is_receiving_finished(&self) -> bool {
        self.finished
    }

    /// Whether received bytes wait to be consumed.
    pub fn has_received(&self) -> bool {
        !self.received.is_empty()
    }

    /// The received bytes as slices for a vectored write; returns how many slices were filled.
    pub fn received<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for (slot, chunk) in slices.iter_mut().zip(&self.received) {
            *slot = IoSlice::new(chunk);
            filled += 1;
        }
        filled
    }

    /// Drops the first `count` received bytes and lets the peer send as many more.
    pub fn consume(&mut self, count: usize) {
        let mut left = count;
        while left > 0 {
            let Some(chunk) = self.received.front_mut() else { break };
            let taken = left.min(chunk.len());
            chunk.advance(taken);
            left -= taken;
            if chunk.is_empty() {
                self.received.pop_front();
            }
        }
        let consumed = u32::try_from(count - left).unwrap_or(u32::MAX);
        self.stream.held = self.stream.held.saturating_sub(consumed);
        let mut state = self.stream.mux.lock();
        if self.received.is_empty() {
            // An idle stream keeps no room for chunks.
            self.received = VecDeque::new();
            if let Some(stream) = state.stream(self.stream.id) {
                stream.is_drained();
            }
        }
        state.consume(self.stream.id, consumed);
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

impl From<TransferError> for io::Error {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::Stream(error) => error.into(),
            TransferError::User(error) => error,
        }
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
        let copy = |room: &mut [u8]| {
            let count = room.len().min(buf.len());
            let (room, data) = (room.get_mut(..count), buf.get(..count));
            if let (Some(room), Some(data)) = (room, data) {
                room.copy_from_slice(data);
            }
            Ok(count)
        };
        let count = ready!(self.get_mut().poll_send(cx, buf.len(), copy))?;
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
