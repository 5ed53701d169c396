#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        text.chars().filter_map(|c| c.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

fn decode(decoder: &mut Decoder, block: &[u8]) -> Result<Vec<(String, String)>, HpackError> {
    let mut fields = Vec::new();
    decoder.decode(block, |field| {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        fields.push((text(&field.name), text(&field.value)));
    })?;
    Ok(fields)
}

fn fields(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// RFC 7541 appendix C.3 and C.4: the same three requests without and with Huffman codes.
#[test]
fn requests_of_the_rfc_decode() {
    let first = [
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", "www.example.com"),
    ];
    let second = [&first[..], &[("cache-control", "no-cache")]].concat();
    let third = [
        (":method", "GET"),
        (":scheme", "https"),
        (":path", "/index.html"),
        (":authority", "www.example.com"),
        ("custom-key", "custom-value"),
    ];
    let plain = [
        "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
        "8286 84be 5808 6e6f 2d63 6163 6865",
        "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
    ];
    let coded = [
        "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
        "8286 84be 5886 a8eb 1064 9cbf",
        "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
    ];
    for blocks in [plain, coded] {
        let mut decoder = Decoder::default();
        assert_eq!(decode(&mut decoder, &hex(blocks[0])).unwrap(), fields(&first));
        assert_eq!(decode(&mut decoder, &hex(blocks[1])).unwrap(), fields(&second));
        assert_eq!(decode(&mut decoder, &hex(blocks[2])).unwrap(), fields(&third));
        assert_eq!(decoder.size, 164);
    }
}

#[test]
fn the_table_forgets_its_oldest_when_it_shrinks() {
    let mut decoder = Decoder::default();
    for name in [b'a', b'b'] {
        decode(&mut decoder, &[0x40, 1, name, 1, b'v']).unwrap();
    }
    assert_eq!(decode(&mut decoder, &[0xbf]).unwrap(), fields(&[("a", "v")]));
    // 34 bytes: room for one of them.
    assert_eq!(decode(&mut decoder, &[0x3f, 3, 0xbe]).unwrap(), fields(&[("b", "v")]));
    assert_eq!(decode(&mut decoder, &[0xbf]), Err(HpackError::Index(63)));
    // One that is too large leaves nothing.
    let block = [&[0x40, 1, b'c', 9][..], &[b'v'; 9]].concat();
    decode(&mut decoder, &block).unwrap();
    assert_eq!(decode(&mut decoder, &[0xbe]), Err(HpackError::Index(62)));
}

#[test]
fn blocks_against_the_rules_are_refused() {
    let refused = |block: &[u8]| decode(&mut Decoder::default(), block).unwrap_err();
    assert_eq!(refused(&[0x80]), HpackError::Index(0));
    assert_eq!(refused(&[0xbe]), HpackError::Index(62));
    assert_eq!(refused(&[0x41]), HpackError::Truncated);
    assert_eq!(refused(&[0x41, 5, b'a']), HpackError::Truncated);
    assert_eq!(refused(&[0xff, 0xff, 0xff, 0xff, 0xff, 1]), HpackError::Number);
    assert_eq!(refused(&[0x3f, 0xe2, 0x1f]), HpackError::TableSize(4097));
    assert_eq!(refused(&[0x88, 0x20]), HpackError::TableSize(0));
    // Padding that is no beginning of the end's code, or longer than seven bits.
    assert_eq!(refused(&[0x41, 0x81, 0x00]), HpackError::Huffman);
    assert_eq!(refused(&[0x41, 0x81, 0xff]), HpackError::Huffman);
    // The end's code itself.
    assert_eq!(refused(&[0x41, 0x84, 0xff, 0xff, 0xff, 0xff]), HpackError::Huffman);
}

#[test]
fn what_is_put_is_read() {
    let mut block = Vec::new();
    put_indexed(&mut block, known::STATUS);
    put_known(&mut block, known::AUTHORITY, b"10.0.0.1:80");
    put(&mut block, b"baggage", &[b'v'; 400]);
    let read = decode(&mut Decoder::default(), &block).unwrap();
    let long = "v".repeat(400);
    let expected = [(":status", "200"), (":authority", "10.0.0.1:80"), ("baggage", &long)];
    assert_eq!(read, fields(&expected));
}

proptest! {
    #[test]
    fn any_block_is_read_or_refused(block in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut decoder = Decoder::default();
        let _ = decode(&mut decoder, &block);
        prop_assert!(decoder.size <= TABLE_SIZE);
    }
}
