//! What is measured, and how rounds become figures.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};
use culvert_lab::{sys, wait};

use super::field::{Field, Path, Side};
use super::load::Outcome;
use super::report::{Figure, Round};

/// One way of putting load on a path; each gives several measures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Bulk(usize),
    Requests(usize),
    /// Requests at a fixed pace.
    Paced,
    /// The same beside a stream of a fixed rate.
    Beside,
    Connections(usize),
    /// Requests at a fixed pace while another pod of the node floods its own destination.
    Fairness(Flood),
    Idle,
}

/// What another pod does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flood {
    Connections,
    Bytes,
}

impl Kind {
    pub fn all() -> Vec<Self> {
        vec![
            Self::Bulk(1),
            Self::Bulk(8),
            Self::Requests(1),
            Self::Requests(64),
            Self::Paced,
            Self::Beside,
            Self::Connections(1),
            Self::Connections(64),
            Self::Fairness(Flood::Connections),
            Self::Fairness(Flood::Bytes),
            Self::Idle,
        ]
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Bulk(1) => "throughput of 1 stream",
            Self::Bulk(_) => "throughput of 8 streams",
            Self::Requests(1) => "latency on 1 connection",
            Self::Requests(_) => "latency on 64 connections",
            Self::Paced => "latency at 2,000 requests/s",
            Self::Beside => "latency at 1,000 requests/s beside 2 Gbit/s",
            Self::Fairness(Flood::Connections) => "latency while another pod floods connections",
            Self::Fairness(Flood::Bytes) => "latency while another pod floods bytes",
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
            Self::Fairness(flood) => vec![flood.measure().to_owned()],
            _ => self.figures(&sample).into_iter().map(|(name, ..)| name).collect(),
        }
    }

    /// The load, without its duration.
    fn arguments(self) -> Vec<String> {
        let (kind, count, more): (_, usize, &[&str]) = match self {
            Self::Bulk(count) => ("bulk", count, &[]),
            Self::Requests(count) => ("requests", count, &[]),
            Self::Connections(count) => ("connections", count, &[]),
            Self::Paced => ("paced", 8, &["--rate", "2000"]),
            Self::Beside => ("paced", 8, &["--rate", "1000", "--beside", "2"]),
            Self::Fairness(_) => ("paced", 8, &["--rate", "1000"]),
            Self::Idle => ("idle", 0, &[]),
        };
        let count = count.to_string();
        let arguments = ["--kind", kind, "--connections", &count];
        arguments.iter().chain(more).map(|argument| (*argument).to_owned()).collect()
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
            Self::Paced => paced("paced", outcome),
            Self::Beside => paced("beside-bulk", outcome),
            Self::Connections(count) => vec![
                (format!("connections-{count}"), rate, "1/s"),
                (format!("cpu-per-10k-connections-{count}"), machine / ten_thousands, "s"),
                (format!("agent-cpu-per-10k-connections-{count}"), agents / ten_thousands, "s"),
            ],
            Self::Fairness(_) | Self::Idle => Vec::new(),
        }
    }
}

impl Flood {
    fn measure(self) -> &'static str {
        match self {
            Self::Connections => "p99-beside-connections-flood",
            Self::Bytes => "p99-beside-bytes-flood",
        }
    }

    fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Connections => ["--kind", "connections", "--connections", "32"],
            Self::Bytes => ["--kind", "bulk", "--connections", "4"],
        }
    }
}

