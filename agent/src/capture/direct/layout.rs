//! Between the agent's types and those that lie in the kernel's maps.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use culvert_abi::{Address, direct as abi};
use culvert_core::tables::{Backend, NetnsCookie, Verdict, VerdictId, VerdictKey};

use super::{Arrival, DirectCounts, DirectFlow, SocketCookie};

const NO_BACKEND: abi::Backend =
    abi::Backend { ip: Address::UNSPECIFIED, port: 0, weight: 0, netns: 0 };

pub fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub fn verdict_key(key: &VerdictKey) -> abi::VerdictKey {
    abi::VerdictKey {
        netns: key.source.0,
        destination: Address::from(key.destination.ip()),
        port: key.destination.port().into(),
        reserved: 0,
    }
}

pub fn key_of(key: &abi::VerdictKey) -> VerdictKey {
    VerdictKey { source: NetnsCookie(key.netns), destination: addr(key.destination, key.port) }
}

/// Backends beyond the bound count as elsewhere, and so do those whose weight would overflow the sum:
/// connections go by the agent rather than somewhere else.
pub fn verdict_value(verdict: &Verdict) -> abi::Verdict {
    let mut backends = [NO_BACKEND; abi::MAX_BACKENDS];
    let mut total = verdict.elsewhere;
    let mut count = 0;
    for (slot, backend) in backends.iter_mut().zip(&verdict.backends) {
        let Some(sum) = total.checked_add(backend.weight) else { break };
        total = sum;
        count += 1;
        *slot = abi::Backend {
            ip: Address::from(backend.to.ip()),
            port: backend.to.port().into(),
            weight: backend.weight,
            netns: backend.netns.0,
        };
    }
    for backend in verdict.backends.iter().skip(count as usize) {
        total = total.saturating_add(backend.weight);
    }
    let expires = nanoseconds(verdict.expires);
    abi::Verdict { id: verdict.id.0, expires, total, count, backends }
}

pub fn verdict_of(verdict: &abi::Verdict) -> Verdict {
    let backends: Vec<Backend> = verdict
        .backends
        .iter()
        .take(verdict.count as usize)
        .map(|backend| Backend {
            to: addr(backend.ip, backend.port),
            netns: NetnsCookie(backend.netns),
            weight: backend.weight,
        })
        .collect();
    let local = backends.iter().fold(0u32, |sum, backend| sum.saturating_add(backend.weight));
    Verdict {
        id: VerdictId(verdict.id),
        expires: Duration::from_nanos(verdict.expires),
        elsewhere: verdict.total.saturating_sub(local),
        backends,
    }
}

pub fn direct_key(client: SocketAddr, server: SocketAddr) -> abi::DirectKey {
    abi::DirectKey {
        source: Address::from(client.ip()),
        destination: Address::from(server.ip()),
        source_port: client.port().into(),
        destination_port: server.port().into(),
    }
}

/// Those of the client and of the server.
pub fn ends_of(key: &abi::DirectKey) -> (SocketAddr, SocketAddr) {
    (addr(key.source, key.source_port), addr(key.destination, key.destination_port))
}

pub fn flow_of(key: &abi::DirectKey, flow: &abi::DirectFlow) -> DirectFlow {
    let (client, server) = ends_of(key);
    DirectFlow {
        client,
        server,
        original: addr(flow.original, flow.port),
        source: NetnsCookie(flow.source),
        destination: NetnsCookie(flow.destination),
        verdict: VerdictId(flow.verdict),
        socket: SocketCookie(flow.socket),
        arrival: match flow.arrived {
            0 => None,
            abi::DirectFlow::ADMITTED => Some(Arrival::Admitted),
            _ => Some(Arrival::Retracted),
        },
        connected_at: Duration::from_nanos(flow.connected_at),
        established_at: (flow.established_at != 0)
            .then(|| Duration::from_nanos(flow.established_at)),
    }
}

/// The programs store nothing but ports.
fn addr(ip: Address, port: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::from(ip), port as u16)
}

pub fn add(sum: DirectCounts, one: &DirectCounts) -> DirectCounts {
    DirectCounts {
        opened: sum.opened + one.opened,
        elsewhere: sum.elsewhere + one.elsewhere,
        expired: sum.expired + one.expired,
        full: sum.full + one.full,
        special: sum.special + one.special,
        backend_gone: sum.backend_gone + one.backend_gone,
        admitted: sum.admitted + one.admitted,
        retracted: sum.retracted + one.retracted,
        unrecorded: sum.unrecorded + one.unrecorded,
        astray: sum.astray + one.astray,
        events_lost: sum.events_lost + one.events_lost,
    }
}
