//! The indexes of a snapshot: what is found by another key than its own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::Job;
use super::batch::Indexes;
use super::members::{Joins, MemberIndex};
use super::trie::{Kind, Step, Trie};
use crate::addr::{NamespacedHostname, NetworkCidr};
use crate::authorization::{Authorization, PolicyScope};
use crate::service::Service;
use crate::workload::{NetworkMode, Workload};

/// Workloads by what else they are known by.
#[derive(Clone, Debug, Default)]
pub(super) struct WorkloadIndex {
    by_address: Trie<Workload>,
    by_pod_name: Trie<Workload>,
    by_dns_name: Trie<Workload>,
}

/// The steps of all that workloads are found by besides their uid.
pub(super) struct WorkloadSteps<'a> {
    index: &'a WorkloadIndex,
    by_address: Vec<Step<Workload>>,
    by_pod_name: Vec<Step<Workload>>,
    by_dns_name: Vec<Step<Workload>>,
    joins: Joins<'a>,
}

impl<'a> WorkloadSteps<'a> {
    pub fn of(index: &'a WorkloadIndex, joins: Joins<'a>) -> Self {
        let (by_address, by_pod_name, by_dns_name) = Default::default();
        Self { index, by_address, by_pod_name, by_dns_name, joins }
    }
}

impl Indexes<Workload> for WorkloadSteps<'_> {
    fn add(&mut self, kind: Kind, uid: u64, value: &Arc<Workload>) {
        let step = |hash| Step { hash, value: value.clone(), kind };
        let (workload, index) = (&**value, self.index);
        let at = |ip: &IpAddr| index.by_address.hash(&(&*workload.network, *ip));
        self.by_address.extend(distinct(addresses(workload)).map(|ip| step(at(ip))));
        let pod = (&*workload.namespace, &*workload.name);
        self.by_pod_name.push(step(index.by_pod_name.hash(&pod)));
        if !workload.hostname.is_empty() {
            let name = (&*workload.namespace, &*workload.hostname);
            self.by_dns_name.push(step(index.by_dns_name.hash(&name)));
        }
        for service in workload.services.keys() {
            self.joins.add(service, step(uid));
        }
    }
}

impl WorkloadIndex {
    /// What there is to do with the steps, in any order.
    pub fn jobs<'a>(
        &'a mut self,
        by_uid: (&'a mut Trie<Workload>, Vec<Step<Workload>>),
        members: &'a mut MemberIndex,
        steps: WorkloadSteps<'a>,
    ) -> [Job<'a>; 5] {
        let (by_uid, uids) = by_uid;
        let Self { by_address, by_pod_name, by_dns_name } = self;
        let alike = Trie::empty_like(by_uid);
        [
            Box::new(move || members.apply(steps.joins, &alike)),
            Box::new(move || by_uid.apply(uids)),
            Box::new(move || by_address.apply(steps.by_address)),
            Box::new(move || by_pod_name.apply(steps.by_pod_name)),
            Box::new(move || by_dns_name.apply(steps.by_dns_name)),
        ]
    }

    pub fn at<'a>(&'a self, network: &str, ip: IpAddr) -> impl Iterator<Item = &'a Arc<Workload>> {
        let hash = self.by_address.hash(&(network, ip));
        self.by_address.matching(hash, move |workload| {
            *workload.network == *network && workload.addresses.contains(&ip)
        })
    }

    pub fn of_pod<'a>(
        &'a self,
        namespace: &str,
        name: &str,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<Workload>> {
        let hash = self.by_pod_name.hash(&(namespace, name));
        self.by_pod_name.matching(hash, move |workload| {
            *workload.name == *name && *workload.namespace == *namespace
        })
    }

    pub fn named(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        let hash = self.by_dns_name.hash(&(&*name.namespace, &*name.hostname));
        self.by_dns_name.find(hash, |workload| {
            workload.hostname == name.hostname && workload.namespace == name.namespace
        })
    }
}

