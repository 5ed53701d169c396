//! Carries the original destination from the application's socket to the agent's, and notes the
//! node's own connections to pods.
//!
//! A captured connection is told apart by its client end. That is known, and cannot change any
//! more, when the SYN is about to be sent: the flow is in the table before the agent's end can exist.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{
    BPF_ANY, BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB, BPF_SOCK_OPS_HDR_OPT_LEN_CB,
    BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_STATE_CB, BPF_SOCK_OPS_STATE_CB_FLAG,
    BPF_SOCK_OPS_TCP_CONNECT_CB, BPF_SOCK_OPS_WRITE_HDR_OPT_CB, BPF_TCP_CLOSE, BPF_TCP_FIN_WAIT2,
    BPF_TCP_SYN_SENT, bpf_sock, bpf_sock_ops,
};
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_sock_ops_cb_flags_set,
};
use aya_ebpf::macros::sock_ops;
use aya_ebpf::programs::SockOpsContext;
use aya_log_ebpf::debug;
use culvert_abi::{Flow, FlowKey, OUTBOUND_PORT, Probe, SocketRole, SocketState};

use crate::context::{Ends, read, socket_ends};
use crate::counts::count;
use crate::maps::{ACCELERATES, ADDRESSES, NODE_NETNS, POD_FLOWS, PROBES};
use crate::{direct, joint, socket};

/// `BPF_CGROUP_SOCK_OPS`, with the namespace's cookie (Linux 5.15). It is called some sixteen times
/// per connection and returns at once for all but a few of them. Always 1, and never with a reply:
/// what other programs on the cgroup answer stays.
#[sock_ops]
pub fn cv_sockops(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    // SAFETY: `ops` is the context.
    match unsafe { read!((*ops).op) } {
        BPF_SOCK_OPS_TCP_CONNECT_CB => connecting(&ctx),
        BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB => established(&ctx),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => accepted(&ctx),
        BPF_SOCK_OPS_STATE_CB => changed(&ctx),
        BPF_SOCK_OPS_HDR_OPT_LEN_CB => direct::reserve_option(&ctx),
        BPF_SOCK_OPS_WRITE_HDR_OPT_CB => direct::write_option(&ctx),
        _ => {}
    }
    1
}

#[inline(always)]
fn netns(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the helper takes this context (Linux 5.15).
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) }
}

#[inline(always)]
pub fn sock(ops: *mut bpf_sock_ops) -> *mut bpf_sock {
    // SAFETY: `ops` is the context.
    unsafe { (*ops).__bindgen_anon_2.sk }
}

/// A SYN is about to be sent.
#[inline(always)]
fn connecting(ctx: &SockOpsContext) {
    let netns = netns(ctx);
    let sk = sock(ctx.ops);
    if sk.is_null() {
        return;
    }
    // SAFETY: `ctx.ops` is the context.
    let ends = unsafe { socket_ends(ctx.ops) };
    if netns == NODE_NETNS.load() {
        return probing(ctx, sk, &ends);
    }
    // SAFETY: `sk` is the context's, and not null.
    let Some(state) = (unsafe { socket::state(sk.cast()) }) else { return };
    // SAFETY: returned by `state`.
    let state = unsafe { &*state };
    if state.role == SocketRole::Direct as u32 {
        return direct::connecting(ctx, netns, state, &ends);
    }
    if state.role != SocketRole::Captured as u32 || ends.remote_port != OUTBOUND_PORT as u32 {
        return;
    }
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_FLOWS.get(&netns) }) else { return };
    // SAFETY: the helper takes this context.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    let key = flow_key(&ends);
    let (original, port, verdict) = (state.original, state.port, state.verdict);
    let flow = Flow { socket: cookie, original, port, reserved: 0, verdict };
    if flows.insert(key, flow, BPF_ANY.into()).is_err() {
        debug!(ctx, "netns {}: too many connections on their way to the agent", netns);
        count(|counts| &mut counts.refused_full);
        return;
    }
    watch(ctx.ops);
}

/// The same, in the node's own namespace. Only there can such a record be made, so a pod cannot
/// pass for the node by taking its address.
#[inline(always)]
fn probing(ctx: &SockOpsContext, sk: *mut bpf_sock, ends: &Ends) {
    if ADDRESSES.get_ptr(ends.remote).is_none() {
        return;
    }
    // SAFETY: `sk` is the context's, and not null.
    if let Some(state) = unsafe { socket::state(sk.cast()) } {
        // SAFETY: returned by `state`.
        if unsafe { socket::is(state, SocketRole::Exempt) } {
            return;
        }
    }
    if PROBES.insert(probe(ends), 0, BPF_ANY.into()).is_err() {
        debug!(ctx, "too many connections of the node on their way to pods");
        count(|counts| &mut counts.probes_full);
        return;
    }
    watch(ctx.ops);
}

