//! What every corridor needs of this node: the mesh as known now, the pods, and the rooms.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use culvert_core::admit::HeaderTo;
use culvert_core::authorization::{Action, Connection};
use culvert_core::authorize::{self, Denied, DryRun, Permit};
use culvert_core::snapshot::{Change, Snapshot};
use culvert_core::view::{Chosen, Enrolled, Fetched, ResourceKey};
use culvert_core::workload::{PolicyKey, Workload};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::ca::Certificates;
use crate::capture::Redirection;
use crate::config::Keepalive;
use crate::connections::Connections;
use crate::direct::Direct;
use crate::dns::{Dns, OwnResolver};
use crate::hbone;
use crate::pods::{Claim, Pod};
use crate::telemetry::{Denial, DenialReason, DryRunEvaluation, Telemetry};
use crate::workers::Workers;

/// How long a connection waits for the pod's own workload to become known.
const WORKLOAD_WAIT: Duration = Duration::from_secs(5);

/// One agent's share of the mesh. Built once by `app`, shared by every task.
pub struct Node {
    /// The Kubernetes node name, or what stands for it.
    pub name: Arc<str>,
    /// The network that this node's addresses belong to.
    pub network: Arc<str>,
    pub mesh: Arc<Mesh>,
    /// The agent's own pod, once it is served as one of the mesh.
    pub own: OnceLock<Arc<Pod>>,
    pub capture: Redirection,
    pub certificates: Arc<Certificates>,
    /// What the kernel carries by itself; `None` where that is nothing.
    pub direct: Option<Direct>,
    /// How pods are told names; `None` when they ask their servers themselves.
    pub dns: Option<Dns>,
    /// Looks up names as the agent itself; `None` without name servers.
    pub resolver: Option<OwnResolver>,
    pub telemetry: Telemetry,
    pub connections: Connections,
    /// Brings what the snapshot lacks; `None` where the snapshot is all there is.
    pub fetch: Option<Arc<dyn Fetch>>,
    pub tunnels: hbone::Settings,
    /// Where the connections of pods are carried.
    pub workers: Workers,
    /// Kernel keepalive of captured and dialled connections.
    pub keepalive: Option<Keepalive>,
    pub options: Options,
}

/// Choices of the operator that corridors follow.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Describe the destination workload in a `baggage` header on 200 answers.
    pub response_baggage: bool,
    /// Log every policy decision at info instead of debug.
    pub log_policy_at_info: bool,
    /// Where an application listens that is told of connections by a header.
    pub header_to: HeaderTo,
}

/// Asks the control plane for single things of the mesh (delta xDS, on-demand subscriptions).
pub trait Fetch: Send + Sync {
    /// Resolves once the control plane has told of `key`, also that there is none, and the published
    /// snapshot says the same; or when the time for that is over, which must be bounded.
    fn fetch(&self, key: ResourceKey) -> Pin<Box<dyn Future<Output = Fetched> + Send + '_>>;
}

