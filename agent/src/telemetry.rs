//! What the agent tells of itself: metrics, the access log, and the log they are written to.
//!
//! Nothing here is global: a [`Telemetry`] owns its registry, and whoever counts is given one.

mod access;
mod context;
mod dns;
mod encode;
mod labels;
pub mod logging;
mod open;
mod process;
mod readings;
mod series;
mod transport;
mod xds;

use std::fmt;
use std::fmt::Display;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::authorization::Action;
use culvert_core::workload::{PolicyKey, Workload};
use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::runtime::Handle;

pub use context::{
    Baggage, ConnectionContext, Denial, DenialReason, Failure, Reporter, ResponseFlag,
};
pub use dns::{DnsMetrics, DnsSource};
pub use open::OpenConnection;
pub use readings::{
    CertificateReading, DirectReading, IdentityReading, KernelReading, SourceReading, TunnelReading,
};
pub use series::ByteCounters;
pub use transport::TransportFacts;
pub use xds::{Termination, XdsMetrics, XdsReading};

use encode::BoundedCounters;
use labels::OnDemandDnsLabels;
use readings::{DroppedLines, Reading, Readings};
use series::SeriesStore;
use transport::TransportMetrics;

/// All metrics of one agent. Cloning copies a pointer.
#[derive(Clone, Debug)]
pub struct Telemetry(Arc<Inner>);

/// How many label sets the `istio_tcp_*` metrics may have at once.
const TCP_SERIES: usize = 10_000;
/// How many label sets each other family with names from the mesh may have.
const OTHER_SERIES: usize = 2_000;

#[derive(Debug)]
struct Inner {
    registry: Mutex<Registry>,
    series: Arc<SeriesStore>,
    sockets: Family<[(&'static str, &'static str); 1], Gauge>,
    failed_early: Family<[(&'static str, &'static str); 1], Counter>,
    denied: Arc<BoundedCounters<DenialLabels>>,
    dry_run: Arc<BoundedCounters<DryRunEvaluation>>,
    on_demand_dns: Arc<BoundedCounters<OnDemandDnsLabels>>,
    dns: DnsMetrics,
    transport: TransportMetrics,
    rejudged: Counter,
    crl_rejected: Family<[(&'static str, &'static str); 1], Counter>,
    crl_untracked: Family<[(&'static str, &'static str); 1], Counter>,
    handovers: Family<[(&'static str, &'static str); 1], Counter>,
    pods: PodMetrics,
    xds: XdsMetrics,
}

/// What became of a hand-over between two agents, seen from this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// This agent took over.
    Taken,
    /// This agent handed over.
    Given,
    /// This agent made room for one that could not take over what it had.
    LetGo,
    /// It failed, and this agent goes on.
    Failed,
}

impl Handover {
    const ALL: [Handover; 4] =
        [Handover::Taken, Handover::Given, Handover::LetGo, Handover::Failed];

    fn label(self) -> &'static str {
        match self {
            Handover::Taken => "taken",
            Handover::Given => "given",
            Handover::LetGo => "let_go",
            Handover::Failed => "failed",
        }
    }
}

/// The pods that are enrolled on this node, as `workload_manager_*`.
#[derive(Clone, Debug, Default)]
pub struct PodMetrics {
    /// Pods whose connections are served.
    pub active: Gauge,
    /// Pods that could not be enrolled yet.
    pub pending: Gauge,
    pub started: Counter,
    pub stopped: Counter,
    /// Requests of istio-cni that were answered with an error.
    pub refused: Counter,
    lost: Family<[(&'static str, &'static str); 1], Counter>,
}

impl PodMetrics {
    /// Counts a connection to istio-cni that ended or did not begin. `reason`: one of a closed set.
    pub fn lost(&self, reason: &'static str) {
        self.lost.get_or_create(&[("reason", reason)]).inc();
    }
}

impl Telemetry {
    /// `istio_version` is the `tag` of `istio_build`; `runtimes` are those that `tokio_*` tell of.
    pub fn new(istio_version: Option<String>, runtimes: &[Handle]) -> Telemetry {
        let mut registry = Registry::default();
        let tag = istio_version.unwrap_or_else(|| "unknown".to_owned());
        registry.register_collector(Box::new(process::Build { tag }));
        registry.register_collector(Box::new(process::Process));
        if !runtimes.is_empty() {
            registry.register_collector(Box::new(process::Tokio::new(runtimes)));
        }
        let inner = Inner {
            series: collector(&mut registry, SeriesStore::new(TCP_SERIES)),
            sockets: Family::default(),
            failed_early: Family::default(),
            denied: collector(
                &mut registry,
                BoundedCounters::new(
                    "culvert_authorization_denied",
                    "Connections refused or closed by policy",
                    OTHER_SERIES,
                    DenialLabels::overflow(),
                ),
            ),
            dry_run: collector(
                &mut registry,
                BoundedCounters::new(
                    "culvert_authorization_dry_run",
                    "Evaluations of policies that are in dry run",
                    OTHER_SERIES,
                    DryRunEvaluation::overflow(),
                ),
            ),
            on_demand_dns: collector(
                &mut registry,
                BoundedCounters::new(
                    "istio_on_demand_dns",
                    "Requests whose destination was looked up by DNS",
                    OTHER_SERIES,
                    OnDemandDnsLabels::overflow(),
                ),
            ),
            dns: DnsMetrics::new(&mut registry),
            transport: TransportMetrics::new(&mut registry),
            rejudged: Counter::default(),
            crl_rejected: Family::default(),
            crl_untracked: Family::default(),
            handovers: Family::default(),
            pods: PodMetrics::default(),
            xds: XdsMetrics::default(),
            registry: Mutex::default(),
        };
        inner.register_counters(&mut registry);
        *inner.registry.lock() = registry;
        Self(Arc::new(inner))
    }

