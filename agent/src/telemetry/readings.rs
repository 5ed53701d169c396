//! Culvert's own metrics that other rooms keep: read from them when asked for.

use std::fmt;
use std::time::SystemTime;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;

use super::encode::{counter, gauge};

/// What the kernel programs counted since they were loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelReading {
    /// Connections handed to the agent.
    pub captured: u64,
    /// Connections left to go their plain way.
    pub passed: u64,
    /// Connections refused in the kernel.
    pub refused: u64,
    /// Entries in each flow map, by its name.
    pub flow_entries: Vec<(String, u64)>,
}

/// What the kernel admits by itself, and what it did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectReading {
    pub verdicts: u64,
    /// Verdicts that found no room.
    pub refused: u64,
    /// Connections that went straight.
    pub opened: u64,
    /// The others went by the agent, though there was a verdict: the draw among the endpoints of a
    /// service fell on one that is elsewhere,
    pub elsewhere: u64,
    /// the verdict had ended, or there was no agent for too long,
    pub expired: u64,
    /// the pod had too many direct connections,
    pub full: u64,
    /// the socket was special,
    pub special: u64,
    /// the pod that was drawn is leaving, or has lost its address,
    pub backend_gone: u64,
    /// or the verdict was taken back while the connection was on its way.
    pub retracted: u64,
    /// Connections that failed because they could not be noted.
    pub unrecorded: u64,
    pub astray: u64,
    /// Connections whose opening or end was not told.
    pub events_lost: u64,
}

/// The state of a source of the mesh's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceReading {
    /// `file`, `xds`.
    pub kind: &'static str,
    /// When it was last taken over in full; `None` before the first time.
    pub loaded: Option<SystemTime>,
    pub loads: u64,
    pub errors: u64,
}

/// A certificate in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateReading {
    pub identity: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

/// The identities of this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdentityReading {
    /// With a certificate that is valid.
    pub available: u64,
    /// Whose first request is not answered.
    pub initializing: u64,
    /// Whose connections are refused.
    pub unavailable: u64,
    /// Requests for certificates that failed.
    pub failed_requests: u64,
}

/// The tunnels to peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TunnelReading {
    /// TLS connections open in the pools.
    pub connections: u64,
    /// Streams open on them.
    pub streams: u64,
}

/// Families that a callback fills at each reading.
pub(super) struct Readings<F>(pub(super) F);

impl<F> fmt::Debug for Readings<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Readings")
    }
}

/// How a reading becomes samples.
pub(super) trait Reading {
    fn encode(self, encoder: DescriptorEncoder) -> Result<(), fmt::Error>;
}

impl<F, R> Collector for Readings<F>
where
    F: Fn() -> R + Send + Sync + 'static,
    R: Reading,
{
    fn encode(&self, encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        (self.0)().encode(encoder)
    }
}

impl Reading for KernelReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut family = encoder.encode_descriptor(
            "culvert_kernel_connections",
            "New connections of enrolled pods, by what the kernel programs did with them",
            None,
            MetricType::Counter,
        )?;
        for (result, count) in
            [("captured", self.captured), ("passed", self.passed), ("refused", self.refused)]
        {
            counter(&mut family, &[("result", result)], count)?;
        }
        let mut family = encoder.encode_descriptor(
            "culvert_kernel_flow_entries",
            "Entries in the kernel's flow maps",
            None,
            MetricType::Gauge,
        )?;
        for (map, entries) in &self.flow_entries {
            gauge(&mut family, &[("map", map.as_str())], *entries)?;
        }
        Ok(())
    }
}

impl Reading for DirectReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let (name, help) = ("culvert_direct_verdicts", "Verdicts by which the kernel admits");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        family.encode_gauge(&self.verdicts)?;
        let (name, help) = ("culvert_direct_verdicts_refused", "Verdicts that found no room");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter::<[(&str, &str); 0], _>(&mut family, &[], self.refused)?;
        let mut family = encoder.encode_descriptor(
            "culvert_direct_connections",
            "Connections for which the kernel had a verdict, by what became of them",
            None,
            MetricType::Counter,
        )?;
        for (result, count) in [
            ("direct", self.opened),
            ("elsewhere", self.elsewhere),
            ("expired", self.expired),
            ("full", self.full),
            ("special", self.special),
            ("backend_gone", self.backend_gone),
            ("retracted", self.retracted),
            ("unrecorded", self.unrecorded),
            ("astray", self.astray),
        ] {
            counter(&mut family, &[("result", result)], count)?;
        }
        let (name, help) = ("culvert_direct_events_lost", "Openings and ends that were not told");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter::<[(&str, &str); 0], _>(&mut family, &[], self.events_lost)
    }
}

impl Reading for SourceReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let labels = [("kind", self.kind)];
        if let Some(loaded) = self.loaded {
            let mut family = encoder.encode_descriptor(
                "culvert_source_age_seconds",
                "Time since the configuration was last taken over in full",
                None,
                MetricType::Gauge,
            )?;
            gauge(&mut family, &labels, seconds_between(loaded, SystemTime::now()))?;
        }
        for (name, help, count) in [
            ("culvert_source_loads", "Configurations taken over", self.loads),
            ("culvert_source_errors", "Configurations refused or not readable", self.errors),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            counter(&mut family, &labels, count)?;
        }
        Ok(())
    }
}

impl Reading for Vec<CertificateReading> {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let now = SystemTime::now();
        let mut family = |name, help, seconds: &dyn Fn(&CertificateReading) -> f64| {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            self.iter().try_for_each(|certificate| {
                let labels = [("identity", certificate.identity.as_str())];
                gauge(&mut family, &labels, seconds(certificate))
            })
        };
        family("culvert_certificate_age_seconds", "Age of a workload certificate", &|c| {
            seconds_between(c.not_before, now)
        })?;
        family(
            "culvert_certificate_expires_in_seconds",
            "Time until a workload certificate ends, negative afterwards",
            &|c| seconds_between(now, c.not_after),
        )
    }
}

impl Reading for IdentityReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let (name, help) = ("culvert_identities", "Identities of this node's pods, by certificate");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (state, count) in [
            ("available", self.available),
            ("initializing", self.initializing),
            ("unavailable", self.unavailable),
        ] {
            gauge(&mut family, &[("state", state)], count)?;
        }
        let name = "culvert_certificate_failures";
        let help = "Requests for certificates that were refused or answered wrongly, or failed";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter::<[(&str, &str); 0], _>(&mut family, &[], self.failed_requests)
    }
}

impl Reading for TunnelReading {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        for (name, help, value) in [
            ("culvert_tunnel_connections", "TLS connections in the pools", self.connections),
            ("culvert_tunnel_streams", "Streams on pooled connections", self.streams),
        ] {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&value)?;
        }
        Ok(())
    }
}

/// Lines that the log writer had to drop.
pub(super) struct DroppedLines(pub(super) u64);

impl Reading for DroppedLines {
    fn encode(self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let help = "Log lines dropped because the log was not read fast enough";
        let name = "culvert_log_lines_dropped";
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        counter::<[(&str, &str); 0], _>(&mut family, &[], self.0)
    }
}

/// Negative when `later` is before `earlier`.
pub(super) fn seconds_between(earlier: SystemTime, later: SystemTime) -> f64 {
    match later.duration_since(earlier) {
        Ok(elapsed) => elapsed.as_secs_f64(),
        Err(reversed) => -reversed.duration().as_secs_f64(),
    }
}
