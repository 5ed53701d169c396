//! Files become a layer: a tar archive whose bytes follow from the files alone.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::{Context, Result};
use flate2::{Compression, GzBuilder};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

/// One thing in the image, by its path from the root without a leading slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Permission bits, such as `0o1777`.
    Directory(u32),
    /// Permission bits and contents.
    File(u32, Vec<u8>),
}

/// A layer as a registry keeps it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Compressed with gzip.
    pub bytes: Vec<u8>,
    /// `sha256:…` of the archive before compression (`diff_ids` of OCI image configuration).
    pub diff_id: String,
}

/// Sorts the entries, adds the directories above them, and gives everything to root, with one
/// time of modification (seconds since 1970).
pub fn pack(entries: &BTreeMap<String, Entry>, modified: u64) -> Result<Layer> {
    let mut whole = entries.clone();
    for path in entries.keys() {
        for (end, _) in path.match_indices('/') {
            whole.entry(path[..end].to_owned()).or_insert(Entry::Directory(0o755));
        }
    }
    let mut archive = Builder::new(Vec::new());
    for (path, entry) in &whole {
        let failed = || format!("packing {path}");
        match entry {
            Entry::Directory(mode) => {
                let header = &mut header(EntryType::Directory, *mode, 0, modified);
                archive.append_data(header, format!("{path}/"), &[][..]).with_context(failed)?;
            }
            Entry::File(mode, bytes) => {
                let length = bytes.len() as u64;
                let header = &mut header(EntryType::Regular, *mode, length, modified);
                archive.append_data(header, path, &bytes[..]).with_context(failed)?;
            }
        }
    }
    let archive = archive.into_inner()?;
    Ok(Layer { bytes: compress(&archive)?, diff_id: digest(&archive) })
}

/// `sha256:` and the digest in hexadecimal (OCI image specification, "Digests").
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The head of an entry that belongs to root.
pub fn header(kind: EntryType, mode: u32, length: u64, modified: u64) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(length);
    header.set_mtime(modified);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// Without a time and without a name in its head, so that equal archives stay equal.
fn compress(archive: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    encoder.write_all(archive)?;
    Ok(encoder.finish()?)
}

#[cfg(test)]
mod tests;
