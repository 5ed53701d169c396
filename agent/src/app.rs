//! The only place that constructs and wires the agent's rooms.

mod certificates;
mod enrolment;
mod explain;
mod news;
mod own;
mod state;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context;
use culvert_abi::DNS_PORT;
use culvert_core::admit::HeaderTo;
use culvert_core::snapshot::Snapshot;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::level_filters::LevelFilter;

use crate::admin::readiness::{DNS_PROXY, OpenTask, PROXY, Readiness, STATE_MANAGER};
use crate::admin::{AdminAddrs, AdminServers, Sources};
use crate::ca::Certificates;
use crate::capture::{
    Capture, CaptureOptions, KERNEL_LOG, ListenOptions, Marks, Netns, Redirection,
};
use crate::config::{Config, DnsSettings, MeshSettings, Redirect};
use crate::connections::Connections;
use crate::dns::{Dns, Upstreams};
use crate::drain::{self, DrainEnd};
use crate::file::{FileSource, FileUpdate, MeshFile};
use crate::node::{Fetch, Mesh, Node, Options};
use crate::recheck::recheck;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::{Directives, LogControl, LogFormat, Logging};
use crate::xds::Xds;
use crate::{config, hbone, zds};

use enrolment::{Enrolment, Terms};
use news::{News, follow_control_plane};
use state::State;

/// How many pods of one node the kernel's tables have room for.
const MAX_PODS: u32 = 1024;
/// How often pods are looked after: namespaces that went, and enrolments to be tried again.
const LOOK_AFTER_PODS: Duration = Duration::from_secs(1);

/// Runs the agent until it is told to stop and its connections are drained.
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
    let (first, source) = match &config.file {
        Some(path) => {
            let (first, source) = FileSource::open(path).await?;
            (first, Some(source))
        }
        None => (MeshFile::default(), None),
    };
    let settings = config.mesh(&first.culvert.stated())?;
    let rooms = rooms(&config, &settings, &first)?;
    let news =
        Arc::new(News::new(rooms.mesh.clone(), rooms.certificates.clone(), config.node.clone()));
    news.apply(first.changes);
    let xds = follow_control_plane(&config, &news, &rooms.telemetry).await;
    let fetch = xds.as_ref().and_then(|xds| xds.fetch());
    let node = Arc::new(make_node(&config, &settings, rooms, fetch)?);
    tokio::spawn(close_when(synced(&xds), loading));

    let (trigger, draining) = drain::drain();
    let named = first.culvert.pods;
    let enrolment = Enrolment::new(
        node.clone(),
        readiness.clone(),
        draining.clone(),
        enrolment_terms(&config),
        named,
    );
    own::serve(&node, &config.pod, enrolment_terms(&config).listen, draining.clone());
    let requests = follow_cni(&config, synced(&xds));
    let (stop, stopped) = mpsc::channel(1);
    let state = Arc::new(State {
        node: node.clone(),
        config: Arc::new(config),
        mesh: settings,
        pods: enrolment.table(),
        file: source.as_ref().map(FileSource::status),
        xds: xds.as_ref().map(|xds| xds.status()),
        started: Instant::now(),
        stop,
    });
    state.watch();
    node.telemetry.watch_log(&log);
    let servers = AdminServers::bind(&admin_addrs(&state.config)).await?;
    let telemetry = node.telemetry.clone();
    let sources = Sources { telemetry, readiness, log, state: state.clone() };
    let serving = tokio::spawn(servers.serve(sources, draining));
    tokio::spawn(recheck(node.clone()));

    follow(&node, &news, enrolment, source, requests, stopped, starting).await?;
    let deadline = state.config.drain_deadline;
    tracing::info!(?deadline, "draining: no new connections");
    node.mesh.pods().iter().for_each(|(pod, _)| pod.pool.drain());
    if let DrainEnd::Expired = trigger.begin(deadline).await {
        tracing::info!("the drain's deadline has passed: open connections are reset");
    }
    serving.abort();
    Ok(())
}

