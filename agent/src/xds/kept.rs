//! The last good state on disk, for an agent that starts while the control plane is away.
//!
//! The file holds the resources as they came, with their versions. Its head tells until when they
//! are known to have been current, which is renewed in place while a stream is open:
//!
//! | Bytes | Content |
//! |---|---|
//! | 8 | magic and format version |
//! | 8 | seconds since 1970, big-endian |
//! | 32 | SHA-256 of the rest of the head |
//! | 32 | SHA-256 of the body |
//! | | the body: length-delimited messages, first [`Scope`], then each [`Resource`] |

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prost::Message;
use sha2::{Digest, Sha256};

use super::session::{Item, Kind, Version};

const MAGIC: [u8; 8] = *b"CVXDS\0\0\x01";
const SUM: usize = 32;
/// Where the time begins.
const TIME: usize = MAGIC.len();
const HEAD_SUM: usize = TIME + 8;
const BODY_SUM: usize = HEAD_SUM + SUM;
const HEAD: usize = BODY_SUM + SUM;
/// How far the clock may have been set back since the file was written.
const FUTURE: Duration = Duration::from_secs(60);

/// For whom a state holds.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Scope {
    #[prost(string, tag = "1")]
    pub cluster_id: String,
    #[prost(bool, tag = "2")]
    pub on_demand: bool,
}

/// One resource.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub(super) struct Resource {
    /// 1: address, 2: authorization.
    #[prost(uint32, tag = "1")]
    pub kind: u32,
    #[prost(string, tag = "2")]
    pub name: String,
    #[prost(string, tag = "3")]
    pub version: String,
    #[prost(bytes = "bytes", tag = "4")]
    pub value: Bytes,
}

impl Resource {
    pub fn kind(&self) -> Option<Kind> {
        match self.kind {
            1 => Some(Kind::Address),
            2 => Some(Kind::Authorization),
            _ => None,
        }
    }
}

/// Why what was kept is not used, or could not be kept.
#[derive(Debug, thiserror::Error)]
pub(super) enum KeptError {
    #[error("{}: {error}", path.display())]
    File { path: PathBuf, error: io::Error },
    #[error("{}: {what}", path.display())]
    Unusable { path: PathBuf, what: &'static str },
    #[error("{}: it is {age:?} old, more than {max_age:?}", path.display())]
    TooOld { path: PathBuf, age: Duration, max_age: Duration },
}

/// The accepted resources as they came. Costs as much memory as they took on the wire.
#[derive(Clone, Debug, Default)]
pub(super) struct Content(HashMap<(Item, Arc<str>), (Version, Bytes)>);

impl Content {
    /// `value` must not be a slice of more: it would hold on to that.
    pub fn put(&mut self, item: Item, name: Arc<str>, version: Version, value: Bytes) {
        self.0.insert((item, name), (version, value));
    }

    pub fn remove(&mut self, item: Option<Item>, name: &str) {
        if let Some(item) = item {
            self.0.remove(&(item, name.into()));
        }
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }
}

/// A state that was read.
#[derive(Debug)]
pub(super) struct State {
    /// Until when it is known to have been current.
    pub current: SystemTime,
    body: Bytes,
}

/// Where a state is kept.
#[derive(Clone, Debug)]
pub(super) struct Store {
    path: PathBuf,
    scope: Scope,
}

impl Store {
    pub fn new(path: &Path, scope: Scope) -> Self {
        Self { path: path.to_owned(), scope }
    }

