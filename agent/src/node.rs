//! What every corridor needs of this node: the mesh as known now, who is enrolled, and the rooms.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use culvert_core::snapshot::Snapshot;
use culvert_core::view::Enrolled;
use tokio::sync::watch;

use crate::ca::Certificates;
use crate::capture::Capture;
use crate::connections::Connections;
use crate::drain::DrainWatch;
use crate::telemetry::Telemetry;

/// How long a connection waits for its own workload to become known.
pub const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// One agent's share of the mesh. Built once by `app`, shared by every task.
pub struct Node {
    /// The Kubernetes node name, or what stands for it.
    pub name: Arc<str>,
    /// The network that this node's addresses belong to.
    pub network: Arc<str>,
    pub cluster_id: Arc<str>,
    pub mesh: Mesh,
    pub capture: Arc<Capture>,
    pub certificates: Arc<Certificates>,
    pub telemetry: Arc<Telemetry>,
    pub connections: Arc<Connections>,
    pub drain: DrainWatch,
    pub options: Options,
}

/// Choices of the operator that corridors follow.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Describe the destination workload in a `baggage` header on 200 answers.
    pub response_baggage: bool,
    /// Log every policy decision at info instead of debug.
    pub log_policy_at_info: bool,
}

/// The current snapshot and the set of enrolled workloads; readers never wait.
#[derive(Debug)]
pub struct Mesh {
    snapshot: ArcSwap<Snapshot>,
    enrolled: ArcSwap<Enrolled>,
    published: watch::Sender<u64>,
}

impl Mesh {
    pub fn new(snapshot: Snapshot) -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(snapshot),
            enrolled: ArcSwap::from_pointee(Enrolled::default()),
            published: watch::Sender::new(0),
        }
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    pub fn enrolled(&self) -> Arc<Enrolled> {
        self.enrolled.load_full()
    }

    /// Makes `next` what every following decision looks at.
    pub fn publish(&self, next: Snapshot) {
        self.snapshot.store(Arc::new(next));
        self.published.send_modify(|count| *count += 1);
    }

    pub fn set_enrolled(&self, enrolled: Enrolled) {
        self.enrolled.store(Arc::new(enrolled));
        self.published.send_modify(|count| *count += 1);
    }

    /// Resolves each time something was published since the last look.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }
}
