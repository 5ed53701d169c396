//! Workloads, services and policies as ztunnel's local format writes them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use culvert_core::addr::{NetworkAddress, NetworkCidr};
use culvert_core::authorization::{
    Action, Authorization, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};
use culvert_core::service::{
    BalanceMode, HealthPolicy, IpFamilies, LoadBalancer, Scope, Service, Visibility,
    WeightedWaypoint,
};
use culvert_core::workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, Health,
    Locality, NetworkMode, PortMap, TunnelProtocol, Workload,
};
use ipnet::IpNet;
use serde::Deserialize;

use super::scalar::{ServiceKey, Text};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawWorkload {
    workload_ips: Vec<Text<IpAddr>>,
    namespace: String,
    services: BTreeMap<Text<ServiceKey>, PortMap>,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    trust_domain: String,
    #[serde(default)]
    service_account: String,
    #[serde(default)]
    cluster_id: String,
    #[serde(default)]
    network: String,
    #[serde(default = "plain_tcp")]
    protocol: Text<TunnelProtocol>,
    #[serde(default = "standard_network")]
    network_mode: Text<NetworkMode>,
    #[serde(default)]
    node: String,
    #[serde(default)]
    workload_name: String,
    #[serde(default)]
    workload_type: String,
    #[serde(default)]
    canonical_name: String,
    #[serde(default)]
    canonical_revision: String,
    #[serde(default)]
    hostname: String,
    waypoint: Option<RawGateway>,
    network_gateway: Option<RawGateway>,
    #[serde(default)]
    native_tunnel: bool,
    application_tunnel: Option<RawApplicationTunnel>,
    #[serde(default)]
    authorization_policies: Vec<String>,
    #[serde(default = "healthy")]
    status: Text<Health>,
    locality: Option<RawLocality>,
    #[serde(default = "one")]
    capacity: u32,
}

fn plain_tcp() -> Text<TunnelProtocol> {
    Text(TunnelProtocol::None)
}

fn standard_network() -> Text<NetworkMode> {
    Text(NetworkMode::Standard)
}

fn healthy() -> Text<Health> {
    Text(Health::Healthy)
}

fn one() -> u32 {
    1
}

impl From<RawWorkload> for Workload {
    fn from(raw: RawWorkload) -> Self {
        Workload {
            uid: raw.uid.into(),
            name: raw.name.into(),
            namespace: raw.namespace.into(),
            trust_domain: raw.trust_domain.into(),
            service_account: raw.service_account.into(),
            addresses: texts(raw.workload_ips),
            hostname: raw.hostname.into(),
            network: raw.network.into(),
            tunnel_protocol: raw.protocol.0,
            network_mode: raw.network_mode.0,
            waypoint: raw.waypoint.map(gateway),
            network_gateway: raw.network_gateway.map(gateway),
            node: raw.node.into(),
            cluster_id: raw.cluster_id.into(),
            locality: raw.locality.map(|raw| Arc::new(raw.into())).unwrap_or_default(),
            native_tunnel: raw.native_tunnel,
            application_tunnel: raw.application_tunnel.map(Into::into),
            services: raw.services.into_iter().map(|(key, ports)| (key.0.0, ports)).collect(),
            authorization_policies: raw
                .authorization_policies
                .into_iter()
                .map(Into::into)
                .collect(),
            status: raw.status.0,
            capacity: raw.capacity,
            workload_name: raw.workload_name.into(),
            workload_type: raw.workload_type.into(),
            canonical_name: raw.canonical_name.into(),
            canonical_revision: raw.canonical_revision.into(),
        }
    }
}

