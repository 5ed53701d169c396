//! Named network namespaces, as `ip netns` keeps them under `/run/netns`.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::{sys, wait};

/// Where named namespaces lie.
pub const DIRECTORY: &str = "/run/netns";

/// A network namespace that lives until [`delete`] or the lab's end.
#[derive(Clone, Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
}

impl Netns {
    /// Makes a namespace with its loopback up and without IPv6 duplicate address detection,
    /// which would keep new addresses unusable for a second.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let netns = Self::open(name)?;
        for scope in ["all", "default"] {
            netns.sysctl(&format!("net/ipv6/conf/{scope}/accept_dad"), "0")?;
            netns.sysctl(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "0")?;
        }
        netns.ip("link set lo up\n")?;
        Ok(netns)
    }

    /// One that is there, such as another process's.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(DIRECTORY).join(name);
        let file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        Ok(Self { name: name.to_owned(), file: Arc::new(file) })
    }

    /// The name to use with `ip netns exec`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new(DIRECTORY).join(&self.name)
    }

    /// The opened namespace.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Runs `work` on a thread inside the namespace and gives its result. A panic goes on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = std::thread::scope(|scope| {
            let thread = scope.spawn(|| sys::enter_netns(self.file.as_fd()).map(|()| work()));
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        inside.unwrap_or_else(|error| panic!("entering namespace {}: {error}", self.name))
    }

    /// Sets one kernel setting of the namespace, named by its path below `/proc/sys`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.run(|| fs::write(&path, value))
            .with_context(|| format!("setting {name} to {value} in {}", self.name))
    }

    /// Runs lines of `ip` commands inside the namespace, and stops at the first that fails.
    pub fn ip(&self, batch: &str) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("starting ip (package iproute2)")?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(batch.as_bytes()).context("writing to ip")?;
        }
        let output = child.wait_with_output().context("waiting for ip")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr);
            bail!("ip in {}: {}\nof:\n{batch}", self.name, error.trim());
        }
        Ok(())
    }
}

/// Waits until the kernel has taken both ends of a link into use; until then it drops packets.
pub fn wait_for_link(netns: &Netns, device: &str) -> Result<()> {
    wait::until(format!("link {device} in {}", netns.name), wait::SOON, || {
        let shown = Command::new("ip").args(["-n", &netns.name, "link", "show", device]).output();
        shown.is_ok_and(|shown| String::from_utf8_lossy(&shown.stdout).contains(" state UP "))
    })
}

/// Removes a name. Processes inside keep the namespace alive until they end.
pub fn delete(name: &str) -> Result<()> {
    ip(&["netns", "del", name])
}

/// The names of all namespaces that begin with `prefix`.
pub fn names(prefix: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(DIRECTORY) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(prefix)).collect()
}

/// Runs one `ip` command in the caller's namespace.
pub fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(arguments).output();
    let output = output.context("starting ip (package iproute2)")?;
    if !output.status.success() {
        let error = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {}", arguments.join(" "), error.trim());
    }
    Ok(())
}
