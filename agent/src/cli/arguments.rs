//! Subcommands, flags and their help.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::Styles;
use clap::builder::styling::AnsiColor;
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::{DEFAULT_PIN_PATH, Flags};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default())
    .error(AnsiColor::Red.on_default().bold());

/// Node agent for Istio ambient meshes: eBPF captures, mutual-TLS tunnels carry.
#[derive(Debug, Parser)]
#[command(name = "culvert", version, styles = STYLES, max_term_width = 100)]
#[command(after_help = "\
Examples:
  culvert run --config mesh.yaml --node node-a    run the agent of one node
  culvert status                                  is it ready, and what does it hold
  culvert explain web/front-1 10.96.0.10:80       what would happen to a connection, and why

A command's own help has more: culvert explain --help")]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run the agent in the foreground.
    // `proxy ztunnel` is how Istio's own chart starts the image that it is given.
    #[command(alias = "proxy", after_help = RUN_EXAMPLES, after_long_help = RUN_VARIABLES)]
    Run(RunFlags),
    /// Show whether the agent is ready, and what it holds.
    #[command(after_help = "\
Examples:
  culvert status
  culvert status -o json | jq .source.error")]
    Status(ListFlags),
    /// List the pods enrolled on this node.
    #[command(after_help = "\
Examples:
  culvert pods
  culvert pods -o json | jq '.[] | select(.state != \"Enrolled\")'")]
    Pods(ListFlags),
    /// List the workloads that the agent knows.
    #[command(after_help = "\
Examples:
  culvert workloads
  culvert workloads --namespace shop -o json")]
    Workloads(NamespacedFlags),
    /// List the services that the agent knows, with healthy and all endpoints.
    #[command(after_help = "\
Examples:
  culvert services
  culvert services --namespace shop")]
    Services(NamespacedFlags),
    /// List the authorization policies that the agent knows.
    #[command(after_help = "\
Examples:
  culvert policies
  culvert policies --namespace shop -o json")]
    Policies(NamespacedFlags),
    /// List the certificates of this node's workloads.
    #[command(after_help = "\
Examples:
  culvert certificates
  culvert certificates -o json | jq -r '.[0].certChain[0].pem' | base64 -d | openssl x509 -text")]
    Certificates(ListFlags),
    /// List the connections that are open now.
    #[command(after_help = "\
Examples:
  culvert connections
  culvert connections --raw        addresses instead of names
  culvert connections -o json | jq '.[] | select(.policy)'")]
    Connections(ConnectionsFlags),
    /// Tell what would happen to a connection, and which rule says so.
    #[command(after_help = "\
The source is a workload: by uid, by namespace/name or by address. The destination is an address
or a hostname with a port. Nothing is sent; the agent asks the functions that enforce.

Examples:
  culvert explain web/front-1 10.96.0.10:80
  culvert explain 10.2.0.3 api.shop.svc.cluster.local:80
  culvert explain demo//Pod/web/front-1 '[fd00:1::7]:8080' -o json")]
    Explain(ExplainFlags),
    /// Take everything of the agent out of the kernel: one command back to before.
    #[command(after_help = "\
Connections that the agent carries end; new ones go their plain way. Stop the agent first.

Examples:
  culvert detach
  culvert detach --pin-path /sys/fs/bpf/culvert-a")]
    Detach(DetachFlags),
    /// Tell what this machine's kernel can do, and how connections behave that it accelerates.
    #[command(after_help = "\
Connections between namespaces that are made for it are accelerated and tried; no other connection
is touched. It takes about half a minute, root, and no agent. Where a case fails, an agent does not
accelerate on this machine; what differs is what applications notice that are named for it.

Examples:
  culvert doctor
  culvert doctor -o json | jq '.cases[] | select(.result != \"passed\")'")]
    Doctor(DoctorFlags),
    /// Show or change the agent's log level.
    #[command(after_help = "\
Examples:
  culvert logging                  what is logged now
  culvert logging debug            everything at debug
  culvert logging access=off       no access log
  culvert logging --reset          as it was at start")]
    Logging(LoggingFlags),
}

impl Command {
    /// Which agent to ask, for the commands that ask one.
    pub(super) fn admin(&self) -> Option<&AdminFlag> {
        match self {
            Command::Run(_) | Command::Detach(_) | Command::Doctor(_) => None,
            Command::Status(list) | Command::Pods(list) | Command::Certificates(list) => {
                Some(&list.admin)
            }
            Command::Workloads(it) | Command::Services(it) | Command::Policies(it) => {
                Some(&it.list.admin)
            }
            Command::Connections(it) => Some(&it.list.admin),
            Command::Explain(it) => Some(&it.list.admin),
            Command::Logging(it) => Some(&it.admin),
        }
    }
}

const RUN_EXAMPLES: &str = "\
Examples:
  culvert run --config mesh.yaml --node node-a
  culvert run --config mesh.yaml --node node-a --state-dir ./state --log info,access=debug
  NODE_NAME=node-a LOCAL_XDS_PATH=mesh.yaml culvert run

