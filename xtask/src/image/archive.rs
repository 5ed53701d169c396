//! An image becomes one archive, which `docker load`, `ctr image import` and `skopeo` read.
//!
//! It holds an OCI image layout (OCI image specification 1.1) and, over the same blobs, the
//! `manifest.json` of `docker save`.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tar::{Builder, EntryType};

use super::layer::{self, Entry};

/// What the runtime of containers is to know.
#[derive(Clone, Debug)]
pub struct Image {
    /// `[HOST/]PATH:TAG`.
    pub reference: String,
    /// Go's name of it: `amd64` or `arm64`.
    pub architecture: String,
    /// The program that is started, and what stands before a container's own arguments.
    pub entrypoint: Vec<String>,
    /// The arguments when a container states none.
    pub arguments: Vec<String>,
    /// By their paths from the root.
    pub entries: BTreeMap<String, Entry>,
    /// Annotations of the kind `org.opencontainers.image.…`.
    pub labels: BTreeMap<String, String>,
    /// Of everything in it, in seconds since 1970.
    pub created: u64,
}

/// An image archive in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archive {
    pub bytes: Vec<u8>,
    /// Of the manifest: what a registry and a pod's status name the image by.
    pub digest: String,
    /// What a node has to fetch, in bytes.
    pub compressed: usize,
}

/// Equal images become equal bytes.
pub fn archive(image: &Image) -> Result<Archive> {
    let reference = full_reference(&image.reference)?;
    let layer = layer::pack(&image.entries, image.created)?;
    let config = serde_json::to_vec(&config(image, &layer.diff_id)?)?;
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer.bytes)],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let mut entry = descriptor("application/vnd.oci.image.manifest.v1+json", &manifest);
    entry["platform"] = json!({"architecture": image.architecture, "os": "linux"});
    // The first is what containerd calls the image, the second the layout's own name for it.
    entry["annotations"] = json!({
        "io.containerd.image.name": reference,
        "org.opencontainers.image.ref.name": tag(&reference),
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [entry],
    });
    let docker = json!([{
        "Config": blob(&config),
        "RepoTags": [image.reference],
        "Layers": [blob(&layer.bytes)],
    }]);
    let digest = layer::digest(&manifest);
    let compressed = config.len() + manifest.len() + layer.bytes.len();
    let mut files = BTreeMap::from([
        ("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()),
        ("index.json".to_owned(), serde_json::to_vec(&index)?),
        ("manifest.json".to_owned(), serde_json::to_vec(&docker)?),
    ]);
    for bytes in [config, manifest, layer.bytes] {
        files.insert(blob(&bytes), bytes);
    }
    Ok(Archive { bytes: outer(&files, image.created)?, digest, compressed })
}

fn config(image: &Image, diff_id: &str) -> Result<Value> {
    let created = UNIX_EPOCH.checked_add(Duration::from_secs(image.created));
    let created = created.context("the time of the image is beyond what a clock can say")?;
    let created = humantime::format_rfc3339_seconds(created).to_string();
    Ok(json!({
        "created": created,
        "architecture": image.architecture,
        "os": "linux",
        "config": {
            "User": "0:0",
            "Env": ["PATH=/usr/local/bin"],
            "Entrypoint": image.entrypoint,
            "Cmd": image.arguments,
            // Paths that ztunnel's settings give relative begin here.
            "WorkingDir": "/",
            "Labels": image.labels,
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": created, "created_by": "cargo xtask image"}],
    }))
}

fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": layer::digest(bytes), "size": bytes.len()})
}

/// Where the layout keeps it.
fn blob(bytes: &[u8]) -> String {
    format!("blobs/{}", layer::digest(bytes).replace(':', "/"))
}

/// The reference as containerd completes it: what has no registry is Docker's, as in
/// `docker.io/library/culvert:1`.
fn full_reference(reference: &str) -> Result<String> {
    let (name, tag) = match reference.rsplit_once(':') {
        Some((name, tag)) if !name.is_empty() && !tag.is_empty() && !tag.contains('/') => {
            (name, tag)
        }
        _ => bail!("{reference:?} is not NAME:TAG, as registry.example.com/mesh/culvert:1.0"),
    };
    let allowed = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-/:".contains(c);
    if !name.chars().all(allowed) || name.split('/').any(str::is_empty) {
        bail!("{name:?} is not a name of an image: lower-case letters, digits, `.`, `_`, `-`, `/`");
    }
    if tag.len() > 128 || !tag.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c)) {
        bail!("{tag:?} is not a tag of an image: letters, digits, `.`, `_`, `-`");
    }
    Ok(match name.split_once('/') {
        None => format!("docker.io/library/{reference}"),
        Some((host, _)) if host == "localhost" || host.contains(['.', ':']) => reference.to_owned(),
        Some(_) => format!("docker.io/{reference}"),
    })
}

fn tag(reference: &str) -> &str {
    reference.rsplit_once(':').map_or(reference, |(_, tag)| tag)
}

fn outer(files: &BTreeMap<String, Vec<u8>>, modified: u64) -> Result<Vec<u8>> {
    let mut archive = Builder::new(Vec::new());
    for folder in ["blobs/", "blobs/sha256/"] {
        let header = &mut layer::header(EntryType::Directory, 0o755, 0, modified);
        archive.append_data(header, folder, &[][..])?;
    }
    for (path, bytes) in files {
        let header = &mut layer::header(EntryType::Regular, 0o644, bytes.len() as u64, modified);
        archive.append_data(header, path, &bytes[..])?;
    }
    Ok(archive.into_inner()?)
}

#[cfg(test)]
mod tests;
