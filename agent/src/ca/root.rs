//! The embedded authority's root: a key and a certificate in a directory that several agents may share.
//!
//! Both files appear whole or not at all and are never replaced: each is written under a name of its own
//! and then linked to its place (link(2) fails where something is). Agents that start together agree on
//! the key that was linked first and on the first certificate made for it, without a lock.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, SanType,
};
use time::OffsetDateTime;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::pem::Pem;

const KEY_FILE: &str = "root.key";
const CERTIFICATE_FILE: &str = "root.pem";

/// Ten years.
const LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);

/// How far a new certificate begins in the past, for nodes whose clocks are behind.
pub(super) const BACKDATED: Duration = Duration::from_secs(120);

/// A root certificate with its key, able to sign.
pub(super) struct Root {
    pub(super) issuer: Issuer<'static, KeyPair>,
    pub(super) certificate: Vec<u8>,
    pub(super) not_after: OffsetDateTime,
}

/// A directory that does not hold a usable root.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    #[error("cannot {action} {}: {source}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{} has mode {mode:04o}, others than its owner may {harm}", path.display())]
    Exposed { path: PathBuf, mode: u32, harm: &'static str },
    #[error("{} is there but its key {} is not", certificate.display(), key.display())]
    MissingKey { certificate: PathBuf, key: PathBuf },
    #[error("{} is unusable: {reason}", path.display())]
    Unusable { path: PathBuf, reason: String },
    #[error("{} is not the certificate of the key {}", certificate.display(), key.display())]
    Mismatch { certificate: PathBuf, key: PathBuf },
    #[error("{} is the root of trust domain {found:?}, not of {own:?}", path.display())]
    ForeignTrustDomain { path: PathBuf, found: String, own: String },
    #[error("{} expired at {at}", path.display())]
    Expired { path: PathBuf, at: OffsetDateTime },
    #[error("certificate lifetime of {0:?} is not between 10 s and 10 years")]
    Lifetime(Duration),
}

impl Root {
    /// Reads the root in `directory`, or makes it where there is none yet.
    ///
    /// A root that was put there by hand may have any name and algorithm; if it says which trust domain
    /// it is for (a SPIFFE URI, as ours does), that must be `trust_domain`.
    pub(super) fn open(directory: &Path, trust_domain: &str) -> Result<Self, RootError> {
        make_private(directory)?;
        let (key_path, path) = (directory.join(KEY_FILE), directory.join(CERTIFICATE_FILE));

        // A key is always placed before its certificate, hence this order of looking.
        let certified = path.try_exists().map_err(failed("look for", &path))?;
        let key = match read_key(&key_path)? {
            Some(key) => key,
            None if certified => {
                return Err(RootError::MissingKey { certificate: path, key: key_path });
            }
            None => place_key(&key_path)?,
        };
        if !certified {
            let pem = self_signed(&key, trust_domain)
                .map_err(|error| unusable(&path, error.to_string()))?;
            place(&path, 0o644, pem.as_bytes())?;
        }
        Self::load(path, key_path, key, trust_domain)
    }

    fn load(
        path: PathBuf,
        key_path: PathBuf,
        key: KeyPair,
        trust_domain: &str,
    ) -> Result<Self, RootError> {
        let text = fs::read(&path).map_err(failed("read", &path))?;
        let pem = sole_block(&text).map_err(|reason| unusable(&path, reason))?;
        let parsed = pem.parse_x509().map_err(|error| unusable(&path, error.to_string()))?;

        if parsed.public_key().raw != key.subject_public_key_info() {
            return Err(RootError::Mismatch { certificate: path, key: key_path });
        }
        if !parsed.is_ca() {
            return Err(unusable(&path, "it is not the certificate of an authority".to_owned()));
        }
        let not_after = parsed.validity().not_after.to_datetime();
        if not_after <= OffsetDateTime::now_utc() {
            return Err(RootError::Expired { path, at: not_after });
        }
        if let Some(found) = trust_domain_of(&parsed).filter(|found| found != trust_domain) {
            return Err(RootError::ForeignTrustDomain {
                path,
                found,
                own: trust_domain.to_owned(),
            });
        }
        drop(parsed);
        let issuer = Issuer::from_ca_cert_der(&pem.contents.as_slice().into(), key)
            .map_err(|error| unusable(&path, error.to_string()))?;
        Ok(Self { issuer, certificate: pem.contents, not_after })
    }
}

