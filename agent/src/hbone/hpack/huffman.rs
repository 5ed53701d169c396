//! The Huffman code of header texts (RFC 7541 appendix B).
//!
//! The code is canonical: with the lengths known, its codes follow in the order of their symbols.

use super::HpackError;

/// How many bits the code of each byte has, and at last that of the end of the text.
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, //
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, //
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, //
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, //
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, //
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, //
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, //
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, //
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, //
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, //
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, //
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, //
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, //
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, //
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, //
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, //
    30,
];

/// The longest code.
const LONGEST: usize = 30;

/// The symbol after the last byte.
const END: u16 = 256;

/// The codes of one length.
#[derive(Clone, Copy)]
struct Row {
    /// The first code.
    first: u32,
    /// How many there are.
    count: u32,
    /// The place of the first one's symbol.
    place: usize,
}

struct Code {
    rows: [Row; LONGEST + 1],
    /// By length of their codes, then by value.
    symbols: [u16; 257],
}

static CODE: Code = canonical();

const fn canonical() -> Code {
    let mut rows = [Row { first: 0, count: 0, place: 0 }; LONGEST + 1];
    let mut symbols = [0; 257];
    let (mut code, mut place, mut length) = (0u32, 0, 1);
    while length <= LONGEST {
        code <<= 1;
        rows[length] = Row { first: code, count: 0, place };
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                symbols[place] = symbol as u16;
                rows[length].count += 1;
                code += 1;
                place += 1;
            }
            symbol += 1;
        }
        length += 1;
    }
    Code { rows, symbols }
}

/// The text that `bytes` are the code of. What is left of the last byte is filled with ones, as the
/// end's code begins.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<u8>, HpackError> {
    let mut text = Vec::with_capacity(bytes.len() * 8 / 5);
    let (mut code, mut length) = (0u32, 0usize);
    for byte in bytes {
        for shift in (0..8).rev() {
            code = code << 1 | u32::from(byte >> shift & 1);
            length += 1;
            let row = CODE.rows.get(length).ok_or(HpackError::Huffman)?;
            // A code below the first of its length would have ended earlier.
            let offset = code.wrapping_sub(row.first);
            if offset >= row.count {
                continue;
            }
            let symbol = CODE.symbols.get(row.place + offset as usize);
            match symbol.copied().unwrap_or(END) {
                END => return Err(HpackError::Huffman),
                symbol => text.push(symbol as u8),
            }
            (code, length) = (0, 0);
        }
    }
    let is_filled = length < 8 && code == (1 << length) - 1;
    if is_filled { Ok(text) } else { Err(HpackError::Huffman) }
}
