//! Connections that go straight from pod to pod of this node, by a verdict that the agent has given.
//!
//! The connect program chooses; the record that proves the connection is made when its ends are
//! final and its SYN has not left; the destination's end lets in nothing without such a record, and
//! asks again whether the verdict holds. A verdict that is taken back in between is noticed by one
//! of the two, or its connection is among the records that the agent reads afterwards.

use core::arch::asm;
use core::ffi::c_void;
use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_EXIST, BPF_NOEXIST, BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP,
    BPF_SOCK_OPS_STATE_CB_FLAG, BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG, BPF_TCP_CLOSE,
    BPF_TCP_ESTABLISHED, BPF_TCP_FIN_WAIT2, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{
    bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_boot_ns, bpf_reserve_hdr_opt,
    bpf_ringbuf_query, bpf_setsockopt, bpf_skc_to_mptcp_sock, bpf_sock_ops_cb_flags_set,
    bpf_store_hdr_opt,
};
use aya_ebpf::programs::{SockAddrContext, SockOpsContext};
use culvert_abi::direct::{
    Backend, DIRECT_OPTION, DirectFlow, DirectKey, EVENTS_SIZE, FlowEvent, Live, MAX_BACKENDS,
    Verdict, VerdictKey,
};
use culvert_abi::{
    Address, HBONE_PORT, OUTBOUND_MARK, OUTBOUND_PORT, PLAINTEXT_PORT, Pod, SocketRole, SocketState,
};

use crate::connect::Connect;
use crate::context::{Ends, fins, read};
use crate::counts::count_direct;
use crate::joint;
use crate::maps::{
    ACCELERATES, ADDRESSES, AGENT, DIRECT_ROOM, EVENTS, HAVE_MPTCP, LIVE, POD_DIRECT, PODS,
    VERDICTS,
};
use crate::socket;

/// `AF_INET`.
const INET: u32 = 2;
/// Socket options, the same numbers on every architecture Culvert runs on.
const SOL_SOCKET: i32 = 1;
const SO_BINDTODEVICE: i32 = 25;
const SO_MARK: i32 = 36;
/// The header flag `SYN`.
const TCP_SYN: u32 = 2;
/// The agent is woken when this much is unread; otherwise it looks by itself from time to time.
const WAKE_AT: u64 = EVENTS_SIZE as u64 / 8;

/// Where a connection of an enrolled pod goes.
pub enum Choice {
    /// To the agent, which chooses.
    Agent,
    /// To the agent, which chooses among the endpoints that this verdict does not name.
    Elsewhere(u64),
    /// To the pod that the socket's state names.
    Straight(SocketState),
}

/// The socket that a connect program is about.
pub struct Socket<'a> {
    pub ctx: &'a SockAddrContext,
    pub netns: u64,
    pub pod: &'a Pod,
    /// The context's, and not null.
    pub sk: *mut bpf_sock,
}