/// What a workload owns: one in the host's network owns no address.
fn addresses(workload: &Workload) -> &[IpAddr] {
    match workload.network_mode {
        NetworkMode::Standard => &workload.addresses,
        NetworkMode::HostNetwork => &[],
    }
}

fn distinct<T: PartialEq>(items: &[T]) -> impl Iterator<Item = &T> {
    let is_new = |(place, item): &(usize, &T)| !items.iter().take(*place).any(|it| it == *item);
    items.iter().enumerate().filter(is_new).map(|(_, item)| item)
}

/// Services by what else they are known by.
#[derive(Clone, Debug, Default)]
pub(super) struct ServiceIndex {
    by_vip: Trie<Service>,
    by_cidr: Trie<Service>,
    /// How many services have a range with a prefix of this length, for IPv4 (false) and IPv6 (true).
    lengths: Arc<BTreeMap<(bool, u8), usize>>,
    by_hostname: Trie<Service>,
    /// By the uid of a workload that the service names as its endpoint.
    by_fixed_endpoint: Trie<Service>,
}

/// The steps of all that services are found by besides their key.
pub(super) struct ServiceSteps<'a> {
    index: &'a ServiceIndex,
    by_vip: Vec<Step<Service>>,
    by_cidr: Vec<Step<Service>>,
    lengths: Vec<(Kind, (bool, u8))>,
    by_hostname: Vec<Step<Service>>,
    by_fixed_endpoint: Vec<Step<Service>>,
}

impl<'a> ServiceSteps<'a> {
    pub fn of(index: &'a ServiceIndex) -> Self {
        let (by_vip, by_cidr, lengths) = Default::default();
        let (by_hostname, by_fixed_endpoint) = Default::default();
        Self { index, by_vip, by_cidr, lengths, by_hostname, by_fixed_endpoint }
    }
}

impl Indexes<Service> for ServiceSteps<'_> {
    fn add(&mut self, kind: Kind, _: u64, value: &Arc<Service>) {
        let step = |hash| Step { hash, value: value.clone(), kind };
        let (service, index) = (&**value, self.index);
        let vips = distinct(&service.vips);
        let vips = vips.map(|vip| index.by_vip.hash(&(&*vip.network, vip.ip)));
        self.by_vip.extend(vips.map(step));
        for NetworkCidr { network, cidr } in ranges(service) {
            self.by_cidr.push(step(index.by_cidr.hash(&(&*network, cidr))));
            self.lengths.push((kind, (cidr.addr().is_ipv6(), cidr.prefix_len())));
        }
        self.by_hostname.push(step(index.by_hostname.hash(&*service.hostname)));
        let endpoints = service.fixed_endpoints.keys();
        let endpoints = endpoints.map(|uid| index.by_fixed_endpoint.hash(&**uid));
        self.by_fixed_endpoint.extend(endpoints.map(step));
    }
}

impl ServiceIndex {
    pub fn apply(&mut self, steps: ServiceSteps<'_>) {
        self.by_vip.apply(steps.by_vip);
        self.by_cidr.apply(steps.by_cidr);
        self.by_hostname.apply(steps.by_hostname);
        self.by_fixed_endpoint.apply(steps.by_fixed_endpoint);
        if !steps.lengths.is_empty() {
            self.count_lengths(steps.lengths);
        }
    }

    pub fn at<'a>(
        &'a self,
        network: &str,
        ip: IpAddr,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<Service>> + Clone {
        self.by_vip.matching(self.by_vip.hash(&(network, ip)), move |service| {
            service.vips.iter().any(|vip| vip.ip == ip && *vip.network == *network)
        })
    }

