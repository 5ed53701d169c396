//! The byte stream between `h2` and TLS: small writes are gathered, frame headers read in passing.
//!
//! `h2` flushes after every DATA frame. With many streams on a connection that would be one TLS
//! record and one system call for each small message. [`Wire`] keeps small writes until the
//! connection's task has nothing more to say and calls [`Flusher::poll_flush`].

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::windows::PeerWindows;
use scan::Scanner;

mod scan;

/// Writes below this are copied into the gathering buffer.
const SMALL: usize = 8 << 10;

/// The gathering buffer's size: four full TLS records.
const GATHER: usize = 64 << 10;

/// What `h2` reads from and writes to.
pub(super) struct Wire<T> {
    shared: Arc<Mutex<Gathered<T>>>,
    scanner: Scanner,
    peer: Arc<PeerWindows>,
}

/// Writes out what was gathered; used by the task that drives the connection. Both ends are used
/// by that one task only, so the lock between them is never contended.
pub(super) struct Flusher<T>(Arc<Mutex<Gathered<T>>>);

struct Gathered<T> {
    io: T,
    pending: Vec<u8>,
    /// How much of `pending` is already written.
    written: usize,
    dirty: bool,
}

/// Wraps the TLS stream of a connection; `preface` is the number of bytes before the first frame.
pub(super) fn wire<T>(io: T, preface: u64, peer: Arc<PeerWindows>) -> (Wire<T>, Flusher<T>) {
    let gathered = Gathered { io, pending: Vec::new(), written: 0, dirty: false };
    let shared = Arc::new(Mutex::new(gathered));
    let wire = Wire { shared: shared.clone(), scanner: Scanner::new(preface), peer };
    (wire, Flusher(shared))
}

impl<T: AsyncWrite + Unpin> Flusher<T> {
    /// To be called after each poll of the connection.
    pub(super) fn poll_flush(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.0.lock().poll_flush(cx)
    }
}

impl<T: AsyncWrite + Unpin> Gathered<T> {
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.dirty {
            return Poll::Ready(Ok(()));
        }
        while self.written < self.pending.len() {
            let rest = self.pending.get(self.written..).unwrap_or_default();
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, rest))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
        }
        self.forget_pending();
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        self.dirty = false;
        Poll::Ready(Ok(()))
    }

    fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let size: usize = bufs.iter().map(|buf| buf.len()).sum();
        if size == 0 {
            return Poll::Ready(Ok(0));
        }
        self.dirty = true;
        loop {
            if size < SMALL && self.pending.len() + size <= GATHER {
                bufs.iter().for_each(|buf| self.pending.extend_from_slice(buf));
                return Poll::Ready(Ok(size));
            }
            let waiting = self.pending.get(self.written..).unwrap_or_default();
            let before = waiting.len();
            let slices = match bufs {
                [one] => [IoSlice::new(waiting), IoSlice::new(one), IoSlice::new(&[])],
                [one, two, ..] => [IoSlice::new(waiting), IoSlice::new(one), IoSlice::new(two)],
                [] => return Poll::Ready(Ok(0)),
            };
            let slices = if before == 0 { slices.get(1..).unwrap_or_default() } else { &slices };
            let n = ready!(Pin::new(&mut self.io).poll_write_vectored(cx, slices))?;
            if n == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if n < before {
                self.written += n;
                continue;
            }
            self.forget_pending();
            if n > before {
                return Poll::Ready(Ok(n - before));
            }
        }
    }

    /// An idle connection keeps no buffer.
    fn forget_pending(&mut self) {
        self.written = 0;
        if self.pending.capacity() > SMALL {
            self.pending = Vec::new();
        } else {
            self.pending.clear();
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Wire<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        ready!(Pin::new(&mut this.shared.lock().io).poll_read(cx, buf))?;
        this.scanner.scan(buf.filled().get(before..).unwrap_or_default(), &this.peer);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Wire<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.shared.lock().poll_write(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let filled = bufs.iter().filter(|buf| !buf.is_empty()).count();
        let mut gathered = self.shared.lock();
        match bufs {
            [_, _, _, ..] if filled > 2 => gathered.poll_write(cx, bufs.get(..2).unwrap_or(bufs)),
            _ => gathered.poll_write(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Flushing is left to [`Flusher`].
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut gathered = self.shared.lock();
        ready!(gathered.poll_flush(cx))?;
        Pin::new(&mut gathered.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