impl Socket<'_> {
    #[inline(always)]
    pub fn choose(&self, destination: Address, port: u32) -> Choice {
        let key = VerdictKey { netns: self.netns, destination, port, reserved: 0 };
        let Some(verdict) = VERDICTS.get_ptr(key) else { return Choice::Agent };
        // SAFETY: the entry stays readable while the program runs. Should it become another verdict's
        // meanwhile, then what is read of it does not match at the destination's end.
        let verdict = unsafe { &*verdict };
        if !holds(verdict) {
            count_direct(|counts| &mut counts.expired);
            return Choice::Agent;
        }
        if !self.is_plain() {
            count_direct(|counts| &mut counts.special);
            return Choice::Agent;
        }
        let Some(live) = LIVE.get_ptr(self.netns) else { return Choice::Agent };
        // SAFETY: the entry stays readable, and each field is read at once.
        let (connections, foreign) =
            unsafe { (read!((*live).connections), read!((*live).foreign)) };
        if foreign != 0 {
            count_direct(|counts| &mut counts.special);
            return Choice::Agent;
        }
        // Signed: where the agent counted anew, it may have missed some.
        if connections as i64 >= DIRECT_ROOM.load() as i64 {
            count_direct(|counts| &mut counts.full);
            return Choice::Agent;
        }
        self.draw(verdict, destination, port)
    }

    #[inline(always)]
    fn draw(&self, verdict: &Verdict, destination: Address, port: u32) -> Choice {
        let id = verdict.id;
        // SAFETY: takes nothing. The high half of the product is even over the sum of weights.
        let random = unsafe { bpf_get_prandom_u32() } as u64;
        let mut drawn = ((random * verdict.total as u64) >> 32) as u32;
        let count = verdict.count as usize;
        let mut n = 0;
        while n < MAX_BACKENDS && n < count {
            let backend = &verdict.backends[n];
            if drawn < backend.weight {
                let (ip, netns) = (backend.ip, backend.netns);
                let backend_port = backend.port as u32;
                // A branch here would be verified once more for each backend.
                let accelerated = (backend.flags & Backend::ACCELERATED) as u32;
                if is_agents(backend_port) {
                    count_direct(|counts| &mut counts.special);
                    return Choice::Agent;
                }
                if ip.is_v4() != destination.is_v4() || !is_served(netns, ip) {
                    count_direct(|counts| &mut counts.backend_gone);
                    return Choice::Agent;
                }
                let mut state =
                    SocketState::new(SocketRole::Direct, destination, port, Address::UNSPECIFIED);
                state.verdict = id;
                state.netns = netns;
                state.backend = ip;
                state.backend_port = backend_port;
                state.flags = accelerated * SocketState::ACCELERATED;
                if flags_of(netns) & Pod::BESIDE_CNI != 0 {
                    state.flags |= SocketState::ANNOUNCED;
                }
                return Choice::Straight(state);
            }
            drawn -= backend.weight;
            n += 1;
        }
        count_direct(|counts| &mut counts.elsewhere);
        Choice::Elsewhere(id)
    }

    /// Notes what was chosen.
    #[inline(always)]
    pub fn go(&self, state: &SocketState) -> Connect {
        let (backend, port) = (state.backend, state.backend_port as u16);
        // SAFETY: `sk` is the context's, and not null.
        if !unsafe { socket::note(self.sk.cast(), state) } {
            return Connect::Refused;
        }
        // istio-cni's rules would lead it to the agent.
        if self.pod.flags & Pod::BESIDE_CNI != 0 && !self.mark(OUTBOUND_MARK) {
            return Connect::Refused;
        }
        Connect::Direct(backend, port)
    }

    /// Takes off the mark of an earlier direct connection of this socket.
    #[inline(always)]
    pub fn unmark(&self) {
        // SAFETY: `sk` is the context's, and not null.
        if unsafe { read!((*self.sk).mark) } == OUTBOUND_MARK {
            self.mark(0);
        }
    }

    #[inline(always)]
    fn mark(&self, mark: u32) -> bool {
        let mut mark = mark;
        let value: *mut u32 = &mut mark;
        // SAFETY: the helper takes this context (Linux 5.8), and reads four bytes.
        unsafe { bpf_setsockopt(self.ctx.as_ptr(), SOL_SOCKET, SO_MARK, value.cast(), 4) == 0 }
    }

    /// Whether nothing about the socket asks for another way than the ordinary one.
    #[inline(always)]
    fn is_plain(&self) -> bool {
        let sk = self.sk;
        // SAFETY: `sk` is the context's, and not null.
        let (family, device, mark, source4, source6) = unsafe {
            (
                read!((*sk).family),
                read!((*sk).bound_dev_if),
                read!((*sk).mark),
                read!((*sk).src_ip4),
                [
                    read!((*sk).src_ip6[0]),
                    read!((*sk).src_ip6[1]),
                    read!((*sk).src_ip6[2]),
                    read!((*sk).src_ip6[3]),
                ],
            )
        };
        if device != 0 || mark != 0 {
            return false;
        }
        let source = if family == INET { Address::v4(source4) } else { Address::v6(source6) };
        if !source.is_unspecified() && !is_address_of(self.netns, source) {
            return false;
        }
        if HAVE_MPTCP.load() == 0 {
            return true;
        }
        // SAFETY: `sk` is the context's.
        unsafe { bpf_skc_to_mptcp_sock(sk.cast()).is_null() }
    }
}