    /// Counts a connection as opened: once its upstream is chosen (outbound), or its target is
    /// computed and before it is authorized (inbound).
    pub fn open(&self, context: ConnectionContext) -> OpenConnection {
        let series = self.0.series.series(&context);
        OpenConnection::new(self.clone(), context, series)
    }

    /// Tells of a connection that failed before it could be opened: one line at warn, and none of
    /// the `istio_tcp_*` counters.
    pub fn failed_early(
        &self,
        reporter: Reporter,
        src: SocketAddr,
        dst: SocketAddr,
        error: &dyn Display,
    ) {
        self.0.failed_early.get_or_create(&[("reporter", reporter.label())]).inc();
        access::failed(reporter, src, dst, error);
    }

    /// Counts an accepted socket as open until the guard is dropped. On 15008 a socket is a TLS
    /// connection, not a stream.
    pub fn socket_opened(&self, reporter: Reporter) -> SocketGuard {
        let open = self.0.sockets.get_or_create_owned(&[("reporter", reporter.label())]);
        open.inc();
        SocketGuard(open)
    }

    /// Counts a destination that had to be looked up by DNS for `source`.
    pub fn on_demand_dns(&self, source: &Workload, hostname: &Arc<str>) {
        self.0.on_demand_dns.increase(&OnDemandDnsLabels::of(source, hostname));
    }

    /// Counts questions that pods ask DNS servers.
    pub fn dns(&self) -> &DnsMetrics {
        &self.0.dns
    }

    /// Notes what the kernel measured of a connection that it carried.
    pub fn transport(&self, context: &ConnectionContext, facts: &TransportFacts) {
        self.0.transport.observe(context, facts);
    }

    /// Notes how long a connection that the kernel carried went on after a publication that no longer
    /// permits it.
    pub fn revoked(&self, after: Duration) {
        self.0.transport.revoked(after);
    }

    /// Counts the evaluation of a policy that is in dry run.
    pub fn dry_run(&self, evaluation: DryRunEvaluation) {
        self.0.dry_run.increase(&evaluation);
    }

    /// Counts a peer that was refused, or a live connection that was cut off, because the peer's
    /// certificate is revoked.
    pub fn crl_rejected(&self, reporter: Reporter) {
        self.0.crl_rejected.get_or_create(&[("reporter", reporter.label())]).inc();
    }

    /// Counts a live connection that no later revocation can reach.
    pub fn crl_untracked(&self, reporter: Reporter) {
        self.0.crl_untracked.get_or_create(&[("reporter", reporter.label())]).inc();
    }

    /// Counts a hand-over between two agents.
    pub fn handover(&self, outcome: Handover) {
        self.0.handovers.get_or_create(&[("result", outcome.label())]).inc();
    }

    pub fn pods(&self) -> &PodMetrics {
        &self.0.pods
    }

    pub fn xds(&self) -> &XdsMetrics {
        &self.0.xds
    }

