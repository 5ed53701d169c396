#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    [&[0], &length[..], message].concat()
}

/// Reads all of it, given in pieces of this size.
fn read(bytes: &[u8], piece: usize) -> Result<Vec<Response>, FrameError> {
    let mut frames = Frames::default();
    let (mut messages, mut resources) = (Vec::new(), Vec::new());
    for piece in bytes.chunks(piece) {
        frames.push(piece);
        while let Some(part) = frames.part()? {
            match part {
                Part::Begin(_) => assert!(resources.is_empty()),
                Part::Resource(resource) => resources.push(resource),
                Part::End(rest) => {
                    messages.push(Response { resources: std::mem::take(&mut resources), ..rest });
                }
            }
        }
    }
    frames.end()?;
    Ok(messages)
}

fn any_response() -> impl Strategy<Value = Response> {
    let resource = proptest::collection::vec(any::<u8>(), 0..300).prop_map(Bytes::from);
    let resources = proptest::collection::vec(resource, 0..8);
    (resources, ".{0,9}", ".{0,9}", proptest::collection::vec(".{0,9}", 0..4)).prop_map(
        |(resources, type_url, nonce, removed_resources)| Response {
            resources,
            type_url,
            nonce,
            removed_resources,
        },
    )
}

proptest! {
    #[test]
    fn messages_are_read_however_they_are_cut(
        messages in proptest::collection::vec(any_response(), 0..4),
        piece in 1_usize..400,
    ) {
        let bytes = messages.iter().flat_map(|it| framed(&it.encode_to_vec()));
        prop_assert_eq!(read(&bytes.collect::<Vec<_>>(), piece), Ok(messages));
    }

    #[test]
    fn what_is_read_is_what_prost_reads(message in proptest::collection::vec(any::<u8>(), 0..40)) {
        if let Ok(read) = read(&framed(&message), 3) {
            prop_assert_eq!(read, vec![Response::decode(&*message).unwrap()]);
        }
    }
}

#[test]
fn fields_are_read_in_any_order_and_unknown_ones_skipped() {
    let resource = [0x12, 1, b'r'];
    let nonce = [0x2a, 1, b'n'];
    let unknown = [0x38, 0x80, 0x01, 0x41, 1, 2, 3, 4, 5, 6, 7, 8, 0x4d, 1, 2, 3, 4];
    let message = [&nonce[..], &resource, &unknown, &resource].concat();
    let resources = vec![Bytes::from_static(b"r"); 2];
    let expected = Response { resources, nonce: "n".to_owned(), ..Response::default() };
    assert_eq!(read(&framed(&message), 1), Ok(vec![expected]));
}

#[test]
fn what_cannot_be_read_is_named() {
    let cases: [(&[u8], FrameError); 6] = [
        (&[1, 0, 0, 0, 0], FrameError::Compressed),
        (&[0, 0xff, 0, 0, 0], FrameError::TooLarge { length: 0xff00_0000 }),
        (&[0, 0, 0, 0, 3, 0x12, 2, 0, 0], FrameError::Overrun),
        (&[0, 0, 0, 0, 2, 0x12, 0x80, 0], FrameError::Overrun),
        (&[0, 0, 0, 0, 1, 0x13], FrameError::UnknownEncoding),
        (&[0, 0, 0, 0, 9, 0x12, 2], FrameError::Truncated),
    ];
    for (bytes, error) in cases {
        assert_eq!(read(bytes, 1), Err(error.clone()), "{error}");
    }
    // The nonce is no text.
    let read = read(&framed(&[0x2a, 1, 0xff]), 8);
    assert!(matches!(read, Err(FrameError::Unreadable(_))));
}

#[test]
fn a_resource_is_given_before_its_message_is_whole() {
    let mut frames = Frames::default();
    frames.push(&framed(&[0x12, 1, b'r', 0x2a, 1, b'n'])[..8]);
    assert!(matches!(frames.part(), Ok(Some(Part::Begin(6)))));
    assert!(matches!(frames.part(), Ok(Some(Part::Resource(resource))) if &*resource == b"r"));
    assert!(matches!(frames.part(), Ok(None)));
    assert_eq!(frames.end(), Err(FrameError::Truncated));
}
