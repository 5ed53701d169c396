//! To come.

use crate::e2e::scenario::Scenario;

pub const SCENARIOS: &[Scenario] = &[];