    /// The services around an address with the length of their prefix, the longest first.
    pub fn around<'a>(
        &'a self,
        network: &str,
        ip: IpAddr,
    ) -> impl Iterator<Item = (u8, &'a Arc<Service>)> {
        let lengths = self.lengths.range((ip.is_ipv6(), 0)..=(ip.is_ipv6(), u8::MAX)).rev();
        lengths.map(|((_, length), _)| *length).flat_map(move |length| {
            // Every length here came from a range of this family.
            let cidr = IpNet::new(ip, length).map_or(IpNet::from(ip), |around| around.trunc());
            let is_it =
                move |range: &NetworkCidr| range.cidr.trunc() == cidr && *range.network == *network;
            let hash = self.by_cidr.hash(&(network, cidr));
            let found =
                self.by_cidr.matching(hash, move |service| service.cidr_vips.iter().any(is_it));
            found.map(move |service| (length, service))
        })
    }

    pub fn named<'a>(
        &'a self,
        hostname: &str,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<Service>> + Clone {
        let hash = self.by_hostname.hash(hostname);
        self.by_hostname.matching(hash, move |service| *service.hostname == *hostname)
    }

    /// The services that name this workload as their endpoint.
    pub fn with_fixed<'a>(&'a self, uid: &str) -> impl Iterator<Item = &'a Arc<Service>> {
        let hash = self.by_fixed_endpoint.hash(uid);
        self.by_fixed_endpoint
            .matching(hash, move |service| service.fixed_endpoints.contains_key(uid))
    }

    fn count_lengths(&mut self, steps: Vec<(Kind, (bool, u8))>) {
        let lengths = Arc::make_mut(&mut self.lengths);
        for (kind, key) in steps {
            let count = lengths.entry(key).or_default();
            match kind {
                Kind::Insert => *count += 1,
                Kind::Remove if *count > 1 => *count -= 1,
                Kind::Remove => {
                    lengths.remove(&key);
                }
            }
        }
    }
}

/// The ranges of a service, each once and without host bits.
fn ranges(service: &Service) -> Vec<NetworkCidr> {
    let mut ranges: Vec<NetworkCidr> = Vec::with_capacity(service.cidr_vips.len());
    for range in &service.cidr_vips {
        let range = NetworkCidr { network: range.network.clone(), cidr: range.cidr.trunc() };
        if !ranges.contains(&range) {
            ranges.push(range);
        }
    }
    ranges
}

/// Policies by what they apply to.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyIndex {
    pub by_key: Trie<Authorization>,
    pub global: Arc<[Arc<Authorization>]>,
    by_namespace: Trie<Authorization>,
}

/// The steps of all that policies are found by besides their key.
pub(super) struct PolicySteps<'a> {
    index: &'a PolicyIndex,
    global: Vec<(Kind, Arc<Authorization>)>,
    by_namespace: Vec<Step<Authorization>>,
}

impl<'a> PolicySteps<'a> {
    pub fn of(index: &'a PolicyIndex) -> Self {
        let (global, by_namespace) = Default::default();
        Self { index, global, by_namespace }
    }
}

impl Indexes<Authorization> for PolicySteps<'_> {
    fn add(&mut self, kind: Kind, _: u64, value: &Arc<Authorization>) {
        match value.scope {
            PolicyScope::Global => self.global.push((kind, value.clone())),
            PolicyScope::Namespace => {
                let hash = self.index.by_namespace.hash(&*value.namespace);
                self.by_namespace.push(Step { hash, value: value.clone(), kind });
            }
            PolicyScope::WorkloadSelector => {}
        }
    }
}

impl PolicyIndex {
    pub fn apply(&mut self, by_key: Vec<Step<Authorization>>, steps: PolicySteps<'_>) {
        self.by_key.apply(by_key);
        self.by_namespace.apply(steps.by_namespace);
        if steps.global.is_empty() {
            return;
        }
        let mut global = self.global.to_vec();
        for (kind, policy) in steps.global {
            match kind {
                Kind::Insert => global.push(policy),
                Kind::Remove => global.retain(|other| !Arc::ptr_eq(other, &policy)),
            }
        }
        self.global = global.into();
    }

    pub fn of_namespace<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<Authorization>> {
        let hash = self.by_namespace.hash(namespace);
        self.by_namespace.matching(hash, move |policy| *policy.namespace == *namespace)
    }
}
