//! The indexes of a snapshot: what is found by another key than its own.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::batch::Net;
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

impl WorkloadIndex {
    pub fn apply(&mut self, net: &Net<Workload>) {
        if net.is_empty() {
            return;
        }
        let steps = net.steps(|workload| {
            let (index, network) = (&self.by_address, &*workload.network);
            distinct(addresses(workload)).map(move |ip| index.hash(&(network, *ip)))
        });
        self.by_address.apply(steps);
        let steps =
            net.steps(|workload| [self.by_pod_name.hash(&(&*workload.namespace, &*workload.name))]);
        self.by_pod_name.apply(steps);
        let steps = net.steps(|workload| {
            let name = (&*workload.namespace, &*workload.hostname);
            (!workload.hostname.is_empty()).then(|| self.by_dns_name.hash(&name))
        });
        self.by_dns_name.apply(steps);
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

impl ServiceIndex {
    pub fn apply(&mut self, net: &Net<Service>) {
        if net.is_empty() {
            return;
        }
        let steps = net.steps(|service| {
            distinct(&service.vips).map(|vip| self.by_vip.hash(&(&*vip.network, vip.ip)))
        });
        self.by_vip.apply(steps);
        let hash = |range: NetworkCidr| self.by_cidr.hash(&(&*range.network, range.cidr));
        let steps = net.steps(|service| ranges(service).into_iter().map(hash));
        self.by_cidr.apply(steps);
        self.count_lengths(net);
        let steps = net.steps(|service| [self.by_hostname.hash(&*service.hostname)]);
        self.by_hostname.apply(steps);
        let hash = |uid: &Arc<str>| self.by_fixed_endpoint.hash(&**uid);
        let steps = net.steps(|service| service.fixed_endpoints.keys().map(hash));
        self.by_fixed_endpoint.apply(steps);
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

    fn count_lengths(&mut self, net: &Net<Service>) {
        for Step { value, kind, .. } in net.all() {
            for range in ranges(value) {
                let key = (range.cidr.addr().is_ipv6(), range.cidr.prefix_len());
                let lengths = Arc::make_mut(&mut self.lengths);
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

impl PolicyIndex {
    /// `net` has the hashes of `by_key`.
    pub fn apply(&mut self, net: &Net<Authorization>) {
        if net.is_empty() {
            return;
        }
        self.by_key.apply(net.all().collect());
        let is_global = |policy: &&Arc<Authorization>| policy.scope == PolicyScope::Global;
        let stays = |policy: &&Arc<Authorization>| {
            !net.removed.iter().any(|(_, removed)| Arc::ptr_eq(removed, policy))
        };
        let added = net.added.iter().map(|(_, policy)| policy).filter(is_global);
        if added.clone().next().is_some() || !self.global.iter().all(|policy| stays(&policy)) {
            self.global = self.global.iter().filter(stays).chain(added).cloned().collect();
        }
        let steps = net.steps(|policy| match policy.scope {
            PolicyScope::Namespace => Some(self.by_namespace.hash(&*policy.namespace)),
            PolicyScope::Global | PolicyScope::WorkloadSelector => None,
        });
        self.by_namespace.apply(steps);
    }

    pub fn of_namespace<'a>(
        &'a self,
        namespace: &str,
    ) -> impl Iterator<Item = &'a Arc<Authorization>> {
        let hash = self.by_namespace.hash(namespace);
        self.by_namespace.matching(hash, move |policy| *policy.namespace == *namespace)
    }
}
