//! Loads the file at start and again after every edit.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use culvert_core::snapshot::Change;
use tokio::sync::watch;

use super::error::FileError;
use super::mesh::{Invalid, Mesh, diff};
use super::place::find;
use super::section::{CulvertSection, fixed_at_start};
use crate::watch::{DirectoryWatch, Fingerprint};

/// The largest file that is read, in bytes.
pub const MAX_BYTES: u64 = 512 << 20;

/// What one good version of the file brings.
#[derive(Debug, Default)]
pub struct MeshFile {
    /// From the last good version to this one; from nothing, for the first.
    pub changes: Vec<Change>,
    pub culvert: CulvertSection,
}

#[derive(Debug)]
pub enum FileUpdate {
    /// A good version is in force. Its changes are empty when an edit was taken back.
    Changed(MeshFile),
    /// The last good version stays in force. Told once for each distinct content.
    Rejected(FileError),
}

/// What `status` shows of the source.
#[derive(Clone, Debug)]
pub struct FileStatus {
    pub path: Arc<Path>,
    /// When the version in force was taken over.
    pub loaded_at: SystemTime,
    /// How many versions have been taken over.
    pub loads: u64,
    /// How many could not be.
    pub errors: u64,
    /// Why the file as it is now is not in force.
    pub error: Option<Arc<str>>,
}

/// A watched file. One task calls [`FileSource::next`] in a loop.
pub struct FileSource {
    path: Arc<Path>,
    good: Arc<Mesh>,
    seen: Seen,
    fingerprint: Option<Fingerprint>,
    watch: DirectoryWatch,
    /// What is given out, and not yet told as taken over.
    given: bool,
    status: watch::Sender<FileStatus>,
}

/// What was there at the last look.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Seen {
    /// A hash of the content.
    Content(u64),
    /// There was nothing to read, for this reason.
    Nothing(String),
}

/// The result of reading the file once.
struct Reading {
    seen: Seen,
    fingerprint: Option<Fingerprint>,
    /// `None` when it is what was seen before.
    outcome: Option<Result<Mesh, FileError>>,
}

impl FileSource {
    /// Loads the file, which must be good, and watches it from then on.
    pub async fn open(path: &Path) -> Result<(MeshFile, FileSource), FileError> {
        // Watched before it is read: no edit falls in between.
        let watch = DirectoryWatch::start(path)
            .map_err(|source| FileError::Watch { path: path.to_owned(), source });
        let path: Arc<Path> = path.into();
        let reading = read(path.clone(), None, None).await;
        let good = match reading.outcome {
            Some(outcome) => outcome?,
            None => Mesh::default(),
        };
        let watch = watch?;
        let first =
            MeshFile { changes: diff(&Mesh::default(), &good), culvert: good.culvert.clone() };
        let status = FileStatus {
            path: path.clone(),
            loaded_at: SystemTime::now(),
            loads: 1,
            errors: 0,
            error: None,
        };
        let source = FileSource {
            path,
            good: Arc::new(good),
            seen: reading.seen,
            fingerprint: reading.fingerprint,
            watch,
            given: false,
            status: watch::Sender::new(status),
        };
        Ok((first, source))
    }

    /// The source's state, now and after every edit.
    pub fn status(&self) -> watch::Receiver<FileStatus> {
        self.status.subscribe()
    }

    /// Waits for the next version of the file. May be dropped at any time without losing one. Whoever
    /// asks for the next has taken over the one before: only then the status tells of it.
    pub async fn next(&mut self) -> FileUpdate {
        if std::mem::take(&mut self.given) {
            self.status.send_modify(|status| {
                status.loaded_at = SystemTime::now();
                status.loads += 1;
                status.error = None;
            });
        }
        loop {
            self.watch.stirred().await;
            self.watch.refresh();
            let update = self.look().await;
            self.watch.looked();
            if let Some(update) = update {
                return update;
            }
        }
    }

