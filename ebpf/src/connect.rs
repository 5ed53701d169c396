//! What becomes of a connection that a process opens, and of a datagram that it sends to a DNS
//! server; shared by the connect and the sendmsg programs.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{BPF_TCP_ESTABLISHED, bpf_sock};
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_skc_to_mptcp_sock};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use culvert_abi::{
    Address, DNS_PORT, ExcludedNet, ExcludedPort, OUTBOUND_PORT, Pod, RESOLVER_PORT, SocketRole,
    SocketState,
};

use crate::context::{self, read};
use crate::counts::count;
use crate::direct::{Choice, Socket};
use crate::maps::{ADDRESSES, EXCLUDED_NETS, EXCLUDED_PORTS, HAVE_MPTCP, HAVE_SET_RETVAL, PODS};
use crate::socket;

/// `ENETUNREACH`, the same number on every architecture Culvert runs on.
const ENETUNREACH: i32 = 101;
/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// What becomes of it.
pub enum Connect {
    Untouched,
    /// The system call fails.
    Refused,
    /// It goes to this port of the agent instead.
    Captured(Target, u16),
    /// It goes straight to this pod of the node.
    Direct(Address, u16),
}

/// Where in the pod the agent is connected to.
pub enum Target {
    LoopbackV4,
    LoopbackV6,
    /// The pod's own address.
    Own(Address),
}

impl Target {
    /// The words of the address. Written out one by one: a constant of sixteen bytes would become a
    /// map of its own.
    #[inline(always)]
    pub fn words(&self) -> [u32; 4] {
        match self {
            Target::LoopbackV4 => [0, 0, 0xffffu32.to_be(), 0x7f00_0001u32.to_be()],
            Target::LoopbackV6 => [0, 0, 0, 1u32.to_be()],
            Target::Own(address) => address.words(),
        }
    }
}

/// TCP of enrolled pods is captured, and UDP to DNS servers where the pod wants that. The socket of
/// an MPTCP client arrives here as the TCP socket of its first subflow.
#[inline(always)]
pub fn connect(ctx: &SockAddrContext, destination: Address) -> Connect {
    // SAFETY: the helper takes any context of this program type (Linux 5.7).
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(pod) = PODS.get_ptr(netns) else { return Connect::Untouched };
    // SAFETY: the entry stays readable while the program runs. If the pod is withdrawn right now,
    // the value may be that of another pod: this connection is then captured for no one and refused.
    let pod = unsafe { &*pod };
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context.
    let (protocol, port, sk) =
        unsafe { (read!((*addr).protocol), context::port(addr), (*addr).__bindgen_anon_1.sk) };
    let is_tcp = protocol == context::TCP;
    if !(is_tcp || protocol == context::UDP) || sk.is_null() || pod.flags & Pod::LEAVING != 0 {
        return Connect::Untouched;
    }
    let asks = asks(pod, port);
    let socket = Socket { ctx, netns, pod, sk };
    // SAFETY: `sk` is the context's, and not null.
    let before = unsafe { socket::state(sk.cast()) };
    if let Some(before) = before {
        // SAFETY: returned by `state`.
        if unsafe { socket::is(before, SocketRole::Exempt) } {
            count(|counts| &mut counts.passed_agent);
            return Connect::Untouched;
        }
        // The same socket may have been captured on its way elsewhere (it was disconnected with
        // AF_UNSPEC, or the attempt failed).
        // SAFETY: as above; the value belongs to this socket.
        unsafe {
            if socket::is(before, SocketRole::Direct) {
                socket.unmark();
            }
            (*before).role = SocketRole::Plain as u32;
        }
    }
    if !is_tcp && !asks {
        return Connect::Untouched;
    }
    if is_left_alone(netns, pod, destination, port) {
        return Connect::Untouched;
    }
    let own = if destination.is_v4() { pod.ipv4 } else { pod.ipv6 };
    if own.is_unspecified() {
        debug!(ctx, "netns {}: no address to reach {:i} port {} from", netns, destination.ip, port);
        return refuse_unreachable();
    }
    let mut state = SocketState::new(SocketRole::Captured, destination, port, own);
    if !asks {
        match socket.choose(destination, port) {
            Choice::Agent => {}
            Choice::Elsewhere(verdict) => state.verdict = verdict,
            Choice::Straight(state) => return socket.go(&state),
        }
    }
    // SAFETY: `sk` is the context's, and not null.
    if !unsafe { socket::note(sk.cast(), &state) } {
        return Connect::Refused;
    }
    if is_tcp && HAVE_MPTCP.load() != 0 {
        // SAFETY: `sk` is the context's; the result is checked.
        let mptcp = unsafe { bpf_skc_to_mptcp_sock(sk.cast()) };
        if !mptcp.is_null() {
            // The application asks this socket for its peer, not the subflow's.
            // SAFETY: not null.
            unsafe { socket::note(mptcp.cast(), &state) };
        }
    }
    debug!(ctx, "netns {}: captured to {:i} port {}", netns, destination.ip, port);
    // SAFETY: `sk` is the context's, and not null.
    let target = unsafe { target(sk, destination, own) };
    if asks {
        count(|counts| &mut counts.captured_dns);
        return Connect::Captured(target, DNS_PORT);
    }
    count(|counts| &mut counts.captured);
    Connect::Captured(target, OUTBOUND_PORT)
}