fn paced(name: &str, outcome: &Outcome) -> Vec<(String, f64, &'static str)> {
    [("p50", outcome.p50), ("p99", outcome.p99), ("p999", outcome.p999)]
        .map(|(part, value)| (format!("{name}-{part}"), value * 1e6, "µs"))
        .to_vec()
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

/// Measures all sides in turn, round after round.
pub fn alternate(
    field: &mut Field,
    path: Path,
    kind: Kind,
    rounds: usize,
    seconds: f64,
) -> Result<Vec<Figure>> {
    let mut figures: Vec<Figure> = Vec::new();
    for _ in 0..rounds {
        let mut round: Vec<(String, Round, &'static str)> = Vec::new();
        for side in field.sides(path).iter().copied() {
            for (measure, value, unit) in sample_of(field, path, side, kind, seconds)? {
                match round.iter_mut().find(|(name, ..)| *name == measure) {
                    Some((_, values, _)) => values.set(side, value),
                    None => {
                        let mut values = Round::default();
                        values.set(side, value);
                        round.push((measure, values, unit));
                    }
                }
            }
        }
        for (measure, values, unit) in round {
            match figures.iter_mut().find(|figure| figure.measure == measure) {
                Some(figure) => figure.rounds.push(values),
                None => {
                    let (path, rounds) = (path.name(), vec![values]);
                    figures.push(Figure { path, measure, rounds, unit });
                }
            }
        }
    }
    Ok(figures)
}

fn sample_of(
    field: &Field,
    path: Path,
    side: Side,
    kind: Kind,
    seconds: f64,
) -> Result<Vec<(String, f64, &'static str)>> {
    match kind {
        Kind::Fairness(flood) => {
            let value = flooded(field, path, side, flood, seconds)?;
            Ok(vec![(flood.measure().to_owned(), value, "× quiet")])
        }
        _ => Ok(kind.figures(&sample(field, path, side, kind, seconds)?)),
    }
}

fn sample(field: &Field, path: Path, side: Side, kind: Kind, seconds: f64) -> Result<Sample> {
    let seconds = seconds.to_string();
    let arguments = kind.arguments();
    let mut arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    arguments.extend(["--seconds", &seconds]);
    let pids = field.agents(path, side);
    let before = (machine_seconds()?, agent_seconds(&pids)?);
    let outcome = field.load(path, side, &arguments)?;
    let after = (machine_seconds()?, agent_seconds(&pids)?);
    Ok(Sample { outcome, machine: after.0 - before.0, agents: after.1 - before.1 })
}

/// How many times its p99 of quiet a pod has while another one of its node floods.
fn flooded(field: &Field, path: Path, side: Side, flood: Flood, seconds: f64) -> Result<f64> {
    let quiet = sample(field, path, side, Kind::Fairness(flood), seconds)?.outcome.p99;
    // Longer than what it is to disturb.
    let flooding = (seconds + 2.0).to_string();
    let mut arguments = flood.arguments().to_vec();
    arguments.extend(["--seconds", &flooding]);
    let other = field.flood(path, side, &arguments)?;
    let loud = sample(field, path, side, Kind::Fairness(flood), seconds)?.outcome.p99;
    other.wait()?;
    Ok(loud / quiet)
}

/// What agents hold, and how much they grow by connections that do nothing.
pub fn idle(field: &mut Field, path: Path, count: usize) -> Result<Vec<Figure>> {
    let mut rounds = [Round::default(); 3];
    for side in field.sides(path).iter().copied().filter(|side| *side != Side::Plain) {
        for (round, value) in rounds.iter_mut().zip(holding(field, path, side, count)?) {
            round.set(side, value);
        }
    }
    let figures = [IDLE, FRESH, HOLDING].into_iter().zip(rounds);
    let figure = |(measure, round): (&str, _)| {
        let (path, measure) = (path.name(), measure.to_owned());
        Figure { path, measure, rounds: vec![round], unit: "MB" }
    };
    Ok(figures.map(figure).collect())
}

/// The same of one side's agents, once they have settled: together for 10,000 connections; of the
/// largest when fresh, and with the connections.
fn holding(field: &Field, path: Path, side: Side, count: usize) -> Result<[f64; 3]> {
    let pids = field.agents(path, side);
    let before = resident(&pids)?;
    let held = field.hold(path, side, count)?;
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
    let fresh = field.fresh(side).get(..pids.len()).unwrap_or_default();
    Ok([grown, largest(fresh), largest(&each)])
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
        let kilobytes = kilobytes.with_context(|| format!("no VmRSS in {path}"))?;
        total += kilobytes * 1024.0 / 1e6;
    }
    Ok(total)
}
