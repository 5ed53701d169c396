//! The live connections: what the dumps show, what a changed policy judges again, and how a
//! connection is told to close.
//!
//! A connection registers before it is authorized: a policy that changes in between then finds it
//! here, and the closing waits for the connection to look.

use std::collections::HashMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::{Duration, Instant};

use culvert_core::authorization::Connection;
use culvert_core::authorize::PermittedBy;
use culvert_core::identity::Identity;
use culvert_core::workload::PolicyKey;
use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

use crate::telemetry::{
    ByteCounters, ConnectionContext, Denial, DenialReason, Failure, ResponseFlag,
};

/// All live connections of one agent. Cloning copies a pointer.
#[derive(Clone, Debug, Default)]
pub struct Connections(Arc<Registry>);

/// Connections that begin or end at the same time rarely meet on a shard.
const SHARDS: usize = 32;

#[derive(Debug, Default)]
struct Registry {
    next: AtomicU64,
    shards: [Mutex<HashMap<u64, Arc<Entry>>>; SHARDS],
}

/// One connection, as it is known when it registers.
#[derive(Clone, Debug)]
pub struct LiveConnection {
    pub direction: Direction,
    pub protocol: Protocol,
    /// What is told of it.
    pub about: Arc<ConnectionContext>,
    /// What was asked for: for HBONE inbound the `forwarded` host if there was one; else the
    /// original destination.
    pub original_dst: Option<String>,
    /// Where it ends up: the application (inbound), or what is dialled (outbound).
    pub actual_dst: SocketAddr,
    /// The uid of the local pod that it belongs to.
    pub pod: Arc<str>,
    /// The uid of that pod's workload when the connection was made.
    pub workload: Arc<str>,
    /// What it was authorized by, and is again; `None` for outbound.
    pub connection: Option<Connection>,
    pub counters: Arc<ByteCounters>,
}

impl LiveConnection {
    pub fn src(&self) -> SocketAddr {
        self.about.src
    }

    pub fn source_identity(&self) -> Option<&Identity> {
        self.about.source_identity.as_ref().filter(|_| self.about.mutual_tls)
    }

    pub fn destination_identity(&self) -> Option<Identity> {
        self.about.told_destination_identity()
    }

    /// The hostname of the service that was addressed.
    pub fn service(&self) -> Option<&str> {
        self.about.service.as_ref().map(|service| &*service.hostname)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    Inbound,
    Outbound,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Hbone,
    Tcp,
    DoubleHbone,
    /// Between two pods of this node: as a tunnel to its ends, and on no wire.
    Local,
    /// TCP from application to application, carried by the kernel.
    Direct,
}

impl Protocol {
    /// As the configuration dump shows it. Both ends of a local connection are known by their
    /// identities, which clients of the dump take no other word for.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Hbone | Protocol::Local => "HBONE",
            Protocol::Tcp => "TCP",
            Protocol::DoubleHbone => "DOUBLEHBONE",
            Protocol::Direct => "DIRECT",
        }
    }

    /// As Culvert's own view shows it.
    pub fn own_name(self) -> &'static str {
        match self {
            Protocol::Local => "LOCAL",
            Protocol::Hbone | Protocol::Tcp | Protocol::DoubleHbone | Protocol::Direct => {
                self.name()
            }
        }
    }
}

impl Connections {
    /// Adds a connection until the guard is dropped.
    pub fn register(&self, live: LiveConnection) -> Guard {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(Entry {
            id,
            live,
            opened: Instant::now(),
            permit: Mutex::default(),
            reason: OnceLock::new(),
            closing: AtomicWaker::new(),
        });
        self.shard(id).lock().insert(id, entry.clone());
        Guard { connections: self.clone(), entry }
    }

    /// The inbound connections of one local pod.
    pub fn inbound_of(&self, uid: &str) -> Vec<Arc<Entry>> {
        self.matching(|entry| entry.live.direction == Direction::Inbound && &*entry.live.pod == uid)
    }

    /// All inbound connections.
    pub fn all_inbound(&self) -> Vec<Arc<Entry>> {
        self.matching(|entry| entry.live.direction == Direction::Inbound)
    }

    /// All connections of one local pod, both directions.
    pub fn of(&self, uid: &str) -> Vec<Arc<Entry>> {
        self.matching(|entry| &*entry.live.pod == uid)
    }

    /// All connections, the oldest first.
    pub fn all(&self) -> Vec<Arc<Entry>> {
        let mut all = self.matching(|_| true);
        all.sort_unstable_by_key(|entry| entry.id);
        all
    }

