//! The agent's own JSON answers, as far as the commands show them.
//!
//! | `GET` | Answer |
//! |---|---|
//! | `/culvert/status` | `{"version", "node", "ready": bool, "pending": [task], "uptimeSeconds", "source": {"kind": "file", "path", "loadedAt": RFC 3339 or null, "ageSeconds": or null, "error": null or text}, "snapshot": {"workloads", "services", "policies"}, "pods": {"enrolled", "failed"}, "certificates": {"available", "unavailable"}, "connections": {"inbound", "outbound"}, "handover": null or text, "kernel": {"cgroup", "pinPath", "programs": [{"name", "id"}], "flowEntries", "verdicts": or null, "acceleration": or null}}` |
//! | `/culvert/pods` | `[{"workload": uid, "name", "namespace", "serviceAccount", "netns": path, "cookie", "addresses": [ip], "state": "Enrolled" or "Failed: why", "certificate": state as in `/config_dump`, "connections": {"inbound", "outbound"}, "verdicts"}]` |
//! | `/culvert/connections` | `[{"direction": "inbound" or "outbound", "protocol": "HBONE", "DOUBLEHBONE", "TCP", "LOCAL" or "DIRECT", "src": ip:port of the client, "dst": what the client asked for, or null, "target": ip:port that was dialled for it, "srcIdentity": or null, "dstIdentity": or null, "workload": uid of the local workload, "service": "namespace/hostname" or null, "policy": by which policy and rule, or why else, it is permitted, or null, "openedSecondsAgo", "received": bytes, "sent": bytes}]` |
//! | `/culvert/explain?src=…&dst=…` | `{"source", "destination", "steps": [{"decision", "result", "because"}], "outcome": "allowed", "refused" or "unknown", "policy": "namespace/name" or null, "rule": index from 0 or null, "path": "passthrough", "direct", "local", "tunnel" or null, "via": ip:port or null, "authority": or null}` |
//!
//! `src` is a workload's uid, `namespace/name` or address; `dst` is `ip:port` or `host:port`. A
//! request that cannot be answered gets 400 or 404 with the reason as plain text. Absent keys read
//! as empty, unknown ones are ignored.

use serde::Deserialize;

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Status {
    pub(super) version: String,
    pub(super) node: String,
    pub(super) ready: bool,
    pub(super) pending: Vec<String>,
    pub(super) uptime_seconds: u64,
    pub(super) source: Source,
    pub(super) snapshot: SnapshotCounts,
    pub(super) pods: PodCounts,
    pub(super) certificates: CertificateCounts,
    pub(super) connections: Connections,
    pub(super) handover: Option<String>,
    pub(super) kernel: Kernel,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Source {
    pub(super) kind: String,
    pub(super) path: String,
    pub(super) age_seconds: Option<u64>,
    pub(super) error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct SnapshotCounts {
    pub(super) workloads: u64,
    pub(super) services: u64,
    pub(super) policies: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct PodCounts {
    pub(super) enrolled: u64,
    pub(super) failed: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CertificateCounts {
    pub(super) available: u64,
    pub(super) unavailable: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Connections {
    pub(super) inbound: u64,
    pub(super) outbound: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Kernel {
    pub(super) cgroup: String,
    pub(super) pin_path: String,
    pub(super) programs: Vec<Program>,
    pub(super) flow_entries: u64,
    pub(super) verdicts: Option<u64>,
    pub(super) acceleration: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Program {
    pub(super) name: String,
    pub(super) id: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Pod {
    pub(super) workload: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) service_account: String,
    pub(super) netns: String,
    pub(super) addresses: Vec<String>,
    pub(super) state: String,
    pub(super) certificate: Option<String>,
    pub(super) connections: Connections,
    pub(super) verdicts: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Connection {
    pub(super) direction: String,
    pub(super) protocol: String,
    pub(super) src: String,
    pub(super) dst: Option<String>,
    pub(super) target: String,
    pub(super) src_identity: Option<String>,
    pub(super) dst_identity: Option<String>,
    pub(super) workload: String,
    pub(super) service: Option<String>,
    pub(super) policy: Option<String>,
    pub(super) opened_seconds_ago: u64,
    pub(super) received: u64,
    pub(super) sent: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Explanation {
    pub(super) source: String,
    pub(super) destination: String,
    pub(super) steps: Vec<ExplainedStep>,
    pub(super) outcome: String,
    pub(super) policy: Option<String>,
    pub(super) rule: Option<u64>,
    pub(super) path: Option<String>,
    pub(super) via: Option<String>,
    pub(super) authority: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ExplainedStep {
    pub(super) decision: String,
    pub(super) result: String,
    pub(super) because: String,
}
