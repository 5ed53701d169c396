//! What is to be taken back, whatever happens: at the end, after a failure, and when interrupted.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::kubectl::Kubectl;

/// Commands that take back what was done, newest last; all holders share them.
#[derive(Clone, Debug)]
pub struct Undo {
    kubectl: Kubectl,
    steps: Arc<Mutex<Steps>>,
}

#[derive(Debug, Default)]
struct Steps {
    last: usize,
    open: Vec<(usize, Vec<String>)>,
}

/// Names one step that is still to be taken back.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a step that is never taken back stays until the end"]
pub struct Step(usize);

impl Undo {
    pub fn new(kubectl: Kubectl) -> Self {
        Self { kubectl, steps: Arc::default() }
    }

    /// Remembers the arguments of kubectl that take back what will be done next.
    pub fn remember(&self, arguments: &[&str]) -> Step {
        let mut steps = self.steps();
        steps.last += 1;
        let number = steps.last;
        steps.open.push((number, arguments.iter().map(|word| (*word).to_owned()).collect()));
        Step(number)
    }

    /// Takes one step back now.
    pub fn now(&self, step: Step) -> Result<()> {
        let arguments = self.take(&step);
        arguments.map_or(Ok(()), |arguments| self.kubectl.run(&arguments).map(drop))
    }

    /// Forgets a step: it has been taken back in another way.
    pub fn forget(&self, step: Step) {
        self.take(&step);
    }

    /// Takes everything back, newest first; gives what failed.
    pub fn all(&self) -> Vec<anyhow::Error> {
        let open = std::mem::take(&mut self.steps().open);
        let results = open.into_iter().rev().map(|(_, arguments)| self.kubectl.run(&arguments));
        results.filter_map(Result::err).collect()
    }

    /// Leaves everything as it is.
    pub fn forget_all(&self) {
        self.steps().open.clear();
    }

    fn take(&self, step: &Step) -> Option<Vec<String>> {
        let mut steps = self.steps();
        let place = steps.open.iter().position(|(number, _)| *number == step.0)?;
        Some(steps.open.remove(place).1)
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
