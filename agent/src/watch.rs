//! Tells when a file may have changed, in whichever way it is replaced.
//!
//! Directories are watched rather than the file, so that renames, symlink swaps (as Kubernetes
//! does for config maps) and delete-and-create all show. Every directory that holds a link on the
//! way to the file is among them. What the kernel cannot tell (a network file system, a directory
//! that was itself replaced) is caught by a look at the file's metadata every few seconds.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use notify::event::{AccessKind, AccessMode};
use notify::{ErrorKind, Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// How long the directories must be quiet before the file is read.
const QUIET: Duration = Duration::from_millis(200);
/// How long a directory that never gets quiet may delay reading.
const AT_MOST: Duration = Duration::from_millis(600);
/// How often the file's metadata is looked at without any event.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Links followed on the way to the file; the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// A file that changed this recently may change again without a change of its metadata.
const UNSETTLED: Duration = Duration::from_secs(1);

/// Watches one file through the directories that lead to it.
pub struct DirectoryWatch {
    path: PathBuf,
    watcher: RecommendedWatcher,
    watched: BTreeSet<PathBuf>,
    event: Arc<Notify>,
    look: Instant,
}

impl DirectoryWatch {
    /// Watches from here on. A directory that does not exist yet is left to the regular look.
    pub fn start(path: &Path) -> Result<Self, notify::Error> {
        let event = Arc::new(Notify::new());
        let signal = event.clone();
        let watcher = notify::recommended_watcher(move |event: notify::Result<Event>| {
            if is_change(&event) {
                signal.notify_one();
            }
        })?;
        let mut watch = DirectoryWatch {
            path: path.to_owned(),
            watcher,
            watched: BTreeSet::new(),
            event,
            look: Instant::now() + LOOK_EVERY,
        };
        for directory in directories(path) {
            match watch.watcher.watch(&directory, RecursiveMode::NonRecursive) {
                Ok(()) => drop(watch.watched.insert(directory)),
                Err(error) if matches!(error.kind, ErrorKind::PathNotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(watch)
    }

    /// Waits until something may have changed and is quiet again, or until it is time to look.
    /// Until [`DirectoryWatch::looked`] is called it does not wait again, so nothing is lost when
    /// the caller is dropped in between.
    pub async fn stirred(&mut self) {
        if timeout_at(self.look, self.event.notified()).await.is_err() {
            return;
        }
        let give_up = Instant::now() + AT_MOST;
        self.look = Instant::now();
        while Instant::now() < give_up {
            let quiet = give_up.min(Instant::now() + QUIET);
            if timeout_at(quiet, self.event.notified()).await.is_err() {
                break;
            }
        }
    }

    /// The file was read or found unchanged.
    pub fn looked(&mut self) {
        self.look = Instant::now() + LOOK_EVERY;
    }

    /// Follows the links anew: they may lead through other directories by now, and a directory of
    /// the same name may be another one.
    pub fn refresh(&mut self) {
        let now = directories(&self.path);
        for gone in self.watched.difference(&now) {
            // It fails for a directory that no longer exists, whose watch ended with it.
            let _ = self.watcher.unwatch(gone);
        }
        // Watching again what is watched already costs one system call and renews the watch where
        // the directory was replaced. What cannot be watched is left to the regular look.
        self.watched = now
            .into_iter()
            .filter(|directory| self.watcher.watch(directory, RecursiveMode::NonRecursive).is_ok())
            .collect();
    }
}

/// Reading alone also makes events; those of our own reading must not wake us.
fn is_change(event: &notify::Result<Event>) -> bool {
    match event {
        Ok(event) => match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => true,
            EventKind::Access(_) => false,
            EventKind::Any
            | EventKind::Create(_)
            | EventKind::Modify(_)
            | EventKind::Remove(_)
            | EventKind::Other => true,
        },
        // Lost events are a reason to look.
        Err(_) => true,
    }
}

/// The directories of the path and of everything its links lead through.
fn directories(path: &Path) -> BTreeSet<PathBuf> {
    let mut directories = BTreeSet::new();
    let mut next = Some(path.to_owned());
    for _ in 0..MAX_LINKS {
        let Some(path) = next.take() else { break };
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            Some(_) | None => PathBuf::from("."),
        };
        // A link within the way to the directory itself, as `..data` in a config map.
        if let Ok(target) = fs::read_link(&parent) {
            next = Some(beside(&parent, &target).join(path.file_name().unwrap_or_default()));
            if let Some(above) = parent.parent().filter(|above| !above.as_os_str().is_empty()) {
                directories.insert(above.to_owned());
            }
            continue;
        }
        next = fs::read_link(&path).ok().map(|target| parent.join(target));
        directories.insert(parent);
    }
    directories
}

fn beside(link: &Path, target: &Path) -> PathBuf {
    link.parent().unwrap_or(Path::new("")).join(target)
}

/// What the file system says of a file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Fingerprint {
    /// `None` for a file that changed so recently that another change might leave it the same.
    pub fn settled(metadata: &fs::Metadata, now: SystemTime) -> Option<Self> {
        let changed = u64::try_from(metadata.ctime()).ok()?;
        let changed = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(changed))?;
        let age = now.duration_since(changed).ok()?;
        (age > UNSETTLED + Duration::from_secs(1)).then(|| Self::of(metadata))
    }

    pub fn of(metadata: &fs::Metadata) -> Self {
        Fingerprint {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}
