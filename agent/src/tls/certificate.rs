//! A workload's certificate with its key and roots, ready for handshakes.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use culvert_core::identity::{Identity, InvalidIdentity};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use time::OffsetDateTime;
use time::macros::format_description;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use super::revocation::{PeerWatch, Role};
use super::verify::{self, ServerVerifier};
use super::{TlsStream, Trust, config};

/// What an authority issued, everything as DER.
#[derive(Clone)]
pub struct Issued {
    /// Leaf first, without its root.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8.
    pub key: Vec<u8>,
    /// What peers are verified against, perhaps several.
    pub roots: Vec<Vec<u8>>,
}

/// Without the key.
impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (chain, roots) = (self.chain.len(), self.roots.len());
        f.debug_struct("Issued")
            .field("chain", &chain)
            .field("roots", &roots)
            .finish_non_exhaustive()
    }
}

/// A key with its certificate chain and the roots to verify peers with.
///
/// The identity is the leaf's first URI. The TLS configurations are made once, here: an accepted
/// handshake shares the server's; a connecting one copies a few pointers of the client's.
pub struct WorkloadCertificate {
    identity: Identity,
    chain: Vec<Described>,
    roots: Vec<Described>,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    verifier: ServerVerifier,
    anchors: Arc<RootCertStore>,
    trust: Trust,
}

impl WorkloadCertificate {
    /// A root that cannot serve as a trust anchor is left out as long as another can. Peers are also
    /// judged by `trust`, as it is during their handshake.
    pub fn new(issued: Issued, trust: &Trust) -> Result<Self, UnusableCertificate> {
        let Issued { chain, key, roots } = issued;
        let chain = chain.into_iter().map(Described::read).collect::<Result<Vec<_>, _>>()?;
        let leaf = chain.first().ok_or(UnusableCertificate::EmptyChain)?;
        let identity = leaf.identity()?;
        let (not_before, not_after) = (leaf.not_before, leaf.not_after);
        let (roots, anchors) = trust_anchors(roots)?;

        let provider = Arc::new(config::provider());
        let sent = chain.iter().map(|described| described.der.clone()).collect();
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key));
        let key = CertifiedKey::from_der(sent, key, &provider)
            .map_err(|reason| UnusableCertificate::Key { identity: identity.clone(), reason })?;
        let (key, anchors) = (Arc::new(key), Arc::new(anchors));
        let algorithms = provider.signature_verification_algorithms;
        let verifier = ServerVerifier::new(anchors.clone(), algorithms, trust.clone());
        let server = config::server(&provider, &key, &anchors, &identity.trust_domain, trust)
            .map_err(UnusableCertificate::Configuration)?;
        let client = config::client(&provider, &key, verifier.clone())
            .map_err(UnusableCertificate::Configuration)?;
        Ok(Self {
            identity,
            chain,
            roots,
            not_before,
            not_after,
            server: Arc::new(server),
            client,
            verifier,
            anchors,
            trust: trust.clone(),
        })
    }

    /// Whether peers that have the same roots would accept this chain at `now`, in both roles.
    ///
    /// The error says what is wrong with it.
    pub fn verify_own_path(&self, now: OffsetDateTime) -> Result<(), String> {
        let chain: Vec<_> = self.chain.iter().map(|described| described.der.clone()).collect();
        verify::own_path(&chain, &self.anchors, now)
    }

    /// Watches the client of a connection that was accepted with this certificate.
    pub fn watch_client<S>(&self, stream: &TlsStream<S>) -> PeerWatch {
        let chain = Some(stream.peer_certificates());
        self.trust.revocations.watch(chain, &self.anchors, Role::Client)
    }

    /// Watches the server of a connection that was made with this certificate.
    pub fn watch_server<S>(&self, stream: &TlsStream<S>) -> PeerWatch {
        let chain = Some(stream.peer_certificates());
        self.trust.revocations.watch(chain, &self.anchors, Role::Server)
    }

    /// Whom the leaf is for.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    pub fn not_before(&self) -> OffsetDateTime {
        self.not_before
    }

    pub fn not_after(&self) -> OffsetDateTime {
        self.not_after
    }

    /// The leaf, then the intermediates: what peers are shown.
    pub fn chain(&self) -> Vec<CertificateSummary> {
        self.chain.iter().map(Described::summary).collect()
    }

    /// The roots that peers must descend from.
    pub fn roots(&self) -> Vec<CertificateSummary> {
        self.roots.iter().map(Described::summary).collect()
    }

    pub(super) fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    pub(super) fn client_config(&self, expect: &[Identity]) -> Arc<ClientConfig> {
        let mut client = self.client.clone();
        let verifier = self.verifier.expecting(expect);
        client.dangerous().set_certificate_verifier(Arc::new(verifier));
        Arc::new(client)
    }
}