/// Asks for [`changed`] to be called for this socket.
#[inline(always)]
fn watch(ops: *mut bpf_sock_ops) {
    // SAFETY: `ops` is the context.
    unsafe {
        let flags = read!((*ops).bpf_sock_ops_cb_flags) | BPF_SOCK_OPS_STATE_CB_FLAG;
        bpf_sock_ops_cb_flags_set(ops, flags as i32);
    }
}

/// The connecting end of a connection is complete, and its acknowledgement has not left.
#[inline(always)]
fn established(ctx: &SockOpsContext) {
    if ACCELERATES.load() == 0 {
        return;
    }
    let sk = sock(ctx.ops);
    if sk.is_null() {
        return;
    }
    // SAFETY: `sk` is the context's, and not null.
    let Some(state) = (unsafe { socket::state(sk.cast()) }) else { return };
    // SAFETY: returned by `state`.
    let state = unsafe { &*state };
    if state.role != SocketRole::Direct as u32 || state.flags & SocketState::ACCELERATED == 0 {
        return;
    }
    // SAFETY: `ctx.ops` is the context.
    let ends = unsafe { socket_ends(ctx.ops) };
    joint::join_client(ctx, netns(ctx), &ends);
}

/// The accepting end of a connection is complete, and no one has seen it yet.
#[inline(always)]
fn accepted(ctx: &SockOpsContext) {
    // SAFETY: `ctx.ops` is the context.
    let ends = unsafe { socket_ends(ctx.ops) };
    if ends.local_port != OUTBOUND_PORT as u32 {
        if ACCELERATES.load() != 0 {
            joint::join_server(ctx, netns(ctx), &ends);
        }
        return;
    }
    let netns = netns(ctx);
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_FLOWS.get(&netns) }) else { return };
    let key = FlowKey { source: ends.remote, target: ends.local, port: ends.remote_port };
    // SAFETY: the value is copied at once, and only this end removes it while its client lives.
    let Some(flow) = (unsafe { flows.get(key) }).copied() else {
        debug!(ctx, "netns {}: no flow for port {}", netns, ends.remote_port);
        count(|counts| &mut counts.missing);
        return;
    };
    let mut state = SocketState::new(SocketRole::Accepted, flow.original, flow.port, ends.local);
    state.verdict = flow.verdict;
    let sk = sock(ctx.ops);
    if sk.is_null() {
        return;
    }
    // Without memory the agent finds nothing on the socket, and refuses the connection.
    // SAFETY: `sk` is the context's, and not null.
    unsafe { socket::note(sk.cast(), &state) };
    let _ = flows.remove(key);
}

/// A watched socket goes to another state.
#[inline(always)]
fn changed(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    // SAFETY: `ops` is the context; this callback has two arguments.
    let (old, new) =
        unsafe { (read!((*ops).__bindgen_anon_1.args[0]), read!((*ops).__bindgen_anon_1.args[1])) };
    if old != BPF_TCP_SYN_SENT && new != BPF_TCP_CLOSE && new != BPF_TCP_FIN_WAIT2 {
        return;
    }
    let netns = netns(ctx);
    // SAFETY: `ops` is the context.
    let ends = unsafe { socket_ends(ops) };
    if netns == NODE_NETNS.load() {
        if old == BPF_TCP_SYN_SENT {
            let _ = PROBES.remove(probe(&ends));
        }
        return;
    }
    let sk = sock(ops);
    if sk.is_null() {
        return;
    }
    // SAFETY: `sk` is the context's, and not null.
    let Some(state) = (unsafe { socket::state(sk.cast()) }) else { return };
    // SAFETY: returned by `state`.
    if unsafe { socket::is(state, SocketRole::Direct) } {
        return direct::changed(ctx, netns, &ends, old, new);
    }
    // The agent's end may become complete after the client's, even after the client has closed. The
    // flow is left over only when the client is gone altogether.
    if new != BPF_TCP_CLOSE || ends.remote_port != OUTBOUND_PORT as u32 {
        return;
    }
    // SAFETY: the inner map is only used while this program runs.
    let Some(flows) = (unsafe { POD_FLOWS.get(&netns) }) else { return };
    let key = flow_key(&ends);
    // SAFETY: the value is read at once.
    let Some(flow) = (unsafe { flows.get(key) }) else { return };
    // SAFETY: the helper takes this context.
    if flow.socket == unsafe { bpf_get_socket_cookie(ctx.as_ptr()) } {
        let _ = flows.remove(key);
    }
}

/// The key at the application's end.
#[inline(always)]
fn flow_key(ends: &Ends) -> FlowKey {
    FlowKey { source: ends.local, target: ends.remote, port: ends.local_port }
}

#[inline(always)]
fn probe(ends: &Ends) -> Probe {
    Probe {
        source: ends.local,
        destination: ends.remote,
        source_port: ends.local_port,
        destination_port: ends.remote_port,
    }
}
