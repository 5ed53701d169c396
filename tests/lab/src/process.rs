//! A process of the lab: its output in a log file, killed when dropped.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{sys, wait};

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    leave: bool,
}

impl Process {
    /// Starts `command` with its output appended to `<logs>/<name>.log`.
    pub fn start(logs: &Path, name: &str, command: &mut Command) -> Result<Self> {
        let log = logs.join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log);
        let file = file.with_context(|| format!("opening {}", log.display()))?;
        let errors = file.try_clone().context("sharing the log file")?;
        let child = command.stdout(file).stderr(errors).spawn();
        let program = command.get_program().to_string_lossy().into_owned();
        let child = child.with_context(|| format!("starting {name} ({program})"))?;
        Ok(Self { name: name.to_owned(), child, log, leave: false })
    }

    /// What it was called when started.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All it printed so far, also by earlier processes of this name.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Where its output goes.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// The last `lines` lines it printed.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = self.log();
        let all: Vec<&str> = text.lines().collect();
        all.get(all.len().saturating_sub(lines)..).unwrap_or_default().join("\n")
    }

    /// Its end, if it has come.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal to it.
    pub fn signal(&self, signal: i32) -> Result<()> {
        sys::kill(self.pid(), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Asks it to end (SIGTERM) and waits for that.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(libc::SIGTERM)?;
        let name = self.name.clone();
        wait::until_some(format!("the end of {name}"), limit, || self.ended().ok_or("it runs"))
    }

    /// Ends it at once (SIGKILL) and waits for that.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.child.kill().with_context(|| format!("killing {}", self.name))?;
        self.child.wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// Lets it run on when this handle is dropped.
    pub fn leave_running(&mut self) {
        self.leave = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.leave {
            return;
        }
        // Both fail only when it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
