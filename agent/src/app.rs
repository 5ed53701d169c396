//! The only place that constructs and wires the agent's rooms.

mod certificates;
mod enrolment;
mod explain;
mod state;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use culvert_core::admit::HeaderTo;
use culvert_core::snapshot::Snapshot;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tracing::level_filters::LevelFilter;

use crate::admin::readiness::{OpenTask, PROXY, Readiness, STATE_MANAGER};
use crate::admin::{AdminAddrs, AdminServers, Sources};
use crate::capture::{Capture, CaptureOptions, KERNEL_LOG, Netns};
use crate::config::{Config, DnsSettings, MeshSettings};
use crate::connections::Connections;
use crate::dns::{Dns, Upstreams};
use crate::drain::{self, DrainEnd};
use crate::file::{FileSource, FileUpdate, MeshFile, PodSettings};
use crate::node::{Mesh, Node, Options};
use crate::recheck::recheck;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::{Directives, LogControl, LogFormat, Logging};
use crate::{config, hbone};

use enrolment::Enrolment;
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
    let (loading, starting) = (readiness.open(STATE_MANAGER), readiness.open(PROXY));
    let (first, source) = match &config.file {
        Some(path) => {
            let (first, source) = FileSource::open(path).await?;
            (first, Some(source))
        }
        None => (MeshFile::default(), None),
    };
    let settings = config.mesh(&first.culvert.stated())?;
    let node = Arc::new(make_node(&config, &settings, &first)?);
    drop(loading);

    let (trigger, draining) = drain::drain();
    let enrolment = Enrolment::new(node.clone(), readiness.clone(), draining.clone());
    let (stop, stopped) = mpsc::channel(1);
    let state = Arc::new(State {
        node: node.clone(),
        config: Arc::new(config),
        mesh: settings,
        pods: enrolment.table(),
        source: source.as_ref().map(FileSource::status),
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

    follow(&node, enrolment, first.culvert.pods, source, stopped, starting).await?;
    let deadline = state.config.drain_deadline;
    tracing::info!(?deadline, "draining: no new connections");
    node.mesh.pods().iter().for_each(|pod| pod.pool.drain());
    if let DrainEnd::Expired = trigger.begin(deadline).await {
        tracing::info!("the drain's deadline has passed: open connections are reset");
    }
    serving.abort();
    Ok(())
}

/// Follows the file and looks after the pods until the agent is told to stop.
async fn follow(
    node: &Node,
    mut enrolment: Enrolment,
    mut wanted: Vec<PodSettings>,
    mut source: Option<FileSource>,
    mut stopped: mpsc::Receiver<()>,
    starting: OpenTask,
) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    enrolment.reconcile(&wanted).await;
    drop(starting);
    tracing::info!(node = %node.name, version = env!("CARGO_PKG_VERSION"), "culvert is up");
    let mut look_after = tokio::time::interval(LOOK_AFTER_PODS);
    look_after.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            update = next(&mut source) => match update {
                FileUpdate::Changed(file) => {
                    tracing::info!(changes = file.changes.len(), "the mesh file changed");
                    node.mesh.apply(file.changes);
                    wanted = file.culvert.pods;
                    enrolment.reconcile(&wanted).await;
                }
                FileUpdate::Rejected(error) => {
                    tracing::error!(%error, "the mesh file stays as it was");
                }
            },
            _ = look_after.tick() => enrolment.reconcile(&wanted).await,
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

fn make_node(config: &Config, settings: &MeshSettings, first: &MeshFile) -> anyhow::Result<Node> {
    let mesh = Arc::new(Mesh::new(Snapshot::default().with(first.changes.iter().cloned())));
    let capture = Arc::new(start_capture(config, first)?);
    let certificates = Arc::new(certificates::start(config, settings, first, &mesh)?);
    if let Some(logs) = capture.logs() {
        tokio::spawn(logs.forward());
    }
    let version = Some(config.istio_version.to_string());
    let upstreams = name_servers();
    let own = upstreams.as_ref().map(Upstreams::own).transpose()?;
    Ok(Node {
        name: config.node.clone(),
        network: settings.network.clone(),
        mesh,
        capture,
        certificates,
        dns: config.dns.as_ref().map(|settings| dns(config, settings, upstreams)),
        resolver: own,
        telemetry: Telemetry::new(version, Some(&Handle::current())),
        connections: Connections::default(),
        fetch: None,
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

fn dns(config: &Config, settings: &DnsSettings, upstreams: Option<Upstreams>) -> Dns {
    Dns {
        cluster_domain: settings.cluster_domain.clone(),
        prefer_namespace: settings.prefer_namespace.clone(),
        ipv6: config.ipv6,
        upstreams,
    }
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
