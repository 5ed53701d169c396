//! The only place that constructs and wires the agent's rooms.

mod certificates;
mod duty;
mod ending;
mod enrolment;
mod explain;
mod handover;
mod news;
mod own;
mod state;

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use anyhow::Context;
use culvert_abi::DNS_PORT;
use culvert_core::admit::HeaderTo;
use culvert_core::snapshot::Snapshot;
use culvert_core::view::Coverage;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tracing::level_filters::LevelFilter;

use crate::admin::readiness::{DNS_PROXY, OpenTask, PROXY, Readiness, STATE_MANAGER};
use crate::admin::{AdminAddrs, Sources};
use crate::ca::Certificates;
use crate::capture::{
    Acceleration, CaptureOptions, KERNEL_LOG, ListenOptions, Marks, Netns, Redirection,
};
use crate::config::{Config, DnsSettings, MeshSettings, Redirect, SameNodePath};
use crate::connections::Connections;
use crate::direct::{self, Direct};
use crate::dns::{Dns, Upstreams};
use crate::drain;
use crate::file::{FileSource, MeshFile};
use crate::node::{Fetch, Mesh, Node, Options};
use crate::recheck::recheck;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::{Directives, LogControl, LogFormat, Logging};
use crate::workers::Workers;
use crate::xds::Xds;
use crate::{config, hbone, tls};

use duty::{Duty, Follower, Signals};
use enrolment::{Enrolment, Terms};
use handover::{Beginning, Begun, Story};
use news::{News, follow_control_plane};
use state::State;

/// How many pods of one node the kernel's tables have room for.
const MAX_PODS: u32 = 1024;
/// How many verdicts there is room for, over all pods.
const MAX_VERDICTS: u32 = 65536;
/// How many direct connections of one pod there is room for.
const MAX_DIRECT: u32 = 16384;

/// Runs the agent until it is told to stop, or another one takes over, and its connections are
/// drained.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let log = start_log(&config)?;
    match crate::capture::raise_open_files() {
        // Each relayed connection has two sockets.
        Ok(limit) => tracing::debug!(limit, "open files"),
        Err(error) => tracing::warn!(%error, "the limit of open files stays as it is"),
    }
    let readiness = Readiness::default();
    let loading = readiness.open(STATE_MANAGER);
    let mut starting = vec![readiness.open(PROXY)];
    starting.extend(config.dns.is_some().then(|| readiness.open(DNS_PROXY)));
    let (mut first, source) = match &config.file {
        Some(path) => {
            let (first, source) = FileSource::open(path).await?;
            (first, Some(source))
        }
        None => (MeshFile::default(), None),
    };
    let settings = config.mesh(&first.culvert.stated())?;
    // From here on a signal ends the agent only where it is awaited.
    let mut signals = Signals::new()?;
    // Both take long, each on a thread of its own; meanwhile the mesh begins to come.
    tokio::task::spawn_blocking(tls::gather_randomness);
    let config = Arc::new(config);
    let options = capture_options(&config, &first)?;
    let beginning = {
        let (config, options) = (config.clone(), options.clone());
        tokio::spawn(async move { Beginning::new(&config, &options).await })
    };
    let (workers, _carrying) = Workers::start(config.worker_threads)?;
    let rooms = rooms(&config, &settings, &first, &workers)?;
    let news =
        Arc::new(News::new(rooms.mesh.clone(), rooms.certificates.clone(), config.node.clone()));
    news.apply(std::mem::take(&mut first.changes));
    let xds = follow_control_plane(&config, &news, &rooms.telemetry).await;
    let fetch = xds.as_ref().and_then(|xds| xds.fetch());
    tokio::spawn(close_when(synced(&xds), loading));
    let ready = certificates::ready(rooms.certificates.clone(), synced(&xds));
    let beginning = beginning.await??;
    let begun = beginning.capture(&config, &options, ready, &mut signals).await?;
    let Some(Begun { capture, bequest }) = begun else { return Ok(()) };
    let node = Arc::new(make_node(&config, &settings, rooms, capture, fetch, workers)?);

    let (trigger, draining) = drain::drain();
    let named = first.culvert.pods;
    let terms = enrolment_terms(&config);
    own::serve(&node, &config.pod, terms.listen, draining.clone());
    let enrolment = Enrolment::new(node.clone(), readiness.clone(), draining, terms, named);
    let (stop, stopped) = mpsc::channel(1);
    let state = Arc::new(State {
        node: node.clone(),
        config,
        mesh: settings,
        pods: enrolment.table(),
        file: source.as_ref().map(FileSource::status),
        xds: xds.as_ref().map(|xds| xds.status()),
        story: Story::default(),
        started: Instant::now(),
        stop,
    });
    state.watch();
    node.telemetry.watch_log(&log);
    tokio::spawn(recheck(node.clone()));
    let sources =
        Sources { telemetry: node.telemetry.clone(), readiness, log, state: state.clone() };
    let follower = Follower::new(news, source, signals, stopped);
    let duty = Duty { state, enrolment, follower, sources, trigger };
    duty.run(bequest, || synced(&xds), starting).await
}