/// Whether a verdict counts now.
#[inline(always)]
fn holds(verdict: &Verdict) -> bool {
    let Some(agent) = AGENT.get(0) else { return false };
    // SAFETY: takes nothing (Linux 5.8).
    let now = unsafe { bpf_ktime_get_boot_ns() };
    // SAFETY: the agent may write the field meanwhile, in one piece.
    let admits = unsafe { read!(agent.admit_until) };
    now < verdict.expires && now < admits && verdict.total != 0
}

#[inline(always)]
fn is_address_of(netns: u64, address: Address) -> bool {
    // SAFETY: the value is read at once.
    unsafe { ADDRESSES.get(address) }.is_some_and(|owner| *owner == netns)
}

/// Whether the agent's listeners in a pod have this port.
#[inline(always)]
fn is_agents(port: u32) -> bool {
    port == OUTBOUND_PORT as u32 || port == PLAINTEXT_PORT as u32 || port == HBONE_PORT as u32
}

/// Whether the pod has this address, and its connections are seen to at its end.
#[inline(always)]
fn is_served(netns: u64, address: Address) -> bool {
    let Some(pod) = PODS.get_ptr(netns) else { return false };
    // SAFETY: the flags are read at once.
    unsafe { (*pod).flags & (Pod::LEAVING | Pod::BY_AGENT) == 0 && is_address_of(netns, address) }
}

#[inline(always)]
fn flags_of(netns: u64) -> u32 {
    // SAFETY: the flags are read at once.
    PODS.get_ptr(netns).map_or(0, |pod| unsafe { (*pod).flags })
}

/// What the destination's end knows of a connection that arrives.
pub enum Arriving {
    /// Nothing: it is not a direct one.
    Unknown,
    Admitted,
    /// It was let go, but the verdict does not hold any more.
    Retracted,
}

/// A connection arrives in a pod.
#[inline(always)]
pub fn arriving(netns: u64, ends: &Ends) -> Arriving {
    // SAFETY: the value is read at once.
    let Some(source) = (unsafe { ADDRESSES.get(ends.remote) }).copied() else {
        return Arriving::Unknown;
    };
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_DIRECT.get(&source) }) else { return Arriving::Unknown };
    let key = DirectKey {
        source: ends.remote,
        destination: ends.local,
        source_port: ends.remote_port,
        destination_port: ends.local_port,
    };
    let Some(flow) = flows.get_ptr_mut(key) else { return Arriving::Unknown };
    // SAFETY: the entry stays valid while the program runs, and its client lives.
    let (id, destination, original, port) =
        unsafe { ((*flow).verdict, (*flow).destination, (*flow).original, (*flow).port) };
    let key = VerdictKey { netns: source, destination: original, port, reserved: 0 };
    let verdict = VERDICTS.get_ptr(key);
    // SAFETY: the entry stays readable while the program runs.
    let valid = verdict.is_some_and(|verdict| unsafe { (*verdict).id == id && holds(&*verdict) });
    let admitted = valid && destination == netns;
    // SAFETY: as above; nobody else writes the field.
    unsafe {
        (*flow).arrived = if admitted { DirectFlow::ADMITTED } else { DirectFlow::RETRACTED }
    };
    if admitted {
        count_direct(|counts| &mut counts.admitted);
        Arriving::Admitted
    } else {
        count_direct(|counts| &mut counts.retracted);
        Arriving::Retracted
    }
}