fn texts<T>(list: Vec<Text<T>>) -> Vec<T> {
    list.into_iter().map(|text| text.0).collect()
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawGateway {
    destination: Text<GatewayDestination>,
    hbone_mtls_port: u16,
}

fn gateway(raw: RawGateway) -> Arc<GatewayAddress> {
    let RawGateway { destination, hbone_mtls_port } = raw;
    Arc::new(GatewayAddress { destination: destination.0, hbone_mtls_port })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawApplicationTunnel {
    protocol: Text<ApplicationTunnelProtocol>,
    port: Option<u16>,
}

impl From<RawApplicationTunnel> for ApplicationTunnel {
    fn from(raw: RawApplicationTunnel) -> Self {
        ApplicationTunnel { protocol: raw.protocol.0, port: raw.port }
    }
}

/// Unknown keys are ignored here, as ztunnel does.
#[derive(Deserialize)]
struct RawLocality {
    region: String,
    zone: String,
    subzone: String,
}

impl From<RawLocality> for Locality {
    fn from(raw: RawLocality) -> Self {
        Locality { region: raw.region.into(), zone: raw.zone.into(), subzone: raw.subzone.into() }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawService {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<Text<NetworkAddress>>,
    ports: PortMap,
    #[serde(default)]
    cidr_vips: Vec<RawCidr>,
    #[serde(default)]
    endpoints: BTreeMap<String, RawEndpoint>,
    #[serde(default)]
    subject_alt_names: Vec<String>,
    waypoint: Option<RawGateway>,
    #[serde(default)]
    weighted_waypoints: Vec<RawWeightedWaypoint>,
    load_balancer: Option<RawLoadBalancer>,
    ip_families: Option<Text<IpFamilies>>,
    #[serde(default)]
    canonical: bool,
    #[serde(default = "public")]
    visibility: Text<Visibility>,
}

fn public() -> Text<Visibility> {
    Text(Visibility::Public)
}

impl From<RawService> for Service {
    fn from(raw: RawService) -> Self {
        let endpoints = raw.endpoints.into_values();
        Service {
            name: raw.name.into(),
            namespace: raw.namespace.into(),
            hostname: raw.hostname.into(),
            vips: texts(raw.vips),
            cidr_vips: raw.cidr_vips.into_iter().map(Into::into).collect(),
            ports: raw.ports,
            subject_alt_names: raw.subject_alt_names.into_iter().map(Into::into).collect(),
            waypoint: raw.waypoint.map(gateway),
            weighted_waypoints: raw.weighted_waypoints.into_iter().map(Into::into).collect(),
            load_balancer: raw.load_balancer.map(Into::into),
            ip_families: raw.ip_families.map_or(IpFamilies::Automatic, |families| families.0),
            canonical: raw.canonical,
            visibility: raw.visibility.0,
            fixed_endpoints: endpoints.map(|it| (it.workload_uid.into(), it.port)).collect(),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCidr {
    network: String,
    cidr: Text<IpNet>,
}

impl From<RawCidr> for NetworkCidr {
    fn from(raw: RawCidr) -> Self {
        NetworkCidr { network: raw.network.into(), cidr: raw.cidr.0 }
    }
}

/// The status must be written and is not used: such endpoints are not filtered by health.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawEndpoint {
    workload_uid: String,
    port: PortMap,
    #[serde(rename = "status")]
    _status: Text<Health>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawWeightedWaypoint {
    destination: RawGateway,
    weight: u32,
}

impl From<RawWeightedWaypoint> for WeightedWaypoint {
    fn from(raw: RawWeightedWaypoint) -> Self {
        WeightedWaypoint { destination: gateway(raw.destination), weight: raw.weight }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawLoadBalancer {
    routing_preferences: Vec<Text<Scope>>,
    mode: Text<BalanceMode>,
    health_policy: Text<HealthPolicy>,
}

impl From<RawLoadBalancer> for LoadBalancer {
    fn from(raw: RawLoadBalancer) -> Self {
        LoadBalancer {
            routing_preferences: texts(raw.routing_preferences),
            mode: raw.mode.0,
            health_policy: raw.health_policy.0,
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct RawPolicy {
    name: String,
    namespace: String,
    scope: Text<PolicyScope>,
    action: Text<Action>,
    rules: Vec<Vec<Vec<RawMatch>>>,
    dry_run: bool,
}

impl From<RawPolicy> for Authorization {
    fn from(raw: RawPolicy) -> Self {
        let clause = |matches: Vec<RawMatch>| Clause {
            matches: matches.into_iter().map(Into::into).collect(),
        };
        let rule = |clauses: Vec<Vec<RawMatch>>| Rule {
            clauses: clauses.into_iter().map(clause).collect(),
        };
        Authorization {
            name: raw.name.into(),
            namespace: raw.namespace.into(),
            scope: raw.scope.0,
            action: raw.action.0,
            rules: raw.rules.into_iter().map(rule).collect(),
            dry_run: raw.dry_run,
        }
    }
}

/// Unknown keys are ignored here, as ztunnel does.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct RawMatch {
    namespaces: Vec<RawStringMatch>,
    not_namespaces: Vec<RawStringMatch>,
    principals: Vec<RawStringMatch>,
    not_principals: Vec<RawStringMatch>,
    service_accounts: Vec<RawServiceAccount>,
    not_service_accounts: Vec<RawServiceAccount>,
    source_ips: Vec<Text<IpNet>>,
    not_source_ips: Vec<Text<IpNet>>,
    destination_ips: Vec<Text<IpNet>>,
    not_destination_ips: Vec<Text<IpNet>>,
    destination_ports: Vec<u16>,
    not_destination_ports: Vec<u16>,
}

impl From<RawMatch> for Match {
    fn from(raw: RawMatch) -> Self {
        let strings = |list: Vec<RawStringMatch>| list.into_iter().map(Into::into).collect();
        let accounts = |list: Vec<RawServiceAccount>| list.into_iter().map(Into::into).collect();
        Match {
            namespaces: strings(raw.namespaces),
            not_namespaces: strings(raw.not_namespaces),
            principals: strings(raw.principals),
            not_principals: strings(raw.not_principals),
            service_accounts: accounts(raw.service_accounts),
            not_service_accounts: accounts(raw.not_service_accounts),
            source_ips: texts(raw.source_ips),
            not_source_ips: texts(raw.not_source_ips),
            destination_ips: texts(raw.destination_ips),
            not_destination_ips: texts(raw.not_destination_ips),
            destination_ports: raw.destination_ports,
            not_destination_ports: raw.not_destination_ports,
        }
    }
}

/// Written with YAML tags: `!Prefix text`. `Presence` takes an empty list, which is why a bare
/// word is no string match.
#[derive(Deserialize)]
enum RawStringMatch {
    Exact(String),
    Prefix(String),
    Suffix(String),
    Presence(),
}

impl From<RawStringMatch> for StringMatch {
    fn from(raw: RawStringMatch) -> Self {
        match raw {
            RawStringMatch::Exact(text) => StringMatch::Exact(Arc::from(text)),
            RawStringMatch::Prefix(text) => StringMatch::Prefix(Arc::from(text)),
            RawStringMatch::Suffix(text) => StringMatch::Suffix(Arc::from(text)),
            RawStringMatch::Presence() => StringMatch::Presence,
        }
    }
}

/// Unknown keys are ignored here, as ztunnel does.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawServiceAccount {
    namespace: String,
    service_account: String,
}

impl From<RawServiceAccount> for ServiceAccountMatch {
    fn from(raw: RawServiceAccount) -> Self {
        ServiceAccountMatch {
            namespace: raw.namespace.into(),
            service_account: raw.service_account.into(),
        }
    }
}
