//! What one decision may look at, and how it says what it still lacks.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::{NamespacedHostname, NetworkAddress};
use crate::snapshot::Snapshot;
use crate::workload::{GatewayAddress, GatewayDestination, Workload};

/// Everything a decision knows of the world. Borrowed for one decision, never kept.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub snapshot: &'a Snapshot,
    /// The agent's own network.
    pub network: &'a str,
    /// The agent's own Kubernetes node.
    pub node: &'a str,
    pub enrolled: &'a Enrolled,
    pub answers: &'a Answers,
    pub coverage: Coverage,
}

/// How much of the mesh the snapshot tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// All of it: what is missing does not exist.
    Whole,
    /// What was asked for: what is missing may be had for the asking.
    OnDemand,
}

impl View<'_> {
    /// Whether what the snapshot lacks does not exist, as far as anybody knows.
    pub(crate) fn confirm_absent(&self, key: ResourceKey) -> Result<(), Stop<Unanswered>> {
        match (self.coverage, self.answers.resources.get(&key)) {
            (Coverage::Whole, _) | (Coverage::OnDemand, Some(Fetched::Answered)) => Ok(()),
            (Coverage::OnDemand, Some(Fetched::Unanswered)) => Err(Unanswered(key).into()),
            (Coverage::OnDemand, None) => Err(Stop::Need(Need::Resource(key))),
        }
    }
}

/// The name under which the control plane is asked for one thing (delta xDS,
/// `resource_names_subscribe`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ResourceKey {
    /// Whatever has this address. Written `network/ip`.
    Address(NetworkAddress),
    /// A service, or else a workload. Written `namespace/hostname`.
    Hostname(NamespacedHostname),
    /// A workload.
    Uid(Arc<str>),
}

impl fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ResourceKey::Address(address) => address.fmt(f),
            ResourceKey::Hostname(hostname) => hostname.fmt(f),
            ResourceKey::Uid(uid) => uid.fmt(f),
        }
    }
}

impl From<&Arc<GatewayAddress>> for ResourceKey {
    fn from(reference: &Arc<GatewayAddress>) -> Self {
        match &reference.destination {
            GatewayDestination::Address(address) => ResourceKey::Address(address.clone()),
            GatewayDestination::Hostname(hostname) => ResourceKey::Hostname(hostname.clone()),
        }
    }
}

/// What came of asking the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// It has told all it knows; what the snapshot lacks now does not exist.
    Answered,
    /// Nothing came in time.
    Unanswered,
}

/// Nobody knows whether there is such a thing: nothing may be concluded from its absence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the control plane did not tell about {0}")]
pub struct Unanswered(pub ResourceKey);

/// The uids of the workloads that are enrolled at this agent, and which of their connections among
/// each other have to be encrypted nevertheless.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Enrolled {
    uids: HashSet<Arc<str>>,
    tunnelled: Arc<Chosen>,
}

impl Enrolled {
    pub fn contains(&self, uid: &str) -> bool {
        self.uids.contains(uid)
    }

    /// Whether it was not there before.
    pub fn insert(&mut self, uid: Arc<str>) -> bool {
        self.uids.insert(uid)
    }

    /// Whether it was there.
    pub fn remove(&mut self, uid: &str) -> bool {
        self.uids.remove(uid)
    }

    /// The same with tunnels within the node for these.
    pub fn tunnelled(self, tunnelled: Arc<Chosen>) -> Self {
        Self { tunnelled, ..self }
    }

    /// Whether a connection between the two is to go through a tunnel, though both are of this node.
    pub(crate) fn tunnels_between(&self, source: &Workload, destination: &Workload) -> bool {
        self.tunnelled.includes(source) || self.tunnelled.includes(destination)
    }
}

impl FromIterator<Arc<str>> for Enrolled {
    fn from_iter<I: IntoIterator<Item = Arc<str>>>(uids: I) -> Self {
        Self { uids: uids.into_iter().collect(), tunnelled: Arc::default() }
    }
}

/// Workloads that the operator names; none by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Chosen {
    pub everyone: bool,
    pub namespaces: BTreeSet<Arc<str>>,
    /// Namespace, and the name of the pod or of its owner.
    pub workloads: BTreeSet<(Arc<str>, Arc<str>)>,
}

impl Chosen {
    pub fn includes(&self, workload: &Workload) -> bool {
        let is_named =
            |name: &Arc<str>| self.workloads.contains(&(workload.namespace.clone(), name.clone()));
        self.everyone
            || self.namespaces.contains(&workload.namespace)
            || (!self.workloads.is_empty()
                && (is_named(&workload.name) || is_named(&workload.workload_name)))
    }
}

/// What was found out for one decision since it first asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    dns: HashMap<Arc<str>, Vec<IpAddr>>,
    resources: HashMap<ResourceKey, Fetched>,
}

impl Answers {
    /// Notes the addresses of a DNS name; none, when it has none or nobody could tell.
    pub fn note_dns(&mut self, name: Arc<str>, addresses: Vec<IpAddr>) {
        let addresses = addresses.into_iter().map(|ip| ip.to_canonical()).collect();
        self.dns.insert(name, addresses);
    }

    /// Notes that the control plane was asked.
    pub fn note_resource(&mut self, key: ResourceKey, fetched: Fetched) {
        self.resources.insert(key, fetched);
    }

    /// `None`: not asked yet.
    pub fn dns(&self, name: &str) -> Option<&[IpAddr]> {
        self.dns.get(name).map(Vec::as_slice)
    }
}

/// What a decision lacks. Once it is in the [`Answers`], also as absent, it is not asked for again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Need {
    /// The addresses of a DNS name, as the agent's own resolver sees them.
    Dns(Arc<str>),
    /// What the control plane knows by this name. Only where it tells on demand.
    Resource(ResourceKey),
}

/// A decision, or what it lacks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<T> {
    Done(T),
    Need(Need),
}

/// Why a decision cannot go on; lets its inner steps use `?`.
#[derive(Debug)]
pub(crate) enum Stop<E> {
    Need(Need),
    Failed(E),
}

impl<E> From<E> for Stop<E> {
    fn from(error: E) -> Self {
        Stop::Failed(error)
    }
}

impl<T, E> From<Result<T, Stop<E>>> for Step<Result<T, E>> {
    fn from(result: Result<T, Stop<E>>) -> Self {
        match result {
            Ok(done) => Step::Done(Ok(done)),
            Err(Stop::Failed(error)) => Step::Done(Err(error)),
            Err(Stop::Need(need)) => Step::Need(need),
        }
    }
}

impl<E> Stop<E> {
    pub fn map<F>(self, wrap: impl FnOnce(E) -> F) -> Stop<F> {
        match self {
            Stop::Need(need) => Stop::Need(need),
            Stop::Failed(error) => Stop::Failed(wrap(error)),
        }
    }
}
