//! The process that tries, and what is left of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;

use super::{Place, Report, StageError};
use crate::capture::{self, CaptureError};

/// How long all cases together may take.
const LIMIT: Duration = Duration::from_secs(180);

/// The running program, also when its file has been replaced.
const SELF: &str = "/proc/self/exe";

/// Why nothing was found out.
#[derive(Debug, thiserror::Error)]
pub enum DoctorError {
    #[error("the process that tries does not start: {0}")]
    Start(io::Error),
    #[error("the process that tries has not ended within {} s", LIMIT.as_secs())]
    Late,
    #[error("the process that tries has failed: {0}")]
    Failed(String),
    #[error("the answer of the process that tries is not understood: {0}")]
    Answer(#[from] serde_json::Error),
    #[error(transparent)]
    Stage(#[from] StageError),
    #[error("removing what was tried with: {0}")]
    Remove(CaptureError),
}

/// Tries in a process of its own, in a cgroup of its own below `cgroup`, with pins beside `pin_path`.
/// All of them are gone when this answers.
pub async fn examine(cgroup: &Path, pin_path: &Path) -> Result<Report, DoctorError> {
    sweep(Some(cgroup), pin_path);
    let own = std::process::id();
    let scratch = Scratch::new(cgroup, own);
    let mut pins = pin_path.as_os_str().to_owned();
    pins.push(format!("{PINS}{own}"));
    let place = Place { cgroup: scratch.cgroup().to_owned(), pin_path: pins.into() };
    let told = attempt(&place).await;
    let removed = capture::detach(&place.pin_path).map_err(DoctorError::Remove);
    let report = told?;
    removed?;
    Ok(report)
}

async fn attempt(place: &Place) -> Result<Report, DoctorError> {
    let mut child = Command::new(SELF)
        .args(["doctor", "--in"])
        .arg(serde_json::to_string(place)?)
        // It ends with this process: nobody else holds the other end.
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(DoctorError::Start)?;
    let _held = child.stdin.take();
    let output = timeout(LIMIT, child.wait_with_output()).await.map_err(|_| DoctorError::Late)?;
    let output = output.map_err(DoctorError::Start)?;
    if !output.status.success() {
        let told = String::from_utf8_lossy(&output.stderr);
        let last = told.trim().lines().last().unwrap_or("without a word").to_owned();
        return Err(DoctorError::Failed(last));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// What the process that tries does. It blocks.
pub(crate) fn answer(place: &str) -> Result<Report, DoctorError> {
    std::thread::spawn(|| {
        // Nothing is written there: it ends when whoever asked has ended.
        let _ended = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::abort();
    });
    let mut place: Place = serde_json::from_str(place)?;
    let is_own = |path: &Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(CGROUP))
    };
    if is_own(&place.cgroup) {
        let moved = fs::write(place.cgroup.join("cgroup.procs"), std::process::id().to_string());
        // A container may not leave its own cgroup, but is below the one above all pods.
        if moved.is_err() {
            place.cgroup.pop();
        }
    }
    Ok(super::run(&place)?)
}

/// How the cgroups and the pins of trials are called: this, and the number of a process.
const CGROUP: &str = "culvert-doctor-";
const PINS: &str = "-doctor-";

/// Removes what trials left whose process was killed. It blocks for some milliseconds.
pub(crate) fn sweep(cgroup: Option<&Path>, pin_path: &Path) {
    let in_folder = |folder: Option<&Path>, prefix: &str| -> Vec<PathBuf> {
        let entries = folder.and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten();
        let paths = entries.flatten().map(|entry| entry.path());
        let is_one = |path: &PathBuf| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix))
        };
        paths.filter(is_one).collect()
    };
    let name = pin_path.file_name().unwrap_or_default().to_string_lossy();
    for pins in in_folder(pin_path.parent(), &format!("{name}{PINS}")) {
        // Those of a trial that runs are locked.
        let _in_use = capture::detach(&pins);
    }
    for left in in_folder(cgroup, CGROUP) {
        let made = fs::metadata(&left).and_then(|metadata| metadata.modified());
        let age = made.ok().and_then(|made| made.elapsed().ok());
        if age.is_some_and(|age| age > LIMIT) {
            let _in_use = fs::remove_dir(&left);
        }
    }
}

/// A cgroup for one trial; where none can be made, as on a file system that is read-only, the one
/// above all pods, whose other processes the programs leave alone.
enum Scratch {
    Own(PathBuf),
    Shared(PathBuf),
}

impl Scratch {
    fn new(above: &Path, id: u32) -> Scratch {
        let own = above.join(format!("{CGROUP}{id}"));
        match fs::create_dir(&own) {
            Ok(()) => Scratch::Own(own),
            Err(error) => {
                tracing::debug!(%error, "no cgroup for the trial");
                Scratch::Shared(above.to_owned())
            }
        }
    }

    fn cgroup(&self) -> &Path {
        match self {
            Scratch::Own(path) | Scratch::Shared(path) => path,
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Scratch::Own(path) = self
            && let Err(error) = fs::remove_dir(&*path)
        {
            tracing::warn!(path = %path.display(), %error, "the trial's cgroup stays");
        }
    }
}
