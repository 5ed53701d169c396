//! The byte stream within a TLS 1.3 connection after its handshake.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::ExtractedSecrets;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::TlsError;
use super::handshake::{Finished, KeySchedule};
use super::record::{CONTENT, HEADER, RecordError, RecordKey, Sealed, TRAILER, content};
use crate::blocks::Block;

/// Records after which our key is replaced: AES-GCM is good for 2^24.5 (RFC 8446 section 5.5).
const RECORDS_PER_KEY: u64 = 1 << 23;

/// Bytes of an unfinished handshake message that are kept. Tickets are the longest that may come.
const LONGEST_MESSAGE: usize = 64 << 10;

/// Records in a row that carry nothing for the reader: a peer that only changes its keys, or sends
/// nothing at all, gives us work for ever.
const IDLE_IN_A_ROW: usize = 256;

/// HandshakeType of RFC 8446 section 4.
const NEW_SESSION_TICKET: u8 = 4;
const KEY_UPDATE: u8 = 24;

/// AlertLevel and AlertDescription of RFC 8446 section 6.
const WARNING: u8 = 1;
const FATAL: u8 = 2;
const CLOSE_NOTIFY: u8 = 0;

/// Encrypted bytes that wait before they are written without being asked to.
const ENOUGH: usize = 3 * (CONTENT + HEADER + TRAILER);

/// What the peer did wrong after the handshake.
#[derive(Debug, thiserror::Error)]
pub enum StreamFault {
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("tls alert {0} from the peer")]
    Alert(u8),
    #[error("unexpected tls handshake message of type {0}")]
    Message(u8),
    #[error("tls handshake message interrupted")]
    Interrupted,
    #[error("too many tls records without content")]
    Empty,
    #[error("tls keys could not be updated: {0}")]
    Keys(rustls::Error),
}

impl StreamFault {
    /// The alert that tells the peer (RFC 8446 section 6.2).
    fn alert(&self) -> u8 {
        const UNEXPECTED_MESSAGE: u8 = 10;
        const BAD_RECORD_MAC: u8 = 20;
        const RECORD_OVERFLOW: u8 = 22;
        const INTERNAL_ERROR: u8 = 80;
        match self {
            Self::Record(RecordError::Decrypt) => BAD_RECORD_MAC,
            Self::Record(RecordError::Length(_)) => RECORD_OVERFLOW,
            Self::Record(RecordError::Suite | RecordError::Encrypt) | Self::Keys(_) => {
                INTERNAL_ERROR
            }
            Self::Record(RecordError::Type(_) | RecordError::NoContent)
            | Self::Message(_)
            | Self::Interrupted
            | Self::Empty
            // Not answered.
            | Self::Alert(_) => UNEXPECTED_MESSAGE,
        }
    }
}

impl From<StreamFault> for io::Error {
    fn from(fault: StreamFault) -> Self {
        io::Error::new(io::ErrorKind::InvalidData, fault)
    }
}

/// One end of an established connection, in either role.
pub struct TlsStream<S = TcpStream> {
    io: S,
    keys: Box<dyn KeySchedule>,
    chain: Vec<CertificateDer<'static>>,
    /// The peer is the server, which may send tickets.
    tickets: bool,
    receiving: Receiving,
    sending: Sending,
}

/// Without keys.
impl<S> std::fmt::Debug for TlsStream<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsStream").finish_non_exhaustive()
    }
}

struct Receiving {
    key: RecordKey,
    /// Encrypted bytes.
    incoming: Block,
    /// A part of a record, while nothing else comes.
    partial: Vec<u8>,
    /// Decrypted bytes that the reader had no room for.
    plain: Block,
    /// The begin of a handshake message.
    message: Vec<u8>,
    /// Records in a row that were not for the reader.
    idle: usize,
    end: Option<End>,
}

/// Nothing more is received.
enum End {
    /// By close_notify.
    Announced,
    Abrupt,
    /// The fault is told once.
    Failed(Option<StreamFault>),
}