fn make_private(directory: &Path) -> Result<(), RootError> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
    made.map_err(failed("create", directory))?;
    let mode = fs::metadata(directory).map_err(failed("inspect", directory))?.mode() & 0o7777;
    match mode & 0o022 {
        0 => Ok(()),
        _ => Err(RootError::Exposed { path: directory.to_owned(), mode, harm: "write to it" }),
    }
}

/// The key, if there is one. Its mode is that of the opened file, so that it cannot change in between.
fn read_key(path: &Path) -> Result<Option<KeyPair>, RootError> {
    let mut file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mode = file.metadata().map_err(failed("inspect", path))?.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(RootError::Exposed { path: path.to_owned(), mode, harm: "use it" });
    }
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(failed("read", path))?;
    KeyPair::from_pem(&text).map(Some).map_err(|error| unusable(path, error.to_string()))
}

/// A new key at `path`, or the one that another agent placed there first.
fn place_key(path: &Path) -> Result<KeyPair, RootError> {
    let new = KeyPair::generate().map_err(|error| unusable(path, error.to_string()))?;
    place(path, 0o600, new.serialize_pem().as_bytes())?;
    read_key(path)?.ok_or_else(|| failed("open", path)(ErrorKind::NotFound.into()))
}

fn self_signed(key: &KeyPair, trust_domain: &str) -> Result<String, rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name.push(DnType::CommonName, "Culvert root");
    // The SPIFFE ID of a signing authority is its trust domain (X509-SVID, section 3).
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{trust_domain}").try_into()?)];
    // It signs leaves only.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let now = OffsetDateTime::now_utc();
    params.not_before = now - BACKDATED;
    params.not_after = now + LIFETIME;
    Ok(params.self_signed(key)?.pem())
}

fn trust_domain_of(root: &X509Certificate<'_>) -> Option<String> {
    let names = root.subject_alternative_name().ok().flatten()?;
    names.value.general_names.iter().find_map(|name| match name {
        GeneralName::URI(uri) => uri.strip_prefix("spiffe://").map(str::to_owned),
        _ => None,
    })
}

fn sole_block(text: &[u8]) -> Result<Pem, String> {
    let mut blocks = Pem::iter_from_buffer(text);
    let first = blocks.next().ok_or("it contains no pem block")?.map_err(|e| e.to_string())?;
    match (first.label.as_str(), blocks.next()) {
        ("CERTIFICATE", None) => Ok(first),
        ("CERTIFICATE", Some(_)) => Err("it contains more than one pem block".to_owned()),
        (label, _) => Err(format!("it contains a pem block {label:?}, expected a certificate")),
    }
}

/// Puts a file at `path` whole, unless there is one.
fn place(path: &Path, mode: u32, content: &[u8]) -> Result<(), RootError> {
    let unique = format!("new-{}-{:016x}", std::process::id(), rand::random::<u64>());
    let draft = path.with_extension(unique);
    let written = write_durably(&draft, mode, content);
    let linked = written.and_then(|()| match fs::hard_link(&draft, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        linked => linked.map_err(failed("create", path)),
    });
    // The draft may hold a key: it goes whatever happened. It is not there if it could not be written.
    let _ = fs::remove_file(&draft);
    linked?;
    match path.parent() {
        Some(directory) => fs::File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(failed("sync", directory)),
        None => Ok(()),
    }
}

fn write_durably(path: &Path, mode: u32, content: &[u8]) -> Result<(), RootError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(failed("create", path))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(failed("write", path))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootError {
    let path = path.to_owned();
    move |source| RootError::Io { action, path, source }
}

fn unusable(path: &Path, reason: String) -> RootError {
    RootError::Unusable { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests;
