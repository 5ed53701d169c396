//! Loads that pods run while something happens, and what they lost.

use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::talk::{self, Call};
use super::town::{Pod, Town};

/// A loss, and when.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Loss {
    pub at_ms: u64,
    pub kind: String,
    pub error: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Calls {
    pub made: u64,
    pub ok: u64,
    pub losses: Vec<Loss>,
    pub servers: Map<String, Value>,
    pub longest_gap_ms: u64,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Streams {
    pub opened: u64,
    pub alive: u64,
    pub lines: u64,
    pub losses: Vec<Loss>,
    pub longest_silence_ms: u64,
}

/// What a load has done so far.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Report {
    pub for_ms: u64,
    pub calls: Calls,
    pub streams: Streams,
}

impl Report {
    pub fn lost_calls(&self) -> u64 {
        self.calls.made - self.calls.ok
    }

    pub fn lost_streams(&self) -> u64 {
        self.streams.opened - self.streams.alive
    }

    /// Both together.
    pub fn lost(&self) -> u64 {
        self.lost_calls() + self.lost_streams()
    }

    /// The first losses as the rest of a sentence, if there were any.
    pub fn tell_losses(&self) -> Option<String> {
        (self.lost() > 0).then(|| format!(": {}", self.first_losses()))
    }

    /// The first losses, for people.
    pub fn first_losses(&self) -> String {
        let tell = |what: &str, losses: &[Loss]| {
            let told = losses.iter().take(3).map(move |loss| {
                format!("{what} at {} ms: {} ({})", loss.at_ms, loss.kind, loss.error)
            });
            told.collect::<Vec<_>>()
        };
        [tell("call", &self.calls.losses), tell("stream", &self.streams.losses)].concat().join("; ")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} calls lost", self.lost_calls(), self.calls.made)?;
        if self.streams.opened > 0 {
            write!(f, ", {} of {} streams", self.lost_streams(), self.streams.opened)?;
        }
        write!(f, ", longest gap {} ms", self.calls.longest_gap_ms)
    }
}

/// A load under way; dropped, it goes on until its pod ends.
#[derive(Debug)]
pub struct Load<'t> {
    town: &'t Town,
    pod: Pod,
    id: String,
}

/// How much a load does.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Calls to this `host:port` over HTTP, so many a second.
    pub calls: Option<(String, f64)>,
    /// So many streams to this `host:port`, where a server speaks first.
    pub streams: Option<(String, usize)>,
}

impl<'t> Load<'t> {
    /// Begins, with all its streams open.
    pub fn start(town: &'t Town, pod: &Pod, plan: &Plan) -> Result<Self> {
        let mut order = json!({});
        if let Some((to, per_second)) = &plan.calls {
            order["calls"] = Call::http(to).plan().clone();
            order["calls"]["per_second"] = (*per_second).into();
        }
        if let Some((to, count)) = &plan.streams {
            order["streams"] = json!({ "to": to, "count": count, "pause_ms": 100 });
        }
        let id = town.unique("load");
        let load = Self { town, pod: pod.clone(), id };
        load.order(json!({ "do": "start", "plan": order })).context("starting a load")?;
        Ok(load)
    }

    /// How it stands.
    pub fn report(&self) -> Result<Report> {
        self.order(json!({ "do": "report" }))
    }

    /// Ends it.
    pub fn stop(self) -> Result<Report> {
        let report = self.order(json!({ "do": "stop" }))?;
        ensure!(report.calls.made > 0 || report.streams.opened > 0, "the load did nothing");
        Ok(report)
    }

    /// Goes on until `count` more calls have been made.
    pub fn further_calls(&self, count: u64) -> Result<Report> {
        let before = self.report()?;
        self.town.until("the load to go on", || {
            let now = self.report()?;
            ensure!(now.calls.made >= before.calls.made + count, "{} calls made", now.calls.made);
            Ok(now)
        })
    }

    fn order(&self, mut order: Value) -> Result<Report> {
        order["id"] = self.id.as_str().into();
        let report = talk::load(&self.town.kubectl, &self.pod.namespace, &self.pod.name, &order)?;
        serde_json::from_value(report).context("reading the report of a load")
    }
}
