//! A stream as a byte stream, for a tunnel within a tunnel.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::HboneStream;

/// Reads and writes the payload of a stream. Dropping it before both ends resets the stream.
pub struct HboneIo(HboneStream);

impl HboneIo {
    pub fn new(stream: HboneStream) -> Self {
        Self(stream)
    }
}

impl AsyncRead for HboneIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = self.0.poll_fill(cx);
        if !self.0.has_received() {
            return filled.map_err(io::Error::from);
        }
        let mut slices = [IoSlice::new(&[]); 1];
        let mut taken = 0;
        if self.0.received(&mut slices) > 0 {
            taken = slices[0].len().min(buffer.remaining());
            buffer.put_slice(slices[0].get(..taken).unwrap_or_default());
        }
        self.0.consume(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for HboneIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        let allowed = ready!(self.0.poll_sendable(cx, data.len()))?;
        let chunk = data.get(..allowed.min(data.len())).unwrap_or_default();
        self.0.send(Bytes::copy_from_slice(chunk))?;
        Poll::Ready(Ok(chunk.len()))
    }

    /// The connection's driver sends what is there.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.finish().map_err(io::Error::from))
    }
}

impl Drop for HboneIo {
    fn drop(&mut self) {
        if !self.0.is_receiving_finished() {
            self.0.reset(Reason::CANCEL);
        }
    }
}
