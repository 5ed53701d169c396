//! What the kernel measured of connections that it carried, by the identities at their ends.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use super::collector;
use super::context::ConnectionContext;
use super::encode::{BoundedCounters, BoundedHistograms};

/// How many pairs of identities are told apart.
const PAIRS: usize = 500;

/// In seconds: within a node connections take tens of microseconds, until something is wrong.
const BOUNDS: &[f64] =
    &[0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.005, 0.025, 0.1, 0.5, 1.0];

/// In seconds: 0.1 is what is promised.
const REVOKED_BOUNDS: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];

/// What is known of one connection when it has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportFacts {
    /// From its first segment until it was established; `None` if it never was.
    pub connect: Option<Duration>,
    /// Smoothed (RFC 6298).
    pub round_trip: Option<Duration>,
    /// Segments that were sent again.
    pub retransmits: u32,
}

#[derive(Debug)]
pub(super) struct TransportMetrics {
    connect: Arc<BoundedHistograms<Pair>>,
    round_trip: Arc<BoundedHistograms<Pair>>,
    retransmits: Arc<BoundedCounters<Pair>>,
    revoked: Histogram,
}

impl TransportMetrics {
    pub fn new(registry: &mut Registry) -> Self {
        let revoked = Histogram::new(REVOKED_BOUNDS.iter().copied());
        registry.register(
            "culvert_direct_revocation_seconds",
            "Time from a publication to the end of a connection that it no longer permits",
            revoked.clone(),
        );
        let mut histograms = |name, help| {
            let new = BoundedHistograms::new(name, help, BOUNDS, PAIRS, Pair::overflow());
            collector(registry, new)
        };
        Self {
            connect: histograms(
                "culvert_direct_connect_seconds",
                "Time to establish a connection that the kernel carried",
            ),
            round_trip: histograms(
                "culvert_direct_round_trip_seconds",
                "Smoothed round-trip time at the end of a connection that the kernel carried",
            ),
            retransmits: collector(
                registry,
                BoundedCounters::new(
                    "culvert_direct_retransmitted_segments",
                    "Segments sent again on connections that the kernel carried",
                    PAIRS,
                    Pair::overflow(),
                ),
            ),
            revoked,
        }
    }

    pub fn revoked(&self, after: Duration) {
        self.revoked.observe(after.as_secs_f64());
    }

    pub fn observe(&self, context: &ConnectionContext, facts: &TransportFacts) {
        let pair = Pair::of(context);
        if let Some(time) = facts.connect {
            self.connect.observe(&pair, time.as_secs_f64());
        }
        if let Some(time) = facts.round_trip {
            self.round_trip.observe(&pair, time.as_secs_f64());
        }
        if facts.retransmits > 0 {
            self.retransmits.add(&pair, facts.retransmits.into());
        }
    }
}

/// The identities at both ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Pair {
    source: Arc<str>,
    destination: Arc<str>,
}

impl Pair {
    fn of(context: &ConnectionContext) -> Self {
        let text = |identity: &Option<culvert_core::identity::Identity>| {
            identity.as_ref().map(ToString::to_string).unwrap_or_default().into()
        };
        Self {
            source: text(&context.source_identity),
            destination: text(&context.destination_identity),
        }
    }

    fn overflow() -> Self {
        Self { source: super::OVERFLOW.into(), destination: super::OVERFLOW.into() }
    }
}

impl EncodeLabelSet for Pair {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        ("source_principal", &*self.source).encode(encoder.encode_label())?;
        ("destination_principal", &*self.destination).encode(encoder.encode_label())
    }
}