/// The SYN of a direct connection is about to be sent: its ends are final.
#[inline(always)]
pub fn connecting(ctx: &SockOpsContext, netns: u64, state: &SocketState, ends: &Ends) {
    if ends.remote != state.backend || ends.remote_port != state.backend_port {
        return;
    }
    if !is_address_of(netns, ends.local) {
        if let Some(live) = LIVE.get_ptr_mut(netns) {
            // SAFETY: the entry stays valid while the program runs.
            unsafe { (*live).foreign = 1 };
        }
        return hold_back(ctx);
    }
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_DIRECT.get(&netns) }) else { return hold_back(ctx) };
    let Some(live) = LIVE.get_ptr_mut(netns) else { return hold_back(ctx) };
    let flow = DirectFlow {
        // SAFETY: the helper takes this context.
        socket: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        verdict: state.verdict,
        source: netns,
        destination: state.netns,
        original: state.original,
        port: state.port,
        arrived: 0,
        // SAFETY: takes nothing.
        connected_at: unsafe { bpf_ktime_get_boot_ns() },
        established_at: 0,
        half_received: 0,
    };
    let key = direct_key(ends);
    if flows.insert(key, flow, BPF_NOEXIST.into()).is_ok() {
        add(live, 1);
    } else if flows.insert(key, flow, BPF_EXIST.into()).is_err() {
        return hold_back(ctx);
    }
    count_direct(|counts| &mut counts.opened);
    let announced = state.flags & SocketState::ANNOUNCED != 0;
    let options = if announced { BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG } else { 0 };
    // SAFETY: `ctx.ops` is the context.
    unsafe {
        let flags = read!((*ctx.ops).bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG | options;
        bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32);
    }
}

/// Without a record the destination's end would take the connection for one from anywhere.
#[inline(always)]
fn hold_back(ctx: &SockOpsContext) {
    count_direct(|counts| &mut counts.unrecorded);
    strand(ctx);
}

/// A program cannot fail a connection here, but a socket that is bound to loopback sends nothing to
/// other places (Linux 5.9).
#[inline(always)]
fn strand(ctx: &SockOpsContext) {
    let mut device = u32::from_ne_bytes(*b"lo\0\0");
    let name: *mut u32 = &mut device;
    // SAFETY: the helper takes this context, and reads four bytes.
    unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_SOCKET, SO_BINDTODEVICE, name.cast(), 4) };
}

/// The header of a segment is being measured.
#[inline(always)]
pub fn reserve_option(ctx: &SockOpsContext) {
    if is_announced(ctx.ops) {
        // SAFETY: the helper takes this context (Linux 5.10).
        unsafe { bpf_reserve_hdr_opt(ctx.ops, DIRECT_OPTION.len() as u32, 0) };
    }
}

/// The header of a segment is being written.
#[inline(always)]
pub fn write_option(ctx: &SockOpsContext) {
    if is_announced(ctx.ops) {
        let option = u32::from_ne_bytes(DIRECT_OPTION);
        let bytes: *const u32 = &option;
        // SAFETY: the helper takes this context (Linux 5.10), and reads four bytes.
        unsafe { bpf_store_hdr_opt(ctx.ops, bytes.cast(), DIRECT_OPTION.len() as u32, 0) };
    }
}

/// Whether the segment is the SYN of a direct connection that has to be told apart.
#[inline(always)]
fn is_announced(ops: *mut bpf_sock_ops) -> bool {
    // SAFETY: `ops` is the context.
    let (flags, sk) = unsafe { (read!((*ops).skb_tcp_flags), (*ops).__bindgen_anon_2.sk) };
    if flags & TCP_SYN == 0 || sk.is_null() {
        return false;
    }
    // SAFETY: `sk` is the context's, and not null.
    let Some(state) = (unsafe { socket::state(sk.cast::<c_void>()) }) else { return false };
    // SAFETY: returned by `state`.
    unsafe { socket::is(state, SocketRole::Direct) && (*state).flags & SocketState::ANNOUNCED != 0 }
}

