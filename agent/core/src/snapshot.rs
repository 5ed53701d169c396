//! The mesh as known at one instant: immutable, indexed, cheap to derive from its predecessor.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use crate::addr::{NamespacedHostname, NetworkAddress};
use crate::authorization::Authorization;
use crate::service::{HealthPolicy, Service};
use crate::workload::{Health, NetworkMode, PolicyKey, PortMap, TunnelProtocol, Workload};
use index::{CidrIndex, Index, NetworkAddressRef, PodName, PodNameRef, PolicyIndex};
use trie::Trie;

mod index;
mod trie;

/// One step from a snapshot to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Workload(Workload),
    RemoveWorkload(Arc<str>),
    Service(Service),
    RemoveService(NamespacedHostname),
    Authorization(Authorization),
    RemoveAuthorization(PolicyKey),
    /// Replaces the set of workloads that must be reached through their waypoint.
    RequireWaypoint(RequireWaypoint),
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
    workloads: Trie<Arc<str>, Arc<Workload>>,
    by_address: Index<NetworkAddress, Arc<Workload>>,
    by_pod_name: Index<PodName, Arc<Workload>>,
    by_dns_name: Index<NamespacedHostname, Arc<Workload>>,
    /// By service, whether or not that is known: its endpoints as workloads declare them.
    members: Trie<NamespacedHostname, Trie<Arc<str>, Arc<Workload>>>,

    services: Trie<NamespacedHostname, Arc<Service>>,
    by_vip: Index<NetworkAddress, Arc<Service>>,
    by_cidr: CidrIndex,
    by_hostname: Index<Arc<str>, Arc<Service>>,
    /// By the uid of a workload that the service names as its endpoint.
    by_fixed_endpoint: Index<Arc<str>, Arc<Service>>,

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
    /// IPv4-mapped IPv6 addresses become plain IPv4.
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Snapshot {
        let mut next = self.clone();
        for change in changes {
            match change {
                Change::Workload(workload) => next.insert_workload(workload),
                Change::RemoveWorkload(uid) => next.remove_workload(&uid),
                Change::Service(service) => next.insert_service(service),
                Change::RemoveService(key) => next.remove_service(&key),
                Change::Authorization(policy) => next.policies.insert(policy),
                Change::RemoveAuthorization(key) => next.policies.remove(&key),
                Change::RequireWaypoint(require) => {
                    if *next.require_waypoint != require {
                        next.require_waypoint = Arc::new(require);
                    }
                }
            }
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
        self.workloads.get(uid)
    }

    /// The workload that owns an address. Of several: pods before others, then HBONE before plain
    /// TCP, then the latest. Workloads in the host's network own none.
    pub fn workload_at(&self, network: &str, ip: IpAddr) -> Option<&Arc<Workload>> {
        let key = NetworkAddressRef { network, ip: ip.to_canonical() };
        match self.by_address.get(&key) {
            [only] => Some(only),
            // `max_by_key` takes the last of equals.
            several => several.iter().max_by_key(|workload| {
                let hbone = workload.tunnel_protocol == TunnelProtocol::Hbone;
                (workload.uid.contains("//Pod/"), hbone)
            }),
        }
    }

    /// The workload with this DNS name in this namespace.
    pub fn workload_named(&self, name: &NamespacedHostname) -> Option<&Arc<Workload>> {
        self.by_dns_name.get(name).first()
    }

    /// The workloads of the pods with this name, of any node.
    pub fn workloads_of_pod(&self, namespace: &str, name: &str) -> &[Arc<Workload>] {
        self.by_pod_name.get(&PodNameRef { namespace, name })
    }

    /// The workload of a pod on `node`; on any node when that is empty.
    pub fn local_workload(
        &self,
        namespace: &str,
        name: &str,
        service_account: &str,
        node: &str,
    ) -> Option<&Arc<Workload>> {
        self.workloads_of_pod(namespace, name).iter().rev().find(|workload| {
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
        self.services.get(key)
    }

    /// The service that an address stands for, to a client of a namespace: among those with
    /// exactly this address as [`Snapshot::service_named`] chooses; else among those whose range
    /// holds it the client's own, then the narrowest, then a canonical one.
    pub fn service_at(
        &self,
        network: &str,
        ip: IpAddr,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        let ip = ip.to_canonical();
        let exact = self.by_vip.get(&NetworkAddressRef { network, ip });
        best(exact, client_namespace).or_else(|| {
            let mut best = None;
            for (length, service) in self.by_cidr.around(network, ip) {
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
    pub fn service_named(
        &self,
        hostname: &str,
        client_namespace: Option<&str>,
    ) -> Option<&Arc<Service>> {
        best(self.by_hostname.get(hostname), client_namespace)
    }

    /// The services with a hostname, one of each namespace that has it.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.by_hostname.get(hostname)
    }

    /// The endpoints that may take traffic: those that workloads declare as far as the service's
    /// health policy lets them, and the service's own.
    pub fn endpoints<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = Endpoint<'a>> {
        let key = service.key();
        let usable = |workload: &Workload| match service.health_policy() {
            HealthPolicy::AllowAll => true,
            HealthPolicy::OnlyHealthy => workload.status == Health::Healthy,
        };
        let members = self.members.get(&key);
        let declared = members.into_iter().flat_map(Trie::values).filter_map({
            let key = key.clone();
            move |workload| {
                let ports = workload.services.get(&key)?;
                usable(workload).then_some(Endpoint { workload, ports })
            }
        });
        let fixed = service.fixed_endpoints.iter().filter_map(move |(uid, ports)| {
            let workload = self.workload(uid)?;
            let is_declared = workload.services.contains_key(&key) && usable(workload);
            (!is_declared).then_some(Endpoint { workload, ports })
        });
        declared.chain(fixed)
    }

    /// All workloads behind a service, healthy or not.
    pub fn members<'a>(&'a self, service: &'a Service) -> impl Iterator<Item = &'a Arc<Workload>> {
        let key = service.key();
        let declared = self.members.get(&key).into_iter().flat_map(Trie::values);
        let fixed = service.fixed_endpoints.keys().filter_map(|uid| self.workload(uid));
        declared.chain(fixed.filter(move |workload| !workload.services.contains_key(&key)))
    }

    /// The known services that a workload is an endpoint of, healthy or not.
    pub fn services_of<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Arc<Service>> {
        let declared = workload.services.keys().filter_map(|key| self.service(key));
        let fixed = self.by_fixed_endpoint.get(&*workload.uid).iter();
        declared.chain(fixed.filter(|service| !workload.services.contains_key(&service.key())))
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.by_key.values()
    }

    pub fn policy(&self, key: &str) -> Option<&Arc<Authorization>> {
        self.policies.by_key.get(key)
    }

    /// Those that apply to every workload.
    pub fn global_policies(&self) -> &[Arc<Authorization>] {
        &self.policies.global
    }

    /// Those that apply to every workload of a namespace.
    pub fn namespace_policies(&self, namespace: &str) -> &[Arc<Authorization>] {
        self.policies.by_namespace.get(namespace)
    }

    /// Whether no policy came, went or changed between the two. Costs one comparison; two
    /// snapshots of which neither was made from the other never share.
    pub fn shares_policies_with(&self, other: &Snapshot) -> bool {
        self.policies.by_key.is_same(&other.policies.by_key)
    }

    pub fn require_waypoint(&self) -> &RequireWaypoint {
        &self.require_waypoint
    }

    fn insert_workload(&mut self, mut workload: Workload) {
        for ip in &mut workload.addresses {
            *ip = ip.to_canonical();
        }
        if self.workload(&workload.uid).is_some_and(|known| **known == workload) {
            return;
        }
        self.remove_workload(&workload.uid.clone());
        let workload = Arc::new(workload);
        for key in addresses(&workload) {
            self.by_address.insert(key, workload.clone());
        }
        self.by_pod_name.insert(pod_name(&workload), workload.clone());
        if let Some(name) = dns_name(&workload) {
            self.by_dns_name.insert(name, workload.clone());
        }
        for service in workload.services.keys() {
            match self.members.get_mut(service) {
                Some(members) => {
                    members.insert(workload.uid.clone(), workload.clone());
                }
                None => {
                    let mut members = Trie::default();
                    members.insert(workload.uid.clone(), workload.clone());
                    self.members.insert(service.clone(), members);
                }
            }
        }
        self.workloads.insert(workload.uid.clone(), workload);
    }

    fn remove_workload(&mut self, uid: &str) {
        let Some(workload) = self.workloads.remove(uid) else { return };
        for key in addresses(&workload) {
            self.by_address.remove(&key, &workload);
        }
        self.by_pod_name.remove(&pod_name(&workload), &workload);
        if let Some(name) = dns_name(&workload) {
            self.by_dns_name.remove(&name, &workload);
        }
        for service in workload.services.keys() {
            let Some(members) = self.members.get_mut(service) else { continue };
            members.remove(uid);
            if members.len() == 0 {
                self.members.remove(service);
            }
        }
    }

    fn insert_service(&mut self, mut service: Service) {
        for vip in &mut service.vips {
            vip.ip = vip.ip.to_canonical();
        }
        for range in &mut service.cidr_vips {
            range.cidr = canonical_range(range.cidr);
        }
        let key = service.key();
        if self.service(&key).is_some_and(|known| **known == service) {
            return;
        }
        self.remove_service(&key);
        let service = Arc::new(service);
        for vip in &service.vips {
            self.by_vip.insert(vip.clone(), service.clone());
        }
        self.by_cidr.insert(&service);
        self.by_hostname.insert(service.hostname.clone(), service.clone());
        for uid in service.fixed_endpoints.keys() {
            self.by_fixed_endpoint.insert(uid.clone(), service.clone());
        }
        self.services.insert(key, service);
    }

    fn remove_service(&mut self, key: &NamespacedHostname) {
        let Some(service) = self.services.remove(key) else { return };
        for vip in &service.vips {
            self.by_vip.remove(vip, &service);
        }
        self.by_cidr.remove(&service);
        self.by_hostname.remove(&service.hostname, &service);
        for uid in service.fixed_endpoints.keys() {
            self.by_fixed_endpoint.remove(uid, &service);
        }
    }
}

/// The keys under which a workload is found by address.
fn addresses(workload: &Workload) -> impl Iterator<Item = NetworkAddress> {
    let own: &[IpAddr] = match workload.network_mode {
        NetworkMode::Standard => &workload.addresses,
        NetworkMode::HostNetwork => &[],
    };
    own.iter().map(|ip| NetworkAddress { network: workload.network.clone(), ip: *ip })
}

fn pod_name(workload: &Workload) -> PodName {
    PodName { namespace: workload.namespace.clone(), name: workload.name.clone() }
}

fn dns_name(workload: &Workload) -> Option<NamespacedHostname> {
    (!workload.hostname.is_empty()).then(|| NamespacedHostname {
        namespace: workload.namespace.clone(),
        hostname: workload.hostname.clone(),
    })
}

/// The length of `::ffff:0:0/96`, in which IPv4-mapped addresses lie (RFC 4291 section 2.5.5.2).
const MAPPED_PREFIX: u8 = 96;

fn canonical_range(cidr: IpNet) -> IpNet {
    let mapped = |addr: Ipv6Addr| addr.to_ipv4_mapped();
    match cidr {
        IpNet::V4(_) => cidr,
        IpNet::V6(range) => mapped(range.addr())
            .zip(range.prefix_len().checked_sub(MAPPED_PREFIX))
            .and_then(|(addr, length)| Ipv4Net::new(addr, length).ok())
            .map_or(cidr, IpNet::V4),
    }
}

fn is_visible(service: &Service, client_namespace: Option<&str>) -> bool {
    client_namespace.is_none_or(|namespace| service.is_visible_to(namespace))
}

/// Of candidates in the order in which they came.
fn best<'a>(
    candidates: &'a [Arc<Service>],
    client_namespace: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let visible = || candidates.iter().filter(|service| is_visible(service, client_namespace));
    visible()
        .rfind(|service| client_namespace == Some(&*service.namespace))
        .or_else(|| visible().rfind(|service| service.canonical))
        .or_else(|| visible().next())
}

#[cfg(test)]
mod tests;
