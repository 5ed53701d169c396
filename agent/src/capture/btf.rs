//! Where the kernel keeps the fields of its structures, by its own description of them (BTF, Linux
//! 5.4 with `CONFIG_DEBUG_INFO_BTF`).
//!
//! The kernel programs are not relocated when they are loaded, so that they are told.

use std::io;

/// The description of the running kernel.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// `btf_header.magic`.
const MAGIC: u16 = 0xeb9f;
/// The kinds of types that are looked at, and the length of what follows those that are skipped
/// (`BTF_KIND_…`).
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const TYPEDEF: u32 = 8;
const VOLATILE: u32 = 9;
const CONST: u32 = 10;
const TYPE_TAG: u32 = 18;
const RESTRICT: u32 = 11;
/// Structures within structures are looked into as deep as this.
const DEPTH: u32 = 8;

/// Why a field's place is not known.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    #[error("the kernel does not describe its types (CONFIG_DEBUG_INFO_BTF): {0}")]
    Unreadable(io::Error),
    #[error("the kernel's description of its types is malformed")]
    Malformed,
    #[error("the kernel has no field {structure}.{field}")]
    Absent { structure: &'static str, field: &'static str },
}

/// A description of types.
pub(super) struct Btf {
    strings: Vec<u8>,
    /// Type 1 is the first.
    types: Vec<Type>,
}

struct Type {
    name: u32,
    kind: u32,
    /// Whether members tell the size of bit fields.
    has_bit_sizes: bool,
    /// The type that this one is made of, for those that are of one.
    of: u32,
    members: Vec<Member>,
}

struct Member {
    name: u32,
    kind: u32,
    offset: u32,
}

impl Btf {
    pub fn of_kernel() -> Result<Btf, BtfError> {
        let bytes = std::fs::read(KERNEL).map_err(BtfError::Unreadable)?;
        Btf::parse(&bytes).ok_or(BtfError::Malformed)
    }

    fn parse(bytes: &[u8]) -> Option<Btf> {
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        if half(0)? != MAGIC {
            return None;
        }
        let header = word(4)? as usize;
        let section = |offset: usize, length: usize| {
            let start = header.checked_add(word(offset)? as usize)?;
            bytes.get(start..start.checked_add(word(length)? as usize)?)
        };
        let (types, strings) = (section(8, 12)?, section(16, 20)?);
        Some(Btf { strings: strings.to_owned(), types: parse_types(types)? })
    }

    /// Bytes from the beginning of a structure to a field; a path of fields is written with dots, and
    /// leaves unnamed structures and unions out.
    pub fn offset(&self, structure: &'static str, field: &'static str) -> Result<u32, BtfError> {
        let absent = BtfError::Absent { structure, field };
        let found = self.types.iter().find(|it| it.kind == STRUCT && self.is(it.name, structure));
        let mut bits = 0;
        let mut inside = found;
        for name in field.split('.') {
            let member = inside.and_then(|inside| self.member(inside, name, DEPTH));
            let Some((offset, kind)) = member else { return Err(absent) };
            bits += offset;
            inside = self.resolved(kind);
        }
        match bits % 8 {
            0 => Ok(bits / 8),
            _ => Err(absent),
        }
    }

    /// Offset in bits, and type.
    fn member(&self, within: &Type, name: &str, depth: u32) -> Option<(u32, u32)> {
        within.members.iter().find_map(|member| {
            let offset = match within.has_bit_sizes {
                true => member.offset & 0xff_ffff,
                false => member.offset,
            };
            if self.is(member.name, name) {
                return Some((offset, member.kind));
            }
            if !self.is(member.name, "") || depth == 0 {
                return None;
            }
            let unnamed = self.resolved(member.kind)?;
            let (inner, kind) = self.member(unnamed, name, depth - 1)?;
            Some((offset + inner, kind))
        })
    }

    /// The structure or union behind names and qualifiers.
    fn resolved(&self, mut kind: u32) -> Option<&Type> {
        for _ in 0..DEPTH {
            let found = self.types.get((kind as usize).checked_sub(1)?)?;
            match found.kind {
                STRUCT | UNION => return Some(found),
                TYPEDEF | VOLATILE | CONST | RESTRICT | TYPE_TAG => kind = found.of,
                _ => return None,
            }
        }
        None
    }

    fn is(&self, at: u32, name: &str) -> bool {
        let text = self.strings.get(at as usize..).unwrap_or_default();
        text.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }
}

fn parse_types(mut bytes: &[u8]) -> Option<Vec<Type>> {
    let mut types = Vec::new();
    while !bytes.is_empty() {
        let ([name, info, of], rest) = words(bytes)?;
        let (count, kind) = ((info & 0xffff) as usize, info >> 24 & 0x1f);
        let mut members = Vec::new();
        bytes = match kind {
            STRUCT | UNION => {
                let mut rest = rest;
                for _ in 0..count {
                    let ([name, kind, offset], after) = words(rest)?;
                    members.push(Member { name, kind, offset });
                    rest = after;
                }
                rest
            }
            _ => rest.get(length_after(kind, count)?..)?,
        };
        types.push(Type { name, kind, has_bit_sizes: info >> 31 == 1, of, members });
    }
    Some(types)
}

/// How many bytes follow the head of a type (Documentation/bpf/btf.rst).
fn length_after(kind: u32, count: usize) -> Option<usize> {
    match kind {
        // Integer, variable, declaration tag.
        1 | 14 | 17 => Some(4),
        // Pointer, forward declaration, names and qualifiers, function, floating point.
        2 | 7..=12 | 16 | 18 => Some(0),
        // Array.
        3 => Some(12),
        // Enumerations of 32 and of 64 bits, parameters, sections.
        6 | 13 => Some(8 * count),
        15 | 19 => Some(12 * count),
        _ => None,
    }
}

fn words(bytes: &[u8]) -> Option<([u32; 3], &[u8])> {
    let (a, bytes) = bytes.split_first_chunk()?;
    let (b, bytes) = bytes.split_first_chunk()?;
    let (c, bytes) = bytes.split_first_chunk()?;
    Some(([a, b, c].map(|word| u32::from_ne_bytes(*word)), bytes))
}

#[cfg(test)]
mod tests;
