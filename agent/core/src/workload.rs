//! Workloads: the pods and other endpoints of the mesh.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::{NamespacedHostname, NetworkAddress};
use crate::identity::Identity;
use crate::sorted::SortedMap;

/// One workload, as `istio.workload.Workload` describes it. The `uid` is its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    pub uid: Arc<str>,
    /// The pod's name.
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub trust_domain: Arc<str>,
    pub service_account: Arc<str>,
    /// Addresses within `network`; may be empty when `hostname` or `network_gateway` is given.
    pub addresses: Vec<IpAddr>,
    /// DNS name to resolve when there are no addresses; empty for none.
    pub hostname: Arc<str>,
    pub network: Arc<str>,
    pub tunnel_protocol: TunnelProtocol,
    pub network_mode: NetworkMode,
    /// The waypoint for traffic that is addressed to this workload itself.
    pub waypoint: Option<Arc<GatewayAddress>>,
    /// How to reach it from another network.
    pub network_gateway: Option<Arc<GatewayAddress>>,
    /// The Kubernetes node it runs on; empty if unknown.
    pub node: Arc<str>,
    pub cluster_id: Arc<str>,
    pub locality: Arc<Locality>,
    /// Terminates HBONE by itself.
    pub native_tunnel: bool,
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services it is an endpoint of, each with its service port → target port map.
    pub services: Memberships,
    /// Policies that apply to it by name, whatever their scope.
    pub authorization_policies: Vec<PolicyKey>,
    pub status: Health,
    /// Weight in load balancing; 0 takes no traffic.
    pub capacity: u32,
    /// Name of the owner (a deployment's, say), for telemetry.
    pub workload_name: Arc<str>,
    /// Kind of the owner in lower case: `deployment`, `cronjob`, `pod`, `job`.
    pub workload_type: Arc<str>,
    pub canonical_name: Arc<str>,
    pub canonical_revision: Arc<str>,
}

impl Workload {
    pub fn identity(&self) -> Identity {
        Identity {
            trust_domain: self.trust_domain.clone(),
            namespace: self.namespace.clone(),
            service_account: self.service_account.clone(),
        }
    }
}

/// Service port → target port. As a service's own map, target 0 stands for a named port, which
/// each endpoint then translates.
pub type PortMap = SortedMap<u16, u16>;

/// The services of a workload.
pub type Memberships = SortedMap<NamespacedHostname, PortMap>;

/// The `namespace/name` of an authorization policy.
pub type PolicyKey = Arc<str>;

/// How a workload is reached (`istio.workload.TunnelProtocol`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TunnelProtocol {
    /// Plain TCP.
    None,
    /// HTTP/2 CONNECT over mutual TLS on port 15008.
    Hbone,
}

/// Whether a workload owns its addresses (`istio.workload.NetworkMode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NetworkMode {
    Standard,
    /// It shares its node's addresses, which therefore do not identify it.
    HostNetwork,
}

/// Whether a workload may take traffic (`istio.workload.WorkloadStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Health {
    Healthy,
    Unhealthy,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Locality {
    pub region: Arc<str>,
    pub zone: Arc<str>,
    pub subzone: Arc<str>,
}

/// How a destination agent hands connections to a workload that wants to know their target
/// (`istio.workload.ApplicationTunnel`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApplicationTunnel {
    pub protocol: ApplicationTunnelProtocol,
    /// Replaces the connection's own target port.
    pub port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ApplicationTunnelProtocol {
    None,
    /// PROXY protocol version 2.
    Proxy,
}

/// Where a waypoint or a network gateway is (`istio.workload.GatewayAddress`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GatewayAddress {
    pub destination: GatewayDestination,
    pub hbone_mtls_port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    Address(NetworkAddress),
    Hostname(NamespacedHostname),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GatewayDestination::Address(address) => address.fmt(f),
            GatewayDestination::Hostname(hostname) => hostname.fmt(f),
        }
    }
}

impl fmt::Display for GatewayAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.destination, self.hbone_mtls_port)
    }
}
