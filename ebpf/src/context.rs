//! Reading and writing the programs' contexts.
//!
//! The verifier only accepts a context access at a constant offset. Where a choice between two
//! fields is optimised into one access at a chosen offset it refuses the program; therefore every
//! field is read by itself with a volatile read, and chosen from afterwards. No context is ever
//! copied whole.

use aya_ebpf::bindings::{
    BPF_TCP_CLOSE_WAIT, BPF_TCP_CLOSING, BPF_TCP_FIN_WAIT2, BPF_TCP_LAST_ACK, bpf_sk_lookup,
    bpf_sock_addr, bpf_sock_ops,
};
use culvert_abi::{Address, DNS_PORT, OUTBOUND_PORT};

/// `AF_INET`.
const INET: u32 = 2;
/// `IPPROTO_TCP`.
pub const TCP: u32 = 6;
/// `IPPROTO_UDP`.
pub const UDP: u32 = 17;

/// Reads one field of a context.
macro_rules! read {
    ($field:expr) => {
        core::ptr::read_volatile(core::ptr::addr_of!($field))
    };
}
/// Writes one field of a context.
macro_rules! write {
    ($field:expr, $value:expr) => {
        core::ptr::write_volatile(core::ptr::addr_of_mut!($field), $value)
    };
}
pub(crate) use {read, write};

/// Both ends of a connection, seen from this host. Ports are in host byte order.
#[derive(Clone, Copy)]
pub struct Ends {
    pub local: Address,
    pub local_port: u32,
    pub remote: Address,
    pub remote_port: u32,
}

/// The ends that a socket operation is about.
///
/// # Safety
/// `ops` is the program's context.
#[inline(always)]
pub unsafe fn socket_ends(ops: *mut bpf_sock_ops) -> Ends {
    // SAFETY: by this function's contract.
    unsafe {
        let v4 = read!((*ops).family) == INET;
        let local4 = read!((*ops).local_ip4);
        let remote4 = read!((*ops).remote_ip4);
        let local6 = [
            read!((*ops).local_ip6[0]),
            read!((*ops).local_ip6[1]),
            read!((*ops).local_ip6[2]),
            read!((*ops).local_ip6[3]),
        ];
        let remote6 = [
            read!((*ops).remote_ip6[0]),
            read!((*ops).remote_ip6[1]),
            read!((*ops).remote_ip6[2]),
            read!((*ops).remote_ip6[3]),
        ];
        Ends {
            local: if v4 { Address::v4(local4) } else { Address::v6(local6) },
            local_port: read!((*ops).local_port),
            remote: if v4 { Address::v4(remote4) } else { Address::v6(remote6) },
            remote_port: u32::from_be(read!((*ops).remote_port)),
        }
    }
}

/// The ends of a connection whose first segment looks for a listener.
///
/// # Safety
/// `lookup` is the program's context.
#[inline(always)]
pub unsafe fn lookup_ends(lookup: *mut bpf_sk_lookup) -> Ends {
    // SAFETY: by this function's contract.
    unsafe {
        let v4 = read!((*lookup).family) == INET;
        let local4 = read!((*lookup).local_ip4);
        let remote4 = read!((*lookup).remote_ip4);
        let local6 = [
            read!((*lookup).local_ip6[0]),
            read!((*lookup).local_ip6[1]),
            read!((*lookup).local_ip6[2]),
            read!((*lookup).local_ip6[3]),
        ];
        let remote6 = [
            read!((*lookup).remote_ip6[0]),
            read!((*lookup).remote_ip6[1]),
            read!((*lookup).remote_ip6[2]),
            read!((*lookup).remote_ip6[3]),
        ];
        Ends {
            local: if v4 { Address::v4(local4) } else { Address::v6(local6) },
            local_port: read!((*lookup).local_port),
            remote: if v4 { Address::v4(remote4) } else { Address::v6(remote6) },
            remote_port: u16::from_be(read!((*lookup).remote_port)) as u32,
        }
    }
}

/// Whether captured sockets are connected to this port.
#[inline(always)]
pub fn is_agents(port: u32) -> bool {
    port == OUTBOUND_PORT as u32 || port == DNS_PORT as u32
}

/// The port a socket address program is about, in host byte order.
///
/// # Safety
/// `addr` is the program's context.
#[inline(always)]
pub unsafe fn port(addr: *mut bpf_sock_addr) -> u32 {
    // SAFETY: by this function's contract. The field holds 16 bits in network byte order.
    unsafe { u16::from_be(read!((*addr).user_port) as u16) as u32 }
}

/// # Safety
/// `addr` is the program's context.
#[inline(always)]
pub unsafe fn set_port(addr: *mut bpf_sock_addr, port: u16) {
    // SAFETY: by this function's contract.
    unsafe { write!((*addr).user_port, port.to_be() as u32) }
}

/// The IPv4 address that a socket address program for IPv4 is about.
///
/// # Safety
/// `addr` is the program's context, and the program is one for IPv4.
#[inline(always)]
pub unsafe fn address4(addr: *mut bpf_sock_addr) -> Address {
    // SAFETY: by this function's contract.
    Address::v4(unsafe { read!((*addr).user_ip4) })
}

/// Sets it, from the words of an [`Address`].
///
/// # Safety
/// As for [`address4`].
#[inline(always)]
pub unsafe fn set_words4(addr: *mut bpf_sock_addr, [_, _, _, word]: [u32; 4]) {
    // SAFETY: by this function's contract.
    unsafe { write!((*addr).user_ip4, word) }
}

/// The address that a socket address program for IPv6 is about; possibly an IPv4-mapped one.
///
/// # Safety
/// `addr` is the program's context, and the program is one for IPv6.
#[inline(always)]
pub unsafe fn address6(addr: *mut bpf_sock_addr) -> Address {
    // SAFETY: by this function's contract.
    unsafe {
        Address::v6([
            read!((*addr).user_ip6[0]),
            read!((*addr).user_ip6[1]),
            read!((*addr).user_ip6[2]),
            read!((*addr).user_ip6[3]),
        ])
    }
}

/// Sets it, from the words of an [`Address`].
///
/// # Safety
/// As for [`address6`].
#[inline(always)]
pub unsafe fn set_words6(addr: *mut bpf_sock_addr, [a, b, c, d]: [u32; 4]) {
    // SAFETY: by this function's contract.
    unsafe {
        write!((*addr).user_ip6[0], a);
        write!((*addr).user_ip6[1], b);
        write!((*addr).user_ip6[2], c);
        write!((*addr).user_ip6[3], d);
    }
}

/// Whether our FIN is among the bytes acknowledged, and the server's among those received, when a
/// socket closes from this state. One that waits for the server's FIN has it if anything arrived
/// since its own was acknowledged, unless the application gave up reading in between.
#[inline(always)]
pub fn fins(old: u32, all_acked: bool, more_received: bool) -> (bool, bool) {
    match old {
        BPF_TCP_FIN_WAIT2 => (true, more_received),
        BPF_TCP_LAST_ACK | BPF_TCP_CLOSING => (all_acked, true),
        BPF_TCP_CLOSE_WAIT => (false, true),
        _ => (false, false),
    }
}
