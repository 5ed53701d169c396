//! What may go straight: first whether policy permits it, then whether everybody's certificate proves
//! who they are.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use culvert_core::addr::OriginalDst;
use culvert_core::identity::Identity;
use culvert_core::route::Outbound;
use culvert_core::snapshot::Snapshot;
use culvert_core::tables::{self, NetnsCookie, VerdictId, VerdictKey};
use culvert_core::verdict::{self, AskAgent, Verdict};
use culvert_core::view::{Answers, Enrolled, View};
use culvert_core::workload::Workload;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::Verdicts;
use crate::capture::direct::since_boot;
use crate::direct::table::{Grant, LocalPod};
use crate::node::LocalPods;

/// Why the kernel has no verdict.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoVerdict {
    #[error("the pod is not enrolled, or its workload is not known")]
    Unknown,
    #[error(transparent)]
    Ask(#[from] AskAgent),
    #[error("there is no certificate of {0}")]
    NoCertificate(Identity),
}

/// The enrolled pods whose workload is known.
#[derive(Default)]
pub(super) struct PodIndex {
    pub of: Arc<LocalPods>,
    by_netns: HashMap<NetnsCookie, (LocalPod, Arc<str>)>,
    by_workload: HashMap<Arc<str>, LocalPod>,
}

impl PodIndex {
    pub fn new(pods: &Arc<LocalPods>) -> Self {
        let known = pods.iter().filter_map(|(pod, workload)| {
            let netns = pod.netns.cookie();
            Some((LocalPod { uid: pod.uid.clone(), netns }, workload.clone()?))
        });
        let known: Vec<_> = known.collect();
        Self {
            of: pods.clone(),
            by_workload: known.iter().cloned().map(|(pod, uid)| (uid, pod)).collect(),
            by_netns: known.into_iter().map(|(pod, uid)| (pod.netns, (pod, uid))).collect(),
        }
    }

    pub fn knows(&self, netns: NetnsCookie) -> bool {
        self.by_netns.contains_key(&netns)
    }

    pub fn of_workload(&self, uid: &str) -> Option<&LocalPod> {
        self.by_workload.get(uid)
    }

    /// Those of a verdict's backends, in their order.
    fn of_backends(&self, verdict: &Verdict) -> Vec<LocalPod> {
        let backends = verdict.backends.iter();
        backends.filter_map(|backend| self.of_workload(&backend.workload.uid).cloned()).collect()
    }
}

/// What is published.
pub(super) struct World<'a> {
    pub snapshot: &'a Snapshot,
    pub enrolled: &'a Enrolled,
    pub pods: &'a PodIndex,
}

/// What policy permits, whoever can prove to be who they are.
pub(super) struct Permitted {
    key: VerdictKey,
    source: Arc<Workload>,
    source_pod: LocalPod,
    verdict: Verdict,
    /// Those of the verdict's backends, in their order.
    pods: Vec<LocalPod>,
}

impl Permitted {
    /// Whether the kernel was told the same, but for how connections travel.
    pub fn admits_as(&self, found: &tables::Verdict) -> bool {
        admits_as(&self.verdict, &self.pods, found)
    }
}

impl Grant {
    /// Whether the kernel was told the same, but for how connections travel.
    pub(super) fn admits_as(&self, found: &tables::Verdict) -> bool {
        admits_as(&self.verdict, &self.pods, found)
    }
}

fn admits_as(verdict: &Verdict, pods: &[LocalPod], found: &tables::Verdict) -> bool {
    let own = verdict.backends.iter().zip(pods);
    let own = own.map(|(backend, pod)| (backend.to(), pod.netns, backend.weight));
    let told = found.backends.iter().map(|backend| (backend.to, backend.netns, backend.weight));
    own.eq(told) && verdict.elsewhere == found.elsewhere
}

impl Verdicts {
    /// What is permitted, and proven by certificates that hold now.
    pub(super) fn decide(
        &self,
        world: &World<'_>,
        key: VerdictKey,
        id: VerdictId,
    ) -> Result<Grant, NoVerdict> {
        self.prove(world, self.permit(world, key)?, id)
    }

    /// Asks routes and policies alone.
    pub(super) fn permit(
        &self,
        world: &World<'_>,
        key: VerdictKey,
    ) -> Result<Permitted, NoVerdict> {
        let (pod, uid) = world.pods.by_netns.get(&key.source).ok_or(NoVerdict::Unknown)?;
        let source = world.snapshot.workload(uid).ok_or(NoVerdict::Unknown)?;
        let destination = OriginalDst::new(key.destination);
        let same_family = |ip: &&IpAddr| ip.is_ipv4() == destination.ip().is_ipv4();
        let client = source.addresses.iter().find(same_family).ok_or(AskAgent::Address)?;
        let answers = Answers::default();
        let view = View {
            snapshot: world.snapshot,
            network: &self.terms.network,
            node: &self.terms.node,
            enrolled: world.enrolled,
            answers: &answers,
            coverage: self.terms.coverage,
        };
        let request = Outbound { source, client: *client, destination };
        let mut verdict = verdict::decide(&view, &request, &mut SmallRng::seed_from_u64(0))?;
        let is_known = |uid: &str| world.pods.of_workload(uid).is_some();
        if !verdict.retain(|backend| is_known(&backend.workload.uid)) {
            return Err(NoVerdict::Unknown);
        }
        let pods = world.pods.of_backends(&verdict);
        Ok(Permitted { key, source: source.clone(), source_pod: pod.clone(), verdict, pods })
    }

    /// Leaves to the agent whoever has no certificate.
    pub(super) fn prove(
        &self,
        world: &World<'_>,
        permitted: Permitted,
        id: VerdictId,
    ) -> Result<Grant, NoVerdict> {
        let Permitted { key, source, source_pod, mut verdict, mut pods } = permitted;
        let lacks = |workload: &Workload| {
            let identity = workload.identity();
            self.certificates.remaining(&identity).is_none().then_some(identity)
        };
        if let Some(identity) = lacks(&source) {
            return Err(NoVerdict::NoCertificate(identity));
        }
        let mut lacking = None;
        let holds = verdict.retain(|backend| {
            let lack = lacks(&backend.workload);
            let is_proven = lack.is_none();
            lacking = lack.or(lacking.take());
            is_proven
        });
        if let Some(identity) = &lacking {
            if !holds {
                return Err(NoVerdict::NoCertificate(identity.clone()));
            }
            pods = world.pods.of_backends(&verdict);
        }
        let expires = self.expires(&source, &verdict).ok_or(NoVerdict::Unknown)?;
        let used = AtomicU64::new(since_boot().as_secs());
        Ok(Grant { id, key, source, source_pod, pods, verdict, lacking, expires, used })
    }

    /// When the first of the certificates ends.
    pub(super) fn expires(&self, source: &Workload, verdict: &Verdict) -> Option<Duration> {
        let backends = verdict.backends.iter().map(|backend| &*backend.workload);
        let mut ends = backends.chain([source]);
        let first = ends.try_fold(Duration::MAX, |first, workload| {
            Some(first.min(self.certificates.remaining(&workload.identity())?))
        });
        first.map(|first| since_boot() + first)
    }
}
