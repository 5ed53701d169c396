//! Mutual TLS between mesh peers: handshakes that end with a verified SPIFFE identity, or not at all.
//!
//! TLS 1.3 only, `h2` as the only protocol offered, no server name sent, no session resumption: every
//! connection proves both identities anew. What a rotation changes, of the key or of the roots, is the
//! certificate that the next handshake is given; connections that exist keep what they started with.
//! Only a revocation reaches them ([`PeerWatch`]).

use std::time::Duration;

use culvert_core::identity::{Identity, TrustDomains};
use tokio::io::{AsyncRead, AsyncWrite};

pub use certificate::{CertificateSummary, Issued, UnusableCertificate, WorkloadCertificate};
pub(crate) use config::{gather_randomness, provider};
pub use crl::{CrlError, CrlFile};
pub use error::{PeerFault, Side, TlsError};
pub use revocation::{InvalidCrl, PeerWatch, RevocationList, Revocations};
pub use stream::TlsStream;

/// What all handshakes of one agent share beside the roots that come with each certificate.
///
/// The default knows no alias and no revocation.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    pub domains: TrustDomains,
    pub revocations: Revocations,
}

/// How long a handshake may take before the peer counts as absent, unless the caller says otherwise.
pub const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);

/// Accepts a peer on `stream`, with `certificate` as ours, and tells the peer's identity.
///
/// The identity is the first SPIFFE URI of the peer's leaf. The handshake succeeds if the peer's chain
/// ends at one of `certificate`'s roots and at least one of its SPIFFE URIs is of our trust domain or
/// an alias of it.
/// The error does not name the peer's address; the caller knows it.
pub async fn accept<S>(
    mut stream: S,
    certificate: &WorkloadCertificate,
    limit: Duration,
) -> Result<(TlsStream<S>, Identity), TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let shaken = handshake::accept(&mut stream, certificate.server_config());
    let stream = TlsStream::after(within(limit, shaken).await?, stream)?;
    let identity = verify::principal(Some(stream.peer_certificates()))?;
    Ok((stream, identity))
}

/// Connects to a peer over `stream`, with `certificate` as ours.
///
/// The handshake succeeds if the peer's chain ends at one of `certificate`'s roots and one of its SPIFFE
/// URIs equals an entry of `expect`, whose trust domain may go by an alias; with an empty `expect` it
/// never does. `stream` may itself be a tunnel.
///
/// The peer judges our certificate after this returns (TLS 1.3): its refusal is an error of the first read.
pub async fn connect<S>(
    mut stream: S,
    certificate: &WorkloadCertificate,
    expect: &[Identity],
    limit: Duration,
) -> Result<TlsStream<S>, TlsError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    if expect.is_empty() {
        return Err(TlsError::Peer(PeerFault::NothingExpected));
    }
    let shaken = handshake::connect(&mut stream, certificate.client_config(expect));
    TlsStream::after(within(limit, shaken).await?, stream)
}

async fn within<T>(
    limit: Duration,
    handshake: impl Future<Output = std::io::Result<T>>,
) -> Result<T, TlsError> {
    match tokio::time::timeout(limit, handshake).await {
        Ok(outcome) => outcome.map_err(TlsError::from_handshake),
        Err(_) => Err(TlsError::TimedOut { limit }),
    }
}

mod certificate;
mod config;
mod crl;
mod error;
mod handshake;
mod record;
mod revocation;
mod stream;
mod verify;

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
