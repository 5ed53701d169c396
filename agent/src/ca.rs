//! Where workload certificates come from, and the cache that keeps them fresh.

use culvert_core::identity::Identity;
use futures_util::future::BoxFuture;

use crate::tls::{UnusableCertificate, WorkloadCertificate};

pub use certificates::{Certificates, Clock};
pub use chain::{ChainError, IssuedChain, parse_chain};
pub use embedded::{EmbeddedCa, MayIssue};
pub use entries::{CertificateState, State};
pub use root::RootError;

/// Issues certificates for the workloads of this node.
///
/// [`Certificates`] asks for at most 8 at a time. Each call makes a new key.
/// An answer for another identity than the one asked for is refused by [`Certificates`].
pub trait IdentitySource: Send + Sync {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<WorkloadCertificate, CaError>>;
}

/// Why there is no certificate for an identity.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The identity may not be issued here; asking again does not help until the mesh changes.
    #[error("no certificate for {identity}: {reason}")]
    Refused { identity: Identity, reason: Refusal },
    /// The authority could not be reached or could not sign.
    #[error("certificate authority failed for {identity}: {reason}")]
    Failed { identity: Identity, reason: String },
    /// The authority did not answer in time.
    #[error("certificate authority did not answer for {identity} within {seconds} s")]
    TimedOut { identity: Identity, seconds: u64 },
    /// The authority's answer is not a list of PEM certificates as the protocol has it.
    #[error("certificate authority's answer for {identity} is unusable: {reason}")]
    Chain { identity: Identity, reason: ChainError },
    /// The authority's answer cannot serve in handshakes.
    #[error("certificate for {identity} is unusable: {reason}")]
    Unusable { identity: Identity, reason: Box<UnusableCertificate> },
    #[error("certificate authority answered for {issued}, asked for {wanted}")]
    WrongIdentity { wanted: Identity, issued: Identity },
    /// The answer, or what was cached, is past its end.
    #[error("certificate of {identity} expired")]
    Expired { identity: Identity },
    /// The last workload of the identity left this node while its certificate was awaited.
    #[error("{identity} was forgotten")]
    Forgotten { identity: Identity },
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

mod chain;

mod embedded;
mod root;

mod certificates;
mod entries;
mod schedule;
