//! The indexes of a snapshot: several values to a key, in the order in which they came.

use std::collections::BTreeMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::Equivalent;
use ipnet::IpNet;

use super::trie::Trie;
use crate::addr::{NetworkAddress, NetworkCidr};
use crate::authorization::{Authorization, PolicyScope};
use crate::service::Service;
use crate::workload::Workload;

/// What an index holds: something with a key of its own.
pub(super) trait Indexed {
    fn is_same_item(&self, other: &Self) -> bool;
}

impl Indexed for Arc<Workload> {
    fn is_same_item(&self, other: &Self) -> bool {
        self.uid == other.uid
    }
}

impl Indexed for Arc<Service> {
    fn is_same_item(&self, other: &Self) -> bool {
        self.namespace == other.namespace && self.hostname == other.hostname
    }
}

impl Indexed for Arc<Authorization> {
    fn is_same_item(&self, other: &Self) -> bool {
        self.namespace == other.namespace && self.name == other.name
    }
}

/// Values by a key that several may share; the last one inserted comes last.
#[derive(Debug)]
pub(super) struct Index<K, V>(Trie<K, Arc<[V]>>);

impl<K: Hash + Eq + Clone, V: Indexed + Clone> Index<K, V> {
    pub fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> &[V] {
        self.0.get(key).map_or(&[], |values| values)
    }

    /// Returns whether it was not there before. Takes the place of the same item, if any.
    pub fn insert(&mut self, key: K, value: V) -> bool {
        let values = self.get(&key);
        let others = values.iter().filter(|other| !other.is_same_item(&value));
        let next: Arc<[V]> = others.chain([&value]).cloned().collect();
        let added = next.len() > values.len();
        self.0.insert(key, next);
        added
    }

    /// Returns whether it was there.
    pub fn remove(&mut self, key: &K, value: &V) -> bool {
        let values = self.get(key);
        let next: Arc<[V]> =
            values.iter().filter(|other| !other.is_same_item(value)).cloned().collect();
        let removed = next.len() < values.len();
        if next.is_empty() {
            self.0.remove(key);
        } else if removed {
            self.0.insert(key.clone(), next);
        }
        removed
    }
}

impl<K, V> Clone for Index<K, V> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K, V> Default for Index<K, V> {
    fn default() -> Self {
        Self(Trie::default())
    }
}

/// Services by address range.
#[derive(Clone, Debug, Default)]
pub(super) struct CidrIndex {
    by_cidr: Index<NetworkCidr, Arc<Service>>,
    /// How many entries have a prefix of this length, for IPv4 (false) and IPv6 (true).
    lengths: Arc<BTreeMap<(bool, u8), usize>>,
}

impl CidrIndex {
    pub fn insert(&mut self, service: &Arc<Service>) {
        for range in &service.cidr_vips {
            if self.by_cidr.insert(truncated(range), service.clone()) {
                let lengths = Arc::make_mut(&mut self.lengths);
                *lengths.entry(length_key(&range.cidr)).or_default() += 1;
            }
        }
    }

    pub fn remove(&mut self, service: &Arc<Service>) {
        for range in &service.cidr_vips {
            if self.by_cidr.remove(&truncated(range), service) {
                let lengths = Arc::make_mut(&mut self.lengths);
                let key = length_key(&range.cidr);
                match lengths.get_mut(&key) {
                    Some(count) if *count > 1 => *count -= 1,
                    Some(_) | None => {
                        lengths.remove(&key);
                    }
                }
            }
        }
    }

    /// The services around an address with the length of their prefix, the longest first.
    pub fn around(&self, network: &str, ip: IpAddr) -> impl Iterator<Item = (u8, &Arc<Service>)> {
        self.lengths
            .range((ip.is_ipv6(), 0)..=(ip.is_ipv6(), u8::MAX))
            .rev()
            .filter_map(move |((_, length), _)| {
                let cidr = IpNet::new(ip, *length).ok()?.trunc();
                Some((*length, self.by_cidr.get(&CidrRef { network, cidr })))
            })
            .flat_map(|(length, services)| services.iter().map(move |service| (length, service)))
    }
}

fn truncated(range: &NetworkCidr) -> NetworkCidr {
    NetworkCidr { network: range.network.clone(), cidr: range.cidr.trunc() }
}

fn length_key(cidr: &IpNet) -> (bool, u8) {
    (cidr.addr().is_ipv6(), cidr.prefix_len())
}

/// Policies by what they apply to.
#[derive(Clone, Debug, Default)]
pub(super) struct PolicyIndex {
    pub by_key: Trie<Arc<str>, Arc<Authorization>>,
    pub global: Arc<[Arc<Authorization>]>,
    pub by_namespace: Index<Arc<str>, Arc<Authorization>>,
}

impl PolicyIndex {
    pub fn insert(&mut self, policy: Authorization) {
        let key = policy.key();
        if self.by_key.get(&key).is_some_and(|known| **known == policy) {
            return;
        }
        self.remove(&key);
        let policy = Arc::new(policy);
        match policy.scope {
            PolicyScope::Global => {
                self.global = self.global.iter().chain([&policy]).cloned().collect();
            }
            PolicyScope::Namespace => {
                self.by_namespace.insert(policy.namespace.clone(), policy.clone());
            }
            PolicyScope::WorkloadSelector => {}
        }
        self.by_key.insert(key, policy);
    }

    pub fn remove(&mut self, key: &str) {
        let Some(policy) = self.by_key.remove(key) else { return };
        match policy.scope {
            PolicyScope::Global => {
                let others = self.global.iter().filter(|other| !other.is_same_item(&policy));
                self.global = others.cloned().collect();
            }
            PolicyScope::Namespace => {
                self.by_namespace.remove(&policy.namespace, &policy);
            }
            PolicyScope::WorkloadSelector => {}
        }
    }
}

/// A borrowed [`NetworkAddress`] to look up by.
#[derive(Hash)]
pub(super) struct NetworkAddressRef<'a> {
    pub network: &'a str,
    pub ip: IpAddr,
}

impl Equivalent<NetworkAddress> for NetworkAddressRef<'_> {
    fn equivalent(&self, key: &NetworkAddress) -> bool {
        self.ip == key.ip && *self.network == *key.network
    }
}

#[derive(Hash)]
struct CidrRef<'a> {
    network: &'a str,
    cidr: IpNet,
}

impl Equivalent<NetworkCidr> for CidrRef<'_> {
    fn equivalent(&self, key: &NetworkCidr) -> bool {
        self.cidr == key.cidr && *self.network == *key.network
    }
}

/// The namespace and name of a workload's pod.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct PodName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Hash)]
pub(super) struct PodNameRef<'a> {
    pub namespace: &'a str,
    pub name: &'a str,
}

impl Equivalent<PodName> for PodNameRef<'_> {
    fn equivalent(&self, key: &PodName) -> bool {
        *self.namespace == *key.namespace && *self.name == *key.name
    }
}
