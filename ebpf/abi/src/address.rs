//! Addresses, as all maps have them.

use crate::{NODE_PROBE_V4, NODE_PROBE_V6};

/// An IP address in network byte order; IPv4 in its IPv4-mapped form (RFC 4291 section 2.5.5.2).
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    pub ip: [u8; 16],
}

/// Written out as words: sixteen bytes compared as a whole would become a map of a program.
const NODE_PROBE_V6_WORDS: [u32; 4] = Address { ip: NODE_PROBE_V6.octets() }.words();

/// The third word of an IPv4-mapped address.
const V4_WORD: u32 = 0xffffu32.to_be();

impl Address {
    /// No address.
    pub const UNSPECIFIED: Address = Address { ip: [0; 16] };
    /// From the words that a context holds, in network byte order.
    #[inline(always)]
    pub const fn v6(words: [u32; 4]) -> Self {
        // SAFETY: both are sixteen bytes without padding or invalid values.
        Self { ip: unsafe { core::mem::transmute::<[u32; 4], [u8; 16]>(words) } }
    }

    /// From the word that a context holds, in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self::v6([0, 0, V4_WORD, word])
    }

    /// Whether it is the address that istio-cni lets the node's own connections come from.
    #[inline(always)]
    pub const fn is_node_probe(self) -> bool {
        let [a, b, c, d] = self.words();
        let [e, f, g, h] = NODE_PROBE_V6_WORDS;
        let v4 = self.beyond_v4() | (d ^ u32::from_ne_bytes(NODE_PROBE_V4.octets()));
        let v6 = (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h);
        either_is_zero(v4, v6)
    }

    /// The four words in network byte order; the last one is the IPv4 address of a mapped one.
    #[inline(always)]
    pub const fn words(self) -> [u32; 4] {
        // SAFETY: both are sixteen bytes without padding or invalid values.
        unsafe { core::mem::transmute::<[u8; 16], [u32; 4]>(self.ip) }
    }

    /// Zero when it is IPv4.
    #[inline(always)]
    const fn beyond_v4(self) -> u32 {
        let [a, b, c, _] = self.words();
        a | b | (c ^ V4_WORD)
    }

    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.beyond_v4() == 0
    }

    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        let [a, b, c, d] = self.words();
        let rest = a | b | d;
        either_is_zero(rest | c, rest | (c ^ V4_WORD))
    }

    /// Whether it is only valid on one link (RFC 4291 section 2.5.6).
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        let [a, _, _, _] = self.words();
        u32::from_be(a) >> 22 == 0xfe80 >> 6
    }

    #[inline(always)]
    pub const fn is_loopback(self) -> bool {
        let [a, b, c, d] = self.words();
        let v4 = self.beyond_v4() | ((u32::from_be(d) >> 24) ^ 127);
        let v6 = a | b | c | (d ^ 1u32.to_be());
        either_is_zero(v4, v6)
    }
}

/// In one comparison: with one for each word the verifier would go on with what each has told of the
/// address, and through all that follows once for each of them.
#[inline(always)]
const fn either_is_zero(a: u32, b: u32) -> bool {
    // Neither is 2^32 or more, so that the product does not wrap.
    a as u64 * b as u64 == 0
}