/// A datagram is about to be sent to an address that the call names.
#[inline(always)]
pub fn send(ctx: &SockAddrContext, destination: Address) -> Connect {
    let addr = ctx.sock_addr;
    // SAFETY: `addr` is the context.
    let (port, sk) = unsafe { (context::port(addr), (*addr).__bindgen_anon_1.sk) };
    if port != RESOLVER_PORT as u32 || sk.is_null() {
        return Connect::Untouched;
    }
    // SAFETY: the helper takes any context of this program type (Linux 5.7).
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    let Some(pod) = PODS.get_ptr(netns) else { return Connect::Untouched };
    // SAFETY: as in `connect`.
    let pod = unsafe { &*pod };
    if !asks(pod, port) || pod.flags & Pod::LEAVING != 0 {
        return Connect::Untouched;
    }
    // SAFETY: `sk` is the context's, and not null.
    let (before, state) = unsafe { (socket::state(sk.cast()), read!((*sk).state)) };
    let mut is_connected = false;
    if let Some(before) = before {
        // SAFETY: returned by `state`.
        if unsafe { socket::is(before, SocketRole::Exempt) } {
            count(|counts| &mut counts.passed_agent);
            return Connect::Untouched;
        }
        // SAFETY: as above.
        is_connected =
            state == BPF_TCP_ESTABLISHED && unsafe { socket::is(before, SocketRole::Captured) };
    }
    if is_left_alone(netns, pod, destination, port) {
        return Connect::Untouched;
    }
    let own = if destination.is_v4() { pod.ipv4 } else { pod.ipv6 };
    if own.is_unspecified() {
        return refuse_unreachable();
    }
    // What the socket is connected to stays its peer.
    if !is_connected {
        let state = SocketState::new(SocketRole::Asking, destination, port, own);
        // SAFETY: `sk` is the context's, and not null.
        if !unsafe { socket::note(sk.cast(), &state) } {
            return Connect::Refused;
        }
    }
    debug!(ctx, "netns {}: question to {:i} captured", netns, destination.ip);
    count(|counts| &mut counts.captured_dns);
    // The interface in a link-local destination has been taken over already, and counts as one that
    // the socket is bound to.
    let target = if destination.is_link_local() {
        Target::Own(own)
    } else {
        // SAFETY: `sk` is the context's, and not null.
        unsafe { target(sk, destination, own) }
    };
    Connect::Captured(target, DNS_PORT)
}

/// Whether what goes to this port is a question for the agent.
#[inline(always)]
fn asks(pod: &Pod, port: u32) -> bool {
    port == RESOLVER_PORT as u32 && pod.flags & Pod::CAPTURES_DNS != 0
}

/// A socket that is bound to a device does not reach 127.0.0.1, but it does reach its own address.
///
/// # Safety
/// `sk` is the context's, and not null.
#[inline(always)]
unsafe fn target(sk: *mut bpf_sock, destination: Address, own: Address) -> Target {
    // SAFETY: by this function's contract.
    let device = unsafe { read!((*sk).bound_dev_if) };
    if device != 0 && device != LOOPBACK {
        Target::Own(own)
    } else if destination.is_v4() {
        Target::LoopbackV4
    } else {
        Target::LoopbackV6
    }
}

/// Whether it stays within the pod, or is excluded.
#[inline(always)]
fn is_left_alone(netns: u64, pod: &Pod, destination: Address, port: u32) -> bool {
    if is_own(netns, destination) {
        count(|counts| &mut counts.passed_own);
        return true;
    }
    let excluded = is_excluded(netns, pod, destination, port);
    if excluded {
        count(|counts| &mut counts.passed_excluded);
    }
    excluded
}

/// Loopback, the pod itself, or "this host" (RFC 1122 section 3.2.1.3).
#[inline(always)]
fn is_own(netns: u64, destination: Address) -> bool {
    if destination.is_loopback() || destination.is_unspecified() {
        return true;
    }
    // SAFETY: the value is read at once.
    unsafe { ADDRESSES.get(destination) }.is_some_and(|owner| *owner == netns)
}

#[inline(always)]
fn is_excluded(netns: u64, pod: &Pod, destination: Address, port: u32) -> bool {
    if pod.flags & Pod::HAS_EXCLUDED_OUTBOUND_PORTS != 0 {
        let key = ExcludedPort::new(netns, port as u16, ExcludedPort::OUTBOUND);
        if EXCLUDED_PORTS.get_ptr(key).is_some() {
            return true;
        }
    }
    if pod.flags & Pod::HAS_EXCLUDED_NETS != 0 {
        let key = Key::new(ExcludedNet::BITS, ExcludedNet::new(netns, destination));
        return EXCLUDED_NETS.get(&key).is_some();
    }
    false
}

/// What a host without a route tells. Applications that try several addresses go on to the next
/// one, while a connection to the agent would look like success to them.
#[inline(always)]
fn refuse_unreachable() -> Connect {
    count(|counts| &mut counts.refused_family);
    if HAVE_SET_RETVAL.load() != 0 {
        // SAFETY: takes a number only (Linux 5.18). Otherwise the application sees EPERM.
        unsafe { bpf_set_retval(-ENETUNREACH) };
    }
    Connect::Refused
}
