//! Services and their endpoints as the dump shows them.

use std::collections::BTreeMap;

use culvert_core::addr::NamespacedHostname;
use culvert_core::service::{
    BalanceMode, HealthPolicy, IpFamilies, LoadBalancer, Scope, Service, Visibility,
};
use culvert_core::snapshot::Snapshot;
use culvert_core::workload::{Health, PortMap};
use serde::Serialize;

use super::{GatewayDump, health};

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceDump<'a> {
    name: &'a str,
    namespace: &'a str,
    hostname: &'a str,
    vips: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cidr_vips: Vec<CidrDump<'a>>,
    ports: &'a PortMap,
    endpoints: &'a Endpoints<'a>,
    subject_alt_names: Vec<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    weighted_waypoints: Vec<WeightedWaypointDump>,
    #[serde(skip_serializing_if = "Option::is_none")]
    load_balancer: Option<LoadBalancerDump>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip_families: Option<&'static str>,
    canonical: bool,
    visibility: &'static str,
}

/// By workload uid.
pub(super) type Endpoints<'a> = BTreeMap<&'a str, EndpointDump<'a>>;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EndpointDump<'a> {
    workload_uid: &'a str,
    port: &'a PortMap,
    status: &'static str,
}

#[derive(Serialize)]
struct CidrDump<'a> {
    network: &'a str,
    cidr: String,
}

#[derive(Serialize)]
struct WeightedWaypointDump {
    destination: GatewayDump,
    weight: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct LoadBalancerDump {
    routing_preferences: Vec<&'static str>,
    mode: &'static str,
    health_policy: &'static str,
}

/// The endpoints by service.
pub(super) type ByService<'a> = BTreeMap<NamespacedHostname, Endpoints<'a>>;

/// The endpoints of every service, and of services that are named but do not exist. Unhealthy ones
/// are there too, so that they can be seen.
pub(super) fn endpoints(snapshot: &Snapshot) -> ByService<'_> {
    let mut found = ByService::new();
    for workload in snapshot.workloads() {
        for (key, port) in &workload.services {
            let status = health(workload.status);
            let endpoint = EndpointDump { workload_uid: &workload.uid, port, status };
            found.entry(key.clone()).or_default().insert(&workload.uid, endpoint);
        }
    }
    for service in snapshot.services() {
        let endpoints = found.entry(service.key()).or_default();
        for (uid, port) in &service.fixed_endpoints {
            let workload = snapshot.workload(uid);
            let status = health(workload.map_or(Health::Healthy, |workload| workload.status));
            endpoints.insert(uid, EndpointDump { workload_uid: uid, port, status });
        }
    }
    found
}

impl<'a> ServiceDump<'a> {
    pub(super) fn of(service: &'a Service, endpoints: &'a Endpoints<'a>) -> Self {
        Self {
            name: &service.name,
            namespace: &service.namespace,
            hostname: &service.hostname,
            vips: service.vips.iter().map(ToString::to_string).collect(),
            cidr_vips: service
                .cidr_vips
                .iter()
                .map(|vip| CidrDump { network: &vip.network, cidr: vip.cidr.to_string() })
                .collect(),
            ports: &service.ports,
            endpoints,
            subject_alt_names: service.subject_alt_names.iter().map(|name| &**name).collect(),
            waypoint: service.waypoint.as_deref().map(GatewayDump::of),
            weighted_waypoints: service
                .weighted_waypoints
                .iter()
                .map(|waypoint| WeightedWaypointDump {
                    destination: GatewayDump::of(&waypoint.destination),
                    weight: waypoint.weight,
                })
                .collect(),
            load_balancer: service.load_balancer.as_ref().map(LoadBalancerDump::of),
            ip_families: match service.ip_families {
                IpFamilies::Automatic => None,
                IpFamilies::Ipv4Only => Some("IPv4"),
                IpFamilies::Ipv6Only => Some("IPv6"),
                IpFamilies::Dual => Some("Dual"),
            },
            canonical: service.canonical,
            visibility: match service.visibility {
                Visibility::Public => "Public",
                Visibility::Namespace => "Namespace",
            },
        }
    }
}

impl LoadBalancerDump {
    fn of(balancer: &LoadBalancer) -> Self {
        let scope = |scope: &Scope| match scope {
            Scope::Region => "Region",
            Scope::Zone => "Zone",
            Scope::Subzone => "Subzone",
            Scope::Node => "Node",
            Scope::Cluster => "Cluster",
            Scope::Network => "Network",
        };
        Self {
            routing_preferences: balancer.routing_preferences.iter().map(scope).collect(),
            mode: match balancer.mode {
                BalanceMode::Standard => "Standard",
                BalanceMode::Strict => "Strict",
                BalanceMode::Failover => "Failover",
                BalanceMode::Passthrough => "Passthrough",
            },
            health_policy: match balancer.health_policy {
                HealthPolicy::OnlyHealthy => "OnlyHealthy",
                HealthPolicy::AllowAll => "AllowAll",
            },
        }
    }
}
