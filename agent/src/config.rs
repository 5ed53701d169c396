//! The agent's settings, typed and checked once at start.
//!
//! `cli` hands in the flags of `culvert run` and the environment; nothing else reads either. A
//! flag wins over its variable. Names that ztunnel has are kept. What contradicts itself ends the
//! start with an error that names the setting.

mod cgroup;
mod environment;
mod plane;
mod proxy;
mod same_node;
mod settings;

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use cgroup::find_cgroup2;
pub use plane::{
    AgentPod, CaSettings, ControlPlane, DnsSettings, Kept, Redirect, Roots, Token, XdsSettings,
};
pub use same_node::{SameNode, SameNodePath};
pub(crate) use settings::{DEFAULT_ADMIN, DEFAULT_PIN_PATH};
pub use settings::{Flags, Surroundings};

/// All that `app` needs to know to construct the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The mesh file (`--config`, `CULVERT_CONFIG`, `LOCAL_XDS_PATH`); there is this, or a control
    /// plane, or both.
    pub file: Option<PathBuf>,
    /// The control plane's workload API; `None` when there is none.
    pub xds: Option<XdsSettings>,
    /// The control plane's certificate service; `None` for the embedded authority.
    pub ca: Option<CaSettings>,
    /// The socket on which istio-cni tells of pods (`INPOD_UDS`); `None` when the file does.
    pub cni: Option<PathBuf>,
    /// Who brings connections to the agent (`CULVERT_REDIRECT`).
    pub redirect: Redirect,
    pub same_node: SameNode,
    /// `None` when names are not the agent's business (`ISTIO_META_DNS_CAPTURE`).
    pub dns: Option<DnsSettings>,
    /// Certificate revocation lists in PEM or DER (`CRL_PATH`).
    pub crl: Option<PathBuf>,
    /// Other names of the own trust domain, whose identities count as its own
    /// (`TRUST_DOMAIN_ALIASES`, separated by commas).
    pub trust_domain_aliases: Vec<Arc<str>>,
    /// The pod that the agent itself is.
    pub pod: AgentPod,
    /// Application tunnels with PROXY protocol end at a loopback address (`LOCALHOST_APP_TUNNEL`).
    pub localhost_app_tunnel: bool,
    /// On every socket that the agent opens in a pod; the lower 12 bits (`PACKET_MARK`).
    pub packet_mark: u32,
    /// Listeners share their ports with those of another agent (`INPOD_PORT_REUSE`).
    pub port_reuse: bool,
    /// `IPV6_ENABLED`.
    pub ipv6: bool,
    /// Which workloads are this agent's own (`--node`, `NODE_NAME`); not empty.
    pub node: Arc<str>,
    /// Kept between runs (`--state-dir`, `CULVERT_STATE_DIR`).
    pub state_dir: PathBuf,
    /// Where maps and links are pinned, under a bpffs (`--pin-path`, `CULVERT_PIN_PATH`).
    pub pin_path: PathBuf,
    /// Where a running agent is asked to hand over (`CULVERT_HANDOVER`); `None` when that is switched
    /// off, or packet rules redirect, with which two agents share the pods anyway.
    pub handover: Option<PathBuf>,
    /// Who ended is started again (`KUBERNETES_SERVICE_HOST`).
    pub in_kubernetes: bool,
    /// A cgroup2 directory to attach to (`--cgroup`, `CULVERT_CGROUP`).
    pub cgroup: PathBuf,
    pub servers: Servers,
    pub log: Log,
    /// Threads of the runtime (`CULVERT_WORKER_THREADS`, `ZTUNNEL_WORKER_THREADS`).
    pub worker_threads: NonZeroUsize,
    /// How long connections may go on after shutdown began (`CONNECTION_TERMINATION_DEADLINE`,
    /// `TERMINATION_GRACE_PERIOD_SECONDS`).
    pub drain_deadline: Duration,
    /// The same once another agent takes new connections: the longer of the two.
    pub handed_over_deadline: Duration,
    /// Kernel keepalive of dialled and captured sockets; `None` when switched off.
    pub keepalive: Option<Keepalive>,
    /// `TCP_USER_TIMEOUT` follows the keepalive settings (`USER_TIMEOUT_ENABLED`).
    pub user_timeout: bool,
    pub http2: Http2,
    pub pool: PoolLimits,
    /// Log policy decisions at info instead of debug (`AUTHZ_POLICY_INFO_LOGGING`).
    pub log_policy_decisions: bool,
    /// Answer CONNECT with a `baggage` header (`ENABLE_RESPONSE_BAGGAGE`).
    pub response_baggage: bool,
    /// Label `tag` of `istio_build` (`ISTIO_META_ISTIO_VERSION`).
    pub istio_version: Arc<str>,
    /// What the environment says of the mesh; see [`Config::mesh`].
    pub stated: StatedMesh,
}

