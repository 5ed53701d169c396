//! Metrics of the process and its runtime, read when asked for.

use std::fmt;
use std::fs;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
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

/// `tokio_*`, from the runtime's own counters.
#[derive(Debug)]
pub(super) struct Tokio(RuntimeMetrics);

impl Tokio {
    pub(super) fn new(runtime: &Handle) -> Self {
        Self(runtime.metrics())
    }
}

impl Collector for Tokio {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Self(metrics) = self;
        for (name, help, value) in [
            ("tokio_num_workers", "Worker threads", metrics.num_workers()),
            ("tokio_num_alive_tasks", "Tasks that have not ended", metrics.num_alive_tasks()),
            (
                "tokio_global_queue_depth",
                "Tasks that wait in the global queue",
                metrics.global_queue_depth(),
            ),
        ] {
            let value = u64::try_from(value).unwrap_or(u64::MAX);
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            family.encode_gauge(&value)?;
        }
        let workers = 0..metrics.num_workers();
        let label = |worker: usize| [("worker", worker.to_string())];
        let mut family = encoder.encode_descriptor(
            "tokio_worker_total_busy_duration_seconds",
            "Time that a worker was busy",
            None,
            MetricType::Counter,
        )?;
        for worker in workers.clone() {
            let seconds = metrics.worker_total_busy_duration(worker).as_secs_f64();
            counter(&mut family, &label(worker), seconds)?;
        }
        let mut family = encoder.encode_descriptor(
            "tokio_worker_park_count",
            "How often a worker parked",
            None,
            MetricType::Counter,
        )?;
        for worker in workers.clone() {
            counter(&mut family, &label(worker), metrics.worker_park_count(worker))?;
        }
        let mut family = encoder.encode_descriptor(
            "tokio_worker_park_unpark_count",
            "How often a worker parked and unparked",
            None,
            MetricType::Counter,
        )?;
        for worker in workers {
            counter(&mut family, &label(worker), metrics.worker_park_unpark_count(worker))?;
        }
        Ok(())
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