/// Follows the file and looks after the pods until the agent is told to stop.
async fn follow(
    node: &Node,
    news: &News,
    mut enrolment: Enrolment,
    mut source: Option<FileSource>,
    mut requests: Option<mpsc::Receiver<zds::Request>>,
    mut stopped: mpsc::Receiver<()>,
    starting: Vec<OpenTask>,
) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    enrolment.reconcile().await;
    drop(starting);
    tracing::info!(node = %node.name, version = env!("CARGO_PKG_VERSION"), "culvert is up");
    let mut look_after = tokio::time::interval(LOOK_AFTER_PODS);
    look_after.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            update = next(&mut source) => match update {
                FileUpdate::Changed(file) => {
                    tracing::info!(changes = file.changes.len(), "the mesh file changed");
                    news.apply(file.changes);
                    enrolment.follow(file.culvert.pods).await;
                }
                FileUpdate::Rejected(error) => {
                    tracing::error!(%error, "the mesh file stays as it was");
                }
            },
            request = next_request(&mut requests) => enrolment.obey(request).await,
            _ = look_after.tick() => enrolment.reconcile().await,
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            _ = stopped.recv() => return Ok(()),
        }
    }
}

/// Never ready without a file.
async fn next(source: &mut Option<FileSource>) -> FileUpdate {
    match source {
        Some(source) => source.next().await,
        None => std::future::pending().await,
    }
}

/// Begins to follow istio-cni, if pods come from there. It is contacted once `synced` is ready.
fn follow_cni(
    config: &Config,
    synced: impl Future<Output = ()> + Send + 'static,
) -> Option<mpsc::Receiver<zds::Request>> {
    let path = config.cni.clone()?;
    let (orders, requests) = mpsc::channel(1);
    tokio::spawn(async move { zds::run(&path, synced, orders).await });
    Some(requests)
}

/// Never ready without istio-cni.
async fn next_request(requests: &mut Option<mpsc::Receiver<zds::Request>>) -> zds::Request {
    if let Some(requests) = requests
        && let Some(request) = requests.recv().await
    {
        return request;
    }
    std::future::pending().await
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
    capture: Redirection,
    certificates: Arc<Certificates>,
    telemetry: Telemetry,
}

fn rooms(config: &Config, settings: &MeshSettings, first: &MeshFile) -> anyhow::Result<Rooms> {
    let mesh = Arc::new(Mesh::new(Snapshot::default()));
    let capture = match config.redirect {
        Redirect::Ebpf => Redirection::Ebpf(Arc::new(start_capture(config, first)?)),
        Redirect::Cni => Redirection::Cni,
    };
    let certificates = Arc::new(certificates::start(config, settings, first, &mesh)?);
    if let Some(logs) = capture.logs() {
        tokio::spawn(logs.forward());
    }
    let version = Some(config.istio_version.to_string());
    let telemetry = Telemetry::new(version, Some(&Handle::current()));
    Ok(Rooms { mesh, capture, certificates, telemetry })
}

fn make_node(
    config: &Config,
    settings: &MeshSettings,
    rooms: Rooms,
    fetch: Option<Arc<dyn Fetch>>,
) -> anyhow::Result<Node> {
    let upstreams = name_servers();
    let own = upstreams.as_ref().map(Upstreams::own).transpose()?;
    Ok(Node {
        name: config.node.clone(),
        network: settings.network.clone(),
        mesh: rooms.mesh,
        own: OnceLock::new(),
        capture: rooms.capture,
        certificates: rooms.certificates,
        dns: config.dns.as_ref().map(|dns| make_dns(config, dns, upstreams)).transpose()?,
        resolver: own,
        telemetry: rooms.telemetry,
        connections: Connections::default(),
        fetch,
        tunnels: tunnel_settings(config),
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

fn start_capture(config: &Config, first: &MeshFile) -> anyhow::Result<Capture> {
    let node = match &first.culvert.node_netns {
        Some(path) => Netns::open(path).context("culvert.nodeNetns")?,
        None => Netns::current()?,
    };
    let directives: Directives = config.log.directives.parse()?;
    let log_level = match directives.want_debug(KERNEL_LOG) {
        true => LevelFilter::DEBUG,
        false => LevelFilter::OFF,
    };
    let options = CaptureOptions {
        cgroup: config.cgroup.clone(),
        pin_path: config.pin_path.clone(),
        node: node.cookie(),
        max_pods: MAX_PODS,
        log_level,
    };
    Capture::start(&options).context("cannot start capture")
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
