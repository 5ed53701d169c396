//! The mesh as known at one instant: immutable, indexed, cheap to derive from its predecessor.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, scope};

use crate::addr::{NamespacedHostname, canonical_range};
use crate::authorization::{Authorization, Match, PolicyScope};
use crate::service::{HealthPolicy, Service};
use crate::workload::{Health, PolicyKey, PortMap, TunnelProtocol, Workload};
use batch::Batch;
use index::{PolicyIndex, PolicySteps, ServiceIndex, ServiceSteps, WorkloadIndex, WorkloadSteps};
use members::{Joins, MemberIndex};
use trie::Trie;

mod batch;
mod index;
mod members;
mod trie;

pub use members::Roster;

/// One step from a snapshot to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Large and very many: moved as a pointer from where it is made to where it stays.
    Workload(Arc<Workload>),
    RemoveWorkload(Arc<str>),
    Service(Arc<Service>),
    RemoveService(NamespacedHostname),
    Authorization(Authorization),
    RemoveAuthorization(PolicyKey),
    /// Replaces the set of workloads that must be reached through their waypoint.
    RequireWaypoint(RequireWaypoint),
}

impl Change {
    pub fn workload(workload: impl Into<Arc<Workload>>) -> Self {
        Self::Workload(workload.into())
    }

    pub fn service(service: impl Into<Arc<Service>>) -> Self {
        Self::Service(service.into())
    }
}

/// Which local workloads refuse what does not come from their waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RequireWaypoint {
    #[default]
    Nobody,
    /// Every workload that is bound to a waypoint, by itself or through a service.
    EveryBound,
    /// The workloads with these uids.
    Workloads(Vec<Arc<str>>),
}

/// Cloning copies a few pointers. Iterators have no particular order.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// By uid.
    workloads: Trie<Workload>,
    workload_index: WorkloadIndex,
    members: MemberIndex,
    /// By namespace and hostname.
    services: Trie<Service>,
    service_index: ServiceIndex,
    policies: PolicyIndex,
    require_waypoint: Arc<RequireWaypoint>,
}

/// One endpoint of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint<'a> {
    pub workload: &'a Arc<Workload>,
    /// Its own translation of service ports.
    pub ports: &'a PortMap,
}

impl Snapshot {
    /// The snapshot after `changes`, applied in order. What did not change is shared.
    ///
    /// IPv4-mapped IPv6 addresses and ranges of them become plain IPv4.
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Snapshot {
        let mut next = self.clone();
        let joins = Joins::of(&self.members);
        let steps = WorkloadSteps::of(&self.workload_index, joins);
        let mut workloads = Batch::on(&self.workloads, steps);
        let steps = ServiceSteps::of(&self.service_index);
        let mut services = Batch::on(&self.services, steps);
        let steps = PolicySteps::of(&self.policies);
        let mut policies = Batch::on(&self.policies.by_key, steps);
        for change in changes {
            match change {
                Change::Workload(workload) => {
                    let (hash, uid) = (self.workloads.hash(&*workload.uid), workload.uid.clone());
                    workloads.insert(hash, canonical_workload(workload), |it| it.uid == uid);
                }
                Change::RemoveWorkload(uid) => {
                    workloads.remove(self.workloads.hash(&*uid), |it| it.uid == uid);
                }
                Change::Service(service) => {
                    let key = service.key();
                    let hash = self.services.hash(&key);
                    let service = canonical_service(service);
                    services.insert(hash, service, |it| is_called(it, &key));
                }
                Change::RemoveService(key) => {
                    services.remove(self.services.hash(&key), |it| is_called(it, &key));
                }
                Change::Authorization(policy) => {
                    let key = policy.key();
                    let hash = self.policies.by_key.hash(&*key);
                    let policy = Arc::new(canonical_policy(policy));
                    policies.insert(hash, policy, |it| it.has_key(&key));
                }
                Change::RemoveAuthorization(key) => {
                    policies.remove(self.policies.by_key.hash(&*key), |it| it.has_key(&key));
                }
                Change::RequireWaypoint(require) => {
                    if *next.require_waypoint != require {
                        next.require_waypoint = Arc::new(require);
                    }
                }
            }
        }
        let (by_key, indexes) = policies.end();
        next.policies.apply(by_key, indexes);
        let (by_key, indexes) = services.end();
        next.services.apply(by_key);
        next.service_index.apply(indexes);
        let (by_uid, indexes) = workloads.end();
        let is_large = by_uid.len() >= WORTH_A_THREAD;
        let by_uid = (&mut next.workloads, by_uid);
        let jobs = next.workload_index.jobs(by_uid, &mut next.members, indexes);
        match is_large {
            true => side_by_side(jobs),
            false => jobs.into_iter().for_each(|job| job()),
        }
        next
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.find(self.workloads.hash(uid), |workload| *workload.uid == *uid)
    }

