//! What becomes of a connection that a process opens; shared by the two connect programs.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::btf_maps::lpm_trie::Key;
use aya_ebpf::helpers::generated::{bpf_get_netns_cookie, bpf_set_retval, bpf_skc_to_mptcp_sock};
use aya_ebpf::programs::SockAddrContext;
use aya_log_ebpf::debug;
use culvert_abi::{Address, ExcludedNet, ExcludedPort, Pod, SocketRole, SocketState};

use crate::context::{self, read};
use crate::counts::count;
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
    /// The socket connects to the agent instead.
    Captured(Target),
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

/// Only TCP of enrolled pods is captured. The socket of an MPTCP client arrives here as the TCP
/// socket of its first subflow.
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
    if protocol != context::TCP || sk.is_null() || pod.flags & Pod::LEAVING != 0 {
        return Connect::Untouched;
    }
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
        unsafe { (*before).role = SocketRole::Plain as u32 };
    }
    if is_own(netns, destination) {
        count(|counts| &mut counts.passed_own);
        return Connect::Untouched;
    }
    if is_excluded(netns, pod, destination, port) {
        count(|counts| &mut counts.passed_excluded);
        return Connect::Untouched;
    }
    let is_v4 = destination.is_v4();
    let own = if is_v4 { pod.ipv4 } else { pod.ipv6 };
    if own.is_unspecified() {
        debug!(ctx, "netns {}: no address to reach {:i} port {} from", netns, destination.ip, port);
        count(|counts| &mut counts.refused_family);
        return refuse_unreachable();
    }
    let role = SocketRole::Captured as u32;
    let mut state = SocketState { role, port, original: destination, own };
    // SAFETY: `sk` is the context's, and not null.
    if !unsafe { socket::note(sk.cast(), &mut state) } {
        return Connect::Refused;
    }
    if HAVE_MPTCP.load() != 0 {
        // SAFETY: `sk` is the context's; the result is checked.
        let mptcp = unsafe { bpf_skc_to_mptcp_sock(sk.cast()) };
        if !mptcp.is_null() {
            // The application asks this socket for its peer, not the subflow's.
            // SAFETY: not null.
            unsafe { socket::note(mptcp.cast(), &mut state) };
        }
    }
    debug!(ctx, "netns {}: captured to {:i} port {}", netns, destination.ip, port);
    count(|counts| &mut counts.captured);
    // A socket that is bound to a device does not reach 127.0.0.1, but it does reach its own address.
    // SAFETY: `sk` is the context's, and not null.
    let device = unsafe { read!((*sk).bound_dev_if) };
    Connect::Captured(if device != 0 && device != LOOPBACK {
        Target::Own(own)
    } else if is_v4 {
        Target::LoopbackV4
    } else {
        Target::LoopbackV6
    })
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
    if HAVE_SET_RETVAL.load() != 0 {
        // SAFETY: takes a number only (Linux 5.18). Otherwise the application sees EPERM.
        unsafe { bpf_set_retval(-ENETUNREACH) };
    }
    Connect::Refused
}