impl Node {
    /// The workload that `pod` is, as known now; waits a little for one that is not known yet.
    pub async fn workload_of(&self, pod: &Pod) -> Result<Arc<Workload>, UnknownWorkload> {
        let mut changes = self.mesh.changes();
        let known = async {
            loop {
                if let Some(workload) = pod.claim.find(&self.mesh.snapshot()) {
                    return workload.clone();
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let asked = async {
            // Pods that are known by name are this node's, whose workloads come unasked.
            if let (Some(fetch), Claim::Uid(uid)) = (&self.fetch, &pod.claim)
                && self.mesh.snapshot().workload(uid).is_none()
            {
                // What it brings is seen like any other change.
                let _ = fetch.fetch(ResourceKey::Uid(uid.clone())).await;
            }
            std::future::pending().await
        };
        let known = async {
            tokio::select! {
                workload = known => workload,
                never = asked => never,
            }
        };
        let unknown = |_| UnknownWorkload(pod.claim.to_string());
        tokio::time::timeout(WORKLOAD_WAIT, known).await.map_err(unknown)
    }

    /// Who serves what arrives for `pod` now: itself, unless it left and came back since.
    pub fn successor(&self, pod: &Arc<Pod>) -> Arc<Pod> {
        if !pod.has_left() {
            return pod.clone();
        }
        let pods = self.mesh.pods();
        let again = pods.iter().find(|(other, _)| other.netns.cookie() == pod.netns.cookie());
        again.map_or(pod, |(again, _)| again).clone()
    }

    /// Judges a connection to `local` by the policies of now, and tells of the judgement.
    ///
    /// The connection must be registered: what changes after this is for `recheck` to find. Hence it
    /// also takes the workload as it is now, whatever the caller has seen of it before.
    pub fn authorize(&self, local: &Workload, connection: &Connection) -> Result<Permit, Denied> {
        let snapshot = self.mesh.snapshot();
        let local = snapshot.workload(&local.uid).map_or(local, |now| now);
        let judgement = authorize::authorize(&snapshot, local, connection);
        for policy in &judgement.missing {
            tracing::warn!(workload = %local.uid, %policy, "policy is not known, skipped");
        }
        for dry_run in &judgement.dry_run {
            self.tell_dry_run(dry_run, connection);
        }
        match &judgement.verdict {
            Ok(permit) => self.tell_verdict(local, connection, permit),
            Err(denied) => self.tell_verdict(local, connection, denied),
        }
        judgement.verdict
    }

    fn tell_verdict(&self, local: &Workload, connection: &Connection, verdict: &dyn fmt::Display) {
        let (source, port) = (connection.source, connection.port);
        if self.options.log_policy_at_info {
            tracing::info!(target: "rbac", workload = %local.uid, %source, port, %verdict);
        } else {
            tracing::debug!(target: "rbac", workload = %local.uid, %source, port, %verdict);
        }
    }

    fn tell_dry_run(&self, dry_run: &DryRun, connection: &Connection) {
        let source = connection.source;
        tracing::info!(target: "rbac", %source, port = connection.port, "dry run: {dry_run}");
        let tell = |policy: &PolicyKey, action, matched| {
            self.telemetry.dry_run(DryRunEvaluation { policy: policy.clone(), action, matched });
        };
        match dry_run {
            DryRun::WouldDeny { policy, .. } => tell(policy, Action::Deny, true),
            DryRun::WouldAllow { policy, .. } => tell(policy, Action::Allow, true),
            DryRun::WouldNotAllow { policies } => {
                policies.iter().for_each(|policy| tell(policy, Action::Allow, false));
            }
        }
    }
}

/// What the log says of a denial besides its text.
pub fn denial(denied: &Denied) -> Denial {
    let reason = match denied {
        Denied::Explicit { .. } => DenialReason::Explicit,
        Denied::NoneAllowed => DenialReason::NoneAllowed,
        Denied::NotFromWaypoint { .. } => DenialReason::NotFromWaypoint,
    };
    Denial { reason, policy: denied.policy().cloned(), rule: denied.rule() }
}

/// The mesh does not (yet, or any more) know the workload of an enrolled pod.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown local workload: {0}")]
pub struct UnknownWorkload(String);

/// What was published, and before what.
#[derive(Clone, Copy)]
pub struct Publication<'a> {
    pub before: &'a Snapshot,
    pub now: &'a Snapshot,
    pub pods: &'a Arc<LocalPods>,
    pub enrolled: &'a Arc<Enrolled>,
    /// The pods are those of before, and each is the same workload.
    pub same_pods: bool,
}

/// Told of a publication before whoever made it goes on.
pub type Follower = Box<dyn Fn(&Publication<'_>) + Send + Sync>;

/// The current snapshot and the enrolled pods; readers never wait.
pub struct Mesh {
    snapshot: ArcSwap<Snapshot>,
    /// Held from reading the snapshot to replacing it: file and control plane both change it.
    writing: Mutex<()>,
    pods: ArcSwap<Pods>,
    published: watch::Sender<u64>,
    /// When the first publication was made that live connections have not been judged by.
    unjudged: Mutex<Option<Instant>>,
    follower: OnceLock<Follower>,
    tunnelled: Arc<Chosen>,
}

/// The enrolled pods, each with the uid of its workload as far as that is known.
pub type LocalPods = Vec<(Arc<Pod>, Option<Arc<str>>)>;

/// The enrolled pods in the forms in which they are asked for.
#[derive(Default)]
struct Pods {
    all: Arc<LocalPods>,
    by_workload: HashMap<Arc<str>, Arc<Pod>>,
    enrolled: Arc<Enrolled>,
    /// The node of those that are known by name; all are of one.
    named_on: Option<Arc<str>>,
}

impl Pods {
    fn new(
        pods: impl IntoIterator<Item = Arc<Pod>>,
        snapshot: &Snapshot,
        tunnelled: &Arc<Chosen>,
    ) -> Self {
        let workload = |pod: &Pod| match &pod.claim {
            Claim::Uid(uid) => Some(uid.clone()),
            claim @ Claim::Named(_) => claim.find(snapshot).map(|workload| workload.uid.clone()),
        };
        let all: LocalPods = pods
            .into_iter()
            .map(|pod| {
                let uid = workload(&pod);
                (pod, uid)
            })
            .collect();
        let known = all.iter().filter_map(|(pod, uid)| Some((uid.clone()?, pod.clone())));
        let by_workload: HashMap<_, _> = known.collect();
        let enrolled: Enrolled = by_workload.keys().cloned().collect();
        let enrolled = Arc::new(enrolled.tunnelled(tunnelled.clone()));
        let named_on = all.iter().find_map(|(pod, _)| match &pod.claim {
            Claim::Named(name) => Some(name.node.clone()),
            Claim::Uid(_) => None,
        });
        Self { all: Arc::new(all), by_workload, enrolled, named_on }
    }

    /// Whether a change may make another workload that of a pod.
    fn concerns(&self, change: &Change) -> bool {
        match change {
            Change::Workload(workload) => {
                self.by_workload.contains_key(&workload.uid)
                    || self.named_on.as_ref() == Some(&workload.node)
            }
            Change::RemoveWorkload(uid) => self.by_workload.contains_key(uid),
            _ => false,
        }
    }
}

impl Mesh {
    pub fn new(snapshot: Snapshot) -> Self {
        Self {
            snapshot: ArcSwap::from_pointee(snapshot),
            writing: Mutex::new(()),
            pods: ArcSwap::from_pointee(Pods::default()),
            published: watch::Sender::new(0),
            unjudged: Mutex::default(),
            follower: OnceLock::new(),
            tunnelled: Arc::default(),
        }
    }

    /// The same, where these are encrypted within the node, too.
    pub fn tunnelling(self, tunnelled: Chosen) -> Self {
        Self { tunnelled: Arc::new(tunnelled), ..self }
    }

    /// Tells `follower` of each publication from now on, one after the other, while it can be seen
    /// already. There is one at most; a second one is not told.
    pub fn follow(&self, follower: Follower) {
        let _one_writer = self.writing.lock();
        let _first = self.follower.set(follower);
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    pub fn enrolled(&self) -> Arc<Enrolled> {
        self.pods.load().enrolled.clone()
    }

    /// The enrolled pod that a workload is.
    pub fn pod(&self, workload: &str) -> Option<Arc<Pod>> {
        self.pods.load().by_workload.get(workload).cloned()
    }

    pub fn pods(&self) -> Arc<LocalPods> {
        self.pods.load().all.clone()
    }

    /// Makes what every following decision looks at from what it is now and `changes`. Gives both,
    /// the former one first. Other writers wait while the changes are taken.
    pub fn apply(
        &self,
        changes: impl IntoIterator<Item = Change>,
    ) -> (Arc<Snapshot>, Arc<Snapshot>) {
        let _one_writer = self.writing.lock();
        let before = self.snapshot();
        let pods = self.pods.load();
        let mut concerned = false;
        let changes = changes.into_iter().inspect(|change| concerned |= pods.concerns(change));
        let next = Arc::new(before.with(changes));
        self.snapshot.store(next.clone());
        if concerned {
            let all = pods.all.iter().map(|(pod, _)| pod.clone());
            self.pods.store(Arc::new(Pods::new(all, &next, &self.tunnelled)));
        }
        self.tell(&before, &next, !concerned);
        (before, next)
    }

    /// Makes `pods` the enrolled ones.
    pub fn set_pods(&self, pods: impl IntoIterator<Item = Arc<Pod>>) {
        let _one_writer = self.writing.lock();
        let now = self.snapshot();
        self.pods.store(Arc::new(Pods::new(pods, &now, &self.tunnelled)));
        self.tell(&now, &now, false);
    }

    fn tell(&self, before: &Snapshot, now: &Snapshot, same_pods: bool) {
        self.unjudged.lock().get_or_insert_with(Instant::now);
        if let Some(follower) = self.follower.get() {
            let Pods { all, enrolled, .. } = &**self.pods.load();
            follower(&Publication { before, now, pods: all, enrolled, same_pods });
        }
        self.published.send_modify(|count| *count += 1);
    }

    /// When the first publication was made since this was asked last, or now if there was none. Asked
    /// by whoever judges live connections, before it looks at what is published.
    pub fn judging(&self) -> Instant {
        self.unjudged.lock().take().unwrap_or_else(Instant::now)
    }

    /// Sees each publication after this call.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.published.subscribe()
    }
}