    /// The workload that owns an address. Of several: pods before others, then HBONE before plain
    /// TCP, then the latest. Workloads in the host's network own none.
    pub fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        // `max_by_key` takes the last of equals.
        self.workload_index.at(network, ip.to_canonical()).max_by_key(|workload| {
            let hbone = workload.tunnel_protocol == TunnelProtocol::Hbone;
            (workload.uid.contains("//Pod/"), hbone)
        })
    }

    /// The workload with this DNS name in this namespace.
    pub fn workload_named(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.workload_index.named(name)
    }

    /// The workloads of the pods with this name, of any node, the latest last.
    pub fn workloads_of_pod<'a>(
        &'a self,
        namespace: &str,
        name: &str,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<Workload>> {
        self.workload_index.of_pod(namespace, name)
    }

    /// The workload of a pod on `node`; on any node when that is empty.
    pub fn local_workload<'a>(
        &'a self,
        namespace: &str,
        name: &str,
        service_account: &str,
        node: &str,
    ) -> Option<&'a Arc<Workload>> {
        self.workload_index.of_pod(namespace, name).rfind(|workload| {
            *workload.service_account == *service_account
                && (node.is_empty() || *workload.node == *node)
        })
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.find(self.services.hash(key), |service| is_called(service, key))
    }

    /// The service that an address stands for, to a client of a namespace: among those with
    /// exactly this address as [`Snapshot::service_named`] chooses; else among those whose range
    /// holds it the client's own, then the narrowest, then a canonical one.
    pub fn service_at<'a>(
        &'a self,
        network: &str,
        ip: IpAddr,
        client_namespace: Option<&str>,
    ) -> Option<&'a Arc<Service>> {
        let ip = ip.to_canonical();
        let exact = self.service_index.at(network, ip);
        best(exact, client_namespace).or_else(|| {
            let mut best = None;
            for (length, service) in self.service_index.around(network, ip) {
                let own = client_namespace == Some(&*service.namespace);
                let rank = Some((own, length, service.canonical));
                if is_visible(service, client_namespace) && rank > best.map(|(rank, _)| rank) {
                    best = rank.map(|rank| (rank, service));
                }
            }
            best.map(|(_, service)| service)
        })
    }

    /// The service with a hostname, to a client of a namespace: that namespace's own, else a
    /// canonical one, else the first. Without a client's namespace, visibility is not asked for.
    pub fn service_named<'a>(
        &'a self,
        hostname: &str,
        client_namespace: Option<&str>,
    ) -> Option<&'a Arc<Service>> {
        best(self.service_index.named(hostname), client_namespace)
    }

    /// The services with a hostname, one of each namespace that has it.
    pub fn services_named<'a>(
        &'a self,
        hostname: &str,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<Service>> + Clone {
        self.service_index.named(hostname)
    }

    /// The endpoints that may take traffic: those that workloads declare as far as the service's
    /// health policy lets them, and the service's own.
    pub fn endpoints<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = Endpoint<'a>> {
        let key = service.key();
        let members = self.members.of(&key);
        let declared = members.filter_map({
            let key = key.clone();
            move |workload| declared_endpoint(service, &key, workload)
        });
        let fixed = service.fixed_endpoints.iter().filter_map(move |(uid, ports)| {
            let workload = self.workload(uid)?;
            let is_declared = declared_endpoint(service, &key, workload).is_some();
            (!is_declared).then_some(Endpoint { workload, ports })
        });
        declared.chain(fixed)
    }

    /// How many workloads name the service as theirs, healthy or not.
    pub fn declared_count(&self, service: &Service) -> usize {
        self.members.count(&service.key())
    }

    /// The workloads that name the service as theirs, healthy or not, in an array: to draw from.
    pub fn roster(&self, service: &Service) -> Option<&Roster> {
        self.members.roster(&service.key())
    }

    /// All workloads behind a service, healthy or not.
    pub fn members<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Arc<Workload>> {
        let key = service.key();
        let declared = self.members.of(&key);
        let fixed = service.fixed_endpoints.keys().filter_map(|uid| self.workload(uid));
        let fixed = fixed.filter(move |workload| !workload.services.contains_key(&key));
        declared.chain(fixed)
    }

    /// The known services that a workload is an endpoint of, healthy or not.
    pub fn services_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        let declared = workload.services.keys().filter_map(|key| self.service(key));
        let fixed = self.service_index.with_fixed(&workload.uid);
        declared.chain(fixed.filter(|service| !workload.services.contains_key(&service.key())))
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.by_key.values()
    }

    pub fn policy(&self, key: &str) -> Option<&Arc<Authorization>> {
        let by_key = &self.policies.by_key;
        by_key.find(by_key.hash(key), |policy| policy.has_key(key))
    }

    /// Those that apply to every workload.
    pub fn global_policies(&self) -> &[Arc<Authorization>] {
        &self.policies.global
    }

    /// Those that apply to every workload of a namespace.
    pub fn namespace_policies<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<Authorization>> {
        self.policies.of_namespace(namespace)
    }

    /// Whether no policy came, went or changed between the two. Costs one comparison; two
    /// snapshots of which neither was made from the other never share.
    pub fn shares_policies_with(&self, other: &Snapshot) -> bool {
        self.policies.by_key.is_same(&other.policies.by_key)
    }

    /// Whether the same workloads name the service as theirs in both, none of them changed. Costs two
    /// look-ups.
    pub fn shares_members_with(&self, other: &Snapshot, service: &NamespacedHostname) -> bool {
        self.members.shares_with(&other.members, service)
    }

    pub fn require_waypoint(&self) -> &RequireWaypoint {
        &self.require_waypoint
    }
}

