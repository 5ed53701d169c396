//! What Culvert is to reach.

use std::fmt;

/// A bound for a measure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub(super) measured_by: By,
    bound: Bound,
}

/// What the bound is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// Culvert's figure divided by that of the plain path.
    Ratio,
    /// The figure itself.
    Value,
}

#[derive(Clone, Copy, Debug)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    pub(super) fn is_met_by(self, value: f64) -> bool {
        match self.bound {
            Bound::AtLeast(least) => value >= least,
            Bound::AtMost(most) => value <= most,
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bound {
            Bound::AtLeast(least) => write!(f, "≥ {least}"),
            Bound::AtMost(most) => write!(f, "≤ {most}"),
        }
    }
}

use Bound::{AtLeast, AtMost};
use By::{Ratio, Value};

/// By path and measure.
const TARGETS: [(&str, &str, By, Bound); 19] = [
    ("same", "throughput-1", Ratio, AtLeast(0.97)),
    ("same", "throughput-8", Ratio, AtLeast(0.97)),
    ("same", "latency-1-p50", Ratio, AtMost(1.03)),
    ("same", "connections-64", Ratio, AtLeast(0.9)),
    ("same", "agent-cpu-per-gb", Value, AtMost(0.0)),
    ("cross", "throughput-1", Ratio, AtLeast(0.35)),
    ("cross", "throughput-8", Ratio, AtLeast(0.35)),
    ("cross", "latency-1-p50", Ratio, AtMost(2.5)),
    ("cross", "paced-p99", Ratio, AtMost(2.0)),
    ("cross", "beside-bulk-p99", Ratio, AtMost(4.0)),
    ("cross", "connections-1", Ratio, AtLeast(0.35)),
    ("cross", "connections-64", Ratio, AtLeast(0.5)),
    ("cross", "agent-cpu-per-10k-requests-64", Value, AtMost(0.27)),
    ("cross", "memory-fresh", Value, AtMost(12.0)),
    ("cross", "memory-idle", Value, AtMost(40.0)),
    ("same", "p99-beside-connections-flood", Ratio, AtMost(1.2)),
    ("same", "p99-beside-bytes-flood", Ratio, AtMost(1.2)),
    ("cross", "p99-beside-connections-flood", Ratio, AtMost(1.2)),
    ("cross", "p99-beside-bytes-flood", Ratio, AtMost(1.2)),
];

/// The target of a measure on a path, if it has one.
pub(super) fn of(path: &str, measure: &str) -> Option<Target> {
    let found = TARGETS.iter().find(|(on, name, ..)| *on == path && *name == measure);
    found.map(|(_, _, measured_by, bound)| Target { measured_by: *measured_by, bound: *bound })
}
