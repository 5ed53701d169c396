//! The counters behind the `istio_tcp_*` metrics.
//!
//! Copying bytes touches only the connection's own counters. A series adds up those of its live
//! connections when it is read and keeps the sum of those that ended, so no two connections meet
//! on the byte path.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use culvert_core::identity::Identity;
use culvert_core::service::Service;
use culvert_core::workload::Workload;
use parking_lot::{Mutex, RwLock};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder};
use prometheus_client::metrics::MetricType;

use super::context::{ConnectionContext, Reporter, ResponseFlag};
use super::encode::counter;
use super::labels::TcpLabels;

/// The payload bytes of one connection.
#[derive(Debug, Default)]
pub struct ByteCounters {
    received: AtomicU64,
    sent: AtomicU64,
    /// Where the series keeps this connection; written under the series' lock only.
    slot: AtomicUsize,
}

impl ByteCounters {
    /// Bytes that came from the client, towards the server.
    pub fn add_received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that came from the server, towards the client.
    pub fn add_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes from the client so far.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes from the server so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

const FLAGS: usize = ResponseFlag::ALL.len();

/// The counters of one label set.
#[derive(Debug)]
pub(super) struct Series {
    labels: Arc<TcpLabels>,
    opened: AtomicU64,
    /// By flag.
    closed: [AtomicU64; FLAGS],
    /// By flag.
    failed: [AtomicU64; FLAGS],
    bytes: Mutex<Bytes>,
    /// Cleared by each sweep of unused series.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Bytes {
    ended_received: u64,
    ended_sent: u64,
    live: Vec<Arc<ByteCounters>>,
}

impl Series {
    fn new(labels: Arc<TcpLabels>) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            closed: Default::default(),
            failed: Default::default(),
            bytes: Mutex::default(),
            used: AtomicBool::new(true),
        }
    }

    /// Counts a connection as opened and its bytes from now on.
    pub(super) fn open(&self) -> Arc<ByteCounters> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        self.used.store(true, Ordering::Relaxed);
        let counters = Arc::new(ByteCounters::default());
        let mut bytes = self.bytes.lock();
        counters.slot.store(bytes.live.len(), Ordering::Relaxed);
        bytes.live.push(counters.clone());
        counters
    }

    /// Counts a connection of [`Series::open`] as closed, and as failed unless the flag is none.
    pub(super) fn close(&self, counters: &Arc<ByteCounters>, flag: ResponseFlag) {
        self.closed[flag as usize].fetch_add(1, Ordering::Relaxed);
        if flag != ResponseFlag::None {
            self.failed[flag as usize].fetch_add(1, Ordering::Relaxed);
        }
        let mut bytes = self.bytes.lock();
        let slot = counters.slot.load(Ordering::Relaxed);
        if bytes.live.get(slot).is_some_and(|live| Arc::ptr_eq(live, counters)) {
            bytes.live.swap_remove(slot);
            if let Some(moved) = bytes.live.get(slot) {
                moved.slot.store(slot, Ordering::Relaxed);
            }
            bytes.ended_received += counters.received();
            bytes.ended_sent += counters.sent();
        }
    }

    fn received_and_sent(&self) -> (u64, u64) {
        let bytes = self.bytes.lock();
        let live = bytes.live.iter().map(|live| (live.received(), live.sent()));
        live.fold((bytes.ended_received, bytes.ended_sent), |(received, sent), live| {
            (received + live.0, sent + live.1)
        })
    }

    fn encode_flags(
        &self,
        counts: &[AtomicU64; FLAGS],
        metric: &mut MetricEncoder,
    ) -> Result<(), fmt::Error> {
        for (flag, count) in ResponseFlag::ALL.into_iter().zip(counts) {
            let count = count.load(Ordering::Relaxed);
            if count > 0 {
                counter(metric, &self.labels.with_flag(flag), count)?;
            }
        }
        Ok(())
    }
}

/// Every series in use, found by the connection's parties.
#[derive(Debug)]
pub(super) struct SeriesStore {
    by_labels: RwLock<HashMap<Arc<TcpLabels>, Arc<Series>>>,
    /// By a hash of the parties' pointers: the same pair again costs neither labels nor clones.
    recent: RwLock<HashMap<u64, (Parties, Arc<Series>)>>,
    hasher: RandomState,
    /// How many series there may be.
    limit: usize,
}

/// How many pairs are remembered by pointer; the table is emptied when full.
const RECENT: usize = 4096;

