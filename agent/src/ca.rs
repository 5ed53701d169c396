//! Where workload certificates come from, and the cache that keeps them fresh.
//!
//! A source of identities is one trait, [`IdentitySource`]. Another source (a SPIFFE broker, say) is one
//! file here with one implementation of it, chosen in `app`. It only has to get a key, a chain and roots
//! for an identity. Caching, priorities, renewal and retries are those of [`Certificates`], and so are
//! all checks of what came back.

use std::sync::Arc;

use culvert_core::identity::Identity;
use futures_util::future::BoxFuture;

use crate::tls::Issued;

pub use certificates::{Certificates, Clock};
pub use chain::{ChainError, IssuedChain, parse_chain};
pub use embedded::{EmbeddedCa, MayIssue};
pub use entries::{CertificateState, State};
pub use error::{AnswerFault, CaError, Refusal};
pub use istio::IstioCa;
pub use local::{IdentityChanges, LocalIdentities};
pub use root::RootError;

/// Issues certificates for the workloads of this node.
///
/// [`Certificates`] asks for at most 8 at a time, and drops a request that takes longer than 30 s. It
/// refuses an answer whose leaf is not for exactly the identity that was asked for (its first URI), not
/// valid now, not of the key that came with it, or not below one of the roots that came with it.
pub trait IdentitySource: Send + Sync {
    /// Who signs, as messages name it: an address, or a few words.
    fn authority(&self) -> Arc<str>;

    /// A new key with its certificates. A failure is told to connections that wait, and tried again.
    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, CaError>>;
}

mod error;

mod chain;

mod embedded;
mod istio;
mod root;

mod certificates;
mod entries;
mod local;
mod schedule;
