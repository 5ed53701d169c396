//! Why there is no certificate for an identity.

use std::sync::Arc;

use culvert_core::identity::Identity;
use time::OffsetDateTime;

use super::ChainError;
use crate::tls::UnusableCertificate;

/// Why there is no certificate for an identity.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The identity may not be issued here; asking again does not help until the mesh changes.
    #[error("no certificate for {identity}: {reason}")]
    Refused { identity: Identity, reason: Refusal },
    /// The authority could not be reached or did not sign.
    #[error("certificate authority {ca} failed for {identity}: {reason}")]
    Failed { identity: Identity, ca: Arc<str>, reason: String },
    /// The authority did not answer in time.
    #[error("certificate authority {ca} did not answer for {identity} within {seconds} s")]
    TimedOut { identity: Identity, ca: Arc<str>, seconds: u64 },
    /// What the authority answered is not what was asked for.
    #[error("certificate authority {ca} answered wrongly for {identity}: {fault}")]
    Answer { identity: Identity, ca: Arc<str>, fault: AnswerFault },
    /// What was cached is past its end.
    #[error("certificate of {identity} expired")]
    Expired { identity: Identity },
    /// The last workload of the identity left this node while its certificate was awaited.
    #[error("{identity} was forgotten")]
    Forgotten { identity: Identity },
}

/// What is wrong with an authority's answer.
#[derive(Debug, thiserror::Error)]
pub enum AnswerFault {
    /// Not a list of PEM certificates as the protocol has it.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It cannot serve in handshakes; also when it is for another key.
    #[error(transparent)]
    Unusable(Box<UnusableCertificate>),
    #[error("the certificate is for {0}")]
    WrongIdentity(Identity),
    #[error("the certificate is not valid before {from}, and it is {now}")]
    NotYetValid { from: OffsetDateTime, now: OffsetDateTime },
    #[error("the certificate expired at {at}")]
    Expired { at: OffsetDateTime },
    #[error("the certificate does not hold under the roots that came with it: {0}")]
    Path(String),
}

/// Why a certificate authority does not issue for an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("a part of the identity is empty or contains a slash")]
    Incomplete,
    #[error("the authority is of trust domain {0}")]
    ForeignTrustDomain(String),
    #[error("no workload of this node has this identity")]
    NotOfThisNode,
}
