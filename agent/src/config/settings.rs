//! Builds the settings from flags and environment.

use std::ffi::OsString;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use tracing_subscriber::filter::Targets;

use super::environment::{Environment, duration, number, switch};
use super::{
    Config, ConfigError, Http2, Keepalive, Log, LogFormat, Named, PoolLimits, Redirect, Servers,
    StatedMesh,
};
use super::{plane, proxy, same_node};

/// The flags of `culvert run`, as written.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    pub config: Option<PathBuf>,
    pub node: Option<String>,
    pub state_dir: Option<PathBuf>,
    pub pin_path: Option<PathBuf>,
    pub cgroup: Option<PathBuf>,
    pub admin: Option<String>,
    pub stats: Option<String>,
    pub readiness: Option<String>,
    pub log: Option<String>,
    pub log_format: Option<String>,
}

/// What the process finds around itself, brought in by `cli`.
pub struct Surroundings<'a> {
    /// An environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<OsString>,
    /// The names of all environment variables.
    pub variables: &'a [OsString],
    /// Processors that this process may use.
    pub processors: NonZeroUsize,
    /// Where the cgroup2 hierarchy is mounted.
    pub cgroup2: Option<PathBuf>,
}

/// The admin address when nothing else is said; clients of it use the same.
pub(crate) const DEFAULT_ADMIN: SocketAddr = v4(Ipv4Addr::LOCALHOST, 15000);
const DEFAULT_STATS: SocketAddr = v6(Ipv6Addr::UNSPECIFIED, 15020);
const DEFAULT_READINESS: SocketAddr = v6(Ipv6Addr::UNSPECIFIED, 15021);
pub(crate) const DEFAULT_PIN_PATH: &str = "/sys/fs/bpf/culvert";
const DEFAULT_CLUSTER: &str = "Kubernetes";
/// Where the cgroup hierarchy is customarily mounted.
const CGROUP_FS: &str = "/sys/fs/cgroup";
const DEFAULT_STATE_DIR: &str = "/var/lib/culvert";

const fn v4(ip: Ipv4Addr, port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(ip), port)
}

const fn v6(ip: Ipv6Addr, port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V6(ip), port)
}

