//! What is measured, and how rounds become figures.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_lab::{sys, wait};

use super::field::{Field, Path, Side};
use super::load::Outcome;
use super::report::Figure;

/// One way of putting load on a path; each gives several measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bulk(usize),
    Requests(usize),
    Connections(usize),
    Idle,
}

impl Kind {
    pub fn all() -> Vec<Self> {
        vec![
            Self::Bulk(1),
            Self::Bulk(8),
            Self::Requests(1),
            Self::Requests(64),
            Self::Connections(1),
            Self::Connections(64),
            Self::Idle,
        ]
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Bulk(1) => "throughput of 1 stream",
            Self::Bulk(_) => "throughput of 8 streams",
            Self::Requests(1) => "latency on 1 connection",
            Self::Requests(_) => "latency on 64 connections",
            Self::Connections(1) => "connections, 1 at a time",
            Self::Connections(_) => "connections, 64 at a time",
            Self::Idle => "memory of idle connections",
        }
    }

    /// The names of what it measures.
    pub fn measures(self) -> Vec<String> {
        let sample = Sample { outcome: Outcome::default(), machine: 0.0, agents: 0.0 };
        match self {
            Self::Idle => [IDLE, FRESH, HOLDING].map(str::to_owned).into(),
            _ => self.figures(&sample).into_iter().map(|(name, ..)| name).collect(),
        }
    }

    fn arguments(self) -> (&'static str, usize) {
        match self {
            Self::Bulk(count) => ("bulk", count),
            Self::Requests(count) => ("requests", count),
            Self::Connections(count) => ("connections", count),
            Self::Idle => ("idle", 0),
        }
    }

    /// Name, value and unit of each figure of one measurement.
    fn figures(self, sample: &Sample) -> Vec<(String, f64, &'static str)> {
        let Sample { outcome, machine, agents } = sample;
        let gigabytes = outcome.bytes as f64 / 1e9;
        let rate = outcome.count as f64 / outcome.seconds;
        let ten_thousands = outcome.count as f64 / 1e4;
        match self {
            Self::Bulk(1) => vec![
                ("throughput-1".to_owned(), gigabytes * 8.0 / outcome.seconds, "Gbit/s"),
                ("cpu-per-gb".to_owned(), machine / gigabytes, "s"),
                ("agent-cpu-per-gb".to_owned(), agents / gigabytes, "s"),
            ],
            Self::Bulk(count) => {
                vec![(format!("throughput-{count}"), gigabytes * 8.0 / outcome.seconds, "Gbit/s")]
            }
            Self::Requests(count) => vec![
                (format!("latency-{count}-p50"), outcome.p50 * 1e6, "µs"),
                (format!("latency-{count}-p99"), outcome.p99 * 1e6, "µs"),
                (format!("latency-{count}-p999"), outcome.p999 * 1e6, "µs"),
                (format!("requests-{count}"), rate, "1/s"),
                (format!("cpu-per-10k-requests-{count}"), machine / ten_thousands, "s"),
                (format!("agent-cpu-per-10k-requests-{count}"), agents / ten_thousands, "s"),
            ],
            Self::Connections(count) => vec![
                (format!("connections-{count}"), rate, "1/s"),
                (format!("cpu-per-10k-connections-{count}"), machine / ten_thousands, "s"),
                (format!("agent-cpu-per-10k-connections-{count}"), agents / ten_thousands, "s"),
            ],
            Self::Idle => Vec::new(),
        }
    }
}

/// How much the agents of a path grow together.
const IDLE: &str = "memory-per-10k-idle";
/// What one agent holds before anybody connects, and with idle connections: the larger of two.
const FRESH: &str = "memory-fresh";
const HOLDING: &str = "memory-idle";

/// One measurement, with the processor seconds it took.
struct Sample {
    outcome: Outcome,
    machine: f64,
    agents: f64,
}

/// Measures both sides in turn, round after round.
pub fn alternate(
    field: &mut Field,
    path: Path,
    kind: Kind,
    rounds: usize,
    seconds: f64,
) -> Result<Vec<Figure>> {
    let mut figures: Vec<Figure> = Vec::new();
    for _ in 0..rounds {
        let plain = kind.figures(&sample(field, path, Side::Plain, kind, seconds)?);
        let culvert = kind.figures(&sample(field, path, Side::Culvert, kind, seconds)?);
        for ((measure, plain, unit), (_, culvert, _)) in plain.into_iter().zip(culvert) {
            match figures.iter_mut().find(|figure| figure.measure == measure) {
                Some(figure) => figure.rounds.push((plain, culvert)),
                None => figures.push(Figure {
                    path: path.name(),
                    measure,
                    rounds: vec![(plain, culvert)],
                    unit,
                }),
            }
        }
    }
    Ok(figures)
}

fn sample(field: &Field, path: Path, side: Side, kind: Kind, seconds: f64) -> Result<Sample> {
    let (load, count) = kind.arguments();
    let (count, seconds) = (count.to_string(), seconds.to_string());
    let arguments = ["--kind", load, "--connections", &count, "--seconds", &seconds];
    let pids = if side == Side::Plain { Vec::new() } else { field.agents(path) };
    let before = (machine_seconds()?, agent_seconds(&pids)?);
    let outcome = field.load(path, side, &arguments)?;
    let after = (machine_seconds()?, agent_seconds(&pids)?);
    Ok(Sample { outcome, machine: after.0 - before.0, agents: after.1 - before.1 })
}

/// How much the agents grow by connections that do nothing, once they have settled.
pub fn idle(field: &mut Field, path: Path, count: usize) -> Result<Vec<Figure>> {
    let pids = field.agents(path);
    let before = resident(&pids)?;
    let held = field.hold(path, Side::Culvert, count)?;
    let mut last = 0.0;
    wait::until("the agents' memory to settle", Duration::from_secs(20), || {
        let now = resident(&pids).unwrap_or_default();
        let settled = (now - last).abs() < 0.1;
        last = now;
        settled
    })?;
    let largest = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
    let each = pids.iter().map(|pid| resident(&[*pid])).collect::<Result<Vec<_>>>()?;
    drop(held);
    let grown = (last - before).max(0.0) * 1e4 / count as f64;
    let fresh = field.fresh.get(..pids.len()).unwrap_or_default();
    let figures = [(IDLE, grown), (FRESH, largest(fresh)), (HOLDING, largest(&each))];
    let figures = figures.map(|(measure, value)| Figure {
        path: path.name(),
        measure: measure.to_owned(),
        rounds: vec![(0.0, value)],
        unit: "MB",
    });
    Ok(figures.into())
}

/// Processor seconds of the whole machine, idling left out.
fn machine_seconds() -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let fields: Vec<f64> = text
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|field| field.parse().ok())
        .collect();
    // user, nice, system, then idle and iowait, then irq and softirq.
    let busy: f64 = [0, 1, 2, 5, 6].iter().filter_map(|index| fields.get(*index)).sum();
    Ok(busy / sys::ticks_per_second())
}

fn agent_seconds(pids: &[u32]) -> Result<f64> {
    let mut total = 0.0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let after_name = text.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let times = after_name.split(' ').skip(11).take(2);
        total += times.filter_map(|time| time.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(total / sys::ticks_per_second())
}

/// Resident memory of the processes together, in megabytes.
pub fn resident(pids: &[u32]) -> Result<f64> {
    let mut total = 0.0;
    for pid in pids {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kilobytes = line.and_then(|line| line.trim().split(' ').next()?.parse::<f64>().ok());
        total += kilobytes.with_context(|| format!("no VmRSS in {path}"))? * 1024.0 / 1e6;
    }
    Ok(total)
}
