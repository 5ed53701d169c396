//! What this machine's kernel can do, and how connections behave that it accelerates.
//!
//! Acceleration changes what applications see, and on a kernel that does it wrongly it would lose
//! what they send. So it is tried first, on namespaces that are made for it, by a process of its own:
//! what goes wrong there harms nobody, and ends when its time is over.

mod bytes;
mod endings;
mod manners;
mod stage;
mod supervise;
mod wakeups;

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::capture::{self, Acceleration, CaptureError};

pub use stage::{Place, StageError};
pub use supervise::{DoctorError, examine};
pub(crate) use supervise::{answer, sweep};

use stage::Stage;

/// How long a case may take before it counts as failed: something did not arrive.
const CASE_LIMIT: Duration = Duration::from_secs(25);

/// What was found out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Version of the kernel.
    pub kernel: String,
    pub facts: Vec<Fact>,
    /// Empty where nothing can be accelerated.
    pub cases: Vec<Case>,
    /// Why there are none.
    pub lacking: Option<String>,
}

/// What the kernel has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    pub name: String,
    /// The first Linux that has it, or what else it takes.
    pub needs: String,
    pub supported: bool,
}

/// How one thing went with an accelerated connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Case {
    pub name: String,
    /// What ought to be.
    pub expected: String,
    pub result: Outcome,
    /// What was instead.
    pub seen: Option<String>,
    pub milliseconds: u64,
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As with TCP.
    Passed,
    /// Nothing is lost, but an application may notice.
    Differs,
    /// Bytes, a wake-up or a bound are lost.
    Failed,
}

impl Report {
    /// Whether connections may be accelerated here.
    pub fn qualifies(&self) -> bool {
        !self.cases.is_empty() && self.cases.iter().all(|case| case.result != Outcome::Failed)
    }

    /// The cases that ended so.
    pub fn those(&self, result: Outcome) -> impl Iterator<Item = &Case> {
        self.cases.iter().filter(move |case| case.result == result)
    }
}

/// What a case saw.
pub(crate) enum Seen {
    AsWithTcp,
    /// An application may notice this.
    Otherwise(String),
}

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    #[error("{0}")]
    Lost(String),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

pub(crate) type Tried = Result<Seen, Fault>;

/// One case: its name, what ought to be, and how it is tried.
#[derive(Clone, Copy)]
pub(crate) struct Trial {
    name: &'static str,
    expected: &'static str,
    run: fn(&Stage) -> Tried,
}

/// Looks at the kernel, and tries everything. It blocks, and belongs into a process of its own.
pub(crate) fn run(place: &Place) -> Result<Report, StageError> {
    let (kernel, facts) = (capture::release(), facts());
    let acceleration = match Acceleration::find() {
        Ok(acceleration) => acceleration,
        Err(error) => {
            let lacking = Some(error.to_string());
            return Ok(Report { kernel, facts, lacking, cases: Vec::new() });
        }
    };
    let stage = Arc::new(Stage::set(place, acceleration)?);
    let trials = [bytes::TRIALS, wakeups::TRIALS, endings::TRIALS, manners::TRIALS].concat();
    let cases = trials.into_iter().map(|trial| attempt(&stage, trial)).collect();
    Ok(Report { kernel, facts, cases, lacking: None })
}

/// A case that does not end is left behind, and ends with the process.
fn attempt(stage: &Arc<Stage>, trial: Trial) -> Case {
    let began = Instant::now();
    let (tell, told) = sync_channel(1);
    let on = stage.clone();
    thread::spawn(move || {
        // Nobody waits any more for what comes too late.
        let _ = tell.send((trial.run)(&on));
    });
    let (result, seen) = match told.recv_timeout(CASE_LIMIT) {
        Ok(Ok(Seen::AsWithTcp)) => (Outcome::Passed, None),
        Ok(Ok(Seen::Otherwise(seen))) => (Outcome::Differs, Some(seen)),
        Ok(Err(fault)) => (Outcome::Failed, Some(fault.to_string())),
        Err(RecvTimeoutError::Timeout) => {
            (Outcome::Failed, Some(format!("did not end within {} s", CASE_LIMIT.as_secs())))
        }
        Err(RecvTimeoutError::Disconnected) => (Outcome::Failed, Some("panicked".to_owned())),
    };
    let milliseconds = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (name, expected) = (trial.name.to_owned(), trial.expected.to_owned());
    Case { name, expected, result, seen, milliseconds }
}

/// What the kernel has, by asking it; nothing where it does not answer.
fn facts() -> Vec<Fact> {
    let features = capture::features().unwrap_or_default();
    let mut facts: Vec<Fact> = features
        .into_iter()
        .map(|feature| Fact {
            name: feature.name.to_owned(),
            needs: feature.needs.to_owned(),
            supported: feature.supported,
        })
        .collect();
    let destroys = capture::can_destroy_sockets().unwrap_or(false);
    facts.push(Fact {
        name: "ending connections (SOCK_DESTROY)".to_owned(),
        needs: "4.5 with CONFIG_INET_DIAG_DESTROY".to_owned(),
        supported: destroys,
    });
    facts.push(Fact {
        name: "acceleration (sk_msg, types of the kernel)".to_owned(),
        needs: "5.8 with CONFIG_DEBUG_INFO_BTF".to_owned(),
        supported: Acceleration::find().is_ok(),
    });
    facts
}

#[cfg(test)]
mod tests;
