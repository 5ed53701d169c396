//! Why a handshake failed, and whose side that is on.

use std::io;
use std::time::Duration;

use culvert_core::identity::{Identity, InvalidIdentity};
use rustls::{AlertDescription, CertificateError, OtherError};

/// A handshake that did not end with a verified peer.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The peer did not finish in time, or its bytes did not arrive.
    #[error("tls handshake with peer not finished within {limit:?}")]
    TimedOut { limit: Duration },
    /// The connection ended or broke during the handshake.
    #[error("connection lost during tls handshake: {0}")]
    Lost(#[source] io::Error),
    /// We refuse the peer's certificate.
    #[error("peer's certificate refused: {0}")]
    Peer(#[source] PeerFault),
    /// The peer refuses us and says so by this alert (RFC 8446, section 6.2).
    #[error("refused by peer with tls alert {0:?}")]
    RefusedByPeer(AlertDescription),
    /// The peer does not speak TLS 1.3 as this mesh does.
    #[error("peer's tls handshake is unacceptable: {0}")]
    Protocol(#[source] rustls::Error),
    /// Our own side could not do its part.
    #[error("own side of tls handshake failed: {0}")]
    Own(#[source] rustls::Error),
    /// The handshake left keys that cannot be used.
    #[error("own side of tls handshake failed: {0}")]
    Keys(String),
}

/// Who has to be looked at when a handshake failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The other end: its certificate, its protocol, or its refusal.
    Peer,
    /// What lies between the two ends, or a peer that is not there.
    Network,
    /// This agent.
    Us,
}

impl TlsError {
    pub fn side(&self) -> Side {
        match self {
            Self::TimedOut { .. } | Self::Lost(_) => Side::Network,
            Self::Peer(PeerFault::NothingExpected) | Self::Own(_) | Self::Keys(_) => Side::Us,
            Self::Peer(_) | Self::RefusedByPeer(_) | Self::Protocol(_) => Side::Peer,
        }
    }

    /// Whether the peer was refused because its certificate is revoked.
    pub fn is_revoked(&self) -> bool {
        matches!(self, Self::Peer(PeerFault::Revoked))
    }

    /// Reads the cause back out of the `io::Error` that the handshake future wraps it in.
    pub(super) fn from_handshake(error: io::Error) -> Self {
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match cause.cloned() {
            None => Self::Lost(error),
            Some(cause) => Self::from_tls(cause),
        }
    }

    fn from_tls(cause: rustls::Error) -> Self {
        match cause {
            rustls::Error::InvalidCertificate(fault) => Self::Peer(PeerFault::from_tls(fault)),
            rustls::Error::NoCertificatesPresented => Self::Peer(PeerFault::NoCertificate),
            rustls::Error::AlertReceived(alert) => Self::RefusedByPeer(alert),
            rustls::Error::General(_)
            | rustls::Error::FailedToGetCurrentTime
            | rustls::Error::FailedToGetRandomBytes
            | rustls::Error::Other(_) => Self::Own(cause),
            _ => Self::Protocol(cause),
        }
    }
}

/// What is wrong with a peer's certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PeerFault {
    #[error("none was presented")]
    NoCertificate,
    #[error("it expired")]
    Expired,
    #[error("its chain does not end at a root that we trust")]
    UntrustedRoot,
    /// A list in force names a certificate of the chain (RFC 5280, section 5).
    #[error("it was revoked by its authority")]
    Revoked,
    /// Any other fault of the certification path (RFC 5280, section 6).
    #[error("{0}")]
    Path(String),
    #[error("it names no workload identity ({})", listed(.found))]
    NoIdentity { found: Vec<InvalidIdentity> },
    #[error("it is for {}, of another trust domain than our {own}", listed(.found))]
    ForeignTrustDomain { found: Vec<Identity>, own: String },
    #[error("it is for {}, expected {}", listed(.found), listed(.expected))]
    Unexpected { found: Vec<Identity>, expected: Vec<Identity> },
    /// Not the peer's fault: we know of no identity that could be right.
    #[error("no identity is expected there")]
    NothingExpected,
}

impl PeerFault {
    /// What the verifiers of this module hand through the TLS library.
    pub(super) fn into_tls(self) -> rustls::Error {
        CertificateError::Other(OtherError(std::sync::Arc::new(self))).into()
    }

    fn from_tls(fault: CertificateError) -> Self {
        match &fault {
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::UnknownIssuer => Self::UntrustedRoot,
            CertificateError::Other(OtherError(own)) => match own.downcast_ref::<Self>() {
                Some(own) => own.clone(),
                None => Self::Path(fault.to_string()),
            },
            _ => Self::Path(fault.to_string()),
        }
    }
}

fn listed(items: &[impl ToString]) -> String {
    match items {
        [] => "nothing".to_owned(),
        items => items.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
    }
}