impl Config {
    /// The settings, or the first thing about them that cannot be.
    pub fn new(flags: Flags, around: &Surroundings) -> Result<Config, ConfigError> {
        let env = Environment { variable: around.variable, names: around.variables };
        let further = proxy::variables(&env)?;
        let value = |name: &str| {
            let stated = (around.variable)(name);
            let of_config = || further.iter().find(|(key, _)| key == name);
            stated.or_else(|| of_config().map(|(_, value)| value.clone()))
        };
        let names: Vec<OsString> =
            around.variables.iter().chain(further.iter().map(|(name, _)| name)).cloned().collect();
        let env = Environment { variable: &value, names: &names };
        env.refuse_unsupported()?;
        let file = mesh_file(&env, flags.config)?;
        let alone = file.is_some();
        let stated = stated(&env)?;
        let cluster = stated.cluster_id.clone().unwrap_or_else(|| DEFAULT_CLUSTER.into());
        let xds = plane::xds(&env, alone, &cluster)?;
        if file.is_none() && xds.is_none() {
            return Err(ConfigError::Missing {
                setting: "CULVERT_CONFIG, --config or XDS_ADDRESS",
                what: "where the mesh comes from: a mesh file, or a control plane",
            });
        }
        let (cni, dns) = (plane::cni(&env, alone), plane::dns(&env, alone)?);
        if dns.is_some() && xds.as_ref().is_some_and(|xds| xds.on_demand) {
            return Err(ConfigError::Contradiction {
                setting: Named("XDS_ON_DEMAND".to_owned()),
                other: Named("ISTIO_META_DNS_CAPTURE".to_owned()),
                why: "the DNS proxy answers for names that it must know in advance".to_owned(),
            });
        }
        let node = env.flag_or("--node", flags.node, "NODE_NAME")?;
        let redirect = plane::redirect(&env, cni.is_some())?;
        let cgroup = env.path(flags.cgroup, "CULVERT_CGROUP").or_else(|| around.cgroup2.clone());
        let pin_path = env.path(flags.pin_path, "CULVERT_PIN_PATH");
        let state_dir = env.path(flags.state_dir, "CULVERT_STATE_DIR");
        let state_dir = state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into());
        let (drain_deadline, handed_over_deadline) = drain_deadlines(&env)?;
        Ok(Config {
            xds,
            ca: plane::ca(&env, alone, &cluster)?,
            same_node: same_node::same_node(&env, redirect)?,
            redirect,
            dns,
            crl: env.path(None, "CRL_PATH"),
            trust_domain_aliases: trust_domain_aliases(&env)?,
            pod: plane::pod(&env)?,
            localhost_app_tunnel: env.parse("LOCALHOST_APP_TUNNEL", switch)?.unwrap_or(true),
            packet_mark: plane::packet_mark(&env)?,
            port_reuse: env.parse("INPOD_PORT_REUSE", switch)?.unwrap_or(true),
            ipv6: env.parse("IPV6_ENABLED", switch)?.unwrap_or(true),
            cni,
            file,
            node: node.map(|node| node.value.into()).ok_or(ConfigError::Missing {
                setting: "NODE_NAME or --node",
                what: "the name of this node, as the workloads' `node` field has it",
            })?,
            handover: handover(&env, redirect, &state_dir),
            in_kubernetes: env.is_set("KUBERNETES_SERVICE_HOST"),
            state_dir,
            pin_path: pin_path.unwrap_or_else(|| DEFAULT_PIN_PATH.into()),
            cgroup: attached_to(cgroup, redirect)?,
            servers: servers(&env, flags.admin, flags.stats, flags.readiness)?,
            log: log(&env, flags.log, flags.log_format)?,
            worker_threads: worker_threads(&env, around.processors)?,
            drain_deadline,
            handed_over_deadline,
            keepalive: keepalive(&env)?,
            user_timeout: env.parse("USER_TIMEOUT_ENABLED", switch)?.unwrap_or(false),
            http2: http2(&env)?,
            pool: pool(&env)?,
            log_policy_decisions: env.parse("AUTHZ_POLICY_INFO_LOGGING", switch)?.unwrap_or(false),
            response_baggage: env.parse("ENABLE_RESPONSE_BAGGAGE", switch)?.unwrap_or(true),
            istio_version: match env.text("ISTIO_META_ISTIO_VERSION")? {
                Some(version) => version.into(),
                None => "unknown".into(),
            },
            stated,
        })
    }
}

/// Where packet rules redirect, nothing is attached, and a container may see no cgroups.
fn attached_to(cgroup: Option<PathBuf>, redirect: Redirect) -> Result<PathBuf, ConfigError> {
    let unused = (redirect == Redirect::Cni).then(|| PathBuf::from(CGROUP_FS));
    cgroup.or(unused).ok_or(ConfigError::Missing {
        setting: "CULVERT_CGROUP or --cgroup",
        what: "no cgroup2 file system is mounted; mount one, or name the directory",
    })
}

impl Environment<'_> {
    /// What would be obeyed by ztunnel and would silently not hold here.
    fn refuse_unsupported(&self) -> Result<(), ConfigError> {
        for (setting, why) in [
            ("LOCAL_XDS", "put the text into a file and name it with CULVERT_CONFIG"),
            ("FAKE_CA", "leave CA_ADDRESS empty for the embedded CA"),
            ("UNSTABLE_ENABLE_SOCKS5", "there is no SOCKS proxy"),
        ] {
            if self.raw(setting).is_some() {
                return Err(ConfigError::Unsupported { setting, why });
            }
        }
        match self.text("PROXY_MODE")?.as_deref() {
            None | Some("shared") => Ok(()),
            Some(_) => Err(ConfigError::Unsupported {
                setting: "PROXY_MODE",
                why: "the agent serves all pods of its node; leave it empty or `shared`",
            }),
        }
    }
}

