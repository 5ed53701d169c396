//! What is counted of the workload API, and how current the state is.

use std::fmt;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::encode::gauge;
use super::readings::{Reading, seconds_between};

type Counts = Family<[(&'static str, &'static str); 1], Counter>;

/// Counters of the stream, as `istio_xds_*`.
#[derive(Clone, Debug, Default)]
pub struct XdsMetrics {
    terminations: Counts,
    messages: Counts,
    bytes: Counts,
}

/// How a stream, or the attempt at one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Termination {
    /// There was no stream yet.
    ConnectionError,
    Error,
    /// By the control plane or the network, in a way that calls for connecting again at once.
    Reconnect,
    /// In good order.
    Complete,
}

impl XdsMetrics {
    pub fn terminated(&self, how: Termination) {
        let reason = match how {
            Termination::ConnectionError => "ConnectionError",
            Termination::Error => "Error",
            Termination::Reconnect => "Reconnect",
            Termination::Complete => "Complete",
        };
        self.terminations.get_or_create(&[("reason", reason)]).inc();
    }

    /// `bytes`: the sum of the resources. `url`: one of a closed set.
    pub fn received(&self, url: &'static str, bytes: u64) {
        self.messages.get_or_create(&[("url", url)]).inc();
        self.bytes.get_or_create(&[("url", url)]).inc_by(bytes);
    }

    pub(super) fn register(&self, registry: &mut Registry) {
        for (name, help, counts) in [
            (
                "istio_xds_connection_terminations",
                "Streams to the control plane that ended, and attempts that failed",
                &self.terminations,
            ),
            ("istio_xds_message", "Messages from the control plane", &self.messages),
            (
                "istio_xds_message_bytes",
                "Bytes of resources in messages from the control plane",
                &self.bytes,
            ),
        ] {
            registry.register(name, help, counts.clone());
        }
    }
}

/// The state that the workload API gave.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XdsReading {
    /// A stream is open.
    pub connected: bool,
    /// Time since the state was last known to be current, 0 while a stream is open; `None` before
    /// there is any.
    pub age: Option<Duration>,
    pub last_push: Option<SystemTime>,
    pub addresses: u64,
    pub authorizations: u64,
    /// Resources that were not taken over.
    pub rejected: u64,
}

impl Reading for XdsReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut value = |name, help, value: f64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&value)
        };
        let connected = f64::from(u8::from(self.connected));
        value("culvert_xds_connected", "Whether a stream to the control plane is open", connected)?;
        if let Some(age) = self.age {
            let help = "Time since the state was last known to be current";
            value("culvert_xds_state_age_seconds", help, age.as_secs_f64())?;
        }
        if let Some(pushed) = self.last_push {
            let help = "Time since the control plane last sent something that was taken over";
            let age = seconds_between(pushed, SystemTime::now());
            value("culvert_xds_last_push_age_seconds", help, age)?;
        }
        let (name, help) = ("culvert_xds_resources", "Resources held");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        gauge(&mut family, &[("type", "address")], self.addresses)?;
        gauge(&mut family, &[("type", "authorization")], self.authorizations)?;
        let (name, help) = ("culvert_xds_rejected_resources", "Resources not taken over");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        family.encode_counter::<NoLabelSet, _, u64>(&self.rejected, None)
    }
}