impl SeriesStore {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            by_labels: RwLock::default(),
            recent: RwLock::default(),
            hasher: RandomState::new(),
            limit,
        }
    }

    /// The series of a connection.
    pub(super) fn series(&self, context: &ConnectionContext) -> Arc<Series> {
        if context.baggage.is_some() {
            return self.by_labels(TcpLabels::of(context));
        }
        let hash = Parties::hash(context, &self.hasher);
        if let Some((parties, series)) = self.recent.read().get(&hash)
            && parties.are_of(context)
        {
            return series.clone();
        }
        let series = self.by_labels(TcpLabels::of(context));
        let mut recent = self.recent.write();
        if recent.len() >= RECENT {
            recent.clear();
        }
        recent.insert(hash, (Parties::of(context), series.clone()));
        series
    }

    fn by_labels(&self, labels: TcpLabels) -> Arc<Series> {
        if let Some(series) = self.by_labels.read().get(&labels) {
            return series.clone();
        }
        let mut all = self.by_labels.write();
        if all.len() >= self.limit && !all.contains_key(&labels) {
            self.sweep(&mut all);
        }
        let labels = match all.len() >= self.limit && !all.contains_key(&labels) {
            true => TcpLabels::overflow(labels.reporter()),
            false => labels,
        };
        let labels = Arc::new(labels);
        all.entry(labels.clone()).or_insert_with(|| Arc::new(Series::new(labels))).clone()
    }

    /// Forgets series without live connections: those unused since the last sweep, or all of them
    /// if that makes no room. To Prometheus this is a counter reset.
    fn sweep(&self, all: &mut HashMap<Arc<TcpLabels>, Arc<Series>>) {
        // While the pointers remember a series, its count of owners says nothing.
        self.recent.write().clear();
        let idle = |series: &Arc<Series>| Arc::strong_count(series) == 1;
        all.retain(|_, series| series.used.swap(false, Ordering::Relaxed) || !idle(series));
        if all.len() >= self.limit {
            all.retain(|_, series| !idle(series));
        }
    }
}

/// The connection's parties as the source and the snapshot share them, told apart by pointer.
///
/// Owning them keeps a freed pointer from coming back as somebody else.
#[derive(Debug)]
struct Parties {
    reporter: Reporter,
    mutual_tls: bool,
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
    source_identity: Option<Identity>,
    destination_identity: Option<Identity>,
}

impl Parties {
    fn of(context: &ConnectionContext) -> Self {
        Self {
            reporter: context.reporter,
            mutual_tls: context.mutual_tls,
            source: context.source.clone(),
            destination: context.destination.clone(),
            service: context.service.clone(),
            source_identity: context.source_identity.clone(),
            destination_identity: context.destination_identity.clone(),
        }
    }

    fn are_of(&self, context: &ConnectionContext) -> bool {
        self.reporter == context.reporter
            && self.mutual_tls == context.mutual_tls
            && pointer(&self.source) == pointer(&context.source)
            && pointer(&self.destination) == pointer(&context.destination)
            && pointer(&self.service) == pointer(&context.service)
            && self.source_identity == context.source_identity
            && self.destination_identity == context.destination_identity
    }

    fn hash(context: &ConnectionContext, hasher: &RandomState) -> u64 {
        hasher.hash_one((
            context.reporter,
            context.mutual_tls,
            pointer(&context.source),
            pointer(&context.destination),
            pointer(&context.service),
            &context.source_identity,
            &context.destination_identity,
        ))
    }
}

fn pointer<T>(shared: &Option<Arc<T>>) -> usize {
    shared.as_ref().map_or(0, |shared| Arc::as_ptr(shared) as usize)
}

impl Collector for SeriesStore {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let all: Vec<Arc<Series>> = self.by_labels.read().values().cloned().collect();
        let mut family = |name, help, encode: &dyn Fn(&Series, &mut MetricEncoder) -> _| {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            all.iter().try_for_each(|series| encode(series, &mut metric))
        };
        family("istio_tcp_connections_opened", "TCP connections opened", &|series, metric| {
            let opened = series.opened.load(Ordering::Relaxed);
            counter(metric, &series.labels.with_flag(ResponseFlag::None), opened)
        })?;
        family("istio_tcp_connections_closed", "TCP connections closed", &|series, metric| {
            series.encode_flags(&series.closed, metric)
        })?;
        family(
            "istio_tcp_connections_failed",
            "TCP connections that were refused, could not be established or broke",
            &|series, metric| series.encode_flags(&series.failed, metric),
        )?;
        family(
            "istio_tcp_received_bytes",
            "Payload bytes from clients to servers",
            &|series, metric| {
                let (received, _) = series.received_and_sent();
                counter(metric, &series.labels.with_flag(ResponseFlag::None), received)
            },
        )?;
        family(
            "istio_tcp_sent_bytes",
            "Payload bytes from servers to clients",
            &|series, metric| {
                let (_, sent) = series.received_and_sent();
                counter(metric, &series.labels.with_flag(ResponseFlag::None), sent)
            },
        )
    }
}

#[cfg(test)]
mod tests;
