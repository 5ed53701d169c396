//! The `istio_dns_*` metrics: what pods ask, and what name servers answer.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::workload::Workload;
use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use prometheus_client::registry::Registry;

use super::encode::{BoundedCounters, BoundedHistograms};
use super::labels::Label;
use super::{OTHER_SERIES, collector};

/// In seconds.
const BOUNDS: [f64; 6] = [0.0005, 0.001, 0.01, 0.1, 1.0, 5.0];

/// Who asks for what, as the metrics tell it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DnsSource {
    /// Record type, in capital letters.
    kind: &'static str,
    protocol: &'static str,
    service: Label,
    revision: Label,
}

impl DnsSource {
    pub fn new(client: &Workload, kind: &'static str, protocol: &'static str) -> Self {
        let service = Some(&client.canonical_name).into();
        let revision = Some(&client.canonical_revision).into();
        Self { kind, protocol, service, revision }
    }

    /// Stands for all further label sets when there are too many.
    fn overflow() -> Self {
        Self {
            kind: "UNKNOWN",
            protocol: "udp",
            service: Label::default(),
            revision: Label::default(),
        }
    }
}

impl EncodeLabelSet for DnsSource {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        ("request_query_type", self.kind.to_ascii_lowercase()).encode(encoder.encode_label())?;
        ("request_protocol", self.protocol).encode(encoder.encode_label())?;
        ("source_canonical_service", &self.service).encode(encoder.encode_label())?;
        ("source_canonical_revision", &self.revision).encode(encoder.encode_label())
    }
}

/// Counts questions.
#[derive(Debug)]
pub struct DnsMetrics {
    requests: Arc<BoundedCounters<DnsSource>>,
    upstream_requests: Arc<BoundedCounters<DnsSource>>,
    upstream_failures: Arc<BoundedCounters<DnsSource>>,
    upstream_durations: Arc<BoundedHistograms<DnsSource>>,
}

impl DnsMetrics {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let mut counters = |name, help| {
            let counters = BoundedCounters::new(name, help, OTHER_SERIES, DnsSource::overflow());
            collector(registry, counters)
        };
        Self {
            requests: counters("istio_dns_requests", "DNS requests of pods"),
            upstream_requests: counters(
                "istio_dns_upstream_requests",
                "DNS requests that were passed on to name servers",
            ),
            upstream_failures: counters(
                "istio_dns_upstream_failures",
                "DNS requests that name servers had no records for, or did not answer",
            ),
            upstream_durations: collector(
                registry,
                BoundedHistograms::new(
                    "istio_dns_upstream_request_duration_seconds",
                    "Time that name servers took to answer",
                    &BOUNDS,
                    OTHER_SERIES,
                    DnsSource::overflow(),
                ),
            ),
        }
    }

    /// Counts a question of a pod, whoever answers it.
    pub fn request(&self, source: &DnsSource) {
        self.requests.increase(source);
    }

    /// Counts a question that was passed on. It has failed when it brought no records.
    pub fn forwarded(&self, source: &DnsSource, took: Duration, failed: bool) {
        self.upstream_requests.increase(source);
        if failed {
            self.upstream_failures.increase(source);
        }
        self.upstream_durations.observe(source, took.as_secs_f64());
    }
}
