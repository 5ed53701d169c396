//! Every row of `docs/applications.md`, as applications see it: without Culvert, on one node through
//! the agent and through the kernel, and across nodes.
//!
//! `APPLICATIONS=name,name` picks rows.

#![allow(clippy::unwrap_used)]

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use anyhow::Result;

use applications::stage::{Family, Ground, Path, Stage};
use applications::table::{CASES, Case, applies, documented};

mod applications {
    pub mod agents;
    pub mod data;
    pub mod ending;
    pub mod names;
    pub mod opening;
    pub mod stage;
    pub mod table;
    pub mod time;
}

/// Cases that run beside each other: most of them wait most of the time.
const BESIDE: usize = 6;

#[test]
fn every_row_of_the_page_has_a_case_and_every_case_a_row() {
    let cases: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
    assert_eq!(documented(), cases);
}

#[test]
fn plain_path() {
    run(Path::Plain);
}

#[test]
fn same_node() {
    run(Path::Same);
}

#[test]
fn same_node_carried_by_the_kernel() {
    // Packet rules leave nothing to the kernel.
    if !culvert_tests::is_by_rules() {
        run(Path::Direct);
    }
}

#[test]
fn cross_node() {
    run(Path::Cross);
}

fn run(path: Path) {
    let mut ground = Ground::start(path).unwrap();
    let report = Report::new(path);
    let cases = || CASES.iter().filter(|(name, _)| picked(name) && applies(name, path));
    let mut beside = Vec::new();
    for (name, case) in cases() {
        if let Case::Beside(case) = case {
            beside.extend([Family::V4, Family::V6].map(|family| (*name, family, *case)));
        }
    }
    // The longest waits come first.
    let queue = Mutex::new(beside.into_iter());
    std::thread::scope(|scope| {
        for _ in 0..BESIDE {
            scope.spawn(|| {
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                while let Some((name, family, case)) = next() {
                    let stage = Stage { ground: &ground, family };
                    report.note(&format!("{name} {family:?}"), || case(&stage));
                }
            });
        }
    });
    for (name, case) in cases() {
        if let Case::Alone(case) = case {
            for stage in ground.stages() {
                report.note(&format!("{name} {:?}", stage.family), || case(&stage));
            }
        }
    }
    for (name, case) in cases() {
        if let Case::Changing(case) = case {
            report.note(name, || {
                ground.start_missing_agents()?;
                case(&mut ground)
            });
        }
    }
    report.finish();
}

fn picked(name: &str) -> bool {
    std::env::var("APPLICATIONS").map_or(true, |list| list.split(',').any(|one| one == name))
}

struct Report {
    path: Path,
    failures: Mutex<Vec<String>>,
}

impl Report {
    fn new(path: Path) -> Self {
        Self { path, failures: Mutex::default() }
    }

    fn note(&self, name: &str, case: impl FnOnce() -> Result<()>) {
        let start = Instant::now();
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(case));
        let result = result.unwrap_or_else(|_| Err(anyhow::anyhow!("panicked")));
        let (path, took) = (self.path, start.elapsed().as_secs_f64());
        let Err(error) = result else {
            return eprintln!("ok      {path:?} {name} ({took:.1} s)");
        };
        let text = format!("FAILED  {path:?} {name} ({took:.1} s): {error:#}");
        eprintln!("{text}");
        self.failures.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    fn finish(self) {
        let failures = self.failures.into_inner().unwrap_or_else(PoisonError::into_inner);
        assert!(failures.is_empty(), "{} rows fail:\n{}", failures.len(), failures.join("\n"));
    }
}