impl End {
    fn tell(&mut self) -> io::Result<()> {
        match self {
            Self::Announced => Ok(()),
            Self::Abrupt => Err(io::ErrorKind::UnexpectedEof.into()),
            Self::Failed(fault) => match fault.take() {
                Some(fault) => Err(fault.into()),
                None => Err(io::ErrorKind::InvalidData.into()),
            },
        }
    }
}

struct Sending {
    key: RecordKey,
    outgoing: Block,
    /// The peer is to learn that our key changes.
    update: bool,
    closed: bool,
    records_per_key: u64,
}

impl Sending {
    /// Whether a record with this much content fits, beside one that tells of a new key, and one
    /// that ends the connection.
    fn has_room(&self, content: usize) -> bool {
        self.outgoing.free() >= content + 4 * (HEADER + TRAILER)
    }
}

impl<S> TlsStream<S> {
    /// With the keys of a handshake that was made over `io`.
    pub(super) fn after(finished: Finished, io: S) -> Result<Self, TlsError> {
        Self::new(finished, io).map_err(|error| TlsError::Keys(error.to_string()))
    }

    fn new(finished: Finished, io: S) -> Result<Self, RecordError> {
        let Finished { secrets, keys, chain, rest, tickets } = finished;
        let ExtractedSecrets { tx, rx } = secrets;
        let mut incoming = Block::default();
        let room = incoming.room(rest.len());
        room.get_mut(..rest.len()).ok_or(RecordError::Length(rest.len()))?.copy_from_slice(&rest);
        incoming.advance(rest.len());
        incoming.consume(0);
        let receiving = Receiving {
            key: RecordKey::new(rx.0, &rx.1)?,
            incoming,
            partial: Vec::new(),
            plain: Block::default(),
            message: Vec::new(),
            idle: 0,
            end: None,
        };
        let sending = Sending {
            key: RecordKey::new(tx.0, &tx.1)?,
            outgoing: Block::default(),
            update: false,
            closed: false,
            records_per_key: RECORDS_PER_KEY,
        };
        Ok(Self { io, keys, chain, tickets, receiving, sending })
    }

    /// The peer's certificates, leaf first.
    pub fn peer_certificates(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }
}

/// What a record was.
enum Opened {
    /// This many bytes for the reader.
    Data(usize),
    Other,
    /// No whole record there.
    Nothing,
    /// The reader's room is too small.
    NoRoom,
}

impl<S> TlsStream<S> {
    /// Decrypts the next record to `out`, or acts on it when it is none for the reader.
    fn open_one(&mut self, out: &mut [u8]) -> Result<Opened, StreamFault> {
        let Receiving { key, incoming, .. } = &mut self.receiving;
        let Some(sealed) = Sealed::first(incoming.filled())? else { return Ok(Opened::Nothing) };
        if sealed.room() > out.len() {
            return Ok(Opened::NoRoom);
        }
        let length = sealed.len();
        let (kind, count) = key.open(&sealed, out)?;
        incoming.consume(length);
        if kind == content::DATA && count > 0 {
            self.receiving.idle = 0;
        } else {
            self.receiving.idle += 1;
        }
        if self.receiving.idle > IDLE_IN_A_ROW {
            return Err(StreamFault::Empty);
        }
        let plain = out.get(..count).unwrap_or_default();
        match kind {
            // Nothing comes between the parts of a handshake message (RFC 8446 section 5.1).
            content::DATA | content::ALERT if !self.receiving.message.is_empty() => {
                return Err(StreamFault::Interrupted);
            }
            content::DATA if count > 0 => return Ok(Opened::Data(count)),
            content::DATA => {}
            content::ALERT => self.take_alert(plain)?,
            content::HANDSHAKE if count > 0 => self.take_messages(plain)?,
            other => return Err(RecordError::Type(other).into()),
        }
        Ok(Opened::Other)
    }