/// The client's socket of a direct connection goes to another state.
#[inline(always)]
pub fn changed(ctx: &SockOpsContext, netns: u64, ends: &Ends, old: u32, new: u32) {
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_DIRECT.get(&netns) }) else { return };
    let key = direct_key(ends);
    let Some(flow) = flows.get_ptr_mut(key) else { return };
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    // SAFETY: the entry is this socket's alone to change, as its cookie shows.
    let flow = unsafe { &mut *flow };
    if flow.socket != cookie {
        return;
    }
    // SAFETY: takes nothing.
    let now = unsafe { bpf_ktime_get_boot_ns() };
    match new {
        BPF_TCP_ESTABLISHED => {
            flow.established_at = now;
            // SAFETY: `ctx.ops` is the context.
            unsafe {
                let flags =
                    read!((*ctx.ops).bpf_sock_ops_cb_flags) & !BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG;
                bpf_sock_ops_cb_flags_set(ctx.ops, flags as i32);
            }
            // Somebody has the address of a pod that is gone, and nobody of ours is there to judge.
            if flow.arrived == 0 {
                count_direct(|counts| &mut counts.astray);
                strand(ctx);
            }
            tell(ctx.ops, FlowEvent::OPENED, old, &key, flow, now);
        }
        BPF_TCP_FIN_WAIT2 => {
            // SAFETY: `ctx.ops` is the context.
            flow.half_received = unsafe { read!((*ctx.ops).bytes_received) };
        }
        BPF_TCP_CLOSE => {
            tell(ctx.ops, FlowEvent::CLOSED, old, &key, flow, now);
            if flows.remove(key).is_ok()
                && let Some(live) = LIVE.get_ptr_mut(netns)
            {
                add(live, u64::MAX);
                if ACCELERATES.load() != 0 && joint::forget(cookie) {
                    joint::add(live, u64::MAX);
                }
            }
        }
        _ => {}
    }
}

#[inline(always)]
fn tell(ops: *mut bpf_sock_ops, kind: u32, old: u32, key: &DirectKey, flow: &DirectFlow, now: u64) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        count_direct(|counts| &mut counts.events_lost);
        return;
    };
    let event = entry.as_mut_ptr();
    // SAFETY: `ops` is the context, and the entry has room for the event, whose every field is set.
    unsafe {
        (*event).kind = kind;
        (*event).state = old;
        (*event).key = *key;
        (*event).flow = *flow;
        (*event).at = now;
        let acked = read!((*ops).bytes_acked);
        let received = read!((*ops).bytes_received);
        let all_acked = read!((*ops).snd_una) == read!((*ops).snd_nxt);
        let (ours, theirs) = fins(old, all_acked, received > flow.half_received);
        // What is sent counts the SYN; both count the FIN (`tcp_sock.bytes_acked`).
        (*event).sent = acked.saturating_sub(1).saturating_sub(ours as u64);
        (*event).received = received.saturating_sub(theirs as u64);
        if ACCELERATES.load() != 0 {
            joint::tell(event, flow.socket);
        }
        (*event).srtt = read!((*ops).srtt_us);
        (*event).min_rtt = read!((*ops).rtt_min);
        (*event).retransmits = read!((*ops).total_retrans);
        (*event).reserved = 0;
    }
    let events = ptr::from_ref(&EVENTS).cast_mut().cast();
    // SAFETY: the helper takes a ring buffer.
    let unread = unsafe { bpf_ringbuf_query(events, BPF_RB_AVAIL_DATA.into()) };
    let wake = if unread >= WAKE_AT { BPF_RB_FORCE_WAKEUP } else { BPF_RB_NO_WAKEUP };
    entry.submit(wake.into());
}

/// Adds atomically, which the library has no function for on this target.
#[inline(always)]
fn add(live: *mut Live, number: u64) {
    // SAFETY: the entry stays valid while the program runs; its first field is the number.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) live, in(reg) number) };
}

/// The key at the client's end.
#[inline(always)]
pub fn direct_key(ends: &Ends) -> DirectKey {
    DirectKey {
        source: ends.local,
        destination: ends.remote,
        source_port: ends.local_port,
        destination_port: ends.remote_port,
    }
}