    async fn look(&mut self) -> Option<FileUpdate> {
        let seen = Some((self.seen.clone(), self.good.clone()));
        let reading = read(self.path.clone(), self.fingerprint, seen).await;
        self.fingerprint = reading.fingerprint;
        self.seen = reading.seen;
        Some(match reading.outcome? {
            Ok(mesh) => {
                let changes = diff(&self.good, &mesh);
                let culvert = mesh.culvert.clone();
                self.good = Arc::new(mesh);
                self.given = true;
                FileUpdate::Changed(MeshFile { changes, culvert })
            }
            Err(error) => {
                let text = error.to_string();
                self.status.send_modify(|status| {
                    status.errors += 1;
                    status.error = Some(text.into());
                });
                FileUpdate::Rejected(error)
            }
        })
    }
}

/// Reads a file once, without watching it.
pub async fn load(path: &Path) -> Result<Mesh, FileError> {
    match read(path.into(), None, None).await.outcome {
        Some(outcome) => outcome,
        None => Ok(Mesh::default()),
    }
}

/// Reads and checks the file on a thread that may block. `before` is what was seen and the version
/// in force; a file that looks or reads the same has no outcome.
async fn read(
    path: Arc<Path>,
    fingerprint: Option<Fingerprint>,
    before: Option<(Seen, Arc<Mesh>)>,
) -> Reading {
    let blocking = path.clone();
    let reading =
        tokio::task::spawn_blocking(move || read_blocking(&blocking, fingerprint, before)).await;
    reading.unwrap_or_else(|failed| {
        let source = std::io::Error::other(failed);
        Reading {
            seen: Seen::Nothing(source.to_string()),
            fingerprint: None,
            outcome: Some(Err(FileError::Unreadable { path: path.to_path_buf(), source })),
        }
    })
}

fn read_blocking(
    path: &Path,
    fingerprint: Option<Fingerprint>,
    before: Option<(Seen, Arc<Mesh>)>,
) -> Reading {
    let (seen_before, good) = match before {
        Some((seen, good)) => (Some(seen), Some(good)),
        None => (None, None),
    };
    let now = SystemTime::now();
    if let (Some(known), Some(seen), Ok(metadata)) = (fingerprint, &seen_before, fs::metadata(path))
        && known == Fingerprint::of(&metadata)
    {
        return Reading { seen: seen.clone(), fingerprint, outcome: None };
    }
    let (fingerprint, bytes) = match read_bytes(path, now) {
        Ok(read) => read,
        Err(error) => {
            let seen = Seen::Nothing(error.to_string());
            let news = seen_before.as_ref() != Some(&seen);
            return Reading { seen, fingerprint: None, outcome: news.then_some(Err(error)) };
        }
    };
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    let seen = Seen::Content(hasher.finish());
    if seen_before.as_ref() == Some(&seen) {
        return Reading { seen, fingerprint, outcome: None };
    }
    let outcome = check(&bytes, good.as_deref()).map_err(|invalid| FileError::Invalid {
        path: path.to_owned(),
        place: invalid.place,
        what: invalid.what,
    });
    Reading { seen, fingerprint, outcome: Some(outcome) }
}

/// A first version may be empty. As an edit that is more likely half a write than the wish to
/// release every pod, which `{}` expresses.
fn check(bytes: &[u8], good: Option<&Mesh>) -> Result<Mesh, Invalid> {
    if bytes.is_empty() && good.is_some_and(|good| *good != Mesh::default()) {
        let what = "the file has become empty; write {} to mean that".to_owned();
        return Err(Invalid { place: None, what });
    }
    let mesh = Mesh::parse(bytes)?;
    match good.and_then(|good| fixed_at_start(&good.culvert, &mesh.culvert)) {
        None => Ok(mesh),
        Some(fault) => Err(Invalid {
            place: find(bytes, &fault.path),
            what: format!("{}: {}", fault.path, fault.why),
        }),
    }
}

/// The fingerprint is taken before the content, so that an edit in between is noticed.
fn read_bytes(path: &Path, now: SystemTime) -> Result<(Option<Fingerprint>, Vec<u8>), FileError> {
    let unreadable = |source| FileError::Unreadable { path: PathBuf::from(path), source };
    // Asked before opening, for opening a pipe would wait for its writer.
    let metadata = fs::metadata(path).map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(FileError::NotAFile { path: path.to_owned(), why: "is not a regular file" });
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(unreadable)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(FileError::NotAFile { path: path.to_owned(), why: "is larger than 512 MiB" });
    }
    Ok((Fingerprint::settled(&metadata, now), bytes))
}
