//! Workloads as the dump shows them.

use std::net::IpAddr;

use culvert_core::workload::{
    ApplicationTunnelProtocol, Locality, NetworkMode, TunnelProtocol, Workload,
};
use serde::Serialize;

use super::{GatewayDump, health, is_empty};

/// What is empty or default is left out, except where the reader counts on it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct WorkloadDump<'a> {
    workload_ips: &'a [IpAddr],
    #[serde(skip_serializing_if = "Option::is_none")]
    waypoint: Option<GatewayDump>,
    #[serde(skip_serializing_if = "Option::is_none")]
    network_gateway: Option<GatewayDump>,
    protocol: &'static str,
    network_mode: &'static str,
    #[serde(skip_serializing_if = "is_empty")]
    uid: &'a str,
    name: &'a str,
    namespace: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    trust_domain: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    service_account: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    network: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    workload_name: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    workload_type: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    canonical_name: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    canonical_revision: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    hostname: &'a str,
    #[serde(skip_serializing_if = "is_empty")]
    node: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    native_tunnel: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    application_tunnel: Option<ApplicationTunnelDump>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    authorization_policies: Vec<&'a str>,
    status: &'static str,
    cluster_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    locality: Option<LocalityDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    services: Vec<String>,
    capacity: u32,
}

#[derive(Serialize)]
struct ApplicationTunnelDump {
    protocol: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
}

#[derive(Serialize)]
struct LocalityDump<'a> {
    region: &'a str,
    zone: &'a str,
    subzone: &'a str,
}

impl<'a> WorkloadDump<'a> {
    pub(super) fn of(workload: &'a Workload) -> Self {
        let locality = &workload.locality;
        Self {
            workload_ips: &workload.addresses,
            waypoint: workload.waypoint.as_deref().map(GatewayDump::of),
            network_gateway: workload.network_gateway.as_deref().map(GatewayDump::of),
            protocol: match workload.tunnel_protocol {
                TunnelProtocol::Hbone => "HBONE",
                TunnelProtocol::None => "TCP",
            },
            network_mode: match workload.network_mode {
                NetworkMode::Standard => "Standard",
                NetworkMode::HostNetwork => "HostNetwork",
            },
            uid: &workload.uid,
            name: &workload.name,
            namespace: &workload.namespace,
            trust_domain: &workload.trust_domain,
            service_account: &workload.service_account,
            network: &workload.network,
            workload_name: &workload.workload_name,
            workload_type: &workload.workload_type,
            canonical_name: &workload.canonical_name,
            canonical_revision: &workload.canonical_revision,
            hostname: &workload.hostname,
            node: &workload.node,
            native_tunnel: workload.native_tunnel,
            application_tunnel: workload.application_tunnel.map(|tunnel| ApplicationTunnelDump {
                protocol: match tunnel.protocol {
                    ApplicationTunnelProtocol::None => "NONE",
                    ApplicationTunnelProtocol::Proxy => "PROXY",
                },
                port: tunnel.port,
            }),
            authorization_policies: workload.authorization_policies.iter().map(|p| &**p).collect(),
            status: health(workload.status),
            cluster_id: &workload.cluster_id,
            locality: (**locality != Locality::default()).then_some(LocalityDump {
                region: &locality.region,
                zone: &locality.zone,
                subzone: &locality.subzone,
            }),
            services: workload.services.keys().map(ToString::to_string).collect(),
            capacity: workload.capacity,
        }
    }
}
