//! Taking labs down: at their end, on Ctrl-C, and the leftovers of labs whose owner died.
//!
//! Everything a lab makes carries its name, so that it can be found without the lab's own memory.
//! The list of live labs is the one thing here that belongs to the whole process, because signals
//! and the process's cgroup do.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};

use crate::{cgroup, netns, sys};

/// Where labs keep their state, one folder each.
pub const STATE: &str = "/run/culvert-lab";
/// What the names of labs, and so of their namespaces and cgroups, begin with.
pub const PREFIX: &str = "cvl";

const OWNER: &str = "owner";
const CGROUP: &str = "cgroup";
const KEPT: &str = "kept";
/// The bpffs mount in a lab's state folder.
pub const BPFFS: &str = "bpf";

static LIVE: Mutex<Live> = Mutex::new(Live { labs: Vec::new(), next: 0, home: None });

struct Live {
    labs: Vec<String>,
    next: u32,
    /// Set while this process sits in a cgroup of its own: where it came from.
    home: Option<Home>,
}

struct Home {
    before: PathBuf,
    base: PathBuf,
}

/// A new lab's name and the cgroup that its cgroups lie below.
pub(crate) struct Registered {
    pub(crate) name: String,
    pub(crate) state: PathBuf,
    pub(crate) base: PathBuf,
}

/// Picks an unused name, moves this process into a cgroup of its own when it is the first lab,
/// and promises the lab's removal should the process be interrupted.
pub(crate) fn register() -> Result<Registered> {
    let mut live = live();
    if live.next == 0 {
        sys::on_interrupt(remove_all_live).context("watching for interrupts")?;
    }
    let base = match &live.home {
        Some(home) => home.base.clone(),
        None => {
            let home = leave_home()?;
            let base = home.base.clone();
            live.home = Some(home);
            base
        }
    };
    let name = format!("{PREFIX}-{}-{}", std::process::id(), live.next);
    live.next += 1;
    let state = Path::new(STATE).join(&name);
    // Filled under another name first: a sweep must never meet a lab without an owner.
    let draft = Path::new(STATE).join(format!(".{name}"));
    fs::create_dir_all(&draft).with_context(|| format!("making {}", draft.display()))?;
    fs::write(draft.join(OWNER), owner_mark(std::process::id()).unwrap_or_default())?;
    fs::write(draft.join(CGROUP), base.join(&name).as_os_str().as_encoded_bytes())?;
    fs::rename(&draft, &state).with_context(|| format!("making {}", state.display()))?;
    live.labs.push(name.clone());
    Ok(Registered { name, state, base })
}

fn leave_home() -> Result<Home> {
    let before = cgroup::current()?;
    let base = before.join(format!("{PREFIX}-{}", std::process::id()));
    let own = base.join("self");
    cgroup::create(&own)?;
    cgroup::enter(&own)?;
    Ok(Home { before, base })
}

/// Removes a lab of this process.
pub(crate) fn unregister(name: &str) -> Result<()> {
    let removed = remove(name);
    forget(name);
    removed
}

/// Marks a lab as one to outlive its owner, and forgets it.
pub(crate) fn keep(name: &str) -> Result<()> {
    fs::write(Path::new(STATE).join(name).join(KEPT), "")?;
    forget(name);
    Ok(())
}

fn forget(name: &str) {
    let mut live = live();
    live.labs.retain(|other| other != name);
    if live.labs.is_empty()
        && let Some(home) = live.home.take()
    {
        // What cannot be undone here is found by the next sweep.
        let _ = cgroup::enter(&home.before);
        let _ = fs::remove_dir(home.base.join("self"));
        let _ = fs::remove_dir(&home.base);
    }
}

fn remove_all_live() {
    let names: Vec<String> = live().labs.clone();
    for name in names {
        if let Err(error) = unregister(&name) {
            eprintln!("removing lab {name}: {error:#}");
        }
    }
}

/// Removes everything that labs of dead owners left behind; `kept` ones only when asked for.
/// Gives the names of the labs removed.
pub fn sweep(which: Sweep) -> Result<Vec<String>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(STATE).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        if name.starts_with('.') {
            continue;
        }
        let kept = entry.path().join(KEPT).exists();
        let wanted = match which {
            Sweep::Dead => !kept && !has_living_owner(&entry.path()),
            Sweep::DeadAndKept => !has_living_owner(&entry.path()),
        };
        if wanted {
            remove(&name)?;
            removed.push(name);
        }
    }
    sweep_strays();
    Ok(removed)
}

/// What [`sweep`] is to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sweep {
    /// Labs whose owner died without taking them down.
    Dead,
    /// Also those that were left running on purpose.
    DeadAndKept,
}

/// Namespaces without a state folder and cgroups of dead processes.
fn sweep_strays() {
    for name in netns::names(&format!("{PREFIX}-")) {
        let lab: Vec<&str> = name.splitn(4, '-').take(3).collect();
        if !Path::new(STATE).join(lab.join("-")).exists() && !names_living_process(&name) {
            // Another process may sweep at the same time.
            let _ = netns::delete(&name);
        }
    }
    let Ok(current) = cgroup::current() else { return };
    for entry in fs::read_dir(current).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(&format!("{PREFIX}-")) && !names_living_process(&name) {
            cgroup::remove_empty(&entry.path());
        }
    }
}

fn names_living_process(name: &str) -> bool {
    let pid = name.split('-').nth(1).and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid: u32| owner_mark(pid).is_some())
}

fn has_living_owner(state: &Path) -> bool {
    let mark = fs::read_to_string(state.join(OWNER)).unwrap_or_default();
    let pid = mark.split(' ').next().and_then(|pid| pid.parse().ok());
    pid.is_some_and(|pid| owner_mark(pid).is_some_and(|now| now == mark))
}

/// The process's id with its start time, which tells it from a later process of the same id.
fn owner_mark(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(") ")?.1;
    Some(format!("{pid} {}", after_name.split(' ').nth(19)?))
}

/// Removes a lab by its name: processes first, then what they held.
fn remove(name: &str) -> Result<()> {
    let state = Path::new(STATE).join(name);
    let group = fs::read_to_string(state.join(CGROUP)).map(PathBuf::from);
    let killed = match &group {
        Ok(path) if path.exists() => cgroup::remove(path),
        _ => Ok(()),
    };
    // Pinned programs go with the file system that names them.
    let _ = sys::unmount(&state.join(BPFFS));
    for netns in netns::names(&format!("{name}-")) {
        let _ = netns::delete(&netns);
    }
    killed?;
    let _ = group.map(|path| path.parent().map(fs::remove_dir));
    match fs::remove_dir_all(&state) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", state.display()))
        }
        _ => Ok(()),
    }
}

fn live() -> MutexGuard<'static, Live> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}