/// An empty variable switches it off.
fn handover(env: &Environment, redirect: Redirect, state_dir: &Path) -> Option<PathBuf> {
    match (redirect, (env.variable)("CULVERT_HANDOVER")) {
        (Redirect::Cni, _) => None,
        (Redirect::Ebpf, None) => Some(state_dir.join("handover.sock")),
        (Redirect::Ebpf, Some(path)) => Some(path.into()).filter(|path: &PathBuf| *path != *""),
    }
}

fn mesh_file(env: &Environment, flag: Option<PathBuf>) -> Result<Option<PathBuf>, ConfigError> {
    if let Some(path) = flag {
        return Ok(Some(path));
    }
    match (env.raw("CULVERT_CONFIG"), env.raw("LOCAL_XDS_PATH")) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(ConfigError::Contradiction {
            setting: Named("CULVERT_CONFIG".to_owned()),
            other: Named("LOCAL_XDS_PATH".to_owned()),
            why: "they name two files".to_owned(),
        }),
        (Some(path), _) | (None, Some(path)) => Ok(Some(path.into())),
        (None, None) => Ok(None),
    }
}

fn servers(
    env: &Environment,
    admin: Option<String>,
    stats: Option<String>,
    readiness: Option<String>,
) -> Result<Servers, ConfigError> {
    let mut taken: Vec<(Named, SocketAddr)> = Vec::new();
    let mut server = |flag, given, variable: &str, default| {
        let setting = env.flag_or(flag, given, variable)?;
        let (name, addr) = match setting {
            Some(setting) => {
                let addr = listen_address(&setting.value).map_err(|why| setting.invalid(why))?;
                (setting.name, addr)
            }
            None => (Named(variable.to_owned()), default),
        };
        if let Some((other, _)) = taken.iter().find(|(_, other)| collide(*other, addr)) {
            return Err(ConfigError::Contradiction {
                setting: name,
                other: other.clone(),
                why: format!("both servers would listen on {addr}"),
            });
        }
        taken.push((name, addr));
        Ok(addr)
    };
    Ok(Servers {
        admin: server("--admin", admin, "ADMIN_ADDR", DEFAULT_ADMIN)?,
        stats: server("--stats", stats, "STATS_ADDR", DEFAULT_STATS)?,
        readiness: server("--readiness", readiness, "READINESS_ADDR", DEFAULT_READINESS)?,
    })
}

/// Port 0 stands for a free port and collides with nothing. `[::]` also takes IPv4.
fn collide(one: SocketAddr, other: SocketAddr) -> bool {
    let overlap =
        one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() != 0 && one.port() == other.port() && overlap
}

/// `IP:port`, or `localhost:port` for the IPv4 loopback address.
fn listen_address(text: &str) -> Result<SocketAddr, String> {
    let port = text.strip_prefix("localhost:").and_then(|port| port.parse().ok());
    match port {
        Some(port) => Ok(v4(Ipv4Addr::LOCALHOST, port)),
        None => text.parse().map_err(|_| {
            "is neither IP:port nor localhost:port, as 127.0.0.1:15000 or [::]:15020".to_owned()
        }),
    }
}

fn log(
    env: &Environment,
    directives: Option<String>,
    format: Option<String>,
) -> Result<Log, ConfigError> {
    let directives = match env.flag_or("--log", directives, "RUST_LOG")? {
        Some(setting) => match Targets::from_str(&setting.value) {
            Ok(_) => setting.value,
            Err(error) => {
                return Err(setting.invalid(format!(
                    "is not a list of `level` and `scope=level`, as info,access=debug: {error}"
                )));
            }
        },
        None => "info".to_owned(),
    };
    let format = match env.flag_or("--log-format", format, "LOG_FORMAT")? {
        Some(setting) => match setting.value.as_str() {
            "plain" => LogFormat::Plain,
            "json" => LogFormat::Json,
            _ => return Err(setting.invalid("is neither plain nor json")),
        },
        None => LogFormat::Plain,
    };
    Ok(Log { directives, format })
}

