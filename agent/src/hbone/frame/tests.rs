#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

/// The frames of `bytes`, which come in pieces of this size; DATA payloads are joined.
fn cut(bytes: &[u8], size: usize) -> Result<Vec<(Head, Vec<u8>)>, TooLarge> {
    let mut cutter = Cutter::default();
    let mut frames: Vec<(Head, Vec<u8>)> = Vec::new();
    let mut goes_on = false;
    for mut piece in bytes.chunks(size) {
        loop {
            match cutter.next(&mut piece, 1 << 20, 1 << 10)? {
                None if piece.is_empty() => break,
                None => {}
                Some(Piece::Data { part, rest, .. }) if goes_on => {
                    frames.last_mut().unwrap().1.extend_from_slice(part);
                    goes_on = rest > 0;
                }
                Some(Piece::Data { head, part, rest }) => {
                    frames.push((head, part.to_vec()));
                    goes_on = rest > 0;
                }
                Some(Piece::Frame { head, payload }) => frames.push((head, payload.to_vec())),
            }
        }
    }
    Ok(frames)
}

#[test]
fn frames_are_the_same_whatever_pieces_they_come_in() {
    let mut bytes = Vec::new();
    put_settings(&mut bytes, &[(setting::INITIAL_WINDOW_SIZE, 65_536)]);
    put(&mut bytes, kind::DATA, 0, 1, &[7; 3000]);
    put(&mut bytes, kind::DATA, flag::END_STREAM, 1, &[]);
    put_window_update(&mut bytes, 3, 5);
    put_goaway(&mut bytes, 9, Reason::CANCEL);
    let whole = cut(&bytes, bytes.len()).unwrap();
    assert_eq!(whole.len(), 5);
    assert_eq!(whole[0].1, [0, 4, 0, 1, 0, 0]);
    assert_eq!(whole[4].1, [0, 0, 0, 9, 0, 0, 0, 8]);
    for size in 1..40 {
        assert_eq!(cut(&bytes, size).unwrap(), whole, "pieces of {size}");
    }
}

#[test]
fn only_data_may_be_large() {
    let large = |kind| {
        let mut bytes = Vec::new();
        put(&mut bytes, kind, 0, 1, &[0; 2000]);
        cut(&bytes, 100).map(|frames| frames.len())
    };
    assert_eq!(large(kind::DATA), Ok(1));
    assert_eq!(large(kind::HEADERS), Err(TooLarge));
    let head = Head { length: (1 << 20) + 1, kind: kind::DATA, flags: 0, stream: 1 };
    assert_eq!(cut(&head.bytes(), 9), Err(TooLarge));
}

#[test]
fn a_long_header_block_goes_in_several_frames() {
    let mut bytes = Vec::new();
    put_headers(&mut bytes, 5, true, &[1; 250], 100);
    let frames = cut(&bytes, 1000).unwrap();
    let kinds: Vec<_> = frames.iter().map(|(head, _)| (head.kind, head.flags)).collect();
    assert_eq!(
        kinds,
        [
            (kind::HEADERS, flag::END_STREAM),
            (kind::CONTINUATION, 0),
            (kind::CONTINUATION, flag::END_HEADERS)
        ]
    );
    assert_eq!(frames.iter().map(|(_, payload)| payload.len()).sum::<usize>(), 250);
}

#[test]
fn reasons_are_told_by_name() {
    assert_eq!(Reason::REFUSED_STREAM.to_string(), "REFUSED_STREAM");
    assert_eq!(Reason::from(99).to_string(), "error code 99");
}

proptest! {
    #[test]
    fn heads_are_read_as_they_are_written(
        length in 0u32..1 << 24, kind: u8, flags: u8, stream in 0u32..1 << 31
    ) {
        let head = Head { length, kind, flags, stream };
        prop_assert_eq!(Head::parse(head.bytes()), head);
    }

    #[test]
    fn any_bytes_are_cut_or_refused(
        bytes in proptest::collection::vec(any::<u8>(), 0..200), size in 1usize..20
    ) {
        let _ = cut(&bytes, size);
    }
}
