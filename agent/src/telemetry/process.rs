//! Metrics of the process and its runtime, read when asked for.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue};
use prometheus_client::metrics::MetricType;
use tokio::runtime::{Handle, RuntimeMetrics};

use super::encode::{counter, gauge};

/// `process_open_fds` and `process_max_fds`, from `/proc/self`.
#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut family = |name, help, value: Option<i64>| match value {
            Some(value) => {
                encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
            }
            None => Ok(()),
        };
        family("process_open_fds", "Open file descriptors", open_fds())?;
        family("process_max_fds", "Limit of open file descriptors", max_fds())
    }
}

fn open_fds() -> Option<i64> {
    // Reading the folder opens a descriptor of its own, which is gone afterwards.
    i64::try_from(fs::read_dir("/proc/self/fd").ok()?.count()).ok().map(|count| count - 1)
}

fn max_fds() -> Option<i64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(i64::MAX),
        number => number.parse().ok(),
    }
}

/// Name, help, and what it is of one runtime.
type Gauge = (&'static str, &'static str, fn(&RuntimeMetrics) -> usize);

/// `tokio_*`, from the runtimes' own counters. Their workers are numbered one after another.
#[derive(Debug)]
pub(super) struct Tokio(Vec<RuntimeMetrics>);

impl Tokio {
    pub(super) fn new(runtimes: &[Handle]) -> Self {
        Self(runtimes.iter().map(Handle::metrics).collect())
    }

    fn sum(&self, of: fn(&RuntimeMetrics) -> usize) -> u64 {
        let all: usize = self.0.iter().map(of).sum();
        u64::try_from(all).unwrap_or(u64::MAX)
    }

    fn workers(&self) -> impl Iterator<Item = (&RuntimeMetrics, usize)> {
        let of = |runtime: &RuntimeMetrics| 0..runtime.num_workers();
        self.0.iter().flat_map(move |runtime| of(runtime).map(move |worker| (runtime, worker)))
    }

    fn encode_workers<V: EncodeCounterValue>(
        &self,
        encoder: &mut DescriptorEncoder,
        (name, help): (&str, &str),
        value: impl Fn(&RuntimeMetrics, usize) -> V,
    ) -> Result<(), fmt::Error> {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (number, (runtime, worker)) in self.workers().enumerate() {
            let label = [("worker", number.to_string())];
            counter(&mut family, &label, value(runtime, worker))?;
        }
        Ok(())
    }
}

impl Collector for Tokio {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let gauges: [Gauge; 3] = [
            ("tokio_num_workers", "Worker threads", RuntimeMetrics::num_workers),
            ("tokio_num_alive_tasks", "Tasks that have not ended", RuntimeMetrics::num_alive_tasks),
            (
                "tokio_global_queue_depth",
                "Tasks that wait in the global queue",
                RuntimeMetrics::global_queue_depth,
            ),
        ];
        for (name, help, of) in gauges {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&self.sum(of))?;
        }
        self.encode_workers(
            &mut encoder,
            ("tokio_worker_total_busy_duration_seconds", "Time that a worker was busy"),
            |runtime, worker| runtime.worker_total_busy_duration(worker).as_secs_f64(),
        )?;
        self.encode_workers(
            &mut encoder,
            ("tokio_worker_park_count", "How often a worker parked"),
            RuntimeMetrics::worker_park_count,
        )?;
        self.encode_workers(
            &mut encoder,
            ("tokio_worker_park_unpark_count", "How often a worker parked and unparked"),
            RuntimeMetrics::worker_park_unpark_count,
        )
    }
}

/// `istio_build`: which version this is, as a label of the constant 1.
#[derive(Debug)]
pub(super) struct Build {
    pub(super) tag: String,
}

impl Collector for Build {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let help = "Version of the mesh that this agent was deployed with";
        let mut family = encoder.encode_descriptor("istio_build", help, None, MetricType::Gauge)?;
        // Dashboards look for the component by this name.
        let labels = [("component", "ztunnel"), ("tag", self.tag.as_str())];
        gauge(&mut family, &labels, 1_u64)
    }
}
