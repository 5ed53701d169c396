//! Moves the frames of one connection between its shared state and its socket.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::mux::{Batch, ConnectionError, Mux};
use crate::blocks::Block;

/// Reads that one connection may make before others get their turn.
const TURN: usize = 4;

/// The socket's side of a connection. Whoever holds it gives it turns.
pub(super) struct Drive<T> {
    io: T,
    mux: Arc<Mux>,
    /// What is being written.
    batch: Batch,
    flushed: bool,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Drive<T> {
    pub(super) fn new(io: T, mux: Arc<Mux>) -> Self {
        Self { io, mux, batch: Batch::default(), flushed: true }
    }

    /// Takes in what has come. Ready when the connection carries nothing more. Each call is to be
    /// followed by one of [`Drive::poll_write`].
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionError> {
        self.mux.lock().begin_turn(cx);
        for _ in 0..TURN {
            if let Some(error) = &self.mux.lock().failure {
                return Poll::Ready(error.clone());
            }
            let mut block = Block::default();
            let mut buffer = ReadBuf::new(block.room(0));
            let read = ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer));
            let mut state = self.mux.lock();
            let received = match read {
                Ok(()) if buffer.filled().is_empty() => Err(ConnectionError::Closed),
                Ok(()) => state.receive(buffer.filled()),
                Err(error) => Err(error.into()),
            };
            if let Err(error) = received {
                if error.is_fault() {
                    state.say_goodbye(error.reason());
                }
                state.fail(error);
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Writes what waits. Ready when nothing does any more, or when that fails.
    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let written = self.poll_write_all(cx);
        if written.is_pending() {
            self.mux.lock().end_turn();
        }
        written.map(|written| {
            if let Err(error) = written {
                let mut state = self.mux.lock();
                state.fail(error.into());
                state.end_turn();
            }
        })
    }

    fn poll_write_all(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.poll_write_batch(cx))?;
            match self.mux.lock().take() {
                Some(batch) => (self.batch, self.flushed) = (batch, false),
                None if self.flushed => return Poll::Ready(Ok(())),
                None => {
                    ready!(Pin::new(&mut self.io).poll_flush(cx))?;
                    self.flushed = true;
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }

    fn poll_write_batch(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Batch { control, data, tail } = &mut self.batch;
        ready!(poll_write_all(&mut self.io, cx, control))?;
        while !data.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, data.filled()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            data.consume(count);
        }
        poll_write_all(&mut self.io, cx, tail)
    }

    /// Writes what waits and ends the connection in order.
    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.poll_write(cx));
        // Whoever has gone needs no good-bye.
        Pin::new(&mut self.io).poll_shutdown(cx).map(drop)
    }
}

fn poll_write_all<T: AsyncWrite + Unpin>(
    io: &mut T,
    cx: &mut Context<'_>,
    bytes: &mut Vec<u8>,
) -> Poll<io::Result<()>> {
    while !bytes.is_empty() {
        let count = ready!(Pin::new(&mut *io).poll_write(cx, bytes))?;
        if count == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        bytes.drain(..count);
    }
    Poll::Ready(Ok(()))
}