    /// Adds the workload API's state, read at each scrape.
    pub fn watch_xds(&self, read: impl Fn() -> XdsReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds the kernel programs' counts, read at each scrape.
    pub fn watch_kernel(&self, read: impl Fn() -> KernelReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds what the kernel admits by itself, read at each scrape.
    pub fn watch_direct(&self, read: impl Fn() -> DirectReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds the configuration source's state, read at each scrape.
    pub fn watch_source(&self, read: impl Fn() -> SourceReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds the certificates' ages, read at each scrape.
    pub fn watch_certificates(
        &self,
        read: impl Fn() -> Vec<CertificateReading> + Send + Sync + 'static,
    ) {
        self.watch(read);
    }

    /// Adds how many identities have certificates, read at each scrape.
    pub fn watch_identities(&self, read: impl Fn() -> IdentityReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds the tunnel pools' sizes, read at each scrape.
    pub fn watch_tunnels(&self, read: impl Fn() -> TunnelReading + Send + Sync + 'static) {
        self.watch(read);
    }

    /// Adds the number of lines that the log dropped.
    pub fn watch_log(&self, log: &logging::LogControl) {
        let log = log.clone();
        self.watch(move || DroppedLines(log.dropped_lines()));
    }

    fn watch<R: Reading + 'static>(&self, read: impl Fn() -> R + Send + Sync + 'static) {
        self.0.registry.lock().register_collector(Box::new(Readings(read)));
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.0.registry.lock())?;
        Ok(text)
    }

    fn count_denial(&self, denial: &Denial) {
        if denial.reason == DenialReason::PolicyChange {
            self.0.rejudged.inc();
        }
        self.0.denied.increase(&DenialLabels(denial.clone()));
    }
}

impl Inner {
    fn register_counters(&self, registry: &mut Registry) {
        for reporter in [Reporter::Source, Reporter::Destination] {
            self.sockets.get_or_create(&[("reporter", reporter.label())]).set(0);
            let _present = self.crl_rejected.get_or_create(&[("reporter", reporter.label())]);
            let _present = self.crl_untracked.get_or_create(&[("reporter", reporter.label())]);
        }
        registry.register("istio_tcp_sockets_open", "Open TCP sockets", self.sockets.clone());
        registry.register(
            "culvert_connections_failed_early",
            "Connections that failed before their destination was known",
            self.failed_early.clone(),
        );
        registry.register(
            "culvert_authorization_rejudged_closings",
            "Live connections closed because a policy or binding changed",
            self.rejudged.clone(),
        );
        registry.register(
            "istio_crl_policy_rejections",
            "Peers refused or cut off because their certificate is revoked",
            self.crl_rejected.clone(),
        );
        registry.register(
            "istio_crl_untracked_connections",
            "Connections that no later revocation can reach",
            self.crl_untracked.clone(),
        );
        for outcome in Handover::ALL {
            let _present = self.handovers.get_or_create(&[("result", outcome.label())]);
        }
        registry.register(
            "culvert_handovers",
            "Hand-overs between this agent and another one",
            self.handovers.clone(),
        );
        self.xds.register(registry);
        let pods = &self.pods;
        let prefix = "workload_manager";
        for (name, help, gauge) in [
            ("active_proxy_count", "Pods whose connections are served", &pods.active),
            ("pending_proxy_count", "Pods that wait to be enrolled", &pods.pending),
        ] {
            registry.register(format!("{prefix}_{name}"), help, gauge.clone());
        }
        for (name, help, counter) in [
            ("proxies_started", "Pods enrolled", &pods.started),
            ("proxies_stopped", "Pods withdrawn", &pods.stopped),
        ] {
            registry.register(format!("{prefix}_{name}"), help, counter.clone());
        }
        registry.register(
            "culvert_cni_refused_requests",
            "Requests of istio-cni that were answered with an error",
            pods.refused.clone(),
        );
        registry.register(
            "culvert_cni_connection_terminations",
            "Connections to istio-cni that ended, and attempts that failed",
            pods.lost.clone(),
        );
    }
}

/// Registers a collector and keeps a handle on it.
fn collector<C>(registry: &mut Registry, collector: C) -> Arc<C>
where
    C: prometheus_client::collector::Collector,
{
    let collector = Arc::new(collector);
    registry.register_collector(Box::new(collector.clone()));
    collector
}

/// A socket counted in `istio_tcp_sockets_open`.
#[derive(Debug)]
pub struct SocketGuard(Gauge);

impl Drop for SocketGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// Stands for every policy beyond the number that is told apart.
const OVERFLOW: &str = "overflow";

#[derive(Clone, Debug, PartialEq, Eq)]
struct DenialLabels(Denial);

impl DenialLabels {
    fn overflow() -> Self {
        Self(Denial { reason: DenialReason::Explicit, policy: Some(OVERFLOW.into()), rule: None })
    }
}

impl std::hash::Hash for DenialLabels {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        (self.0.reason, &self.0.policy, self.0.rule).hash(state);
    }
}

impl EncodeLabelSet for DenialLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let Denial { reason, policy, rule } = &self.0;
        let rule = rule.map(|rule| rule.to_string()).unwrap_or_default();
        ("policy", policy.as_deref().unwrap_or_default()).encode(encoder.encode_label())?;
        ("rule", rule).encode(encoder.encode_label())?;
        ("reason", reason.label()).encode(encoder.encode_label())
    }
}

/// What a policy in dry run said of one connection.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DryRunEvaluation {
    pub policy: PolicyKey,
    pub action: Action,
    pub matched: bool,
}

impl DryRunEvaluation {
    fn overflow() -> Self {
        Self { policy: OVERFLOW.into(), action: Action::Deny, matched: false }
    }
}

impl EncodeLabelSet for DryRunEvaluation {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        let action = match self.action {
            Action::Allow => "allow",
            Action::Deny => "deny",
        };
        ("policy", &*self.policy).encode(encoder.encode_label())?;
        ("action", action).encode(encoder.encode_label())?;
        ("matched", self.matched).encode(encoder.encode_label())
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
