//! Large buffers that a thread lends out for as long as bytes are under way.
//!
//! A connection without traffic holds none, and one with traffic finds one that is warm.

use std::cell::RefCell;
use std::ops::Range;

/// Bytes of a block: eight full TLS records with their framing (RFC 8446 section 5.2), and some for
/// small ones beside them.
pub const BLOCK: usize = 8 * (16_384 + 22) + 128;

/// Empty blocks that a thread keeps.
const KEPT: usize = 8;

thread_local! {
    static EMPTY: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A queue of bytes in a borrowed block; it goes back to its thread's store when dropped.
///
/// What it holds beyond its queued bytes are left-overs of other connections.
#[derive(Debug, Default)]
pub struct Block {
    bytes: Option<Box<[u8]>>,
    start: usize,
    end: usize,
}

impl Block {
    /// The queued bytes.
    pub fn filled(&self) -> &[u8] {
        self.slice(self.start..self.end)
    }

    pub fn len(&self) -> usize {
        self.end - self.start
    }

    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Room behind the queued bytes, of at least `wanted` bytes if the block has as many; borrows a
    /// block if there is none.
    pub fn room(&mut self, wanted: usize) -> &mut [u8] {
        let bytes = self.bytes.get_or_insert_with(borrow);
        if bytes.len() - self.end < wanted && self.start > 0 {
            bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// Bytes that fit behind the queued ones without moving them.
    pub fn free(&self) -> usize {
        BLOCK - self.end
    }

    /// Queues `count` bytes that were written to [`Block::room`].
    pub fn advance(&mut self, count: usize) {
        self.end = (self.end + count).min(BLOCK);
    }

    /// Drops the first `count` queued bytes; gives the block back with the last of them.
    pub fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.is_empty() {
            self.give_back();
        }
    }

    fn slice(&self, range: Range<usize>) -> &[u8] {
        self.bytes.as_ref().and_then(|bytes| bytes.get(range)).unwrap_or_default()
    }

    fn give_back(&mut self) {
        (self.start, self.end) = (0, 0);
        let Some(bytes) = self.bytes.take() else { return };
        // Fails only while the thread ends.
        let _ = EMPTY.try_with(|empty| {
            let mut empty = empty.borrow_mut();
            if empty.len() < KEPT {
                empty.push(bytes);
            }
        });
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.give_back();
    }
}

fn borrow() -> Box<[u8]> {
    let kept = EMPTY.try_with(|empty| empty.borrow_mut().pop()).ok().flatten();
    kept.unwrap_or_else(|| vec![0; BLOCK].into_boxed_slice())
}

#[cfg(test)]
mod tests;