    /// How many connections there are: inbound and outbound.
    pub fn count(&self) -> (usize, usize) {
        let mut counts = (0, 0);
        for shard in &self.0.shards {
            for entry in shard.lock().values() {
                match entry.live.direction {
                    Direction::Inbound => counts.0 += 1,
                    Direction::Outbound => counts.1 += 1,
                }
            }
        }
        counts
    }

    /// No more than one shard is locked at a time, and none while the caller looks.
    fn matching(&self, wanted: impl Fn(&Entry) -> bool) -> Vec<Arc<Entry>> {
        let mut found = Vec::new();
        for shard in &self.0.shards {
            found.extend(shard.lock().values().filter(|entry| wanted(entry)).cloned());
        }
        found
    }

    fn shard(&self, id: u64) -> &Mutex<HashMap<u64, Arc<Entry>>> {
        &self.0.shards[(id % SHARDS as u64) as usize]
    }
}

/// A connection that is registered.
#[derive(Debug)]
pub struct Entry {
    id: u64,
    live: LiveConnection,
    opened: Instant,
    permit: Mutex<Option<PermittedBy>>,
    /// With when it came to be.
    reason: OnceLock<Box<(CloseReason, Instant)>>,
    closing: AtomicWaker,
}

impl Entry {
    pub fn live(&self) -> &LiveConnection {
        &self.live
    }

    /// Time since it registered.
    pub fn age(&self) -> Duration {
        self.opened.elapsed()
    }

    /// By what it was allowed; `None` before it was, and for outbound.
    pub fn permit(&self) -> Option<PermittedBy> {
        self.permit.lock().clone()
    }

    /// Notes by what it is allowed now.
    pub fn permitted(&self, by: &PermittedBy) {
        *self.permit.lock() = Some(by.clone());
    }

    /// Tells the connection to close. The first reason stays; gives whether it was this one.
    pub fn close(&self, reason: CloseReason) -> bool {
        self.close_since(reason, Instant::now())
    }

    /// The same for a reason that came to be before this.
    pub fn close_since(&self, reason: CloseReason, since: Instant) -> bool {
        let first = self.reason.set(Box::new((reason, since))).is_ok();
        self.closing.wake();
        first
    }
}

/// Keeps a connection registered.
#[derive(Debug)]
pub struct Guard {
    connections: Connections,
    entry: Arc<Entry>,
}

impl Guard {
    pub fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }

    /// Waits until somebody closes this connection, also if that happened before. One task at a time
    /// waits.
    pub async fn closed(&self) -> CloseReason {
        std::future::poll_fn(|cx| {
            // Listen first, look then: a closing in between is not missed.
            self.entry.closing.register(cx.waker());
            self.close_reason().cloned().map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// The reason if somebody has closed this connection.
    pub fn close_reason(&self) -> Option<&CloseReason> {
        self.entry.reason.get().map(|reason| &reason.0)
    }

    /// How long ago that reason came to be.
    pub fn overdue(&self) -> Option<Duration> {
        self.entry.reason.get().map(|reason| reason.1.elapsed())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connections.shard(self.entry.id).lock().remove(&self.entry.id);
    }
}

/// What is told of a connection whose peer's certificate was revoked, as peers tell it.
pub const PEER_REVOKED: &str = "connection closed: peer certificate revoked by CRL";

/// Why the agent itself ends a live connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// It is no longer allowed.
    PolicyChange { policy: Option<PolicyKey>, rule: Option<usize> },
    /// The agent shuts down.
    Drain,
    /// The pod was withdrawn or its namespace is gone.
    PodGone,
    /// The certificate of the tunnel's peer was revoked.
    PeerRevoked,
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CloseReason::PolicyChange { .. } => "connection closed due to policy change",
            CloseReason::Drain => "connection closed due to connection drain",
            CloseReason::PodGone => "connection closed because its pod is gone",
            CloseReason::PeerRevoked => PEER_REVOKED,
        })
    }
}

impl From<CloseReason> for Failure {
    fn from(reason: CloseReason) -> Failure {
        let error = reason.to_string();
        match reason {
            CloseReason::PolicyChange { policy, rule } => {
                Failure::denied(error, Denial { reason: DenialReason::PolicyChange, policy, rule })
            }
            CloseReason::Drain | CloseReason::PodGone => Failure::new(ResponseFlag::None, error),
            CloseReason::PeerRevoked => Failure::new(ResponseFlag::CertRevoked, error),
        }
    }
}

#[cfg(test)]
mod tests;