fn enrolment_terms(config: &Config) -> Terms {
    let by_rules = config.redirect == Redirect::Cni;
    Terms {
        listen: ListenOptions { share_ports: config.port_reuse, by_rules },
        marks: Marks::of(config.packet_mark),
        cni: config.cni.is_some(),
    }
}

/// Ready when there is a whole mesh to decide on.
fn synced(xds: &Option<Arc<Xds>>) -> impl Future<Output = ()> + Send + use<> {
    let xds = xds.clone();
    async move {
        if let Some(xds) = xds {
            xds.ready().await;
        }
    }
}

async fn close_when(done: impl Future<Output = ()>, task: OpenTask) {
    done.await;
    drop(task);
}

/// What the sources of the mesh need before there is a node.
struct Rooms {
    mesh: Arc<Mesh>,
    certificates: Arc<Certificates>,
    telemetry: Telemetry,
}

fn rooms(
    config: &Config,
    settings: &MeshSettings,
    first: &MeshFile,
    workers: &Workers,
) -> anyhow::Result<Rooms> {
    let mesh = Mesh::new(Snapshot::default()).tunnelling(config.same_node.tunnelled.clone());
    let mesh = Arc::new(mesh);
    let certificates = Arc::new(certificates::start(config, settings, first, &mesh)?);
    let version = Some(config.istio_version.to_string());
    let runtimes = [&[Handle::current()], workers.handles()].concat();
    let telemetry = Telemetry::new(version, &runtimes);
    Ok(Rooms { mesh, certificates, telemetry })
}

fn make_node(
    config: &Config,
    settings: &MeshSettings,
    rooms: Rooms,
    capture: Redirection,
    fetch: Option<Arc<dyn Fetch>>,
    workers: Workers,
) -> anyhow::Result<Node> {
    if let Some(logs) = capture.logs() {
        tokio::spawn(logs.forward());
    }
    let upstreams = name_servers();
    let own = upstreams.as_ref().map(Upstreams::own).transpose()?;
    let direct = make_direct(config, settings, &rooms, &capture, fetch.is_some());
    Ok(Node {
        direct,
        name: config.node.clone(),
        network: settings.network.clone(),
        mesh: rooms.mesh,
        own: OnceLock::new(),
        capture,
        certificates: rooms.certificates,
        dns: config.dns.as_ref().map(|dns| make_dns(config, dns, upstreams)).transpose()?,
        resolver: own,
        telemetry: rooms.telemetry,
        connections: Connections::default(),
        fetch,
        tunnels: tunnel_settings(config),
        workers,
        keepalive: config.keepalive,
        options: Options {
            response_baggage: config.response_baggage,
            log_policy_at_info: config.log_policy_decisions,
            header_to: match config.localhost_app_tunnel {
                true => HeaderTo::Loopback,
                false => HeaderTo::Address,
            },
        },
    })
}

