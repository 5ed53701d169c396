//! The folder of pins: what is in it, whose it is, and whether its maps fit this agent.
//!
//! `maps/NAME`, `links/PROGRAM` and `pods/COOKIE`; a BPF file system allows no dots in names.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::{Array, Map, MapData};
use culvert_abi::{ABI_MAP, Abi};
use culvert_core::tables::NetnsCookie;

use super::object::PINNED_MAPS;
use super::{CaptureError, direct, sys};

/// Where a BPF file system is customarily mounted.
const BPF_FS: &str = "/sys/fs/bpf";
const MAPS: &str = "maps";
const LINKS: &str = "links";
const PODS: &str = "pods";

/// The folder, locked against other agents.
#[derive(Debug)]
pub struct Pins {
    root: PathBuf,
    /// Two agents have the same open folder, and with it one lock, while one hands over to the other.
    lock: File,
    /// Whether the lock ends with this.
    is_ours: AtomicBool,
}

/// What was in the folder.
#[derive(Clone, Copy, Debug, Default)]
pub struct Removed {
    pub links: usize,
    pub pods: usize,
    /// Accelerated connections that were ended, and that could not be.
    pub ended: usize,
    pub stuck: usize,
}

impl Drop for Pins {
    fn drop(&mut self) {
        self.unlock();
    }
}

impl Pins {
    /// Creates the folder where it is missing, and mounts the BPF file system at its customary
    /// place where that is missing.
    pub fn open(root: &Path) -> Result<Pins, CaptureError> {
        ensure_bpf_fs(root)?;
        let failed = |error| path_error("pin folder", root, error);
        for folder in [root.to_owned(), root.join(MAPS), root.join(LINKS), root.join(PODS)] {
            DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(failed)?;
        }
        Pins::open_existing(root)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// `None` where there is no such folder.
    pub fn open_existing(root: &Path) -> Result<Option<Pins>, CaptureError> {
        let lock = match File::open(root) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(path_error("pin folder", root, error)),
        };
        match sys::lock(&lock) {
            Ok(()) => Ok(Some(Pins { root: root.to_owned(), lock, is_ours: true.into() })),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(CaptureError::Busy(root.to_owned()))
            }
            Err(error) => Err(path_error("lock of pin folder", root, error)),
        }
    }

    /// With the folder as another agent has it open and locked. The lock stays that agent's until
    /// [`Pins::own`].
    pub fn inherit(root: &Path, lock: OwnedFd) -> Result<Pins, CaptureError> {
        let failed = |error| path_error("pin folder", root, error);
        let lock = File::from(lock);
        let (here, there) = (fs::metadata(root).map_err(failed)?, lock.metadata().map_err(failed)?);
        if (here.dev(), here.ino()) != (there.dev(), there.ino()) {
            return Err(failed(io::Error::other("what was handed over is another folder")));
        }
        Ok(Pins { root: root.to_owned(), lock, is_ours: false.into() })
    }

    /// The open and locked folder.
    pub fn lock(&self) -> &File {
        &self.lock
    }

    /// Whether no other agent has the pins.
    pub fn is_ours(&self) -> bool {
        self.is_ours.load(Ordering::Relaxed)
    }

    /// The lock ends with this from now on. Locking again what is open and locked changes nothing.
    pub fn own(&self) -> Result<(), CaptureError> {
        sys::lock(&self.lock).map_err(|_| CaptureError::Busy(self.root.clone()))?;
        self.is_ours.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The lock is another agent's from now on.
    pub fn give_away(&self) {
        self.is_ours.store(false, Ordering::Relaxed);
    }

    /// Gives the lock back, unless it is another agent's.
    pub fn unlock(&self) {
        if self.is_ours.swap(false, Ordering::Relaxed) {
            sys::unlock(&self.lock);
        }
    }

    pub fn map(&self, map: &str) -> PathBuf {
        self.root.join(MAPS).join(map)
    }

    pub fn link(&self, program: &str) -> PathBuf {
        self.root.join(LINKS).join(program)
    }

    pub fn pod(&self, cookie: NetnsCookie) -> PathBuf {
        self.root.join(PODS).join(cookie.to_string())
    }

    pub fn open_map(&self, map: &str) -> Result<OwnedFd, CaptureError> {
        let path = self.map(map);
        sys::pinned(&path).map_err(|error| path_error("pinned map", &path, error))
    }

    pub fn open_pod(&self, cookie: NetnsCookie) -> Result<OwnedFd, CaptureError> {
        let path = self.pod(cookie);
        sys::pinned(&path).map_err(|error| path_error("pinned link", &path, error))
    }

    pub fn has_pod(&self, cookie: NetnsCookie) -> bool {
        self.pod(cookie).exists()
    }

    /// Detaches a pod's program, if it is attached.
    pub fn unlink_pod(&self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        remove_link(&self.pod(cookie)).map(drop)
    }

    /// The pods whose programs are attached.
    pub fn pods(&self) -> Result<Vec<NetnsCookie>, CaptureError> {
        let names = entries(&self.root.join(PODS))?;
        let cookie = |path: PathBuf| path.file_name()?.to_str()?.parse().ok().map(NetnsCookie);
        Ok(names.into_iter().filter_map(cookie).collect())
    }

    /// Unpins maps that this agent cannot use; `true` when none are left. The programs that use
    /// them keep them until they are replaced.
    pub fn discard_foreign_maps(&self, ours: Abi) -> Result<bool, CaptureError> {
        match self.abi()? {
            Some(abi) if abi == ours => return Ok(false),
            Some(abi) => tracing::warn!(
                pins = %self.root.display(),
                version = abi.version,
                max_pods = abi.max_pods,
                max_verdicts = abi.max_verdicts,
                max_direct = abi.max_direct,
                "the pinned maps were made by a different agent and are made anew: adopted pods \
                 are refused all connections until they are enrolled again"
            ),
            None => {}
        }
        direct::end_all(self);
        for map in PINNED_MAPS {
            remove_file(&self.map(map))?;
        }
        Ok(true)
    }

    /// Removes every pin and the folder.
    pub fn remove(self) -> Result<Removed, CaptureError> {
        let mut removed = Removed::default();
        // Links before maps, so that no program runs on maps that nobody can see any more.
        for path in entries(&self.root.join(LINKS))? {
            removed.links += usize::from(remove_link(&path)?);
        }
        (removed.ended, removed.stuck) = direct::end_accelerated(&self);
        for path in entries(&self.root.join(PODS))? {
            removed.pods += usize::from(remove_link(&path)?);
        }
        for path in entries(&self.root.join(MAPS))? {
            remove_file(&path)?;
        }
        let folders = [LINKS, PODS, MAPS].map(|folder| self.root.join(folder));
        for folder in folders.iter().chain([&self.root]) {
            match fs::remove_dir(folder) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(path_error("pin folder", folder, error));
                }
                Ok(()) | Err(_) => {}
            }
        }
        Ok(removed)
    }

    fn abi(&self) -> Result<Option<Abi>, CaptureError> {
        let path = self.map(ABI_MAP);
        if !path.exists() {
            return Ok(None);
        }
        let unreadable = |error| super::maps::failed(ABI_MAP, error);
        let map = MapData::from_pin(&path).map_err(unreadable)?;
        let version: Result<Array<_, Abi>, _> = Map::Array(map).try_into();
        // A map of another shape is another version.
        let foreign = Abi { version: 0, max_pods: 0, max_verdicts: 0, max_direct: 0 };
        Ok(Some(version.and_then(|map| map.get(&0, 0)).unwrap_or(foreign)))
    }
}

