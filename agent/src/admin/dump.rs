//! `/config_dump`: everything the agent knows, in the shape that istioctl reads.

mod certificate;
mod pod;
mod policy;
mod service;
mod workload;

use std::collections::BTreeMap;

use culvert_core::authorization::Authorization;
use culvert_core::snapshot::Snapshot;
use culvert_core::workload::{GatewayAddress, GatewayDestination, Health};
use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

pub use certificate::{Certificate, CertificateState, CertificateStatus};
pub use pod::{Pod, PodState};

use super::Sources;
use certificate::CertificateDump;
use pod::PodDump;
use policy::PolicyDump;
use service::{ByService, Endpoints, ServiceDump};
use workload::WorkloadDump;

/// Which program this is.
#[derive(Clone, Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    pub version: String,
    pub git_revision: String,
    pub rust_version: String,
    pub build_profile: String,
    /// `Clean` or `Modified`.
    pub build_status: String,
    pub istio_version: String,
    pub crypto_provider: String,
}

/// Keys in alphabetical order.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Dump<'a> {
    certificates: Vec<CertificateDump<'a>>,
    config: serde_json::Value,
    policies: Vec<PolicyDump<'a>>,
    services: Vec<ServiceDump<'a>>,
    staged_services: BTreeMap<String, &'a Endpoints<'a>>,
    static_config: Mesh<'a>,
    version: Version,
    workload_state: BTreeMap<&'a str, PodDump>,
    workloads: Vec<WorkloadDump<'a>>,
}

/// The lists of one snapshot.
#[derive(Serialize)]
struct Mesh<'a> {
    policies: Vec<PolicyDump<'a>>,
    services: Vec<ServiceDump<'a>>,
    workloads: Vec<WorkloadDump<'a>>,
}

pub(super) fn config_dump(sources: &Sources) -> serde_json::Result<Vec<u8>> {
    let state = &sources.state;
    let mut certificates = state.certificates();
    certificates.sort_by_cached_key(|certificate| certificate.identity.to_string());
    let pods = state.pods();
    let snapshot = state.snapshot();
    let file = state.static_config().unwrap_or_else(|error| {
        tracing::warn!(%error, "cannot read the configuration file again");
        Snapshot::default()
    });
    let endpoints = service::endpoints(&snapshot);
    let file_endpoints = service::endpoints(&file);
    let Mesh { policies, services, workloads } = mesh(&snapshot, &endpoints);
    let dump = Dump {
        certificates: certificates.iter().map(CertificateDump::of).collect(),
        config: state.config(),
        policies,
        services,
        staged_services: staged(&snapshot, &endpoints),
        static_config: mesh(&file, &file_endpoints),
        version: state.version(),
        workload_state: pods
            .iter()
            .map(|pod| (&*pod.uid, PodDump::of(pod, state.connections())))
            .collect(),
        workloads,
    };
    let mut body = serde_json::to_vec_pretty(&dump)?;
    body.push(b'\n');
    Ok(body)
}

fn mesh<'a>(snapshot: &'a Snapshot, endpoints: &'a ByService<'a>) -> Mesh<'a> {
    let mut policies: Vec<&Authorization> = snapshot.policies().map(AsRef::as_ref).collect();
    policies.sort_by_key(|policy| (&policy.namespace, &policy.name));
    let mut services: Vec<_> =
        snapshot.services().map(|service| (service.key(), service)).collect();
    services
        .sort_by(|(a, _), (b, _)| (&a.hostname, &a.namespace).cmp(&(&b.hostname, &b.namespace)));
    let mut workloads: Vec<_> = snapshot.workloads().collect();
    workloads.sort_by_key(|workload| &workload.uid);
    Mesh {
        policies: policies.into_iter().map(PolicyDump::of).collect(),
        services: services
            .into_iter()
            .filter_map(|(key, service)| Some(ServiceDump::of(service, endpoints.get(&key)?)))
            .collect(),
        workloads: workloads.into_iter().map(|workload| WorkloadDump::of(workload)).collect(),
    }
}

/// The endpoints that wait for their service.
fn staged<'a>(
    snapshot: &Snapshot,
    endpoints: &'a ByService<'a>,
) -> BTreeMap<String, &'a Endpoints<'a>> {
    let waiting = endpoints.iter().filter(|(key, _)| snapshot.service(key).is_none());
    waiting.map(|(key, endpoints)| (key.to_string(), endpoints)).collect()
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct GatewayDump {
    destination: String,
    hbone_mtls_port: u16,
}

impl GatewayDump {
    fn of(gateway: &GatewayAddress) -> Self {
        let destination = match &gateway.destination {
            GatewayDestination::Address(address) => address.to_string(),
            GatewayDestination::Hostname(hostname) => hostname.to_string(),
        };
        Self { destination, hbone_mtls_port: gateway.hbone_mtls_port }
    }
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Healthy => "Healthy",
        Health::Unhealthy => "Unhealthy",
    }
}

fn is_empty(text: &&str) -> bool {
    text.is_empty()
}

/// RFC 3339 in UTC, whole seconds.
const SECONDS: &[BorrowedFormatItem<'_>] =
    format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");

pub(super) fn seconds_utc(instant: OffsetDateTime) -> String {
    instant.to_offset(time::UtcOffset::UTC).format(SECONDS).unwrap_or_default()
}

#[cfg(test)]
mod tests;