/// A number, or a share of the processors as `50%`; 0 stands for all processors.
fn worker_threads(
    env: &Environment,
    processors: NonZeroUsize,
) -> Result<NonZeroUsize, ConfigError> {
    // Kubernetes tells a container with a share of the processors how many it may count on.
    let cores = |name| env.parse(name, |text| number::<usize>(text, 0, MAX_THREADS as u64));
    let processors = cores("ZTUNNEL_CPU_LIMIT")?.and_then(NonZeroUsize::new).unwrap_or(processors);
    let request = cores("ZTUNNEL_RESOURCE_CPU_REQUEST")?.unwrap_or(0);
    let limit = cores("ZTUNNEL_RESOURCE_CPU_LIMIT")?.map(|limit| limit.max(request));
    let default = limit.and_then(NonZeroUsize::new).unwrap_or(processors);
    let threads = |text: &str| -> Result<NonZeroUsize, String> {
        let count = match text.strip_suffix('%') {
            None => text.parse::<usize>().map_err(|_| "is neither a number nor a percentage")?,
            Some(percent) => match percent.parse::<usize>() {
                Ok(percent @ 1..=100) => (processors.get() * percent).div_ceil(100),
                Ok(_) | Err(_) => return Err("is not between 1% and 100%".to_owned()),
            },
        };
        if count > MAX_THREADS {
            return Err(format!("is more than {MAX_THREADS}"));
        }
        Ok(NonZeroUsize::new(count).unwrap_or(processors))
    };
    let ours = env.parse("CULVERT_WORKER_THREADS", threads)?;
    let theirs = env.parse("ZTUNNEL_WORKER_THREADS", threads)?;
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(ConfigError::Contradiction {
            setting: Named("CULVERT_WORKER_THREADS".to_owned()),
            other: Named("ZTUNNEL_WORKER_THREADS".to_owned()),
            why: format!("{ours} is not {theirs}"),
        }),
        (Some(count), _) | (None, Some(count)) => Ok(count),
        (None, None) => Ok(default),
    }
}

const MAX_THREADS: usize = 1024;

/// That of an agent which alone takes new connections, and that of one which has handed over. From
/// the grace period a few seconds are left for closing what remains by ourselves, more gently than
/// being killed would.
fn drain_deadlines(env: &Environment) -> Result<(Duration, Duration), ConfigError> {
    let grace = env.parse("TERMINATION_GRACE_PERIOD_SECONDS", |text| {
        text.parse::<u64>().map_err(|_| "is not a number of seconds".to_owned())
    })?;
    let of_grace = grace.map(|grace| {
        let seconds = if grace > 10 { grace - 5 } else { grace.saturating_sub(1).max(1) };
        Duration::from_secs(seconds)
    });
    let deadline = env.parse("CONNECTION_TERMINATION_DEADLINE", duration)?;
    match (deadline, grace) {
        (Some(deadline), Some(grace)) if deadline > Duration::from_secs(grace) => {
            Err(ConfigError::Contradiction {
                setting: Named("CONNECTION_TERMINATION_DEADLINE".to_owned()),
                other: Named("TERMINATION_GRACE_PERIOD_SECONDS".to_owned()),
                why: format!(
                    "connections may last {} after the start of a shutdown that is cut off after \
                     {grace}s",
                    humantime::format_duration(deadline)
                ),
            })
        }
        (stated, _) => {
            let deadline = stated.or(of_grace).unwrap_or(Duration::from_secs(5));
            Ok((deadline, of_grace.map_or(deadline, |of_grace| of_grace.max(deadline))))
        }
    }
}

