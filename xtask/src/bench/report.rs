//! Medians, ratios and their spread, as a table and as JSON.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::field::Side;

mod targets;

/// What the sides showed in one round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Round {
    plain: Option<f64>,
    culvert: Option<f64>,
    peer: Option<f64>,
}

impl Round {
    pub fn set(&mut self, side: Side, value: f64) {
        let place = match side {
            Side::Plain => &mut self.plain,
            Side::Culvert => &mut self.culvert,
            Side::Peer => &mut self.peer,
        };
        *place = Some(value);
    }

    fn get(&self, side: Side) -> Option<f64> {
        match side {
            Side::Plain => self.plain,
            Side::Culvert => self.culvert,
            Side::Peer => self.peer,
        }
    }
}

/// All rounds of one measure on one path.
#[derive(Clone, Debug)]
pub struct Figure {
    pub path: &'static str,
    pub measure: String,
    pub rounds: Vec<Round>,
    pub unit: &'static str,
}

impl Figure {
    fn median(&self, side: Side) -> Option<f64> {
        let values: Vec<f64> = self.rounds.iter().filter_map(|round| round.get(side)).collect();
        (!values.is_empty()).then(|| median(values.into_iter()))
    }

    fn ratios(&self, side: Side) -> Vec<f64> {
        let ratio = |round: &Round| {
            let plain = round.plain.filter(|plain| *plain > 0.0)?;
            Some(round.get(side)? / plain)
        };
        self.rounds.iter().filter_map(ratio).collect()
    }

    /// The median of the rounds' ratios; none where the plain path costs nothing.
    fn ratio(&self, side: Side) -> Option<f64> {
        let ratios = self.ratios(side);
        (!ratios.is_empty()).then(|| median(ratios.into_iter()))
    }

    /// How far the rounds lie apart: (largest − smallest) / median, of the ratio where there is
    /// one, else of Culvert's own figures.
    fn spread(&self) -> f64 {
        let mut values = self.ratios(Side::Culvert);
        if values.is_empty() {
            values = self.rounds.iter().filter_map(|round| round.culvert).collect();
        }
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let middle = median(values.into_iter());
        if middle > 0.0 { (largest - smallest) / middle } else { 0.0 }
    }

    /// What is to be reached, and whether it is.
    fn goal(&self) -> Option<(String, bool)> {
        let goal = targets::of(self.path, &self.measure)?;
        let reached = match goal.measured_by {
            targets::By::Ratio => self.ratio(Side::Culvert),
            targets::By::Value => self.median(Side::Culvert),
        };
        Some((goal.to_string(), reached.is_some_and(|value| goal.is_met_by(value))))
    }

    pub fn summary(&self) -> String {
        let told = |side| self.median(side).map_or_else(|| "–".to_owned(), short);
        let ratio = |side| {
            let ratio = self.ratio(side).map(|ratio| format!(" ({ratio:.2})"));
            ratio.unwrap_or_default()
        };
        let (plain, culvert) = (told(Side::Plain), told(Side::Culvert));
        let unit = self.unit;
        let peer = match self.median(Side::Peer) {
            Some(peer) => format!(", ztunnel {} {unit}{}", short(peer), ratio(Side::Peer)),
            None => String::new(),
        };
        format!("plain {plain}, Culvert {culvert} {unit}{}{peer}", ratio(Side::Culvert))
    }

    fn json(&self) -> Value {
        let mut told = json!({
            "path": self.path,
            "measure": self.measure,
            "plain": self.median(Side::Plain),
            "culvert": self.median(Side::Culvert),
            "ratio": self.ratio(Side::Culvert),
            "spread": self.spread(),
            "unit": self.unit,
            "target": self.goal().map(|(goal, _)| goal),
            "reached": self.goal().map(|(_, reached)| reached),
        });
        if let Some(peer) = self.median(Side::Peer) {
            told["ztunnel"] = json!(peer);
            told["ztunnel_ratio"] = json!(self.ratio(Side::Peer));
        }
        told
    }
}

/// All figures of a run.
#[derive(Debug, Default)]
pub struct Report(Vec<Figure>);

impl Report {
    pub fn extend(&mut self, figures: Vec<Figure>) {
        self.0.extend(figures);
    }

    /// Keeps the measures whose names begin with one of `only`, or all when there is none.
    pub fn retain(&mut self, only: &[String]) {
        self.0.retain(|figure| {
            only.is_empty() || only.iter().any(|only| figure.measure.starts_with(only.as_str()))
        });
    }

    /// Writes the list of all figures.
    pub fn write(&self, file: &Path) -> Result<()> {
        let list: Vec<Value> = self.0.iter().map(Figure::json).collect();
        let text = serde_json::to_string_pretty(&list)? + "\n";
        std::fs::write(file, text).with_context(|| format!("writing {}", file.display()))
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let has_peer = self.0.iter().any(|figure| figure.median(Side::Peer).is_some());
        let row = |f: &mut fmt::Formatter<'_>, cells: [&str; 7], peer: [&str; 2], goal: &str| {
            let [path, measure, plain, culvert, unit, ratio, spread] = cells;
            write!(
                f,
                "{path:<11} {measure:<32} {plain:>10} {culvert:>10} {unit:<8} {ratio:>6} \
                 {spread:>7}  "
            )?;
            if has_peer {
                let [value, ratio] = peer;
                write!(f, "{value:>10} {ratio:>6}  ")?;
            }
            writeln!(f, "{goal}")
        };
        let cells = ["path", "measure", "plain", "Culvert", "unit", "ratio", "spread"];
        row(f, cells, ["ztunnel", "ratio"], "to reach")?;
        for figure in &self.0 {
            let told = |side| figure.median(side).map_or_else(|| "–".to_owned(), short);
            let ratio = |side| {
                figure.ratio(side).map_or_else(|| "–".to_owned(), |ratio| format!("{ratio:.2}"))
            };
            let goal = figure
                .goal()
                .map(|(goal, reached)| format!("{goal} {}", if reached { "✔" } else { "✘" }));
            let spread = format!("{:.0} %", figure.spread() * 100.0);
            row(
                f,
                [
                    figure.path,
                    &figure.measure,
                    &told(Side::Plain),
                    &told(Side::Culvert),
                    figure.unit,
                    &ratio(Side::Culvert),
                    &spread,
                ],
                [&told(Side::Peer), &ratio(Side::Peer)],
                goal.as_deref().unwrap_or_default(),
            )?;
        }
        Ok(())
    }
}

/// Three significant digits or so.
fn short(value: f64) -> String {
    match value.abs() {
        0.0 => "–".to_owned(),
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 1.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

pub fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    let (half, even) = (sorted.len() / 2, sorted.len().is_multiple_of(2));
    let upper = sorted.get(half).copied().unwrap_or_default();
    match half.checked_sub(1).and_then(|below| sorted.get(below)) {
        Some(lower) if even => (lower + upper) / 2.0,
        _ => upper,
    }
}

#[cfg(test)]
mod tests;
