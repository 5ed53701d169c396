//! What can be wrong with the file, and where.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A line and column of the file, both counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

/// Why the file cannot be used. The operator's side is at fault, save for `Watch`.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("{}: cannot be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// A directory, a pipe or a device, or larger than 512 MiB.
    #[error("{}: {why}", path.display())]
    NotAFile { path: PathBuf, why: &'static str },
    /// `what` names the field, as `workloads[1].services`, and says why it is refused.
    #[error("{}{}: {what}", path.display(), Suffix(*place))]
    Invalid { path: PathBuf, place: Option<Place>, what: String },
    /// The kernel offers no more inotify instances or watches.
    #[error("{}: cannot be watched: {source}", path.display())]
    Watch { path: PathBuf, source: notify::Error },
}

impl FileError {
    /// Where in the file, if the error is about its content.
    pub fn place(&self) -> Option<Place> {
        match self {
            FileError::Invalid { place, .. } => *place,
            FileError::Unreadable { .. } | FileError::NotAFile { .. } | FileError::Watch { .. } => {
                None
            }
        }
    }
}

/// `:12:5`, or nothing.
struct Suffix(Option<Place>);

impl fmt::Display for Suffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(Place { line, column }) => write!(f, ":{line}:{column}"),
            None => Ok(()),
        }
    }
}
