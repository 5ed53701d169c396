//! Cgroups of version 2, on machines where it is the only hierarchy and where it is one of many.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::{sys, wait};

/// Where the version 2 hierarchy is mounted: `/sys/fs/cgroup`, or `…/unified` on hybrid machines.
pub fn mount() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading mountinfo")?;
    mount_point(&mounts).context("no cgroup2 file system is mounted on this machine")
}

/// Finds the first cgroup2 mount in the text of `/proc/self/mountinfo`.
fn mount_point(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let is_v2 = kind.split(' ').next() == Some("cgroup2");
        let path = place.split(' ').nth(4)?;
        is_v2.then(|| PathBuf::from(path.replace("\\040", " ")))
    })
}

/// The cgroup that this process is in. One that lies outside the mounted tree counts as the root.
pub fn current() -> Result<PathBuf> {
    let mount = mount()?;
    let own = fs::read_to_string("/proc/self/cgroup").context("reading own cgroup")?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or("");
    let found = mount.join(path);
    let inside = !path.starts_with("..") && found.join("cgroup.procs").exists();
    Ok(if inside { found } else { mount })
}

/// Makes the cgroup at `path`, with its parents.
pub fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("making cgroup {}", path.display()))
}

/// Opens the file that takes a process into the cgroup.
pub fn procs(path: &Path) -> Result<File> {
    let file = path.join("cgroup.procs");
    let opened = OpenOptions::new().write(true).open(&file);
    opened.with_context(|| format!("opening {}", file.display()))
}

/// Moves this whole process into the cgroup at `path`.
pub fn enter(path: &Path) -> Result<()> {
    fs::write(path.join("cgroup.procs"), "0")
        .with_context(|| format!("entering cgroup {}", path.display()))
}

/// The processes in the cgroup and below it.
pub fn members(path: &Path) -> Vec<u32> {
    let mut pids: Vec<u32> = fs::read_to_string(path.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for child in children(path) {
        pids.extend(members(&child));
    }
    pids
}

/// Kills every process below `path` but this one, and removes the cgroup with all below it.
pub fn remove(path: &Path) -> Result<()> {
    let own = std::process::id();
    wait::until(format!("an empty cgroup {}", path.display()), wait::SOON, || {
        for pid in members(path).into_iter().filter(|pid| *pid != own) {
            // It may have ended by itself meanwhile.
            let _ = sys::kill(pid, libc::SIGKILL);
        }
        remove_empty(path)
    })
}

/// Removes the cgroup with all below it where no process is; true when nothing is left.
pub fn remove_empty(path: &Path) -> bool {
    for child in children(path) {
        remove_empty(&child);
    }
    fs::remove_dir(path).is_ok() || !path.exists()
}

fn children(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

#[cfg(test)]
mod tests;
