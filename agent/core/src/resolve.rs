//! What an address, a hostname or a gateway reference stands for.

use std::net::IpAddr;
use std::sync::Arc;

use crate::addr::NamespacedHostname;
use crate::identity::Identity;
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::workload::{GatewayAddress, GatewayDestination, Workload};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination<'a> {
    Workload(&'a Arc<Workload>),
    Service(&'a Arc<Service>),
    Unknown,
}

/// What an address is: a workload before a service.
///
/// This order answers whether a service was addressed, whether a destination is acceptable, and
/// who is behind a gateway reference; [`upstream_at`] has the other one.
pub fn address<'a>(
    snapshot: &'a Snapshot,
    network: &str,
    ip: IpAddr,
    client_namespace: Option<&str>,
) -> Destination<'a> {
    match snapshot.workload_at(network, ip) {
        Some(workload) => Destination::Workload(workload),
        None => snapshot
            .service_at(network, ip, client_namespace)
            .map_or(Destination::Unknown, Destination::Service),
    }
}

/// Where traffic to an address goes: to a service before a workload.
pub fn upstream_at<'a>(
    snapshot: &'a Snapshot,
    network: &str,
    ip: IpAddr,
    client_namespace: Option<&str>,
) -> Destination<'a> {
    match snapshot.service_at(network, ip, client_namespace) {
        Some(service) => Destination::Service(service),
        None => {
            snapshot.workload_at(network, ip).map_or(Destination::Unknown, Destination::Workload)
        }
    }
}

/// What a hostname within one namespace is: a service before a workload.
pub fn hostname<'a>(snapshot: &'a Snapshot, name: &NamespacedHostname) -> Destination<'a> {
    match snapshot.service(name) {
        Some(service) => Destination::Service(service),
        None => snapshot.workload_named(name).map_or(Destination::Unknown, Destination::Workload),
    }
}

/// What a waypoint or network gateway reference names.
pub fn gateway<'a>(snapshot: &'a Snapshot, reference: &GatewayAddress) -> Destination<'a> {
    match &reference.destination {
        GatewayDestination::Hostname(name) => hostname(snapshot, name),
        GatewayDestination::Address(at) => address(snapshot, &at.network, at.ip, None),
    }
}

impl<'a> Destination<'a> {
    /// The workload itself, or all workloads behind the service.
    pub fn workloads(self, snapshot: &'a Snapshot) -> Vec<&'a Arc<Workload>> {
        match self {
            Destination::Workload(workload) => vec![workload],
            Destination::Service(service) => snapshot.members(service).collect(),
            Destination::Unknown => Vec::new(),
        }
    }

    pub fn includes(self, workload: &Workload) -> bool {
        match self {
            Destination::Workload(other) => other.uid == workload.uid,
            Destination::Service(service) => service.endpoint_ports(workload).is_some(),
            Destination::Unknown => false,
        }
    }

    /// Of its peers: the identities that the service names, and those of its workloads.
    pub fn identities(self, snapshot: &'a Snapshot) -> impl Iterator<Item = Identity> {
        let named = match self {
            Destination::Service(service) => Some(service.identities()),
            Destination::Workload(_) | Destination::Unknown => None,
        };
        let own = self.workloads(snapshot).into_iter().map(|workload| workload.identity());
        named.into_iter().flatten().chain(own)
    }
}
