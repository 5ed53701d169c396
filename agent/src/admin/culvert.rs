//! Culvert's own view of itself: status, pods, connections, and explanations.

use std::sync::Arc;

use hyper::StatusCode;
use serde::Serialize;
use time::OffsetDateTime;

use super::Sources;
use super::dump::{CertificateStatus, Pod, PodState, seconds_utc};
use crate::connections::{Connections, Direction, Entry};

/// The agent itself, as its status shows it.
#[derive(Clone, Debug)]
pub struct Agent {
    pub version: String,
    pub node: String,
    pub uptime: std::time::Duration,
    pub source: Source,
    /// Whom it took over from, or hands over to; `None` when it did neither.
    pub handover: Option<String>,
    pub kernel: Kernel,
}

/// Where the mesh's configuration comes from.
#[derive(Clone, Debug)]
pub struct Source {
    /// `file`, say.
    pub kind: &'static str,
    pub path: String,
    /// When it was last taken over in full.
    pub loaded_at: Option<OffsetDateTime>,
    /// Why what came after that could not be taken over.
    pub error: Option<String>,
}

/// The kernel programs and where they are.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Kernel {
    pub cgroup: String,
    pub pin_path: String,
    pub programs: Vec<Program>,
    /// Entries in all flow maps.
    pub flow_entries: u64,
    /// By how many verdicts it admits connections within the node; `None` where it does not.
    pub verdicts: Option<u64>,
    /// Whether it accelerates connections, and why not; `None` where nobody is named for it.
    pub acceleration: Option<String>,
}

/// A loaded program, as `bpftool prog` shows it.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    pub name: String,
    pub id: u32,
}

/// What would happen to a connection, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Explanation {
    pub source: String,
    pub destination: String,
    /// The decisions in the order they are taken.
    pub steps: Vec<ExplainStep>,
    pub outcome: Outcome,
    /// The policy that decides, and the index of its rule.
    pub policy: Option<String>,
    pub rule: Option<usize>,
    /// How the bytes travel: `direct`, `local`, `tunnel`, …
    pub path: Option<String>,
    /// The next hop's address.
    pub via: Option<String>,
    /// What the tunnel is asked for.
    pub authority: Option<String>,
}

/// One decision, what it gave and which rule or object made it so.
#[derive(Clone, Debug, Serialize)]
pub struct ExplainStep {
    pub decision: String,
    pub result: String,
    pub because: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    Allowed,
    Refused,
    /// It is decided elsewhere, by what is not known here.
    Unknown,
}

/// A connection that cannot be explained.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    #[error("{0:?} is not an address, a uid or namespace/name")]
    Source(String),
    #[error("{0:?} is not address:port or host:port")]
    Destination(String),
    #[error("no workload {0:?}")]
    UnknownSource(String),
}

impl ExplainError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            ExplainError::Source(_) | ExplainError::Destination(_) => StatusCode::BAD_REQUEST,
            ExplainError::UnknownSource(_) => StatusCode::NOT_FOUND,
        }
    }
}

pub(super) fn status(sources: &Sources) -> serde_json::Result<Vec<u8>> {
    let state = &sources.state;
    let Agent { version, node, uptime, source, handover, kernel } = state.agent();
    let pending = sources.readiness.pending();
    let snapshot = state.snapshot();
    let pods = state.pods();
    let certificates = state.certificates();
    let (inbound, outbound) = state.connections().count();
    let enrolled = pods.iter().filter(|pod| pod.state == PodState::Enrolled).count();
    let available =
        certificates.iter().filter(|c| c.status == CertificateStatus::Available).count();
    let age = source.loaded_at.map(|loaded| {
        (OffsetDateTime::now_utc() - loaded).max(time::Duration::ZERO).whole_seconds()
    });
    serde_json::to_vec_pretty(&serde_json::json!({
        "version": version,
        "node": node,
        "ready": pending.is_empty(),
        "pending": pending,
        "uptimeSeconds": uptime.as_secs(),
        "source": {
            "kind": source.kind,
            "path": source.path,
            "loadedAt": source.loaded_at.map(seconds_utc),
            "ageSeconds": age,
            "error": source.error,
        },
        "snapshot": {
            "workloads": snapshot.workloads().count(),
            "services": snapshot.services().count(),
            "policies": snapshot.policies().count(),
        },
        "pods": {"enrolled": enrolled, "failed": pods.len() - enrolled},
        "certificates": {"available": available, "unavailable": certificates.len() - available},
        "connections": {"inbound": inbound, "outbound": outbound},
        "handover": handover,
        "kernel": kernel,
    }))
}

pub(super) fn pods(sources: &Sources) -> serde_json::Result<Vec<u8>> {
    let mut pods = sources.state.pods();
    pods.sort_by(|a, b| a.workload.cmp(&b.workload));
    let connections = sources.state.connections();
    let views: Vec<PodView> = pods.iter().map(|pod| PodView::of(pod, connections)).collect();
    serde_json::to_vec_pretty(&views)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodView<'a> {
    workload: &'a str,
    name: &'a str,
    namespace: &'a str,
    service_account: &'a str,
    netns: &'a str,
    cookie: u64,
    addresses: &'a [std::net::IpAddr],
    state: String,
    certificate: String,
    connections: Counts,
    verdicts: usize,
}

#[derive(Serialize)]
struct Counts {
    inbound: usize,
    outbound: usize,
}

impl<'a> PodView<'a> {
    fn of(pod: &'a Pod, connections: &Connections) -> Self {
        let live = connections.of(&pod.uid);
        let inbound = live.iter().filter(|e| e.live().direction == Direction::Inbound).count();
        Self {
            workload: &pod.workload,
            name: &pod.name,
            namespace: &pod.namespace,
            service_account: &pod.service_account,
            netns: &pod.netns,
            cookie: pod.cookie,
            addresses: &pod.addresses,
            state: pod.state.to_string(),
            certificate: pod.certificate.to_string(),
            connections: Counts { inbound, outbound: live.len() - inbound },
            verdicts: pod.verdicts,
        }
    }
}

pub(super) fn connections(sources: &Sources) -> serde_json::Result<Vec<u8>> {
    sources.state.measure();
    let all = sources.state.connections().all();
    let views: Vec<ConnectionView> = all.iter().map(ConnectionView::of).collect();
    serde_json::to_vec_pretty(&views)
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionView<'a> {
    direction: &'static str,
    protocol: &'static str,
    src: std::net::SocketAddr,
    dst: Option<&'a str>,
    target: std::net::SocketAddr,
    src_identity: Option<String>,
    dst_identity: Option<String>,
    workload: &'a str,
    service: Option<&'a str>,
    policy: Option<String>,
    opened_seconds_ago: u64,
    received: u64,
    sent: u64,
}

impl<'a> ConnectionView<'a> {
    fn of(entry: &'a Arc<Entry>) -> Self {
        let live = entry.live();
        Self {
            direction: match live.direction {
                Direction::Inbound => "inbound",
                Direction::Outbound => "outbound",
            },
            protocol: live.protocol.own_name(),
            src: live.src(),
            dst: live.original_dst.as_deref(),
            target: live.actual_dst,
            src_identity: live.source_identity().map(ToString::to_string),
            dst_identity: live.destination_identity().map(|identity| identity.to_string()),
            workload: &live.workload,
            service: live.service(),
            policy: entry.permit().map(|permit| permit.to_string()),
            opened_seconds_ago: entry.age().as_secs(),
            received: live.counters.received(),
            sent: live.counters.sent(),
        }
    }
}