/// A workload as the endpoint of a service that it names as its own, if it may take traffic.
pub(crate) fn declared_endpoint<'a>(
    service: &Service,
    key: &NamespacedHostname,
    workload: &'a Arc<Workload>,
) -> Option<Endpoint<'a>> {
    let is_usable = match service.health_policy() {
        HealthPolicy::AllowAll => true,
        HealthPolicy::OnlyHealthy => workload.status == Health::Healthy,
    };
    let ports = workload.services.get(key)?;
    is_usable.then_some(Endpoint { workload, ports })
}

/// From how many changes on a thread costs less than it saves.
const WORTH_A_THREAD: usize = 8192;

/// One of the things that can be done at the same time.
type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Does all of them on two threads, or on this one if there is no other.
fn side_by_side<const N: usize>(jobs: [Job<'_>; N]) {
    let jobs = Mutex::new(jobs.into_iter());
    let next = || jobs.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = || {
        while let Some(job) = next() {
            job();
        }
    };
    scope(|scope| {
        let _ = Builder::new().spawn_scoped(scope, work);
        work();
    });
}

fn is_called(service: &Service, key: &NamespacedHostname) -> bool {
    service.hostname == key.hostname && service.namespace == key.namespace
}

fn canonical_workload(mut workload: Arc<Workload>) -> Arc<Workload> {
    if workload.addresses.iter().any(|ip| ip.to_canonical() != *ip) {
        for ip in &mut Arc::make_mut(&mut workload).addresses {
            *ip = ip.to_canonical();
        }
    }
    workload
}

fn canonical_service(mut service: Arc<Service>) -> Arc<Service> {
    let is_canonical = service.vips.iter().all(|vip| vip.ip.to_canonical() == vip.ip)
        && service.cidr_vips.iter().all(|range| canonical_range(range.cidr) == range.cidr);
    if !is_canonical {
        let service = Arc::make_mut(&mut service);
        for vip in &mut service.vips {
            vip.ip = vip.ip.to_canonical();
        }
        for range in &mut service.cidr_vips {
            range.cidr = canonical_range(range.cidr);
        }
    }
    service
}

/// A policy of no namespace for all of its namespace is for all namespaces, as peers take it.
fn canonical_policy(mut policy: Authorization) -> Authorization {
    if policy.scope == PolicyScope::Namespace && policy.namespace.is_empty() {
        policy.scope = PolicyScope::Global;
    }
    let clauses = policy.rules.iter_mut().flat_map(|rule| &mut rule.clauses);
    for one in clauses.flat_map(|clause| &mut clause.matches) {
        let Match { source_ips, not_source_ips, destination_ips, not_destination_ips, .. } = one;
        for range in
            [source_ips, not_source_ips, destination_ips, not_destination_ips].into_iter().flatten()
        {
            *range = canonical_range(*range);
        }
    }
    policy
}

fn is_visible(service: &Service, client_namespace: Option<&str>) -> bool {
    client_namespace.is_none_or(|namespace| service.is_visible_to(namespace))
}

/// Of candidates in the order in which they came.
fn best<'a>(
    candidates: impl DoubleEndedIterator<Item = &'a Arc<Service>> + Clone,
    client_namespace: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let visible = || candidates.clone().filter(|service| is_visible(service, client_namespace));
    visible()
        .rfind(|service| client_namespace == Some(&*service.namespace))
        .or_else(|| visible().rfind(|service| service.canonical))
        .or_else(|| visible().next())
}

#[cfg(test)]
mod tests;
