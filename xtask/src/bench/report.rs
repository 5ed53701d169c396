//! Medians, ratios and their spread, as a table and as JSON.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// All rounds of one measure on one path.
#[derive(Clone, Debug)]
pub struct Figure {
    pub path: &'static str,
    pub measure: String,
    /// Plain and Culvert, of each round.
    pub rounds: Vec<(f64, f64)>,
    pub unit: &'static str,
}

impl Figure {
    fn plain(&self) -> f64 {
        median(self.rounds.iter().map(|round| round.0))
    }

    fn culvert(&self) -> f64 {
        median(self.rounds.iter().map(|round| round.1))
    }

    fn ratios(&self) -> Vec<f64> {
        let with_plain = self.rounds.iter().filter(|round| round.0 > 0.0);
        with_plain.map(|(plain, culvert)| culvert / plain).collect()
    }

    /// The median of the rounds' ratios; none where the plain path costs nothing.
    fn ratio(&self) -> Option<f64> {
        let ratios = self.ratios();
        (!ratios.is_empty()).then(|| median(ratios.into_iter()))
    }

    /// How far the rounds lie apart: (largest − smallest) / median, of the ratio where there is
    /// one, else of Culvert's own figures.
    fn spread(&self) -> f64 {
        let mut values = self.ratios();
        if values.is_empty() {
            values = self.rounds.iter().map(|round| round.1).collect();
        }
        let smallest = values.iter().copied().fold(f64::INFINITY, f64::min);
        let largest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let middle = median(values.into_iter());
        if middle > 0.0 { (largest - smallest) / middle } else { 0.0 }
    }

    pub fn summary(&self) -> String {
        let ratio = self.ratio().map(|ratio| format!(", ratio {ratio:.2}")).unwrap_or_default();
        let (plain, culvert) = (short(self.plain()), short(self.culvert()));
        format!("plain {plain}, Culvert {culvert} {}{ratio}", self.unit)
    }

    fn json(&self) -> Value {
        json!({
            "path": self.path,
            "measure": self.measure,
            "plain": self.plain(),
            "culvert": self.culvert(),
            "ratio": self.ratio(),
            "spread": self.spread(),
            "unit": self.unit,
        })
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
        let head = ["path", "measure", "plain", "Culvert", "unit", "ratio", "spread"];
        writeln!(
            f,
            "{:<11} {:<30} {:>10} {:>10} {:<7} {:>7} {:>7}",
            head[0], head[1], head[2], head[3], head[4], head[5], head[6]
        )?;
        for figure in &self.0 {
            let ratio = figure.ratio().map_or_else(|| "–".to_owned(), |r| format!("{r:.2}"));
            let spread = format!("{:.0} %", figure.spread() * 100.0);
            writeln!(
                f,
                "{:<11} {:<30} {:>10} {:>10} {:<7} {ratio:>7} {spread:>7}",
                figure.path,
                figure.measure,
                short(figure.plain()),
                short(figure.culvert()),
                figure.unit,
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
