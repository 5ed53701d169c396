//! Calls with what should become of them, asked again until a change has arrived everywhere.

use std::fmt;

use anyhow::{Result, ensure};

use super::{Pod, Town};
use crate::e2e::talk::{self, Call, Outcome};

/// What should become of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Want {
    /// An answer, from whomever.
    Answer,
    /// An answer from this pod.
    By(String),
    /// No answer, and the connection broken.
    Refusal,
    /// An answer through a waypoint.
    Waypoint,
    /// An answer without a waypoint in between.
    NoWaypoint,
    /// An HTTP status.
    Status(u16),
}

impl Want {
    fn is_met(&self, outcome: &Outcome) -> bool {
        match self {
            Self::Answer => outcome.ok,
            Self::By(pod) => outcome.ok && outcome.server() == pod,
            Self::Refusal => outcome.is_refusal(),
            Self::Waypoint => outcome.ok && outcome.by_waypoint(),
            Self::NoWaypoint => outcome.ok && !outcome.by_waypoint(),
            Self::Status(status) => outcome.status == Some(*status),
        }
    }
}

impl fmt::Display for Want {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Answer => f.write_str("an answer"),
            Self::By(pod) => write!(f, "an answer by {pod}"),
            Self::Refusal => f.write_str("a refusal"),
            Self::Waypoint => f.write_str("an answer through a waypoint"),
            Self::NoWaypoint => f.write_str("an answer without a waypoint"),
            Self::Status(status) => write!(f, "status {status}"),
        }
    }
}

/// A call, and what should become of it.
#[derive(Clone, Debug)]
pub struct Case {
    pub from: Pod,
    pub call: Call,
    pub want: Want,
}

impl Case {
    pub fn new(from: &Pod, call: Call, want: Want) -> Self {
        Self { from: from.clone(), call, want }
    }
}

impl Town {
    /// Makes all calls, those of different pods at the same time; each must end as wanted. Gives
    /// the outcomes in the order of the cases.
    pub fn expect(&self, cases: &[Case]) -> Result<Vec<Outcome>> {
        let mut pods: Vec<&Pod> = Vec::new();
        for case in cases {
            if !pods.contains(&&case.from) {
                pods.push(&case.from);
            }
        }
        let of = |pod: &Pod| -> Vec<usize> {
            cases
                .iter()
                .enumerate()
                .filter(|(_, case)| case.from == *pod)
                .map(|(index, _)| index)
                .collect()
        };
        let asked: Vec<Result<Vec<(usize, Outcome)>>> = std::thread::scope(|scope| {
            let threads: Vec<_> = pods
                .iter()
                .map(|pod| {
                    let indexes = of(pod);
                    scope.spawn(move || {
                        let calls: Vec<Call> = indexes
                            .iter()
                            .filter_map(|index| cases.get(*index))
                            .map(|case| case.call.clone())
                            .collect();
                        let outcomes =
                            talk::calls(&self.kubectl, &pod.namespace, &pod.name, &calls)?;
                        Ok(indexes.into_iter().zip(outcomes).collect())
                    })
                })
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined
                .map(|done| {
                    done.unwrap_or_else(|_| Err(anyhow::anyhow!("a caller's thread ended early")))
                })
                .collect()
        });
        let mut outcomes = vec![Outcome::default(); cases.len()];
        for asked in asked {
            for (index, outcome) in asked? {
                if let Some(place) = outcomes.get_mut(index) {
                    *place = outcome;
                }
            }
        }
        let unmet: Vec<String> = cases
            .iter()
            .zip(&outcomes)
            .filter(|(case, outcome)| !case.want.is_met(outcome))
            .map(|(case, outcome)| {
                let Case { from, call, want } = case;
                format!(
                    "{}/{} {}: wanted {want}, {outcome}",
                    from.namespace,
                    from.name,
                    call.told()
                )
            })
            .collect();
        ensure!(
            unmet.is_empty(),
            "{} of {} calls:\n    {}",
            unmet.len(),
            cases.len(),
            unmet.join("\n    ")
        );
        Ok(outcomes)
    }

    /// Asks until every case is as wanted, and then twice more, when it must be so at once.
    pub fn settle(&self, cases: &[Case]) -> Result<Vec<Outcome>> {
        self.until("calls to end as wanted", || self.expect(cases))?;
        self.expect(cases)?;
        self.expect(cases)
    }
}