    fn take_alert(&mut self, alert: &[u8]) -> Result<(), StreamFault> {
        const USER_CANCELED: u8 = 90;
        match alert {
            [_, CLOSE_NOTIFY] => self.receiving.end = Some(End::Announced),
            [_, USER_CANCELED] => {}
            [_, description] => return Err(StreamFault::Alert(*description)),
            _ => return Err(RecordError::Length(alert.len()).into()),
        }
        Ok(())
    }

    /// Tickets are of no use here, since each connection proves both identities anew.
    fn take_messages(&mut self, bytes: &[u8]) -> Result<(), StreamFault> {
        let mut message = std::mem::take(&mut self.receiving.message);
        message.extend_from_slice(bytes);
        let mut rest = message.as_slice();
        while let Some(([kind, high, middle, low], body)) = rest.split_first_chunk::<4>() {
            let length = u32::from_be_bytes([0, *high, *middle, *low]) as usize;
            if length > LONGEST_MESSAGE {
                return Err(RecordError::Length(length).into());
            }
            let Some((body, after)) = body.split_at_checked(length) else { break };
            match (*kind, body) {
                // Only servers have any (RFC 8446 section 4.6.1).
                (NEW_SESSION_TICKET, _) if self.tickets => {}
                // Its key changes with the record that follows.
                (KEY_UPDATE, [wanted @ (0 | 1)]) if after.is_empty() => {
                    let secrets = self.keys.next_receiving().map_err(StreamFault::Keys)?;
                    self.receiving.key = RecordKey::new(0, &secrets)?;
                    self.sending.update |= *wanted == 1;
                }
                (kind, _) => return Err(StreamFault::Message(kind)),
            }
            rest = after;
        }
        self.receiving.message = rest.to_vec();
        Ok(())
    }

    /// Tells the peer that our key changes, and changes it (RFC 8446 section 4.6.3).
    fn update_key(&mut self) -> Result<(), StreamFault> {
        let Sending { key, outgoing, update, .. } = &mut self.sending;
        let message = [KEY_UPDATE, 0, 0, 1, 0];
        let room = outgoing.room(message.len() + HEADER + TRAILER);
        let count = key.seal(content::HANDSHAKE, &message, room)?;
        outgoing.advance(count);
        let secrets = self.keys.next_sending().map_err(StreamFault::Keys)?;
        *key = RecordKey::new(0, &secrets)?;
        *update = false;
        Ok(())
    }

    /// Encrypts as much of `data` as there is room for.
    fn seal_some(&mut self, data: &[u8]) -> Result<usize, StreamFault> {
        let mut taken = 0;
        for content in data.chunks(CONTENT) {
            if !self.sending.has_room(content.len()) {
                break;
            }
            if self.sending.update || self.sending.key.records() >= self.sending.records_per_key {
                self.update_key()?;
            }
            let Sending { key, outgoing, .. } = &mut self.sending;
            let room = outgoing.room(content.len() + HEADER + TRAILER);
            let count = key.seal(content::DATA, content, room)?;
            outgoing.advance(count);
            taken += content.len();
        }
        Ok(taken)
    }
}