fn keepalive(env: &Environment) -> Result<Option<Keepalive>, ConfigError> {
    let enabled = env.parse("KEEPALIVE_ENABLED", switch)?.unwrap_or(true);
    // The kernel takes no more (`MAX_TCP_KEEPIDLE`, `MAX_TCP_KEEPINTVL`, `MAX_TCP_KEEPCNT`).
    let seconds = |text: &str| match duration(text)? {
        time if time.subsec_nanos() != 0 => Err("is not whole seconds".to_owned()),
        time if !(1..=32767).contains(&time.as_secs()) => {
            Err("is not between 1 and 32767 seconds".to_owned())
        }
        time => Ok(time),
    };
    let time = env.parse("KEEPALIVE_TIME", seconds)?;
    let interval = env.parse("KEEPALIVE_INTERVAL", seconds)?;
    let retries = env.parse("KEEPALIVE_RETRIES", |text| number(text, 1, 127))?;
    if !enabled {
        let set = [
            ("KEEPALIVE_TIME", time.is_some()),
            ("KEEPALIVE_INTERVAL", interval.is_some()),
            ("KEEPALIVE_RETRIES", retries.is_some()),
        ];
        return match set.into_iter().find(|(_, set)| *set) {
            None => Ok(None),
            Some((name, _)) => Err(ConfigError::Contradiction {
                setting: Named(name.to_owned()),
                other: Named("KEEPALIVE_ENABLED".to_owned()),
                why: "keepalive is switched off".to_owned(),
            }),
        };
    }
    Ok(Some(Keepalive {
        time: time.unwrap_or(Duration::from_secs(180)),
        interval: interval.unwrap_or(Duration::from_secs(180)),
        retries: retries.unwrap_or(9),
    }))
}

fn http2(env: &Environment) -> Result<Http2, ConfigError> {
    // RFC 9113 sections 6.5.2 and 6.9.1.
    let window = |text: &str| number(text, 65_535, (1 << 31) - 1);
    let frame = |text: &str| number(text, 16_384, (1 << 24) - 1);
    let stream_window = env.parse("HTTP2_STREAM_WINDOW_SIZE", window)?.unwrap_or(512 << 10);
    let connection_window = env.parse("HTTP2_CONNECTION_WINDOW_SIZE", window)?.unwrap_or(64 << 20);
    if stream_window > connection_window {
        return Err(ConfigError::Contradiction {
            setting: Named("HTTP2_STREAM_WINDOW_SIZE".to_owned()),
            other: Named("HTTP2_CONNECTION_WINDOW_SIZE".to_owned()),
            why: format!("{stream_window} bytes of one stream exceed {connection_window} of all"),
        });
    }
    let frame_size = env.parse("HTTP2_FRAME_SIZE", frame)?.unwrap_or(1 << 20);
    Ok(Http2 { stream_window, connection_window, frame_size })
}

fn pool(env: &Environment) -> Result<PoolLimits, ConfigError> {
    let streams = env.parse("POOL_MAX_STREAMS_PER_CONNECTION", |text| number(text, 1, 65_535))?;
    let release = env.parse("POOL_UNUSED_RELEASE_TIMEOUT", duration)?;
    Ok(PoolLimits {
        streams_per_connection: streams.unwrap_or(100),
        release_unused_after: release.unwrap_or(Duration::from_secs(300)),
    })
}

fn stated(env: &Environment) -> Result<StatedMesh, ConfigError> {
    let text = |name| env.text(name).map(|value| value.map(Arc::<str>::from));
    let trust_domain = env.parse("TRUST_DOMAIN", |text| match text.contains('/') {
        true => Err("holds a `/`".to_owned()),
        false => Ok(Arc::<str>::from(text)),
    })?;
    let (cluster_id, meta) = (text("CLUSTER_ID")?, text("ISTIO_META_CLUSTER_ID")?);
    if let (Some(id), Some(meta)) = (&cluster_id, &meta)
        && id != meta
    {
        return Err(ConfigError::Contradiction {
            setting: Named("CLUSTER_ID".to_owned()),
            other: Named("ISTIO_META_CLUSTER_ID".to_owned()),
            why: format!("{id:?} is not {meta:?}"),
        });
    }
    Ok(StatedMesh { trust_domain, network: text("NETWORK")?, cluster_id: cluster_id.or(meta) })
}

fn trust_domain_aliases(env: &Environment) -> Result<Vec<Arc<str>>, ConfigError> {
    let aliases = env.parse("TRUST_DOMAIN_ALIASES", |text| {
        let aliases = text.split(',').map(str::trim);
        match aliases.clone().find(|alias| alias.is_empty() || alias.contains('/')) {
            Some(alias) => Err(format!("{alias:?} is not a trust domain")),
            None => Ok(aliases.map(Arc::<str>::from).collect()),
        }
    })?;
    Ok(aliases.unwrap_or_default())
}
