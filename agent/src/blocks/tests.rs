#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn bytes_leave_in_the_order_in_which_they_came() {
    let mut block = Block::default();
    block.room(3).get_mut(..3).unwrap().copy_from_slice(b"abc");
    block.advance(3);
    block.consume(1);
    assert_eq!(block.filled(), b"bc");
    let room = block.room(BLOCK - 2);
    assert_eq!(room.len(), BLOCK - 2);
    room.get_mut(..1).unwrap().copy_from_slice(b"d");
    block.advance(1);
    assert_eq!(block.filled(), b"bcd");
    block.consume(3);
    assert!(block.is_empty());
    assert_eq!(block.free(), BLOCK);
}

#[test]
fn a_block_is_given_back_with_its_last_byte_and_when_dropped() {
    let kept = || EMPTY.with_borrow(Vec::len);
    let mut block = Block::default();
    block.room(1);
    block.advance(1);
    let before = kept();
    block.consume(1);
    assert_eq!(kept(), before + 1);
    block.room(1);
    assert_eq!(kept(), before);
    drop(block);
    assert_eq!(kept(), before + 1);
}
