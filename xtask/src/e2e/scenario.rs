//! What a scenario is, and what can come of it.

use anyhow::Result;

use super::town::Town;

/// One thing that must hold on a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Scenario {
    /// `subject/what`.
    pub name: &'static str,
    /// What it shows, in a sentence.
    pub covers: &'static str,
    pub run: fn(&Town) -> Result<Verdict>,
}

/// What came of a scenario that did not fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All was as it should be.
    Passed(String),
    /// Only ztunnel fell short, in a way that is known of it.
    Known(String),
    /// It could not be tried here.
    Skipped(String),
}

impl Verdict {
    pub fn passed(note: impl Into<String>) -> Result<Self> {
        Ok(Self::Passed(note.into()))
    }

    pub fn skipped(why: impl Into<String>) -> Result<Self> {
        Ok(Self::Skipped(why.into()))
    }
}
