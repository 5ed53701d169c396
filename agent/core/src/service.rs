//! Services: names and virtual addresses in front of workloads.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::{NamespacedHostname, NetworkAddress, NetworkCidr};
use crate::identity::Identity;
use crate::workload::{GatewayAddress, PortMap, Workload};

/// One service, as `istio.workload.Service` describes it. Namespace and hostname are its key.
///
/// Its endpoints are not here: workloads name the services they belong to, and the snapshot joins
/// the two.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
    pub vips: Vec<NetworkAddress>,
    pub cidr_vips: Vec<NetworkCidr>,
    pub ports: PortMap,
    /// Identities that its servers may present besides those of the chosen workload, as written.
    pub subject_alt_names: Vec<Arc<str>>,
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// Drawn from before `waypoint` when any weight is positive.
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// `None`: any endpoint, healthy ones only.
    pub load_balancer: Option<LoadBalancer>,
    pub ip_families: IpFamilies,
    /// Wins over other services with the same address or hostname.
    pub canonical: bool,
    pub visibility: Visibility,
    /// Endpoints given with the service itself (the file source only), by workload uid. They join
    /// those that workloads declare and are not filtered by health.
    pub fixed_endpoints: BTreeMap<Arc<str>, PortMap>,
}

impl Service {
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname { namespace: self.namespace.clone(), hostname: self.hostname.clone() }
    }

    /// Whether clients of this namespace may use it.
    pub fn is_visible_to(&self, client_namespace: &str) -> bool {
        match self.visibility {
            Visibility::Public => true,
            Visibility::Namespace => *self.namespace == *client_namespace,
        }
    }

    /// Those of its alternative names that are identities.
    pub fn identities(&self) -> impl Iterator<Item = Identity> {
        self.subject_alt_names.iter().filter_map(|name| name.parse().ok())
    }

    /// The ports of this workload as an endpoint of the service, healthy or not; `None` when it is
    /// none of its endpoints.
    pub fn endpoint_ports<'a>(&'a self, workload: &'a Workload) -> Option<&'a PortMap> {
        workload.services.get(&self.key()).or_else(|| self.fixed_endpoints.get(&workload.uid))
    }

    /// Every waypoint that traffic to the service may take.
    pub fn waypoints(&self) -> impl Iterator<Item = &Arc<GatewayAddress>> {
        let weighted = self.weighted_waypoints.iter().filter(|waypoint| waypoint.weight > 0);
        weighted.map(|waypoint| &waypoint.destination).chain(&self.waypoint)
    }

    pub fn is_passthrough(&self) -> bool {
        self.load_balancer.as_ref().is_some_and(|lb| lb.mode == BalanceMode::Passthrough)
    }

    pub fn health_policy(&self) -> HealthPolicy {
        self.load_balancer.as_ref().map_or(HealthPolicy::OnlyHealthy, |lb| lb.health_policy)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightedWaypoint {
    pub destination: Arc<GatewayAddress>,
    pub weight: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadBalancer {
    pub routing_preferences: Vec<Scope>,
    pub mode: BalanceMode,
    pub health_policy: HealthPolicy,
}

/// What two workloads may have in common (`istio.workload.LoadBalancing.Scope`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    Region,
    Zone,
    Subzone,
    Node,
    Cluster,
    Network,
}

/// How `routing_preferences` bind (`istio.workload.LoadBalancing.Mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalanceMode {
    /// Any endpoint.
    Standard,
    /// Only endpoints that match every scope.
    Strict,
    /// The endpoints that match best.
    Failover,
    /// No selection: the original destination, in plain TCP.
    Passthrough,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HealthPolicy {
    OnlyHealthy,
    AllowAll,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFamilies {
    Automatic,
    Ipv4Only,
    Ipv6Only,
    Dual,
}

impl IpFamilies {
    pub fn accepts(self, ip: IpAddr) -> bool {
        match self {
            IpFamilies::Automatic | IpFamilies::Dual => true,
            IpFamilies::Ipv4Only => ip.is_ipv4(),
            IpFamilies::Ipv6Only => ip.is_ipv6(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visibility {
    Public,
    /// Only for clients of its own namespace.
    Namespace,
}
