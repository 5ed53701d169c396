//! Who a peer is: its certification path, then the SPIFFE rules of each role.
//!
//! Names of hosts and addresses in a certificate mean nothing here. Both verifiers first let the TLS
//! library validate the path (roots, validity, extended key usage), then ask whether any of it was
//! revoked, and only then look at identities.

use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::{Identity, InvalidIdentity, TrustDomains};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};
use time::OffsetDateTime;
use webpki::{EndEntityCert, KeyUsage};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::error::{PeerFault, TlsError};
use super::revocation::Role;
use super::{Trust, config};

/// Verifies clients: one of their identities must be of our trust domain, by its name or an alias.
#[derive(Debug)]
pub(super) struct ClientVerifier {
    path: Arc<dyn ClientCertVerifier>,
    roots: Arc<RootCertStore>,
    trust_domain: Arc<str>,
    trust: Trust,
}

impl ClientVerifier {
    /// `path` validates to `roots`.
    pub(super) fn new(
        path: Arc<dyn ClientCertVerifier>,
        roots: Arc<RootCertStore>,
        trust_domain: Arc<str>,
        trust: Trust,
    ) -> Self {
        Self { path, roots, trust_domain, trust }
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.path.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.path.verify_client_cert(leaf, intermediates, now)?;
        not_revoked(&self.trust, leaf, intermediates, &self.roots, Role::Client, now)
            .and_then(|()| of_trust_domain(leaf, &self.trust_domain, &self.trust.domains))
            .map_err(PeerFault::into_tls)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.path.supported_verify_schemes()
    }
}

/// Verifies servers: one of their identities must be one that is expected there.
#[derive(Clone, Debug)]
pub(super) struct ServerVerifier {
    roots: Arc<RootCertStore>,
    algorithms: WebPkiSupportedAlgorithms,
    trust: Trust,
    expected: Vec<Identity>,
}

impl ServerVerifier {
    /// Refuses everyone until [`Self::expecting`] says who is expected.
    pub(super) fn new(
        roots: Arc<RootCertStore>,
        algorithms: WebPkiSupportedAlgorithms,
        trust: Trust,
    ) -> Self {
        Self { roots, algorithms, trust, expected: Vec::new() }
    }

    pub(super) fn expecting(&self, expected: &[Identity]) -> Self {
        Self { expected: expected.to_vec(), ..self.clone() }
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _unsent_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(leaf)?,
            &self.roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        not_revoked(&self.trust, leaf, intermediates, &self.roots, Role::Server, now)
            .and_then(|()| one_expected(leaf, &self.expected, &self.trust.domains))
            .map_err(PeerFault::into_tls)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, leaf, signature, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, leaf, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Whether a chain of our own ends at one of `roots` and may serve in both roles at `now`.
pub(super) fn own_path(
    chain: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: OffsetDateTime,
) -> Result<(), String> {
    let (leaf, intermediates) = chain.split_first().ok_or("it is empty")?;
    let leaf = EndEntityCert::try_from(leaf).map_err(|reason| reason.to_string())?;
    let algorithms = config::provider().signature_verification_algorithms.all;
    let now = u64::try_from(now.unix_timestamp()).unwrap_or_default();
    let now = UnixTime::since_unix_epoch(Duration::from_secs(now));
    for usage in [KeyUsage::client_auth(), KeyUsage::server_auth()] {
        leaf.verify_for_usage(algorithms, &roots.roots, intermediates, now, usage, None, None)
            .map_err(|reason| format!("{reason:?}"))?;
    }
    Ok(())
}

/// The identity that authorization sees: the first of the verified leaf, whichever one let it in.
pub(super) fn principal(chain: Option<&[CertificateDer<'_>]>) -> Result<Identity, TlsError> {
    let leaf = chain.and_then(<[_]>::first).ok_or(TlsError::Peer(PeerFault::NoCertificate))?;
    let found = identities(leaf).map_err(TlsError::Peer)?;
    found.into_iter().next().ok_or(TlsError::Peer(PeerFault::NoIdentity { found: Vec::new() }))
}

fn not_revoked(
    trust: &Trust,
    leaf: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    role: Role,
    now: UnixTime,
) -> Result<(), PeerFault> {
    let Some(lists) = trust.revocations.current() else { return Ok(()) };
    let chain: Vec<_> = std::iter::once(leaf).chain(intermediates).cloned().collect();
    match lists.revokes(&chain, &roots.roots, role, now) {
        true => Err(PeerFault::Revoked),
        false => Ok(()),
    }
}

fn of_trust_domain(
    leaf: &CertificateDer<'_>,
    own: &str,
    domains: &TrustDomains,
) -> Result<(), PeerFault> {
    let found = identities(leaf)?;
    match found.iter().any(|identity| domains.are_one(&identity.trust_domain, own)) {
        true => Ok(()),
        false => Err(PeerFault::ForeignTrustDomain { found, own: own.to_owned() }),
    }
}

fn one_expected(
    leaf: &CertificateDer<'_>,
    expected: &[Identity],
    domains: &TrustDomains,
) -> Result<(), PeerFault> {
    if expected.is_empty() {
        return Err(PeerFault::NothingExpected);
    }
    let found = identities(leaf)?;
    let is_expected =
        |identity| expected.iter().any(|wanted| domains.same_workload(wanted, identity));
    match found.iter().any(is_expected) {
        true => Ok(()),
        false => Err(PeerFault::Unexpected { found, expected: expected.to_vec() }),
    }
}

/// The SPIFFE identities of a leaf in their order, at least one.
fn identities(leaf: &CertificateDer<'_>) -> Result<Vec<Identity>, PeerFault> {
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|error| PeerFault::Path(format!("it cannot be read: {error}")))?;
    let uris = uris(&leaf).map_err(PeerFault::Path)?;
    let (mut parsed, mut foreign) = (Vec::new(), Vec::<InvalidIdentity>::new());
    for uri in uris {
        match uri.parse() {
            Ok(identity) => parsed.push(identity),
            Err(invalid) => foreign.push(invalid),
        }
    }
    match parsed.is_empty() {
        true => Err(PeerFault::NoIdentity { found: foreign }),
        false => Ok(parsed),
    }
}

/// The URIs among the subject alternative names, in their order (RFC 5280, section 4.2.1.6).
pub(super) fn uris<'a>(leaf: &'a X509Certificate<'_>) -> Result<Vec<&'a str>, String> {
    let extension = leaf
        .subject_alternative_name()
        .map_err(|error| format!("its subject alternative names cannot be read: {error}"))?;
    let names = extension.map(|extension| extension.value.general_names.as_slice());
    let uri = |name: &'a GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    };
    Ok(names.unwrap_or_default().iter().filter_map(uri).collect())
}