/// Without the key, and short.
impl fmt::Debug for WorkloadCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity.to_string())
            .field("not_before", &rfc3339(self.not_before))
            .field("not_after", &rfc3339(self.not_after))
            .finish_non_exhaustive()
    }
}

/// One certificate as dumps show it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateSummary {
    /// PEM text (RFC 7468).
    pub pem: String,
    /// Decimal.
    pub serial: String,
    /// `notBefore` as RFC 3339 in whole seconds, UTC, with `Z`.
    pub valid_from: String,
    /// `notAfter`, written like `valid_from`.
    pub expiration: String,
}

/// A certificate, key or set of roots that cannot make a [`WorkloadCertificate`].
#[derive(Clone, Debug, thiserror::Error)]
pub enum UnusableCertificate {
    #[error("certificate chain is empty")]
    EmptyChain,
    #[error("certificate cannot be read: {0}")]
    Unreadable(String),
    #[error("certificate carries no uri to tell its identity")]
    NoIdentity,
    #[error("certificate is for no workload: {0}")]
    ForeignIdentity(#[from] InvalidIdentity),
    #[error("no usable root certificate among {given}")]
    NoRoot { given: usize },
    #[error("key does not fit the certificate of {identity}: {reason}")]
    Key { identity: Identity, reason: rustls::Error },
    #[error("tls configuration: {0}")]
    Configuration(rustls::Error),
}

/// A certificate and what was read from it.
struct Described {
    der: CertificateDer<'static>,
    serial: String,
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

impl Described {
    fn read(der: Vec<u8>) -> Result<Self, UnusableCertificate> {
        let (_, parsed) = X509Certificate::from_der(&der)
            .map_err(|error| UnusableCertificate::Unreadable(error.to_string()))?;
        Ok(Self {
            serial: parsed.serial.to_string(),
            not_before: parsed.validity().not_before.to_datetime(),
            not_after: parsed.validity().not_after.to_datetime(),
            der: CertificateDer::from(der),
        })
    }

    /// The first URI decides, as it does for the trust domain that peers are measured by.
    fn identity(&self) -> Result<Identity, UnusableCertificate> {
        let (_, parsed) = X509Certificate::from_der(&self.der)
            .map_err(|error| UnusableCertificate::Unreadable(error.to_string()))?;
        let uris = verify::uris(&parsed).map_err(UnusableCertificate::Unreadable)?;
        let first = uris.first().ok_or(UnusableCertificate::NoIdentity)?;
        Ok(first.parse()?)
    }

    fn summary(&self) -> CertificateSummary {
        CertificateSummary {
            pem: pem(&self.der),
            serial: self.serial.clone(),
            valid_from: rfc3339(self.not_before),
            expiration: rfc3339(self.not_after),
        }
    }
}

fn trust_anchors(
    roots: Vec<Vec<u8>>,
) -> Result<(Vec<Described>, RootCertStore), UnusableCertificate> {
    let given = roots.len();
    let mut anchors = RootCertStore::empty();
    let mut used = Vec::with_capacity(given);
    for (position, der) in roots.into_iter().enumerate() {
        let added = Described::read(der).and_then(|root| {
            let added = anchors.add(root.der.clone());
            added.map_err(|error| UnusableCertificate::Unreadable(error.to_string()))?;
            Ok(root)
        });
        match added {
            Ok(root) => used.push(root),
            Err(error) => tracing::warn!(position, %error, "root certificate left out"),
        }
    }
    match used.is_empty() {
        true => Err(UnusableCertificate::NoRoot { given }),
        false => Ok((used, anchors)),
    }
}

/// PEM text (RFC 7468).
fn pem(der: &[u8]) -> String {
    let base64 = STANDARD.encode(der);
    let mut text = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = base64.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str("-----END CERTIFICATE-----\n");
    text
}

fn rfc3339(at: OffsetDateTime) -> String {
    let format = format_description!("[year]-[month]-[day]T[hour]:[minute]:[second]Z");
    // Formatting fails only for a missing component; a date with time and offset has all of these.
    at.to_offset(time::UtcOffset::UTC).format(format).unwrap_or_default()
}
