//! Where something runs: a network namespace with a cgroup and a folder for logs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::netns::Netns;
use crate::process::Process;
use crate::{cgroup, sys};

/// A node or a pod, seen as the surroundings of a process.
#[derive(Clone, Debug)]
pub struct Place {
    netns: Netns,
    cgroup: PathBuf,
    logs: PathBuf,
}

impl Place {
    /// Makes the cgroup for an existing namespace.
    pub fn new(netns: Netns, cgroup: PathBuf, logs: PathBuf) -> Result<Self> {
        cgroup::create(&cgroup)?;
        Ok(Self { netns, cgroup, logs })
    }

    /// The network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The cgroup, below the mount of version 2.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The same namespace with a cgroup below this one.
    pub fn within(&self, name: &str) -> Result<Self> {
        Self::new(self.netns.clone(), self.cgroup.join(name), self.logs.clone())
    }

    /// A command that will run here, with its input closed.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(program);
        let procs = cgroup::procs(&self.cgroup)?;
        sys::start_inside(&mut command, self.netns.file(), Arc::new(procs));
        command.stdin(std::process::Stdio::null());
        Ok(command)
    }

    /// Starts a process here whose output goes to a log file called `name`.
    pub fn start(&self, name: &str, command: &mut Command) -> Result<Process> {
        Process::start(&self.logs, name, command)
    }

    /// Runs a program here to its end and gives what it printed; a failure carries its errors.
    pub fn output(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<String> {
        let name = program.as_ref().to_string_lossy().into_owned();
        let line = || format!("{name} {}", arguments.join(" "));
        let output = self.command(program)?.args(arguments).output().with_context(line)?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("{} ended with {}: {} {}", line(), output.status, printed.trim(), error.trim());
        }
        Ok(printed)
    }

    /// Runs `work` on a thread inside the namespace. The thread stays in the cgroup of this
    /// process, which lies below the one where the lab's agents attach.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        self.netns.run(work)
    }
}
