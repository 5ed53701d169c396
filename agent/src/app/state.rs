//! What the administrator sees of the running agent.

use std::sync::Arc;
use std::time::Instant;

use culvert_core::snapshot::Snapshot;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{mpsc, watch};

use super::enrolment::PodTable;
use super::explain;
use super::handover::Story;
use crate::admin::{
    AdminState, Agent, Certificate, CertificateState, CertificateStatus, ExplainError, Explanation,
    Kernel, Pod, PodState, Program, Source, Version,
};
use crate::ca;
use crate::capture::NetnsCookie;
use crate::config::{Config, MeshSettings};
use crate::connections::{Connections, Direction, Protocol};
use crate::direct::Direct;
use crate::file::{self, FileStatus};
use crate::node::Node;
use crate::pods::Claim;
use crate::telemetry::{
    CertificateReading, IdentityReading, KernelReading, SourceReading, TunnelReading,
};
use crate::tls::CertificateSummary;
use crate::xds::{XdsConnection, XdsStatus};

pub(super) struct State {
    pub node: Arc<Node>,
    pub config: Arc<Config>,
    pub mesh: MeshSettings,
    pub pods: PodTable,
    /// That of the mesh file, when there is one.
    pub file: Option<watch::Receiver<FileStatus>>,
    /// That of the control plane, when there is one.
    pub xds: Option<watch::Receiver<XdsStatus>>,
    pub story: Story,
    pub started: Instant,
    /// Asks for the graceful shutdown.
    pub stop: mpsc::Sender<()>,
}

impl State {
    /// Lets the metrics read what other rooms keep.
    pub fn watch(&self) {
        let telemetry = &self.node.telemetry;
        if let Some(status) = self.xds.clone() {
            telemetry.watch_source(move || {
                let status = status.borrow();
                SourceReading {
                    kind: "xds",
                    loaded: status.last_push,
                    loads: status.acks,
                    errors: status.nacks,
                }
            });
        } else if let Some(source) = self.file.clone() {
            telemetry.watch_source(move || {
                let status = source.borrow();
                SourceReading {
                    kind: "file",
                    loaded: Some(status.loaded_at),
                    loads: status.loads,
                    errors: status.errors,
                }
            });
        }
        let node = Arc::downgrade(&self.node);
        telemetry
            .watch_kernel(move || node.upgrade().map(|node| kernel(&node)).unwrap_or_default());
        if let Some(direct) = self.node.direct.clone() {
            telemetry.watch_direct(move || direct.reading());
        }
        let node = Arc::downgrade(&self.node);
        telemetry.watch_certificates(move || {
            let states = node.upgrade().map(|node| node.certificates.states());
            states.unwrap_or_default().iter().filter_map(certificate_ages).collect()
        });
        let node = Arc::downgrade(&self.node);
        telemetry.watch_identities(move || {
            node.upgrade().map(|node| identities(&node.certificates)).unwrap_or_default()
        });
        let node = Arc::downgrade(&self.node);
        telemetry
            .watch_tunnels(move || node.upgrade().map(|node| tunnels(&node)).unwrap_or_default());
    }
}

fn kernel(node: &Node) -> KernelReading {
    let events = match node.capture.events() {
        Ok(events) => events,
        Err(error) => {
            tracing::warn!(%error, "cannot read the kernel's counters");
            return KernelReading::default();
        }
    };
    KernelReading {
        captured: events.captured
            + events.captured_dns
            + events.inbound_plaintext
            + events.inbound_hbone,
        passed: events.passed_own
            + events.passed_excluded
            + events.passed_agent
            + events.inbound_excluded
            + events.inbound_node,
        refused: events.refused_family
            + events.refused_full
            + events.refused_outbound
            + events.missing
            + events.inbound_refused,
        flow_entries: flow_entries(node),
    }
}

fn flow_entries(node: &Node) -> Vec<(String, u64)> {
    let counts = node.capture.counts();
    vec![
        ("cv_flows".to_owned(), counts.flows as u64),
        ("cv_probes".to_owned(), counts.probes as u64),
    ]
}

fn certificate_ages(state: &ca::CertificateState) -> Option<CertificateReading> {
    let leaf = state.cert_chain.first()?;
    Some(CertificateReading {
        identity: state.identity.to_string(),
        not_before: instant(&leaf.valid_from).into(),
        not_after: instant(&leaf.expiration).into(),
    })
}