/// Where the agent's own servers listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Servers {
    pub admin: SocketAddr,
    pub stats: SocketAddr,
    pub readiness: SocketAddr,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// `level` or `scope=level`, separated by commas (`--log`, `RUST_LOG`).
    pub directives: String,
    /// `--log-format`, `LOG_FORMAT`.
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Plain,
    Json,
}

/// tcp(7): `TCP_KEEPIDLE`, `TCP_KEEPINTVL`, `TCP_KEEPCNT`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// Whole seconds (`KEEPALIVE_TIME`).
    pub time: Duration,
    /// Whole seconds (`KEEPALIVE_INTERVAL`).
    pub interval: Duration,
    /// `KEEPALIVE_RETRIES`.
    pub retries: u32,
}

/// HTTP/2 settings of tunnels (RFC 9113 section 6.5.2), in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http2 {
    /// `HTTP2_STREAM_WINDOW_SIZE`.
    pub stream_window: u32,
    /// `HTTP2_CONNECTION_WINDOW_SIZE`; not smaller than a stream's.
    pub connection_window: u32,
    /// `HTTP2_FRAME_SIZE`.
    pub frame_size: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolLimits {
    /// `POOL_MAX_STREAMS_PER_CONNECTION`; at least 1.
    pub streams_per_connection: u16,
    /// `POOL_UNUSED_RELEASE_TIMEOUT`.
    pub release_unused_after: Duration,
}

/// The mesh settings that both the environment and the file may state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatedMesh {
    /// `TRUST_DOMAIN`.
    pub trust_domain: Option<Arc<str>>,
    /// `NETWORK`.
    pub network: Option<Arc<str>>,
    /// `CLUSTER_ID` or `ISTIO_META_CLUSTER_ID`.
    pub cluster_id: Option<Arc<str>>,
}

/// What holds for the agent's own place in the mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshSettings {
    pub trust_domain: Arc<str>,
    /// Empty for the default network.
    pub network: Arc<str>,
    pub cluster_id: Arc<str>,
}

/// A setting that cannot be; the operator's side.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("{setting} is missing: {what}")]
    Missing { setting: &'static str, what: &'static str },
    #[error("{setting}: {value:?} {why}")]
    Invalid { setting: Named, value: String, why: String },
    #[error("{setting} contradicts {other}: {why}")]
    Contradiction { setting: Named, other: Named, why: String },
    #[error("{setting} is not supported: {why}")]
    Unsupported { setting: &'static str, why: &'static str },
}

/// A setting as the operator wrote it: `--admin` or `ADMIN_ADDR`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named(pub(crate) String);

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Config {
    /// The settings that hold, given what the file's `culvert` section states of the same things.
    pub fn mesh(&self, file: &StatedMesh) -> Result<MeshSettings, ConfigError> {
        let agree = |variable: &str,
                     key: &str,
                     ours: &Option<Arc<str>>,
                     theirs: &Option<Arc<str>>| match (ours, theirs) {
            (Some(ours), Some(theirs)) if ours != theirs => Err(ConfigError::Contradiction {
                setting: Named(variable.to_owned()),
                other: Named(format!(
                    "culvert.{key} of {}",
                    self.file.as_deref().unwrap_or(Path::new("")).display()
                )),
                why: format!("{ours:?} is not {theirs:?}"),
            }),
            (Some(stated), _) | (None, Some(stated)) => Ok(Some(stated.clone())),
            (None, None) => Ok(None),
        };
        let own = &self.stated;
        let trust_domain =
            agree("TRUST_DOMAIN", "trustDomain", &own.trust_domain, &file.trust_domain)?;
        let network = agree("NETWORK", "network", &own.network, &file.network)?;
        let cluster_id = agree("CLUSTER_ID", "clusterId", &own.cluster_id, &file.cluster_id)?;
        Ok(MeshSettings {
            trust_domain: trust_domain.unwrap_or_else(|| "cluster.local".into()),
            network: network.unwrap_or_default(),
            cluster_id: cluster_id.unwrap_or_else(|| "Kubernetes".into()),
        })
    }
}

#[cfg(test)]
mod tests;
