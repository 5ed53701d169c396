//! Protobuf's wire format written by hand, so that the tests do not compare the generated code with
//! itself (protobuf.dev, "Encoding").

use prost::Message;

/// Bytes from text such as `08 01`.
pub fn hex(text: &str) -> Vec<u8> {
    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect()
}

/// A field of wire type 0: numbers, bools, enums.
pub fn number(field: u32, value: u64) -> Vec<u8> {
    [varint(u64::from(field) << 3), varint(value)].concat()
}

/// A field of wire type 2: strings, bytes, messages, packed numbers.
pub fn block(field: u32, content: impl AsRef<[u8]>) -> Vec<u8> {
    let content = content.as_ref();
    [varint(u64::from(field) << 3 | 2), varint(content.len() as u64), content.to_vec()].concat()
}

/// A `google.protobuf.Any`.
pub fn any(type_url: &str, value: &[u8]) -> Vec<u8> {
    [block(1, type_url), block(2, value)].concat()
}

/// Asserts that `message` is written as exactly `bytes`, and read back from them.
pub fn assert_wire<M>(message: M, bytes: impl AsRef<[u8]>)
where
    M: Message + Default + PartialEq + std::fmt::Debug,
{
    let bytes = bytes.as_ref();
    assert_eq!(M::decode(bytes).unwrap(), message);
    assert_eq!(message.encode_to_vec(), bytes, "{message:?}");
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
    bytes
}