fn identities(certificates: &ca::Certificates) -> IdentityReading {
    let failed_requests = certificates.failed_requests();
    let mut reading = IdentityReading { failed_requests, ..IdentityReading::default() };
    for known in certificates.states() {
        let count = match known.state {
            ca::State::Available => &mut reading.available,
            ca::State::Initializing => &mut reading.initializing,
            ca::State::Unavailable(_) => &mut reading.unavailable,
        };
        *count += 1;
    }
    reading
}

fn tunnels(node: &Node) -> TunnelReading {
    let connections = node.mesh.pods().iter().map(|(pod, _)| pod.pool.connections() as u64).sum();
    let is_stream = |protocol| matches!(protocol, Protocol::Hbone | Protocol::DoubleHbone);
    let open = node.connections.all();
    let streams = open
        .iter()
        .map(|entry| entry.live())
        .filter(|live| live.direction == Direction::Outbound && is_stream(live.protocol));
    TunnelReading { connections, streams: streams.count() as u64 }
}

/// What `CertificateSummary` wrote is always well-formed.
fn instant(rfc3339: &str) -> OffsetDateTime {
    OffsetDateTime::parse(rfc3339, &Rfc3339).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

fn status(state: &ca::State) -> CertificateStatus {
    match state {
        ca::State::Available => CertificateStatus::Available,
        ca::State::Initializing => CertificateStatus::Initializing,
        ca::State::Unavailable(error) => CertificateStatus::Unavailable(error.to_string()),
    }
}

fn shown(certificate: CertificateSummary) -> Certificate {
    Certificate {
        valid_from: instant(&certificate.valid_from),
        expiration: instant(&certificate.expiration),
        pem: certificate.pem,
        serial: certificate.serial,
    }
}

impl State {
    fn verdicts_of(&self, cookie: Option<u64>) -> usize {
        let of = |direct: &Direct| cookie.map(|cookie| direct.verdicts_of(NetnsCookie(cookie)));
        self.node.direct.as_ref().and_then(of).unwrap_or_default()
    }

    fn source(&self) -> Source {
        if let Some(xds) = &self.xds {
            return control_plane(&xds.borrow());
        }
        let Some(file) = &self.file else {
            return Source { kind: "none", path: String::new(), loaded_at: None, error: None };
        };
        let file = file.borrow().clone();
        Source {
            kind: "file",
            path: file.path.display().to_string(),
            loaded_at: Some(file.loaded_at.into()),
            error: file.error.map(|error| error.to_string()),
        }
    }
}

fn control_plane(status: &XdsStatus) -> Source {
    let (path, error) = match (&status.connection, &status.last_rejected) {
        (XdsConnection::Open { address }, None) => (address.to_string(), None),
        (XdsConnection::Open { address }, Some(rejected)) => {
            (address.to_string(), Some(format!("rejected: {rejected}")))
        }
        (XdsConnection::Connecting | XdsConnection::Waiting, _) => {
            ("not connected".to_owned(), status.last_error.clone())
        }
    };
    let loaded_at = status.current.map(Into::into);
    Source { kind: "xds", path, loaded_at, error }
}

impl AdminState for State {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.node.mesh.snapshot()
    }

    fn certificates(&self) -> Vec<CertificateState> {
        let states = self.node.certificates.states().into_iter().map(|state| CertificateState {
            status: status(&state.state),
            identity: state.identity,
            chain: state.cert_chain.into_iter().map(shown).collect(),
            roots: state.roots.into_iter().map(shown).collect(),
        });
        states.collect()
    }

    fn pods(&self) -> Vec<Pod> {
        let snapshot = self.node.mesh.snapshot();
        let certificates = self.node.certificates.states();
        let rows = self.pods.lock().clone();
        let rows = rows.into_iter().filter_map(|(uid, row)| {
            let workload = row.claim.find(&snapshot);
            let (name, namespace, service_account) = match (workload, &row.claim) {
                (Some(workload), _) => {
                    (&workload.name, &workload.namespace, &workload.service_account)
                }
                (None, Claim::Named(pod)) => (&pod.name, &pod.namespace, &pod.service_account),
                (None, Claim::Uid(_)) => return None,
            };
            let identity = workload.map(|workload| workload.identity());
            let certificate =
                certificates.iter().find(|state| Some(&state.identity) == identity.as_ref());
            let enrolled = row.spec.map(|spec| spec.addresses);
            Some(Pod {
                uid,
                workload: workload.map(|workload| workload.uid.clone()).unwrap_or_default(),
                name: name.clone(),
                namespace: namespace.clone(),
                service_account: service_account.clone(),
                netns: row.home.to_string(),
                cookie: row.cookie.unwrap_or_default(),
                addresses: match workload {
                    Some(workload) => workload.addresses.clone(),
                    None => enrolled.unwrap_or_default(),
                },
                verdicts: self.verdicts_of(row.cookie),
                state: row.failed.map_or(PodState::Enrolled, PodState::Failed),
                certificate: certificate
                    .map_or(CertificateStatus::Initializing, |found| status(&found.state)),
            })
        });
        rows.collect()
    }

    fn connections(&self) -> &Connections {
        &self.node.connections
    }

    fn measure(&self) {
        if let Some(direct) = &self.node.direct {
            direct.measure(&self.node.mesh.pods());
        }
    }

    fn agent(&self) -> Agent {
        let programs = self.node.capture.programs().into_iter();
        let standing = self.node.direct.as_ref().map(Direct::standing).unwrap_or_default();
        Agent {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            node: self.node.name.to_string(),
            uptime: self.started.elapsed(),
            source: self.source(),
            handover: self.story.told(),
            kernel: Kernel {
                cgroup: self.config.cgroup.display().to_string(),
                pin_path: self.config.pin_path.display().to_string(),
                programs: programs.map(|(name, id)| Program { name, id }).collect(),
                flow_entries: flow_entries(&self.node).iter().map(|(_, count)| count).sum(),
                verdicts: self.node.direct.as_ref().map(|direct| direct.reading().verdicts),
                acceleration: standing.qualifies().map(|_| standing.to_string()),
            },
        }
    }

    fn version(&self) -> Version {
        Version {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            git_revision: env!("CULVERT_GIT_REVISION").to_owned(),
            rust_version: env!("CULVERT_RUST_VERSION").to_owned(),
            build_profile: match cfg!(debug_assertions) {
                true => "debug".to_owned(),
                false => "release".to_owned(),
            },
            build_status: env!("CULVERT_BUILD_STATUS").to_owned(),
            istio_version: self.config.istio_version.to_string(),
            crypto_provider: "aws-lc-rs".to_owned(),
        }
    }

    fn config(&self) -> serde_json::Value {
        let config = &self.config;
        serde_json::json!({
            "adminAddr": config.servers.admin.to_string(),
            "cgroup": config.cgroup,
            "clusterId": *self.mesh.cluster_id,
            "configFile": config.file,
            "drainDeadlineSeconds": config.drain_deadline.as_secs_f64(),
            "handover": config.handover,
            "http2FrameSize": config.http2.frame_size,
            "http2StreamWindow": config.http2.stream_window,
            "localNode": *config.node,
            "network": *self.mesh.network,
            "pinPath": config.pin_path,
            "poolMaxStreamsPerConnection": config.pool.streams_per_connection,
            "poolUnusedReleaseSeconds": config.pool.release_unused_after.as_secs_f64(),
            "sameNode": format!("{:?}", config.same_node.path).to_lowercase(),
            "sameNodeAdmitSeconds": config.same_node.admit_time.as_secs_f64(),
            "sameNodeVerdictsPerPod": config.same_node.verdicts_per_pod,
            "readinessAddr": config.servers.readiness.to_string(),
            "stateDir": config.state_dir,
            "statsAddr": config.servers.stats.to_string(),
            "trustDomain": *self.mesh.trust_domain,
            "workerThreads": config.worker_threads,
        })
    }

    fn static_config(&self) -> Result<Snapshot, String> {
        let Some(path) = &self.config.file else { return Ok(Snapshot::default()) };
        let loaded = tokio::runtime::Handle::current().block_on(file::load(path));
        let mesh = loaded.map_err(|error| error.to_string())?;
        Ok(Snapshot::default().with(file::diff(&file::Mesh::default(), &mesh)))
    }

    fn explain<'a>(
        &'a self,
        src: &'a str,
        dst: &'a str,
    ) -> BoxFuture<'a, Result<Explanation, ExplainError>> {
        explain::explain(&self.node, &self.pods, src, dst).boxed()
    }

    fn shutdown(&self) {
        // A second request changes nothing: the first is being carried out.
        let _ = self.stop.try_send(());
    }
}