    /// Reads what is kept; `None` when there is no file. Blocks.
    pub fn load(&self, max_age: Duration, now: SystemTime) -> Result<Option<State>, KeptError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.failed(error)),
        };
        let unusable = |what| KeptError::Unusable { path: self.path.clone(), what };
        let head = bytes.get(..HEAD).ok_or(unusable("it is cut short"))?;
        if !head.starts_with(&MAGIC) {
            return Err(unusable("it is not a state of this version of the agent"));
        }
        let (time, sums) = (&head[TIME..HEAD_SUM], &head[BODY_SUM..]);
        let mut body = bytes.slice(HEAD..);
        if head[HEAD_SUM..BODY_SUM] != head_sum(time, sums) || sums != &*Sha256::digest(&body) {
            return Err(unusable("its checksum is wrong"));
        }
        let time = <[u8; 8]>::try_from(time).map_err(|_| unusable("it is cut short"))?;
        let current = UNIX_EPOCH + Duration::from_secs(u64::from_be_bytes(time));
        let age = match now.duration_since(current) {
            Ok(age) => age,
            Err(ahead) if ahead.duration() <= FUTURE => Duration::ZERO,
            Err(_) => return Err(unusable("it is from the future")),
        };
        if age > max_age {
            return Err(KeptError::TooOld { path: self.path.clone(), age, max_age });
        }
        match Scope::decode_length_delimited(&mut body) {
            Ok(scope) if scope == self.scope => Ok(Some(State { current, body })),
            Ok(_) => Err(unusable("it is of another cluster or another kind of subscription")),
            Err(_) => Err(unusable("its content cannot be read")),
        }
    }

    /// Replaces what is kept in one step, readable by the owner only. Blocks.
    pub fn write(&self, content: &Content, now: SystemTime) -> Result<(), KeptError> {
        let mut body = self.scope.encode_length_delimited_to_vec();
        for ((item, name), (version, value)) in &content.0 {
            let resource = Resource {
                kind: match item {
                    Item::Workload | Item::Service => 1,
                    Item::Policy => 2,
                },
                name: name.to_string(),
                version: version.to_string(),
                value: value.clone(),
            };
            body.extend_from_slice(&resource.encode_length_delimited_to_vec());
        }
        let mut head = MAGIC.to_vec();
        let body_sum = Sha256::digest(&body);
        head.extend_from_slice(&time_and_sum(now, &body_sum));
        head.extend_from_slice(&body_sum);
        self.replace(&head, &body).map_err(|error| self.failed(error))
    }

    fn replace(&self, head: &[u8], body: &[u8]) -> io::Result<()> {
        let mut name = self.path.clone().into_os_string();
        name.push(".new");
        let next = PathBuf::from(name);
        match fs::remove_file(&next) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&next)?;
        file.write_all(head)?;
        file.write_all(body)?;
        file.sync_all()?;
        fs::rename(&next, &self.path)?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// Tells that what is kept is current still. Blocks.
    pub fn renew(&self, now: SystemTime) -> Result<(), KeptError> {
        let renew = || {
            let file = OpenOptions::new().read(true).write(true).open(&self.path)?;
            let mut body_sum = [0; SUM];
            file.read_exact_at(&mut body_sum, BODY_SUM as u64)?;
            file.write_all_at(&time_and_sum(now, &body_sum), TIME as u64)
        };
        renew().map_err(|error| self.failed(error))
    }

    fn failed(&self, error: io::Error) -> KeptError {
        KeptError::File { path: self.path.clone(), error }
    }
}

/// They lie side by side, so that one write replaces both.
fn time_and_sum(now: SystemTime, body_sum: &[u8]) -> Vec<u8> {
    let time = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs().to_be_bytes();
    [&time[..], &head_sum(&time, body_sum)].concat()
}

fn head_sum(time: &[u8], body_sum: &[u8]) -> [u8; SUM] {
    Sha256::new().chain_update(MAGIC).chain_update(time).chain_update(body_sum).finalize().into()
}

impl Iterator for State {
    type Item = Resource;

    /// The checksum was right: what cannot be read was written by another version, and ends it.
    fn next(&mut self) -> Option<Resource> {
        if self.body.is_empty() {
            return None;
        }
        match Resource::decode_length_delimited(&mut self.body) {
            Ok(resource) => Some(resource),
            Err(error) => {
                tracing::warn!(%error, "the rest of the kept state is left out");
                self.body.clear();
                None
            }
        }
    }
}

#[cfg(test)]
mod tests;
