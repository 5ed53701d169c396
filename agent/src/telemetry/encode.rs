//! Writing samples of families that the metrics library does not keep itself.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, MetricEncoder,
    NoLabelSet,
};
use prometheus_client::metrics::MetricType;

/// One sample of a counter family.
pub(super) fn counter<L: EncodeLabelSet, V: EncodeCounterValue>(
    family: &mut MetricEncoder,
    labels: &L,
    value: V,
) -> Result<(), fmt::Error> {
    family.encode_family(labels)?.encode_counter::<NoLabelSet, V, u64>(&value, None)
}

/// One sample of a gauge family.
pub(super) fn gauge<L: EncodeLabelSet, V: EncodeGaugeValue>(
    family: &mut MetricEncoder,
    labels: &L,
    value: V,
) -> Result<(), fmt::Error> {
    family.encode_family(labels)?.encode_gauge(&value)
}

/// A family of counters whose label sets are bounded: further ones are counted as `overflow`.
pub(super) struct BoundedCounters<L> {
    name: &'static str,
    help: &'static str,
    limit: usize,
    overflow: L,
    counts: Mutex<HashMap<L, u64>>,
}

impl<L: Hash + Eq + Clone> BoundedCounters<L> {
    pub(super) fn new(
        name: &'static str,
        help: &'static str,
        limit: usize,
        overflow: L,
    ) -> BoundedCounters<L> {
        Self { name, help, limit, overflow, counts: Mutex::default() }
    }

    pub(super) fn increase(&self, labels: L) {
        let mut counts = self.counts.lock();
        let full = counts.len() >= self.limit && !counts.contains_key(&labels);
        let labels = if full { self.overflow.clone() } else { labels };
        *counts.entry(labels).or_default() += 1;
    }
}

impl<L> fmt::Debug for BoundedCounters<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundedCounters").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<L> Collector for BoundedCounters<L>
where
    L: EncodeLabelSet + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut family =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Counter)?;
        self.counts
            .lock()
            .iter()
            .try_for_each(|(labels, count)| counter(&mut family, labels, *count))
    }
}
