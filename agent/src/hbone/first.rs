//! What is sent on a stream before its CONNECT is answered.
//!
//! An application that speaks first does so when it is connected, and that is when the agent has
//! accepted, long before the destination has. DATA may follow a request at once (RFC 9113 section
//! 8.1), so its first bytes need not wait for a round trip. They go to a peer whose identity was
//! verified, and which throws them away with a request that it refuses.

use std::io;
use std::task::{Context, Poll};

use super::stream::{HboneStream, TransferError};

/// The most that is sent so: it is kept until the answer, for the case that the request has to be
/// repeated on another connection.
const MOST: usize = 16 << 10;

/// Where the bytes come from.
pub trait Source: Send + Sync {
    /// Ready when there may be something to read.
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Reads what is there, also without having been ready.
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// The first bytes of a connection.
pub struct First<'a> {
    source: Option<&'a dyn Source>,
    /// Those that were read.
    bytes: Vec<u8>,
}

impl<'a> First<'a> {
    pub fn of(source: &'a dyn Source) -> Self {
        Self { source: Some(source), bytes: Vec::new() }
    }

    /// Nothing is sent before the answer.
    pub fn none() -> Self {
        Self { source: None, bytes: Vec::new() }
    }

    /// How many bytes were sent before the answer.
    pub fn count(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Begins with a stream on which nothing was sent yet.
    pub(super) fn on_stream(&mut self) -> Sending<'_, 'a> {
        Sending { first: self, sent: 0, has_asked: false }
    }
}

/// On their way through one stream.
pub(super) struct Sending<'f, 'a> {
    first: &'f mut First<'a>,
    sent: usize,
    has_asked: bool,
}

impl Sending<'_, '_> {
    /// Sends what can be sent now. An error is the source's; the stream's show in the answer.
    pub fn poll(&mut self, cx: &mut Context<'_>, stream: &mut HboneStream) -> io::Result<()> {
        if stream.poll_introduced(cx).is_pending() || self.poll_again(cx, stream).is_pending() {
            return Ok(());
        }
        while let (Some(source), true) = (self.first.source, self.first.bytes.is_empty()) {
            let ready = source.poll_ready(cx)?;
            // What was sent at once is there before the runtime has heard of it.
            if ready.is_pending() && self.has_asked {
                break;
            }
            self.has_asked = true;
            match self.send_from(source, cx, stream) {
                Poll::Ready(Ok(0)) => self.first.source = None,
                Poll::Ready(Err(error)) if error.kind() != io::ErrorKind::WouldBlock => {
                    return Err(error);
                }
                Poll::Ready(Err(_)) if ready.is_ready() => {}
                Poll::Ready(_) | Poll::Pending => break,
            }
        }
        Ok(())
    }

    /// Reads as much as the stream takes; gives 0 at the end of either.
    fn send_from(
        &mut self,
        source: &dyn Source,
        cx: &mut Context<'_>,
        stream: &mut HboneStream,
    ) -> Poll<io::Result<usize>> {
        let bytes = &mut self.first.bytes;
        let sent = stream.poll_send(cx, MOST, |buffer| {
            let count = source.read(buffer)?;
            bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
            Ok(count)
        });
        self.sent = self.first.bytes.len();
        sent.map(|sent| match sent {
            Ok(count) => Ok(count),
            Err(TransferError::User(error)) => Err(error),
            Err(TransferError::Stream(_)) => Ok(0),
        })
    }

    /// Sends what was read for another stream. Ready when that is sent, or never will be.
    pub fn poll_again(&mut self, cx: &mut Context<'_>, stream: &mut HboneStream) -> Poll<()> {
        while let Some(rest) = self.first.bytes.get(self.sent..).filter(|rest| !rest.is_empty()) {
            let sent = stream.poll_send(cx, rest.len(), |buffer| {
                let count = rest.len().min(buffer.len());
                if let (Some(to), Some(from)) = (buffer.get_mut(..count), rest.get(..count)) {
                    to.copy_from_slice(from);
                }
                Ok(count)
            });
            match sent {
                Poll::Ready(Ok(count)) if count > 0 => self.sent += count,
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests;
