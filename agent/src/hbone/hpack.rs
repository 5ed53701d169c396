//! Header compression (RFC 7541): a decoder of all of it, and an encoder that compresses nothing.
//!
//! A CONNECT has a handful of headers of which most differ each time. Sending them as they are costs
//! some bytes and no state.

use std::collections::VecDeque;

use bytes::Bytes;

mod huffman;
mod table;

use table::STATIC;

/// Bytes that a header counts beside its name and value (RFC 7541 section 4.1).
const OVERHEAD: usize = 32;

/// The size of the dynamic table that peers may use, for it is the one they start with.
pub(super) const TABLE_SIZE: usize = 4096;

/// A header block that breaks the rules. It leaves both sides with different tables, which ends the
/// connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HpackError {
    #[error("header block ends within a header")]
    Truncated,
    #[error("header block holds a number that is too large")]
    Number,
    #[error("header block refers to entry {0}, which is not there")]
    Index(usize),
    #[error("header block holds an invalid huffman code")]
    Huffman,
    #[error("header block changes its table's size to {0}")]
    TableSize(usize),
}

/// One header as it was sent. A name that begins with a colon is a pseudo-header's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Field {
    pub(super) name: Bytes,
    pub(super) value: Bytes,
}

impl Field {
    fn size(&self) -> usize {
        self.name.len() + self.value.len() + OVERHEAD
    }
}

/// The decoding side of one connection.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    /// The newest first.
    entries: VecDeque<Field>,
    size: usize,
    /// What the encoder allows itself, at most [`TABLE_SIZE`].
    limit: Option<usize>,
}

impl Decoder {
    /// Decodes a whole header block; `each` is told every header.
    pub(super) fn decode(
        &mut self,
        block: &[u8],
        mut each: impl FnMut(Field),
    ) -> Result<(), HpackError> {
        let mut input = Input(block);
        let mut may_resize = true;
        while let Some(first) = input.0.first().copied() {
            if first & 0xe0 == 0x20 {
                let size = input.number(5)?;
                if size > TABLE_SIZE || !may_resize {
                    return Err(HpackError::TableSize(size));
                }
                self.limit = Some(size);
                self.shrink(size);
                continue;
            }
            may_resize = false;
            if first & 0x80 != 0 {
                let index = input.number(7)?;
                each(self.entry(index)?);
                continue;
            }
            // 01: with indexing; 0000: without; 0001: never.
            let indexed = first & 0x40 != 0;
            let name = input.number(if indexed { 6 } else { 4 })?;
            let name = if name == 0 { input.text()? } else { self.entry(name)?.name };
            let field = Field { name, value: input.text()? };
            if indexed {
                self.insert(field.clone());
            }
            each(field);
        }
        Ok(())
    }

    fn entry(&self, index: usize) -> Result<Field, HpackError> {
        let place = index.checked_sub(1).ok_or(HpackError::Index(index))?;
        if let Some((name, value)) = STATIC.get(place) {
            let (name, value) = (Bytes::from_static(name), Bytes::from_static(value));
            return Ok(Field { name, value });
        }
        let found = place.checked_sub(STATIC.len()).and_then(|place| self.entries.get(place));
        found.cloned().ok_or(HpackError::Index(index))
    }

    fn insert(&mut self, field: Field) {
        let limit = self.limit.unwrap_or(TABLE_SIZE);
        let size = field.size();
        self.shrink(limit.saturating_sub(size));
        // One that is too large empties the table (RFC 7541 section 4.4).
        if size <= limit {
            self.size += size;
            self.entries.push_front(field);
        }
    }

    fn shrink(&mut self, limit: usize) {
        while self.size > limit {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.size -= oldest.size();
        }
    }
}

struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Result<u8, HpackError> {
        let (first, rest) = self.0.split_first().ok_or(HpackError::Truncated)?;
        self.0 = rest;
        Ok(*first)
    }

    /// A number whose first `bits` are in the byte that comes now (RFC 7541 section 5.1).
    fn number(&mut self, bits: u32) -> Result<usize, HpackError> {
        let most = (1usize << bits) - 1;
        let mut value = usize::from(self.byte()?) & most;
        if value < most {
            return Ok(value);
        }
        // Three more bytes make two million, and nothing here is as large.
        for shift in [0, 7, 14] {
            let next = self.byte()?;
            value += usize::from(next & 0x7f) << shift;
            if next & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(HpackError::Number)
    }

    /// RFC 7541 section 5.2.
    fn text(&mut self) -> Result<Bytes, HpackError> {
        let first = self.0.first().copied().ok_or(HpackError::Truncated)?;
        let length = self.number(7)?;
        let (text, rest) = self.0.split_at_checked(length).ok_or(HpackError::Truncated)?;
        self.0 = rest;
        match first & 0x80 != 0 {
            true => huffman::decode(text).map(Bytes::from),
            false => Ok(Bytes::copy_from_slice(text)),
        }
    }
}

/// Places in the static table of what a CONNECT and its answer say.
pub(super) mod known {
    pub(in crate::hbone) const AUTHORITY: usize = 1;
    pub(in crate::hbone) const METHOD: usize = 2;
    pub(in crate::hbone) const STATUS: usize = 8;
}

/// At the begin of a block: the encoder's table has no entries (RFC 7541 section 6.3). It has to be
/// said after the decoder has limited the table (section 4.2).
pub(super) const NO_TABLE: u8 = 0x20;

/// Appends a header with a name of the static table.
pub(super) fn put_known(out: &mut Vec<u8>, name: usize, value: &[u8]) {
    put_number(out, 0, 4, name);
    put_text(out, value);
}

/// Appends a header.
pub(super) fn put(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    put_number(out, 0, 4, 0);
    put_text(out, name);
    put_text(out, value);
}

/// Appends a header that is whole in the static table.
pub(super) fn put_indexed(out: &mut Vec<u8>, index: usize) {
    put_number(out, 0x80, 7, index);
}

fn put_text(out: &mut Vec<u8>, text: &[u8]) {
    put_number(out, 0, 7, text.len());
    out.extend_from_slice(text);
}

fn put_number(out: &mut Vec<u8>, pattern: u8, bits: u32, number: usize) {
    let most = (1usize << bits) - 1;
    if number < most {
        out.push(pattern | number as u8);
        return;
    }
    out.push(pattern | most as u8);
    let mut rest = number - most;
    while rest >= 0x80 {
        out.push(0x80 | (rest & 0x7f) as u8);
        rest >>= 7;
    }
    out.push(rest as u8);
}

#[cfg(test)]
mod tests;
