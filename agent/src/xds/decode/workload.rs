//! `istio.workload.Workload`.

use std::sync::Arc;

use bytes::Bytes;
use culvert_core::addr::NamespacedHostname;
use culvert_core::intern::{Interner, Last};
use culvert_core::workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, Health, Locality, Memberships, NetworkMode,
    PortMap, TunnelProtocol, Workload,
};
use culvert_proto::istio::workload as proto;
use prost::Message;

use super::super::wire::text;
use super::{Rejection, fields, raw};

/// What an empty field stands for.
static DEFAULT_TRUST_DOMAIN: Bytes = Bytes::from_static(b"cluster.local");
static DEFAULT_SERVICE_ACCOUNT: Bytes = Bytes::from_static(b"default");
static DEFAULT_CLUSTER: Bytes = Bytes::from_static(b"Kubernetes");

/// What the workload before this one had: of these most repeat it.
#[derive(Debug, Default)]
pub(super) struct Before {
    namespace: Last,
    trust_domain: Last,
    /// What the workload's owner is called, which names its account and application too.
    owner: Last,
    hostname: Last,
    network: Last,
    node: Last,
    cluster_id: Last,
    canonical_revision: Last,
    workload_type: Last,
    locality: Arc<Locality>,
}

pub(super) fn decode(
    raw: Box<raw::Workload>,
    texts: &mut Interner,
    before: &mut Before,
) -> Result<Arc<Workload>, Rejection> {
    if raw.uid.is_empty() {
        return Err(Rejection::Missing("uid"));
    }
    let address = |bytes: &Bytes| fields::address("addresses", bytes);
    let addresses = raw.addresses.iter().map(|bytes| address(bytes).map(|ip| ip.to_canonical()));
    let gateway = |field, raw: Option<proto::GatewayAddress>, texts: &mut Interner| {
        raw.map(|raw| fields::gateway(field, raw, texts)).transpose()
    };
    let policies = raw.authorization_policies.iter();
    let policies =
        policies.map(|name| text("authorization_policies", name).map(|text| texts.text(text)));
    let policies = policies.collect::<Result<_, _>>()?;
    let locality = locality(&raw.locality.unwrap_or_default(), texts, &mut before.locality)?;
    let mut known = |field, bytes: &Bytes, last: &mut Last| {
        text(field, bytes).map(|text| texts.text_like(last, text))
    };
    let trust_domain = or(&raw.trust_domain, &DEFAULT_TRUST_DOMAIN);
    let service_account = or(&raw.service_account, &DEFAULT_SERVICE_ACCOUNT);
    let cluster_id = or(&raw.cluster_id, &DEFAULT_CLUSTER);
    Ok(Arc::new(Workload {
        authorization_policies: policies,
        addresses: addresses.collect::<Result<_, _>>()?,
        // The key of the name's version too, and therefore not interned.
        uid: text("uid", &raw.uid)?.into(),
        name: text("name", &raw.name)?.into(),
        namespace: known("namespace", &raw.namespace, &mut before.namespace)?,
        trust_domain: known("trust_domain", trust_domain, &mut before.trust_domain)?,
        service_account: known("service_account", service_account, &mut before.owner)?,
        workload_name: known("workload_name", &raw.workload_name, &mut before.owner)?,
        canonical_name: known("canonical_name", &raw.canonical_name, &mut before.owner)?,
        canonical_revision: known(
            "canonical_revision",
            &raw.canonical_revision,
            &mut before.canonical_revision,
        )?,
        hostname: known("hostname", &raw.hostname, &mut before.hostname)?,
        network: known("network", &raw.network, &mut before.network)?,
        tunnel_protocol: tunnel_protocol(raw.tunnel_protocol)?,
        network_mode: network_mode(raw.network_mode)?,
        node: known("node", &raw.node, &mut before.node)?,
        cluster_id: known("cluster_id", cluster_id, &mut before.cluster_id)?,
        native_tunnel: raw.native_tunnel,
        application_tunnel: raw.application_tunnel.map(application_tunnel).transpose()?,
        status: status(raw.status)?,
        capacity: raw.capacity.unwrap_or(1),
        waypoint: gateway("waypoint", raw.waypoint, texts)?,
        network_gateway: gateway("network_gateway", raw.network_gateway, texts)?,
        locality,
        services: services(&raw.services, texts)?,
        workload_type: texts.text_like(&mut before.workload_type, workload_type(raw.workload_type)),
        // `extensions` are absent: they are for other consumers of the resource.
    }))
}

fn or<'a>(given: &'a Bytes, default: &'a Bytes) -> &'a Bytes {
    if given.is_empty() { default } else { given }
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

fn locality(
    raw: &raw::Locality,
    texts: &mut Interner,
    before: &mut Arc<Locality>,
) -> Result<Arc<Locality>, Rejection> {
    let Locality { region, zone, subzone } = &**before;
    let parts = [(region, &raw.region), (zone, &raw.zone), (subzone, &raw.subzone)];
    if parts.iter().all(|(known, given)| known.as_bytes() == &***given) {
        return Ok(before.clone());
    }
    let mut known = |bytes: &Bytes| text("locality", bytes).map(|text| texts.text(text));
    let locality = Locality {
        region: known(&raw.region)?,
        zone: known(&raw.zone)?,
        subzone: known(&raw.subzone)?,
    };
    *before = texts.locality(locality);
    Ok(before.clone())
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

/// Most workloads have one service, encoded just as others of that service have it.
fn services(raw: &[Bytes], texts: &mut Interner) -> Result<Memberships, Rejection> {
    if let [only] = raw {
        return texts.memberships_of(only, |texts| Ok([membership(only, texts)?].into()));
    }
    let services = raw.iter().map(|one| membership(one, texts));
    // Of several of one name the last counts, as in any map of the protocol.
    let services = services.collect::<Result<_, Rejection>>()?;
    Ok(texts.memberships(services))
}

fn membership(
    raw: &Bytes,
    texts: &mut Interner,
) -> Result<(NamespacedHostname, PortMap), Rejection> {
    let raw::Membership { service, ports } = raw::Membership::decode(raw.clone())?;
    let key = text("services", &service)?;
    let Some((namespace, hostname)) = key.split_once('/') else {
        return Err(Rejection::invalid("services", key, "is not namespace/hostname"));
    };
    let ports = texts.ports(fields::ports(ports.unwrap_or_default().ports));
    Ok((texts.hostname(namespace, hostname), ports))
}
