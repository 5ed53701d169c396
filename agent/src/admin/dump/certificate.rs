//! Certificates as the dump shows them.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use culvert_core::identity::Identity;
use serde::Serialize;
use time::OffsetDateTime;

use super::seconds_utc;

/// The certificate of one identity, or why there is none.
#[derive(Clone, Debug)]
pub struct CertificateState {
    pub identity: Identity,
    pub status: CertificateStatus,
    /// Leaf first, then intermediates.
    pub chain: Vec<Certificate>,
    pub roots: Vec<Certificate>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateStatus {
    Available,
    /// Asked for the first time and not answered yet.
    Initializing,
    /// The last attempt failed, and none from before is valid.
    Unavailable(String),
}

impl fmt::Display for CertificateStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CertificateStatus::Available => f.write_str("Available"),
            CertificateStatus::Initializing => f.write_str("Initializing"),
            CertificateStatus::Unavailable(error) => write!(f, "Unavailable: {error}"),
        }
    }
}

/// One X.509 certificate.
#[derive(Clone, Debug)]
pub struct Certificate {
    /// PEM text (RFC 7468).
    pub pem: String,
    /// The serial number in decimal.
    pub serial: String,
    pub valid_from: OffsetDateTime,
    pub expiration: OffsetDateTime,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct CertificateDump<'a> {
    identity: String,
    state: String,
    cert_chain: Vec<PemDump<'a>>,
    root_certs: Vec<PemDump<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct PemDump<'a> {
    /// Base64 of the PEM text.
    pem: String,
    serial_number: &'a str,
    valid_from: String,
    expiration_time: String,
}

impl<'a> CertificateDump<'a> {
    pub(super) fn of(certificate: &'a CertificateState) -> Self {
        Self {
            identity: certificate.identity.to_string(),
            state: certificate.status.to_string(),
            cert_chain: certificate.chain.iter().map(PemDump::of).collect(),
            root_certs: certificate.roots.iter().map(PemDump::of).collect(),
        }
    }
}

impl<'a> PemDump<'a> {
    fn of(certificate: &'a Certificate) -> Self {
        Self {
            pem: BASE64_STANDARD.encode(&certificate.pem),
            serial_number: &certificate.serial,
            valid_from: seconds_utc(certificate.valid_from),
            expiration_time: seconds_utc(certificate.expiration),
        }
    }
}
