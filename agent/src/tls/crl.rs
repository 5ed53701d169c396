//! The file with revocation lists: read at start, and again whenever it changes.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::revocation::{InvalidCrl, RevocationList, Revocations};
use crate::watch::DirectoryWatch;

/// The largest file that is read, in bytes. Kubernetes allows a config map 1 MiB.
const MAX_BYTES: u64 = 64 << 20;

/// A file of revocation lists that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CrlError {
    #[error("cannot watch revocation lists {}: {source}", path.display())]
    Watch { path: PathBuf, source: notify::Error },
    #[error("cannot read revocation lists {}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("revocation lists {} are unusable: {reason}", path.display())]
    Invalid { path: PathBuf, reason: InvalidCrl },
}

/// A watched file (`CRL_PATH`).
pub struct CrlFile {
    path: Arc<Path>,
    watch: DirectoryWatch,
    revocations: Revocations,
    /// The content that was last judged; none if there was no file.
    seen: Option<Vec<u8>>,
    /// The last failure to read, so that it is told once.
    failure: Option<String>,
}

impl CrlFile {
    /// Loads the file, which may be missing but not unreadable or malformed, and watches it.
    ///
    /// Reads a file, blocking. Needs a tokio runtime.
    pub fn open(path: &Path) -> Result<Self, CrlError> {
        // Watched before it is read: no change falls in between.
        let watch = DirectoryWatch::start(path)
            .map_err(|source| CrlError::Watch { path: path.to_owned(), source })?;
        let seen = read(path)?;
        let list = match &seen {
            Some(bytes) => parse(path, bytes)?,
            None => {
                tracing::warn!(
                    path = %path.display(),
                    "there are no revocation lists yet: nothing is revoked"
                );
                RevocationList::default()
            }
        };
        tracing::info!(path = %path.display(), lists = list.len(), "revocation lists");
        let revocations = Revocations::starting_with(list);
        Ok(Self { path: path.into(), watch, revocations, seen, failure: None })
    }

    /// The handle through which handshakes and live connections see the lists.
    pub fn revocations(&self) -> Revocations {
        self.revocations.clone()
    }

    /// Loads the file again after each change, for as long as it is polled. What cannot be read or
    /// used leaves the lists as they were, and so does a file that went away.
    pub async fn follow(mut self) {
        loop {
            self.watch.stirred().await;
            self.watch.refresh();
            let path = self.path.clone();
            let reading = tokio::task::spawn_blocking(move || read(&path)).await;
            match reading {
                Ok(reading) => self.take(reading),
                Err(error) => tracing::error!(%error, "revocation lists stay as they were"),
            }
            self.watch.looked();
        }
    }

    fn take(&mut self, reading: Result<Option<Vec<u8>>, CrlError>) {
        let bytes = match reading {
            Ok(Some(bytes)) => bytes,
            Ok(None) if self.seen.is_none() => return,
            Ok(None) => return self.keep("the file is gone".to_owned()),
            Err(error) => return self.keep(error.to_string()),
        };
        if self.failure.is_none() && self.seen.as_ref() == Some(&bytes) {
            return;
        }
        match parse(&self.path, &bytes) {
            Ok(list) => {
                tracing::info!(path = %self.path.display(), lists = list.len(), "revocation lists");
                self.failure = None;
                self.revocations.replace(list);
                self.seen = Some(bytes);
            }
            Err(error) => self.keep(error.to_string()),
        }
    }

    fn keep(&mut self, failure: String) {
        if self.failure.as_ref() != Some(&failure) {
            let path = self.path.display();
            tracing::error!(%path, %failure, "revocation lists stay as they were");
            self.failure = Some(failure);
        }
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, CrlError> {
    let failed = |source| CrlError::Read { path: path.to_owned(), source };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    match bytes.len() as u64 > MAX_BYTES {
        true => Err(failed(io::Error::other("it is larger than 64 MiB"))),
        false => Ok(Some(bytes)),
    }
}

fn parse(path: &Path, bytes: &[u8]) -> Result<RevocationList, CrlError> {
    RevocationList::parse(bytes)
        .map_err(|reason| CrlError::Invalid { path: path.to_owned(), reason })
}

#[cfg(test)]
mod tests;