impl<S: AsyncRead + Unpin> TlsStream<S> {
    /// Reads once from below; gives how many bytes came.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Receiving { incoming, partial, .. } = &mut self.receiving;
        let room = incoming.room(CONTENT + HEADER + TRAILER + 256);
        // What is read now follows what was kept.
        let kept = partial.len();
        let Some((front, room)) = room.split_at_mut_checked(kept) else {
            return Poll::Ready(Err(io::ErrorKind::OutOfMemory.into()));
        };
        let mut buffer = ReadBuf::new(room);
        match Pin::new(&mut self.io).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) => {
                let count = buffer.filled().len();
                front.copy_from_slice(partial);
                *partial = Vec::new();
                incoming.advance(kept + count);
                Poll::Ready(Ok(count))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                // Whoever sends half a record does not make us keep a block.
                partial.extend_from_slice(incoming.filled());
                incoming.consume(incoming.len());
                Poll::Pending
            }
        }
    }

    /// Decrypts into a block of ours for a reader with little room.
    fn open_aside(&mut self) -> Result<Opened, StreamFault> {
        let mut plain = std::mem::take(&mut self.receiving.plain);
        let opened = self.open_one(plain.room(CONTENT + 256));
        if let Ok(Opened::Data(count)) = opened {
            plain.advance(count);
        }
        self.receiving.plain = plain;
        opened.map(|_| Opened::Other)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        loop {
            let plain = &mut this.receiving.plain;
            if !plain.is_empty() {
                let count = plain.len().min(buf.remaining());
                buf.put_slice(plain.filled().get(..count).unwrap_or_default());
                plain.consume(count);
            }
            let has_some = buf.filled().len() > before;
            if buf.remaining() == 0 || (has_some && !this.receiving.plain.is_empty()) {
                return Poll::Ready(Ok(()));
            }
            match &mut this.receiving.end {
                Some(_) if has_some => return Poll::Ready(Ok(())),
                Some(end) => return Poll::Ready(end.tell()),
                None => {}
            }
            let opened = match this.open_one(buf.initialize_unfilled()) {
                Ok(Opened::NoRoom) if !has_some => this.open_aside(),
                opened => opened,
            };
            match opened {
                Ok(Opened::Data(count)) => buf.advance(count),
                Ok(Opened::Other) => {}
                Ok(Opened::NoRoom | Opened::Nothing) if has_some => return Poll::Ready(Ok(())),
                // What came before it is delivered first.
                Err(fault) => {
                    this.refuse(cx, &fault);
                    this.receiving.end = Some(End::Failed(Some(fault)));
                }
                Ok(Opened::NoRoom | Opened::Nothing) => {
                    let Sending { update, closed, .. } = this.sending;
                    if update && !closed && this.sending.has_room(0) {
                        this.update_key()?;
                        let _sent_later = this.poll_send(cx)?;
                    }
                    if ready!(this.poll_receive(cx))? == 0 {
                        this.receiving.end = Some(End::Abrupt);
                    }
                }
            }
        }
    }
}

impl<S: AsyncWrite + Unpin> TlsStream<S> {
    /// Tells the peer what it did wrong, if that leaves at once.
    fn refuse(&mut self, cx: &mut Context<'_>, fault: &StreamFault) {
        if self.sending.closed || matches!(fault, StreamFault::Alert(_)) {
            return;
        }
        self.sending.closed = true;
        if self.seal_alert([FATAL, fault.alert()]).is_ok() {
            let _ = self.poll_send(cx);
        }
    }

    fn seal_alert(&mut self, alert: [u8; 2]) -> Result<(), RecordError> {
        let Sending { key, outgoing, .. } = &mut self.sending;
        let room = outgoing.room(alert.len() + HEADER + TRAILER);
        let count = key.seal(content::ALERT, &alert, room)?;
        outgoing.advance(count);
        Ok(())
    }

    /// Writes what is encrypted.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outgoing = &mut self.sending.outgoing;
        while !outgoing.is_empty() {
            let count = ready!(Pin::new(&mut self.io).poll_write(cx, outgoing.filled()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            outgoing.consume(count);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    /// Small writes stay until they are flushed, so that the socket takes them together.
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.sending.closed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        loop {
            let count = this.seal_some(buf)?;
            if this.sending.outgoing.len() >= ENOUGH || (count == 0 && !buf.is_empty()) {
                match this.poll_send(cx)? {
                    Poll::Ready(()) if count == 0 && !buf.is_empty() => continue,
                    Poll::Pending if count == 0 => return Poll::Pending,
                    Poll::Ready(()) | Poll::Pending => {}
                }
            }
            return Poll::Ready(Ok(count));
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let one = bufs.iter().find(|buf| !buf.is_empty());
        self.poll_write(cx, one.map_or(&[], |buf| buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sending.closed {
            ready!(this.poll_send(cx))?;
            this.sending.closed = true;
            this.seal_alert([WARNING, CLOSE_NOTIFY]).map_err(StreamFault::from)?;
        }
        ready!(this.poll_send(cx))?;
        Pin::new(&mut this.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