More settings come from the environment: culvert run --help";

const RUN_VARIABLES: &str = "\
Examples:
  culvert run --config mesh.yaml --node node-a
  culvert run --config mesh.yaml --node node-a --state-dir ./state --log info,access=debug
  NODE_NAME=node-a LOCAL_XDS_PATH=mesh.yaml culvert run

In a mesh of Istio's, with defaults as in a pod of Kubernetes:
  XDS_ADDRESS, CA_ADDRESS           several may stand, with commas; empty for none
                                    [istiod.istio-system.svc:15012 unless there is a mesh file]
  XDS_ROOT_CA, CA_ROOT_CA           file, PEM text or SYSTEM [./var/run/secrets/istio/root-cert.pem]
  ALT_XDS_HOSTNAME, ALT_CA_HOSTNAME a name their certificates may carry instead
  AUTH_TOKEN                        file or text [./var/run/secrets/tokens/istio-token]
  XDS_ON_DEMAND                     ask for addresses when they are needed [false]
  CULVERT_XDS_CACHE                 file to keep the last good state in [none]
  CULVERT_XDS_CACHE_MAX_AGE         how old it may be when it is served [1h]
  SECRET_TTL                        lifetime of certificates [24h]
  TRUST_DOMAIN_ALIASES              other names of the own trust domain [none]
  CRL_PATH                          revocation lists, PEM or DER [none]
  INPOD_UDS                         istio-cni's socket [/var/run/ztunnel/ztunnel.sock]
  CULVERT_ACCELERATE                namespaces, and workloads as namespace/name, with commas: what
                                    they say to each other on this node goes past TCP [none]
  CULVERT_REDIRECT                  ebpf, or cni for the rules that istio-cni sets [ebpf]
  ISTIO_META_DNS_CAPTURE            answer the pods' DNS questions [true]
  ISTIO_META_*, ISTIO_METAJSON_*    node metadata for the control plane
  XDS_HEADER_*, CA_HEADER_*         further request headers
  POD_NAME, POD_NAMESPACE, SERVICE_ACCOUNT, INSTANCE_IP    the agent's own pod
  PROXY_CONFIG                      YAML that stands for some of these

Environment, with defaults:
  CULVERT_WORKER_THREADS            threads, a number or 50%; also ZTUNNEL_WORKER_THREADS [all]
  CONNECTION_TERMINATION_DEADLINE   how long connections may outlast a shutdown's start [5s]
  TERMINATION_GRACE_PERIOD_SECONDS  sets that deadline from the pod's grace period
  TRUST_DOMAIN, NETWORK, CLUSTER_ID must agree with the file's `culvert` section
  KEEPALIVE_ENABLED                 TCP keepalive [true]
  KEEPALIVE_TIME, KEEPALIVE_INTERVAL, KEEPALIVE_RETRIES [180s, 180s, 9]
  USER_TIMEOUT_ENABLED              TCP user timeout [false]
  HTTP2_STREAM_WINDOW_SIZE          bytes [524288]
  HTTP2_CONNECTION_WINDOW_SIZE      bytes [67108864]
  HTTP2_FRAME_SIZE                  bytes [1048576]
  POOL_MAX_STREAMS_PER_CONNECTION   streams in one tunnel connection [100]
  POOL_UNUSED_RELEASE_TIMEOUT       how long an idle tunnel connection is kept [300s]
  AUTHZ_POLICY_INFO_LOGGING         policy decisions at info [false]
  ENABLE_RESPONSE_BAGGAGE           tell peers who answered [true]
  ISTIO_META_ISTIO_VERSION          version in the metric istio_build [unknown]

An empty variable counts as absent. What contradicts itself ends the start.";

#[derive(Debug, Args)]
pub(super) struct RunFlags {
    #[arg(hide = true, value_parser = ["ztunnel"])]
    role: Option<String>,
    /// The mesh file [env: CULVERT_CONFIG or LOCAL_XDS_PATH]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The name of this node, as the workloads' `node` has it [env: NODE_NAME]
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
    /// What is kept between runs [env: CULVERT_STATE_DIR] [default: /var/lib/culvert]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Where the kernel's part is pinned [env: CULVERT_PIN_PATH] [default: /sys/fs/bpf/culvert]
    #[arg(long, value_name = "DIR")]
    pin_path: Option<PathBuf>,
    /// The cgroup to attach to [env: CULVERT_CGROUP] [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// Listen here for these commands [env: ADMIN_ADDR] [default: 127.0.0.1:15000]
    #[arg(long, value_name = "ADDR")]
    admin: Option<String>,
    /// Listen here for metrics [env: STATS_ADDR] [default: port 15020]
    #[arg(long, value_name = "ADDR")]
    stats: Option<String>,
    /// Listen here for readiness probes [env: READINESS_ADDR] [default: port 15021]
    #[arg(long, value_name = "ADDR")]
    readiness: Option<String>,
    /// `level` or `scope=level`, separated by commas [env: RUST_LOG] [default: info]
    #[arg(long, value_name = "DIRECTIVES")]
    log: Option<String>,
    /// `plain` or `json` [env: LOG_FORMAT] [default: plain]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
}

