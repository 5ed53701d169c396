//! Pods and their connections as the dump shows them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use serde::Serialize;

use super::certificate::CertificateStatus;
use crate::connections::{Connections, Direction, Entry};

/// One pod of this node.
#[derive(Clone, Debug)]
pub struct Pod {
    /// The pod's own UID where there is one, else its workload's.
    pub uid: Arc<str>,
    /// The uid of its workload.
    pub workload: Arc<str>,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
    /// The path of its network namespace.
    pub netns: String,
    /// The namespace's cookie (`SO_NETNS_COOKIE`, Linux 5.14).
    pub cookie: u64,
    pub addresses: Vec<IpAddr>,
    /// To how many destinations the kernel lets it connect by itself.
    pub verdicts: usize,
    pub state: PodState,
    pub certificate: CertificateStatus,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Its connections are captured and served.
    Enrolled,
    /// Why they are not.
    Failed(String),
}

impl fmt::Display for PodState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PodState::Enrolled => f.write_str("Enrolled"),
            PodState::Failed(why) => write!(f, "Failed: {why}"),
        }
    }
}

#[derive(Serialize)]
pub(super) struct PodDump {
    state: &'static str,
    info: PodInfo,
    connections: ConnectionsDump,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PodInfo {
    name: String,
    namespace: String,
    service_account: String,
}

#[derive(Serialize)]
struct ConnectionsDump {
    inbound: Vec<ConnectionDump>,
    outbound: Vec<ConnectionDump>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
struct ConnectionDump {
    src: SocketAddr,
    original_dst: Option<String>,
    actual_dst: SocketAddr,
    protocol: &'static str,
}

impl PodDump {
    pub(super) fn of(pod: &Pod, connections: &Connections) -> Self {
        let live = connections.of(&pod.uid);
        let of = |direction: Direction| {
            let entries = live.iter().filter(|entry| entry.live().direction == direction);
            let mut dumps: Vec<_> = entries.map(|entry| ConnectionDump::of(entry)).collect();
            dumps.sort_unstable();
            dumps
        };
        Self {
            state: match pod.state {
                PodState::Enrolled => "Up",
                PodState::Failed(_) => "Pending",
            },
            info: PodInfo {
                name: pod.name.to_string(),
                namespace: pod.namespace.to_string(),
                service_account: pod.service_account.to_string(),
            },
            connections: ConnectionsDump {
                inbound: of(Direction::Inbound),
                outbound: of(Direction::Outbound),
            },
        }
    }
}

impl ConnectionDump {
    fn of(entry: &Entry) -> Self {
        let live = entry.live();
        Self {
            src: live.src(),
            original_dst: live.original_dst.clone(),
            actual_dst: live.actual_dst,
            protocol: live.protocol.name(),
        }
    }
}
