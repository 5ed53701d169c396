//! A pod of this node while it is enrolled: its namespace, its tunnels, its listeners.

use std::fmt;
use std::sync::Arc;

use culvert_core::snapshot::Snapshot;
use culvert_core::workload::Workload;
use tokio_util::sync::CancellationToken;

use crate::capture::netns::Netns;
use crate::connections::CloseReason;
use crate::drain::DrainWatch;
use crate::hbone::Pool;

/// Which workload a pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The one with this uid.
    Uid(Arc<str>),
    /// The one of this node with these names: whoever enrols pods by their own UIDs does not know
    /// those of workloads. It may be unknown yet, and become another one.
    Named(PodName),
}

/// What the node knows a pod by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodName {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    pub node: Arc<str>,
}

impl Claim {
    /// The workload, if it is known.
    pub fn find<'a>(&self, snapshot: &'a Snapshot) -> Option<&'a Arc<Workload>> {
        match self {
            Claim::Uid(uid) => snapshot.workload(uid),
            Claim::Named(PodName { name, namespace, service_account, node }) => {
                snapshot.local_workload(namespace, name, service_account, node)
            }
        }
    }

    /// Whether it names this workload.
    pub fn is_of(&self, workload: &Workload) -> bool {
        match self {
            Claim::Uid(uid) => *uid == workload.uid,
            Claim::Named(PodName { name, namespace, service_account, node }) => {
                *name == workload.name
                    && *namespace == workload.namespace
                    && *service_account == workload.service_account
                    && *node == workload.node
            }
        }
    }
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Claim::Uid(uid) => uid.fmt(f),
            Claim::Named(PodName { name, namespace, .. }) => write!(f, "{namespace}/{name}"),
        }
    }
}

/// One enrolled pod. Connections keep it alive after it is withdrawn.
pub struct Pod {
    /// Its own UID where istio-cni tells it, else that of its workload.
    pub uid: Arc<str>,
    pub claim: Claim,
    pub netns: Arc<Netns>,
    /// Its tunnels to other nodes and to waypoints.
    pub pool: Pool,
    /// Whether its application sees the addresses of clients.
    pub keeps_clients: bool,
    leaving: CancellationToken,
    closed: CancellationToken,
    gone: CancellationToken,
    /// Cancelled when its connections are to end at once: it is gone, or the drain is over.
    cut: CancellationToken,
}

impl Pod {
    pub fn new(
        uid: Arc<str>,
        claim: Claim,
        netns: Arc<Netns>,
        pool: Pool,
        drain: &DrainWatch,
    ) -> Self {
        let (leaving, closed, gone) = Default::default();
        let cut = drain.expiry();
        Self { uid, claim, netns, pool, keeps_clients: true, leaving, closed, gone, cut }
    }

    /// The agent's own: no route there leads answers to clients' addresses back to the agent.
    pub fn of_agent(claim: Claim, netns: Arc<Netns>, pool: Pool, drain: &DrainWatch) -> Self {
        let uid = claim.to_string().into();
        Self { keeps_clients: false, ..Self::new(uid, claim, netns, pool, drain) }
    }

    /// It opens no further tunnels. Those of its peers, and its listeners, still take what is sent by
    /// who does not know yet.
    pub fn leave(&self) {
        self.leaving.cancel();
        self.pool.drain();
    }

    /// Whether it was told to leave.
    pub fn has_left(&self) -> bool {
        self.leaving.is_cancelled()
    }

    /// Its listeners close once their queues are empty, and its peers are told to go elsewhere.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Its namespace is gone: everything of it ends at once.
    pub fn end(&self) {
        self.gone.cancel();
        self.cut.cancel();
        self.leave();
        self.close();
    }

    /// Ready when [`Pod::close`] was called.
    pub async fn is_closed(&self) {
        self.closed.cancelled().await;
    }

    /// Cancelled when [`Pod::end`] is called. It does not keep the pod.
    pub fn ending(&self) -> CancellationToken {
        self.gone.clone()
    }

    /// Ready when [`Pod::end`] was called.
    pub async fn is_gone(&self) {
        self.gone.cancelled().await;
    }

    /// Ready when its connections are to end at once; gives why.
    pub async fn is_cut(&self) -> CloseReason {
        self.cut.cancelled().await;
        match self.gone.is_cancelled() {
            true => CloseReason::PodGone,
            false => CloseReason::Drain,
        }
    }
}