impl RunFlags {
    pub(super) fn flags(self) -> Flags {
        Flags {
            config: self.config,
            node: self.node,
            state_dir: self.state_dir,
            pin_path: self.pin_path,
            cgroup: self.cgroup,
            admin: self.admin,
            stats: self.stats,
            readiness: self.readiness,
            log: self.log,
            log_format: self.log_format,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct AdminFlag {
    /// Where the agent listens for commands [env: ADMIN_ADDR] [default: 127.0.0.1:15000]
    #[arg(long, value_name = "ADDR")]
    pub(super) admin: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ListFlags {
    #[command(flatten)]
    admin: AdminFlag,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

impl ListFlags {
    pub(super) fn format(&self) -> Format {
        self.output
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub(super) struct NamespacedFlags {
    #[command(flatten)]
    pub(super) list: ListFlags,
    /// Only those of this namespace
    #[arg(short, long)]
    pub(super) namespace: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct ConnectionsFlags {
    #[command(flatten)]
    pub(super) list: ListFlags,
    /// Show addresses instead of the names of workloads and services
    #[arg(long)]
    pub(super) raw: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExplainFlags {
    /// Who connects: uid, namespace/name or address of a workload
    #[arg(value_name = "SRC")]
    source: String,
    /// Where to: address:port or hostname:port
    #[arg(value_name = "DST:PORT", value_parser = destination)]
    destination: String,
    #[command(flatten)]
    pub(super) list: ListFlags,
}

impl ExplainFlags {
    pub(super) fn path_and_query(&self) -> String {
        let (source, destination) = (encoded(&self.source), encoded(&self.destination));
        format!("/culvert/explain?src={source}&dst={destination}")
    }
}

fn destination(text: &str) -> Result<String, String> {
    match text.parse::<culvert_core::addr::Authority>() {
        Ok(_) => Ok(text.to_owned()),
        Err(_) => Err("a port is needed, as in 10.96.0.10:80 or [fd00::1]:80".to_owned()),
    }
}

#[derive(Debug, Args)]
pub(super) struct DetachFlags {
    /// Where the kernel's part is pinned [env: CULVERT_PIN_PATH] [default: /sys/fs/bpf/culvert]
    #[arg(long, value_name = "DIR")]
    pin_path: Option<PathBuf>,
}

impl DetachFlags {
    pub(super) fn pin_path(self, variable: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
        let stated = variable("CULVERT_PIN_PATH").filter(|path| !path.is_empty());
        self.pin_path.or(stated.map(Into::into)).unwrap_or_else(|| DEFAULT_PIN_PATH.into())
    }
}

#[derive(Debug, Args)]
pub(super) struct DoctorFlags {
    /// Beside which folder on a BPF file system it is tried [env: CULVERT_PIN_PATH] [default: /sys/fs/bpf/culvert]
    #[arg(long, value_name = "DIR")]
    pin_path: Option<PathBuf>,
    /// Below which cgroup it is tried [env: CULVERT_CGROUP] [default: the cgroup2 mount]
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// For people or for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    pub(super) output: Format,
    /// The process that tries is told where.
    #[arg(long = "in", hide = true, value_name = "JSON")]
    pub(super) place: Option<String>,
}

impl DoctorFlags {
    pub(super) fn pin_path(&self, variable: &dyn Fn(&str) -> Option<OsString>) -> PathBuf {
        let stated = variable("CULVERT_PIN_PATH").filter(|path| !path.is_empty());
        let stated = self.pin_path.clone().or(stated.map(Into::into));
        stated.unwrap_or_else(|| DEFAULT_PIN_PATH.into())
    }

    pub(super) fn cgroup(&self, variable: &dyn Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
        let stated = variable("CULVERT_CGROUP").filter(|path| !path.is_empty());
        self.cgroup.clone().or(stated.map(Into::into))
    }
}

#[derive(Debug, Args)]
pub(super) struct LoggingFlags {
    #[command(flatten)]
    admin: AdminFlag,
    /// A level, or scope=level separated by commas
    #[arg(value_name = "LEVEL")]
    level: Option<String>,
    /// Back to the directives of the start, before LEVEL is applied
    #[arg(long)]
    reset: bool,
}

impl LoggingFlags {
    pub(super) fn query(&self) -> String {
        let level = self.level.as_deref().map(|level| format!("level={}", encoded(level)));
        let reset = self.reset.then(|| "reset".to_owned());
        level.into_iter().chain(reset).collect::<Vec<_>>().join("&")
    }
}

/// Percent-encoding for a query (RFC 3986 section 2): everything but unreserved characters.
fn encoded(text: &str) -> String {
    let mut query = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                query.push(char::from(byte));
            }
            _ => query.push_str(&format!("%{byte:02X}")),
        }
    }
    query
}
