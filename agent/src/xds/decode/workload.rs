//! `istio.workload.Workload`.

use std::sync::Arc;

use culvert_core::addr::NamespacedHostname;
use culvert_core::intern::Interner;
use culvert_core::workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, Health, Locality, NetworkMode, PortMap,
    TunnelProtocol, Workload,
};
use culvert_proto::istio::workload as proto;

use super::{Rejection, fields};

/// What an empty field stands for.
const DEFAULT_TRUST_DOMAIN: &str = "cluster.local";
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
const DEFAULT_CLUSTER: &str = "Kubernetes";

pub(super) fn decode(raw: proto::Workload, texts: &mut Interner) -> Result<Workload, Rejection> {
    if raw.uid.is_empty() {
        return Err(Rejection::Missing("uid"));
    }
    let address = |bytes: &Vec<u8>| fields::address("addresses", bytes);
    let addresses = raw.addresses.iter().map(|bytes| address(bytes).map(|ip| ip.to_canonical()));
    let gateway = |field, raw: Option<proto::GatewayAddress>, texts: &mut Interner| {
        raw.map(|raw| fields::gateway(field, raw, texts)).transpose()
    };
    let policies = raw.authorization_policies.iter().map(|name| texts.text(name));
    Ok(Workload {
        authorization_policies: policies.collect(),
        addresses: addresses.collect::<Result<_, _>>()?,
        // The key of the name's version too, and therefore not interned.
        uid: raw.uid.into(),
        name: raw.name.into(),
        namespace: texts.text(&raw.namespace),
        trust_domain: or_default(&raw.trust_domain, DEFAULT_TRUST_DOMAIN, texts),
        service_account: or_default(&raw.service_account, DEFAULT_SERVICE_ACCOUNT, texts),
        hostname: texts.text(&raw.hostname),
        network: texts.text(&raw.network),
        tunnel_protocol: tunnel_protocol(raw.tunnel_protocol)?,
        network_mode: network_mode(raw.network_mode)?,
        waypoint: gateway("waypoint", raw.waypoint, texts)?,
        network_gateway: gateway("network_gateway", raw.network_gateway, texts)?,
        node: texts.text(&raw.node),
        cluster_id: or_default(&raw.cluster_id, DEFAULT_CLUSTER, texts),
        locality: locality(&raw.locality.unwrap_or_default(), texts),
        native_tunnel: raw.native_tunnel,
        application_tunnel: raw.application_tunnel.map(application_tunnel).transpose()?,
        services: services(raw.services, texts)?,
        status: status(raw.status)?,
        capacity: raw.capacity.unwrap_or(1),
        workload_name: texts.text(&raw.workload_name),
        workload_type: texts.text(workload_type(raw.workload_type)),
        canonical_name: texts.text(&raw.canonical_name),
        canonical_revision: texts.text(&raw.canonical_revision),
        // `extensions` are absent: they are for other consumers of the resource.
    })
}

fn or_default(text: &str, default: &str, texts: &mut Interner) -> Arc<str> {
    texts.text(if text.is_empty() { default } else { text })
}

fn tunnel_protocol(number: i32) -> Result<TunnelProtocol, Rejection> {
    match proto::TunnelProtocol::try_from(number) {
        Ok(proto::TunnelProtocol::None) => Ok(TunnelProtocol::None),
        Ok(proto::TunnelProtocol::Hbone) => Ok(TunnelProtocol::Hbone),
        Ok(proto::TunnelProtocol::LegacyIstioMtls) => {
            Err(Rejection::invalid("tunnel_protocol", "LEGACY_ISTIO_MTLS", "is not spoken"))
        }
        Err(_) => Err(Rejection::undefined("tunnel_protocol", number)),
    }
}

fn network_mode(number: i32) -> Result<NetworkMode, Rejection> {
    match proto::NetworkMode::try_from(number) {
        Ok(proto::NetworkMode::Standard) => Ok(NetworkMode::Standard),
        Ok(proto::NetworkMode::HostNetwork) => Ok(NetworkMode::HostNetwork),
        Err(_) => Err(Rejection::undefined("network_mode", number)),
    }
}

fn status(number: i32) -> Result<Health, Rejection> {
    match proto::WorkloadStatus::try_from(number) {
        Ok(proto::WorkloadStatus::Healthy) => Ok(Health::Healthy),
        Ok(proto::WorkloadStatus::Unhealthy) => Ok(Health::Unhealthy),
        Err(_) => Err(Rejection::undefined("status", number)),
    }
}

/// Only for telemetry, and therefore a deployment when it is unknown.
fn workload_type(number: i32) -> &'static str {
    match proto::WorkloadType::try_from(number) {
        Ok(proto::WorkloadType::Deployment) | Err(_) => "deployment",
        Ok(proto::WorkloadType::Cronjob) => "cronjob",
        Ok(proto::WorkloadType::Pod) => "pod",
        Ok(proto::WorkloadType::Job) => "job",
    }
}

fn locality(raw: &proto::Locality, texts: &mut Interner) -> Arc<Locality> {
    let (region, zone) = (texts.text(&raw.region), texts.text(&raw.zone));
    let subzone = texts.text(&raw.subzone);
    texts.locality(Locality { region, zone, subzone })
}

fn application_tunnel(raw: proto::ApplicationTunnel) -> Result<ApplicationTunnel, Rejection> {
    use proto::application_tunnel::Protocol;
    let protocol = match Protocol::try_from(raw.protocol) {
        Ok(Protocol::None) => ApplicationTunnelProtocol::None,
        Ok(Protocol::Proxy) => ApplicationTunnelProtocol::Proxy,
        Err(_) => return Err(Rejection::undefined("application_tunnel.protocol", raw.protocol)),
    };
    let port = match raw.port {
        0 => None,
        port => Some(fields::port("application_tunnel.port", port)?),
    };
    Ok(ApplicationTunnel { protocol, port })
}

fn services(
    raw: std::collections::BTreeMap<String, proto::PortList>,
    texts: &mut Interner,
) -> Result<culvert_core::workload::Memberships, Rejection> {
    let mut services: Vec<(NamespacedHostname, PortMap)> = Vec::with_capacity(raw.len());
    for (key, list) in raw {
        let Some((namespace, hostname)) = key.split_once('/') else {
            return Err(Rejection::invalid("services", key, "is not namespace/hostname"));
        };
        let ports = texts.ports(fields::ports(list.ports));
        services.push((texts.hostname(namespace, hostname), ports));
    }
    Ok(texts.memberships(services.into_iter().collect()))
}
