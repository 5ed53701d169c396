//! Leads a connection that arrives in a pod to the agent's listener for it.
//!
//! The program is loaded once for each pod with the pod's cookie as a constant, because the kernel
//! does not tell a program of this type which namespace it runs in.

use aya_ebpf::bindings::sk_action::{SK_DROP, SK_PASS};
use aya_ebpf::macros::sk_lookup;
use aya_ebpf::programs::SkLookupContext;
use aya_log_ebpf::debug;
use culvert_abi::{
    DNS_PORT, ExcludedPort, HBONE_PORT, Listener, ListenerKey, OUTBOUND_PORT, PLAINTEXT_PORT, Pod,
    Probe,
};

use crate::context::{Ends, TCP, lookup_ends, read};
use crate::counts::count;
use crate::direct::{Arriving, arriving};
use crate::maps::{ADDRESSES, EXCLUDED_PORTS, LISTENERS, POD_NETNS, PODS, PROBES};

/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;
/// Take exactly the agent's socket, not another one that shares its port (Linux 5.9).
const BPF_SK_LOOKUP_F_NO_REUSEPORT: u64 = 2;

/// `BPF_SK_LOOKUP` (Linux 5.9): runs when the first segment of a connection looks for a listener,
/// never for a connection that exists.
#[sk_lookup]
pub fn cv_sk_lookup(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    // SAFETY: `lookup` is the context.
    let (protocol, interface, ends) = unsafe {
        (read!((*lookup).protocol), read!((*lookup).ingress_ifindex), lookup_ends(lookup))
    };
    let netns = POD_NETNS.load();
    if protocol != TCP && ends.local_port != DNS_PORT as u32 {
        return SK_PASS;
    }
    let inside = interface == LOOPBACK || is_own(netns, &ends);
    if ends.local_port == DNS_PORT as u32 && has(netns, Pod::CAPTURES_DNS) {
        return asked(&ctx, netns, inside);
    }
    if protocol != TCP {
        return SK_PASS;
    }
    if inside {
        return from_inside(&ctx, netns, ends.local_port);
    }
    from_outside(&ctx, netns, &ends)
}

/// Whether the pod speaks to itself by its own address. Such a segment travels over `lo`, yet names
/// the interface that has the address.
#[inline(always)]
fn is_own(netns: u64, ends: &Ends) -> bool {
    if ends.local == ends.remote {
        return true;
    }
    let owned = |address| {
        // SAFETY: the value is read at once.
        unsafe { ADDRESSES.get(address) }.is_some_and(|owner| *owner == netns)
    };
    owned(ends.remote) && owned(ends.local)
}

/// The agent answers the pod's own questions only.
#[inline(always)]
fn asked(ctx: &SkLookupContext, netns: u64, inside: bool) -> u32 {
    if inside {
        return SK_PASS;
    }
    debug!(ctx, "netns {}: question from outside refused", netns);
    count(|counts| &mut counts.inbound_refused);
    SK_DROP
}

/// Only captured connections, which were led to the agent's port, are its business.
#[inline(always)]
fn from_inside(ctx: &SkLookupContext, netns: u64, port: u32) -> u32 {
    if port != OUTBOUND_PORT as u32 {
        return SK_PASS;
    }
    let assigned = assign(ctx, netns, Listener::Outbound);
    if assigned == SK_DROP {
        debug!(ctx, "netns {}: outbound connection refused, the agent does not listen", netns);
        count(|counts| &mut counts.refused_outbound);
    }
    assigned
}

#[inline(always)]
fn from_outside(ctx: &SkLookupContext, netns: u64, ends: &Ends) -> u32 {
    let port = ends.local_port;
    let beside_cni = has(netns, Pod::BESIDE_CNI);
    if port == OUTBOUND_PORT as u32 || port == PLAINTEXT_PORT as u32 {
        if beside_cni {
            return translated(ctx, netns, port);
        }
        count(|counts| &mut counts.inbound_refused);
        return SK_DROP;
    }
    if port == HBONE_PORT as u32 {
        let assigned = lead(ctx, netns, port, Listener::Hbone);
        if assigned == SK_PASS {
            count(|counts| &mut counts.inbound_hbone);
        }
        return assigned;
    }
    match arriving(netns, ends) {
        Arriving::Unknown => {}
        Arriving::Admitted => return SK_PASS,
        // The agent judges it as its source's. On the plaintext listener it would be nobody's, should
        // its record be gone by then; what is not captured is on the outbound one for this alone.
        Arriving::Retracted => return lead(ctx, netns, port, Listener::Outbound),
    }
    if beside_cni && ends.remote.is_node_probe() {
        debug!(ctx, "netns {}: port {} from the node itself", netns, port);
        count(|counts| &mut counts.inbound_node);
        return SK_PASS;
    }
    if is_excluded(netns, port) {
        count(|counts| &mut counts.inbound_excluded);
        return SK_PASS;
    }
    let probe = Probe {
        source: ends.remote,
        destination: ends.local,
        source_port: ends.remote_port,
        destination_port: port,
    };
    if PROBES.get_ptr(probe).is_some() {
        debug!(ctx, "netns {}: port {} from the node itself", netns, port);
        count(|counts| &mut counts.inbound_node);
        return SK_PASS;
    }
    let assigned = lead(ctx, netns, port, Listener::Plaintext);
    if assigned == SK_PASS {
        count(|counts| &mut counts.inbound_plaintext);
    }
    assigned
}

/// istio-cni's rules have translated the destination into a port of the agent. Who named that port
/// by himself gets as far, and is refused by the agent: only connection tracking knows the difference.
#[inline(always)]
fn translated(ctx: &SkLookupContext, netns: u64, port: u32) -> u32 {
    if port == OUTBOUND_PORT as u32 {
        return lead(ctx, netns, port, Listener::Outbound);
    }
    let assigned = lead(ctx, netns, port, Listener::Plaintext);
    if assigned == SK_PASS {
        count(|counts| &mut counts.inbound_plaintext);
    }
    assigned
}

#[inline(always)]
fn lead(ctx: &SkLookupContext, netns: u64, port: u32, listener: Listener) -> u32 {
    let assigned = assign(ctx, netns, listener);
    if assigned == SK_DROP {
        debug!(ctx, "netns {}: port {} refused, the agent does not listen", netns, port);
        count(|counts| &mut counts.inbound_refused);
    }
    assigned
}

#[inline(always)]
fn is_excluded(netns: u64, port: u32) -> bool {
    let key = ExcludedPort::new(netns, port as u16, ExcludedPort::INBOUND);
    has(netns, Pod::HAS_EXCLUDED_INBOUND_PORTS) && EXCLUDED_PORTS.get_ptr(key).is_some()
}

/// Whether the pod has a flag.
#[inline(always)]
fn has(netns: u64, flag: u32) -> bool {
    let Some(pod) = PODS.get_ptr(netns) else { return false };
    // SAFETY: the flags are read at once.
    unsafe { (*pod).flags & flag != 0 }
}

/// Gives the connection to one of the pod's listeners, or drops it: nobody else may have it.
#[inline(always)]
fn assign(ctx: &SkLookupContext, netns: u64, listener: Listener) -> u32 {
    let key = ListenerKey::new(netns, listener);
    match LISTENERS.redirect_sk_lookup(ctx, key, BPF_SK_LOOKUP_F_NO_REUSEPORT) {
        Ok(()) => SK_PASS,
        Err(_) => SK_DROP,
    }
}
