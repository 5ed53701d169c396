//! Writing samples of families that the metrics library does not keep itself.

use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;

use parking_lot::Mutex;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeCounterValue, EncodeGaugeValue, EncodeLabelSet, EncodeMetric,
    MetricEncoder, NoLabelSet,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::histogram::Histogram;

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

    pub(super) fn increase(&self, labels: &L) {
        self.add(labels, 1);
    }

    pub(super) fn add(&self, labels: &L, more: u64) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(labels) {
            *count += more;
            return;
        }
        let full = counts.len() >= self.limit;
        let labels = if full { &self.overflow } else { labels };
        *counts.entry(labels.clone()).or_default() += more;
    }
}

/// A family of histograms, bounded likewise.
pub(super) struct BoundedHistograms<L> {
    name: &'static str,
    help: &'static str,
    bounds: &'static [f64],
    limit: usize,
    overflow: L,
    histograms: Mutex<HashMap<L, Histogram>>,
}

impl<L: Hash + Eq + Clone> BoundedHistograms<L> {
    pub(super) fn new(
        name: &'static str,
        help: &'static str,
        bounds: &'static [f64],
        limit: usize,
        overflow: L,
    ) -> BoundedHistograms<L> {
        Self { name, help, bounds, limit, overflow, histograms: Mutex::default() }
    }

    pub(super) fn observe(&self, labels: &L, value: f64) {
        let mut histograms = self.histograms.lock();
        if let Some(histogram) = histograms.get(labels) {
            return histogram.observe(value);
        }
        let full = histograms.len() >= self.limit;
        let labels = if full { &self.overflow } else { labels };
        let new = || Histogram::new(self.bounds.iter().copied());
        histograms.entry(labels.clone()).or_insert_with(new).observe(value);
    }
}

impl<L> fmt::Debug for BoundedHistograms<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundedHistograms").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<L> Collector for BoundedHistograms<L>
where
    L: EncodeLabelSet + Send + Sync + 'static,
{
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut family =
            encoder.encode_descriptor(self.name, self.help, None, MetricType::Histogram)?;
        let histograms = self.histograms.lock();
        histograms
            .iter()
            .try_for_each(|(labels, histogram)| histogram.encode(family.encode_family(labels)?))
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