fn ensure_bpf_fs(root: &Path) -> Result<(), CaptureError> {
    let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let failed = |error| path_error("pin folder", root, error);
    if sys::is_bpf_fs(existing).map_err(failed)? {
        return Ok(());
    }
    if root.starts_with(BPF_FS) && existing == Path::new(BPF_FS) {
        tracing::info!("mounting the BPF file system at {BPF_FS}");
        return sys::mount_bpf_fs(existing)
            .map_err(|error| path_error("mounting the BPF file system at", existing, error));
    }
    let advice =
        format!("not on a BPF file system; mount one: mount -t bpf bpf {}", root.display());
    Err(failed(io::Error::other(advice)))
}

/// Detaches a pinned link and removes the pin. Whether there was one.
fn remove_link(path: &Path) -> Result<bool, CaptureError> {
    match sys::pinned(path) {
        Ok(link) => {
            // What it was attached to may be gone already, and then so is the attachment.
            let _ = sys::link_detach(link.as_fd());
            remove_file(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(path_error("pinned link", path, error)),
    }
}

/// Whether there was one.
fn remove_file(path: &Path) -> Result<bool, CaptureError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(path_error("pin", path, error)),
    }
}

fn entries(folder: &Path) -> Result<Vec<PathBuf>, CaptureError> {
    let failed = |error| path_error("pin folder", folder, error);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    entries.map(|entry| entry.map(|entry| entry.path()).map_err(failed)).collect()
}

fn path_error(what: &'static str, path: &Path, error: io::Error) -> CaptureError {
    CaptureError::Path { what, path: path.to_owned(), error }
}
