//! The messages of the delta stream, read while they arrive: a resource is given as soon as it is
//! whole, so that a large message is never in memory as such.
//!
//! Sources: gRPC over HTTP/2 (a length-prefixed message: 1 byte, then 4 bytes of length) and the
//! encoding of protobuf. Fields other than resources are few and read when the message is whole.

use bytes::{Buf, Bytes, BytesMut};
use prost::Message;

use super::wire::Response;
use crate::control::MAX_MESSAGE;

/// Before a message: whether it is compressed, and its length.
const HEADER: usize = 5;
/// `DeltaDiscoveryResponse.resources`.
const RESOURCES: u64 = 2;
/// A 64-bit number takes no more bytes (protobuf's base 128 varints).
const VARINT: usize = 10;

/// What cannot be read, after which nothing more can.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a message is compressed, which was not offered")]
    Compressed,
    #[error("a message of {length} bytes is larger than {MAX_MESSAGE}")]
    TooLarge { length: usize },
    #[error("a field of a message reaches beyond the message")]
    Overrun,
    #[error("a field of a message has no known encoding")]
    UnknownEncoding,
    #[error("a message cannot be read: {0}")]
    Unreadable(#[from] prost::DecodeError),
    #[error("the stream ended within a message")]
    Truncated,
}

/// What is read of a message, in this order: its beginning, its resources, its end.
#[derive(Debug)]
pub enum Part {
    /// Of this many bytes.
    Begin(usize),
    /// An encoded `Resource`.
    Resource(Bytes),
    /// All but the resources.
    End(Response),
}

/// Takes bytes as they come and gives parts of messages.
#[derive(Debug, Default)]
pub struct Frames {
    unread: BytesMut,
    message: Option<Unfinished>,
}

/// The message that is being read.
#[derive(Debug)]
struct Unfinished {
    /// Bytes that are not read yet.
    left: usize,
    /// Its fields that are not resources, encoded.
    others: BytesMut,
}

/// A field as far as it must be known to find its end.
struct Field {
    number: u64,
    /// Bytes before the content.
    head: usize,
    content: usize,
}

impl Frames {
    /// What is pushed is kept until it is read: all parts should be taken before the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.unread.extend_from_slice(bytes);
    }

    /// The next part; `None` until more bytes have come. Nothing may be asked after an error.
    pub fn part(&mut self) -> Result<Option<Part>, FrameError> {
        let Some(message) = &mut self.message else { return self.begin() };
        while message.left > 0 {
            let known = self.unread.get(..message.left).unwrap_or(&self.unread);
            let Some(field) = field(known, message.left)? else { return Ok(None) };
            let Field { number, head, content } = field;
            // No overflow: both are within the message.
            if self.unread.len() < head + content {
                return Ok(None);
            }
            message.left -= head + content;
            if number == RESOURCES {
                self.unread.advance(head);
                return Ok(Some(Part::Resource(self.unread.split_to(content).freeze())));
            }
            message.others.extend_from_slice(&self.unread.split_to(head + content));
        }
        let others = std::mem::take(&mut message.others).freeze();
        self.message = None;
        Ok(Some(Part::End(Response::decode(others)?)))
    }

    /// Whether the stream may end here.
    pub fn end(&self) -> Result<(), FrameError> {
        match self.unread.is_empty() && self.message.is_none() {
            true => Ok(()),
            false => Err(FrameError::Truncated),
        }
    }

    fn begin(&mut self) -> Result<Option<Part>, FrameError> {
        let Some(&[compressed, a, b, c, d]) = self.unread.first_chunk::<HEADER>() else {
            return Ok(None);
        };
        if compressed != 0 {
            return Err(FrameError::Compressed);
        }
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > MAX_MESSAGE {
            return Err(FrameError::TooLarge { length });
        }
        self.unread.advance(HEADER);
        self.message = Some(Unfinished { left: length, others: BytesMut::new() });
        Ok(Some(Part::Begin(length)))
    }
}

/// The field at the start of `known`, in a message that has `left` more bytes; `None` until more of
/// it is known.
fn field(known: &[u8], left: usize) -> Result<Option<Field>, FrameError> {
    let Some((key, key_length)) = varint(known, left)? else { return Ok(None) };
    let rest = known.get(key_length..).unwrap_or_default();
    let left_after_key = left - key_length;
    // The wire types of protobuf; groups are not in use any more.
    let (head, content) = match key & 7 {
        0 => match varint(rest, left_after_key)? {
            Some((_, length)) => (key_length, length),
            None => return Ok(None),
        },
        1 => (key_length, 8),
        2 => match varint(rest, left_after_key)? {
            Some((content, length)) => {
                (key_length + length, usize::try_from(content).map_err(|_| FrameError::Overrun)?)
            }
            None => return Ok(None),
        },
        5 => (key_length, 4),
        _ => return Err(FrameError::UnknownEncoding),
    };
    match left.checked_sub(head).is_some_and(|room| content <= room) {
        // Resources that are no bytes are for the decoder of all others to refuse.
        true if key & 7 == 2 => Ok(Some(Field { number: key >> 3, head, content })),
        true => Ok(Some(Field { number: 0, head, content })),
        false => Err(FrameError::Overrun),
    }
}

/// A number and how many bytes it takes.
fn varint(known: &[u8], left: usize) -> Result<Option<(u64, usize)>, FrameError> {
    let mut number = 0;
    for (place, byte) in known.iter().take(VARINT).enumerate() {
        // The last byte has room for one bit.
        if place + 1 == VARINT && *byte > 1 {
            return Err(FrameError::UnknownEncoding);
        }
        number |= u64::from(byte & 0x7f) << (7 * place);
        if byte & 0x80 == 0 {
            return Ok(Some((number, place + 1)));
        }
    }
    match known.len() {
        VARINT.. => Err(FrameError::UnknownEncoding),
        length if length >= left => Err(FrameError::Overrun),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
