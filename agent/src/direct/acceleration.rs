//! Whether connections between pods that are named for it are accelerated.

use std::fmt;
use std::path::Path;

use culvert_core::view::Chosen;

use super::Direct;
use crate::capture::{CaptureError, Redirection};
use crate::doctor::{self, DoctorError, Outcome, Report};

/// Where acceleration stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Standing {
    /// Nobody is named for it.
    #[default]
    Unasked,
    /// The machine is being tried.
    Trying,
    /// On; in these cases applications notice.
    On { differs: Vec<String> },
    /// Off, because of this.
    Off(String),
}

impl Standing {
    pub(super) fn at_first(named: &Chosen, capture: &Redirection) -> Standing {
        match (named == &Chosen::default(), capture.direct()) {
            (false, Some(kernel)) if kernel.accelerates() => Standing::Trying,
            (false, _) => Standing::Off("the kernel cannot".to_owned()),
            (true, _) => Standing::Unasked,
        }
    }

    /// `None` where nobody has asked.
    pub fn qualifies(&self) -> Option<bool> {
        match self {
            Standing::Unasked => None,
            Standing::On { .. } => Some(true),
            Standing::Trying | Standing::Off(_) => Some(false),
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Standing::Unasked => f.write_str("not asked for"),
            Standing::Trying => f.write_str("the machine is being tried"),
            Standing::On { differs } if differs.is_empty() => f.write_str("on"),
            Standing::On { differs } => write!(f, "on; differs: {}", differs.join(", ")),
            Standing::Off(because) => write!(f, "off: {because}"),
        }
    }
}

/// Why nothing is accelerated.
#[derive(Debug, thiserror::Error)]
enum NoAcceleration {
    #[error(transparent)]
    Doctor(#[from] DoctorError),
    #[error("this machine fails: {}", failures(.0))]
    Fails(Report),
    #[error(transparent)]
    Capture(#[from] CaptureError),
}

fn failures(report: &Report) -> String {
    let failed = report.those(Outcome::Failed).map(|case| {
        let seen = case.seen.as_deref().unwrap_or_default();
        format!("{} ({seen})", case.name)
    });
    failed.chain(report.lacking.clone()).collect::<Vec<_>>().join(", ")
}

impl Direct {
    /// Where acceleration stands.
    pub fn standing(&self) -> Standing {
        self.0.standing.lock().clone()
    }

    /// Tries the machine if somebody is named for it, and accelerates connections that are made from
    /// then on, unless it fails.
    pub async fn qualify(self, cgroup: &Path, pin_path: &Path) {
        if self.standing() != Standing::Trying {
            // Of an agent before, for which somebody was named.
            return doctor::sweep(Some(cgroup), pin_path);
        }
        let standing = match self.try_out(cgroup, pin_path).await {
            Ok(differs) => Standing::On { differs },
            Err(error) => {
                tracing::error!(%error, "connections within the node are not accelerated");
                Standing::Off(error.to_string())
            }
        };
        *self.0.standing.lock() = standing;
    }

    async fn try_out(&self, cgroup: &Path, pin_path: &Path) -> Result<Vec<String>, NoAcceleration> {
        let report = doctor::examine(cgroup, pin_path).await?;
        if !report.qualifies() {
            return Err(NoAcceleration::Fails(report));
        }
        let mut differs = Vec::new();
        for case in report.those(Outcome::Differs) {
            let (expected, seen) = (&case.expected, case.seen.as_deref().unwrap_or_default());
            tracing::warn!(case = %case.name, %expected, seen, "accelerated workloads notice");
            differs.push(case.name.clone());
        }
        // Another agent has the kernel's tables from then on.
        if !self.0.stopped.is_cancelled()
            && let Some(kernel) = self.0.verdicts.capture().kernel()
        {
            kernel.accelerate()?;
            self.0.verdicts.accelerate();
            tracing::info!(
                cases = report.cases.len(),
                "connections within the node are accelerated"
            );
        }
        Ok(differs)
    }
}