fn make_direct(
    config: &Config,
    settings: &MeshSettings,
    rooms: &Rooms,
    capture: &Redirection,
    on_demand: bool,
) -> Option<Direct> {
    let same_node = &config.same_node;
    if same_node.path != SameNodePath::Kernel {
        return None;
    }
    let terms = direct::Terms {
        network: settings.network.clone(),
        node: config.node.clone(),
        coverage: match on_demand {
            true => Coverage::OnDemand,
            false => Coverage::Whole,
        },
        per_pod: same_node.verdicts_per_pod as usize,
        admit_time: same_node.admit_time,
        accelerated: same_node.accelerated.clone().unwrap_or_default(),
    };
    let (capture, certificates) = (capture.clone(), rooms.certificates.clone());
    let direct = Direct::new(capture, certificates, terms, same_node.irrevocable)?;
    direct.follow(&rooms.mesh);
    Some(direct)
}

/// Read once: what asks them later keeps their answers.
fn name_servers() -> Option<Upstreams> {
    let upstreams = Upstreams::of_system();
    upstreams.inspect_err(|error| tracing::warn!(%error, "names are not looked up")).ok()
}

fn make_dns(
    config: &Config,
    settings: &DnsSettings,
    upstreams: Option<Upstreams>,
) -> anyhow::Result<Dns> {
    let port = settings.addr.port();
    if config.redirect == Redirect::Ebpf && port != DNS_PORT {
        anyhow::bail!("the kernel programs lead questions to port {DNS_PORT}, not to {port}");
    }
    Ok(Dns {
        port,
        cluster_domain: settings.cluster_domain.clone(),
        prefer_namespace: settings.prefer_namespace.clone(),
        ipv6: config.ipv6,
        upstreams,
    })
}

/// The log goes to standard error, from a thread of its own; it ends with the process.
fn start_log(config: &Config) -> anyhow::Result<LogControl> {
    let directives: Directives = config.log.directives.parse()?;
    let format = match config.log.format {
        config::LogFormat::Plain => LogFormat::Plain,
        config::LogFormat::Json => LogFormat::Json,
    };
    let logging = Logging::new(directives, format, std::io::stderr());
    tracing::dispatcher::set_global_default(logging.dispatch).context("the log is set already")?;
    // Kept to the end of the process: the last lines are those of the shutdown.
    std::mem::forget(logging.flush);
    Ok(logging.control)
}

/// How the kernel programs capture here.
fn capture_options(config: &Config, first: &MeshFile) -> anyhow::Result<CaptureOptions> {
    let node = match &first.culvert.node_netns {
        Some(path) => Netns::open(path).context("culvert.nodeNetns")?,
        None => Netns::current()?,
    };
    let directives: Directives = config.log.directives.parse()?;
    let log_level = match directives.want_debug(KERNEL_LOG) {
        true => LevelFilter::DEBUG,
        false => LevelFilter::OFF,
    };
    Ok(CaptureOptions {
        cgroup: config.cgroup.clone(),
        pin_path: config.pin_path.clone(),
        node: node.cookie(),
        max_pods: MAX_PODS,
        max_verdicts: MAX_VERDICTS,
        max_direct: MAX_DIRECT,
        acceleration: acceleration(config),
        log_level,
    })
}

/// Where somebody is to be accelerated, and the kernel can.
fn acceleration(config: &Config) -> Option<Acceleration> {
    config.same_node.accelerated.as_ref()?;
    let found = Acceleration::find();
    let missing = |error| tracing::warn!(%error, "connections within the node are not accelerated");
    found.map_err(missing).ok()
}

fn tunnel_settings(config: &Config) -> hbone::Settings {
    let max_streams = config.http2.connection_window / config.http2.stream_window;
    hbone::Settings {
        stream_window: config.http2.stream_window,
        max_streams: max_streams.max(1),
        streams_per_connection: config.pool.streams_per_connection.into(),
        max_frame: config.http2.frame_size,
        idle: config.pool.release_unused_after,
        ..hbone::Settings::default()
    }
}

fn admin_addrs(config: &Config) -> AdminAddrs {
    AdminAddrs {
        admin: config.servers.admin,
        stats: config.servers.stats,
        readiness: config.servers.readiness,
    }
}
