//! Certificates that their authorities took back, and whether a peer's chain contains one.
//!
//! Certificate revocation lists (RFC 5280, section 5) are looked at in both roles, for every
//! certificate below the root. What they do not speak of is accepted: a list of another authority, an
//! authority without a list, a list that its issuer may not sign. A list stays in force past its
//! `nextUpdate`, because a late list must not end all traffic. Absent on purpose: delta lists, OCSP.

use std::sync::Arc;

use rustls::RootCertStore;
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, TrustAnchor, UnixTime};
use tokio::sync::watch;
use webpki::{
    CertRevocationList, EndEntityCert, KeyUsage, OwnedCertRevocationList, RevocationOptionsBuilder,
    UnknownStatusPolicy,
};

use super::config;

/// What PEM text begins with (RFC 7468, section 2).
const PEM_BEGIN: &[u8] = b"-----BEGIN";

/// The revocation lists of one file. The default revokes nothing.
#[derive(Debug, Default)]
pub struct RevocationList {
    lists: Vec<CertRevocationList<'static>>,
}

/// Bytes that are no revocation list.
#[derive(Debug, thiserror::Error)]
pub enum InvalidCrl {
    #[error("it is not pem: {0}")]
    Pem(pem::Error),
    #[error("list {position} is not a certificate revocation list: {reason}")]
    List { position: usize, reason: webpki::Error },
}

/// Which of the two ends a peer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

impl RevocationList {
    /// Reads PEM with any number of lists, of which other blocks are skipped, or one list as DER.
    /// Nothing at all means that nothing is revoked.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidCrl> {
        let text = bytes.trim_ascii_start();
        if text.is_empty() {
            return Ok(Self::default());
        }
        let lists: Vec<_> = match text.starts_with(PEM_BEGIN) {
            true => CertificateRevocationListDer::pem_slice_iter(text)
                .collect::<Result<_, _>>()
                .map_err(InvalidCrl::Pem)?,
            false => vec![CertificateRevocationListDer::from(bytes)],
        };
        let mut parsed = Vec::with_capacity(lists.len());
        for (position, der) in lists.iter().enumerate() {
            match OwnedCertRevocationList::from_der(der) {
                Ok(list) => parsed.push(list.into()),
                Err(webpki::Error::UnsupportedDeltaCrl) => {
                    tracing::warn!(position, "delta revocation list ignored");
                }
                Err(reason) => return Err(InvalidCrl::List { position, reason }),
            }
        }
        Ok(Self { lists: parsed })
    }

    /// How many lists there are.
    pub fn len(&self) -> usize {
        self.lists.len()
    }

    pub fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    /// Whether a certificate on the path from the chain's leaf to one of the roots is revoked.
    ///
    /// A path is only built for a list that names a presented certificate, to see that the list is
    /// signed by that certificate's issuer. Lists are asked one by one: of two authorities with one
    /// name, as before and after a change of the root's key, each has its own list.
    pub(super) fn revokes(
        &self,
        chain: &[CertificateDer<'_>],
        roots: &[TrustAnchor<'_>],
        role: Role,
        at: UnixTime,
    ) -> bool {
        let Some((leaf, intermediates)) = chain.split_first() else { return false };
        let Ok(leaf) = EndEntityCert::try_from(leaf) else { return false };
        let algorithms = config::provider().signature_verification_algorithms;
        let usage = match role {
            Role::Client => KeyUsage::client_auth(),
            Role::Server => KeyUsage::server_auth(),
        };
        self.lists.iter().filter(|list| names_one_of(list, chain)).any(|list| {
            let list = [list];
            let Ok(options) = RevocationOptionsBuilder::new(&list) else { return false };
            let options = options.with_status_policy(UnknownStatusPolicy::Allow).build();
            let path = leaf.verify_for_usage(
                algorithms.all,
                roots,
                intermediates,
                at,
                usage,
                Some(options),
                None,
            );
            match path {
                Err(webpki::Error::CertRevoked) => true,
                Ok(_) => false,
                Err(reason) => {
                    tracing::debug!(%reason, "revocation list does not bind this chain");
                    false
                }
            }
        })
    }
}

fn names_one_of(list: &CertRevocationList<'_>, chain: &[CertificateDer<'_>]) -> bool {
    chain.iter().any(|der| {
        EndEntityCert::try_from(der).is_ok_and(|certificate| {
            list.issuer() == certificate.issuer()
                && matches!(list.find_serial(certificate.serial()), Ok(Some(_)))
        })
    })
}

/// A handle on the lists in force. The default is an agent without any: nothing is tracked.
///
/// Cloning copies a pointer. What replaces the lists is seen by handshakes that follow and by the
/// [`PeerWatch`] of every live connection.
#[derive(Clone, Debug, Default)]
pub struct Revocations(Option<Arc<watch::Sender<Arc<RevocationList>>>>);

impl Revocations {
    /// A handle whose lists may be replaced.
    pub fn starting_with(list: RevocationList) -> Self {
        Self(Some(Arc::new(watch::Sender::new(Arc::new(list)))))
    }

    /// Puts other lists in force. Without effect on the default handle.
    pub fn replace(&self, list: RevocationList) {
        if let Some(lists) = &self.0 {
            lists.send_replace(Arc::new(list));
        }
    }

    pub(super) fn current(&self) -> Option<Arc<RevocationList>> {
        let lists = self.0.as_ref()?.borrow().clone();
        (!lists.is_empty()).then_some(lists)
    }

    /// Watches a connection whose handshake is over: `chain` is what the peer presented.
    pub(super) fn watch(
        &self,
        chain: Option<&[CertificateDer<'_>]>,
        roots: &Arc<RootCertStore>,
        role: Role,
    ) -> PeerWatch {
        let Some(lists) = &self.0 else { return PeerWatch::Off };
        let Some(chain) = chain.filter(|chain| !chain.is_empty()) else {
            return PeerWatch::Untracked;
        };
        PeerWatch::Tracked(Box::new(Tracked {
            lists: lists.subscribe(),
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
            roots: roots.clone(),
            role,
            at: UnixTime::now(),
        }))
    }
}

/// Tells when the certificate of a live connection's peer is revoked.
///
/// The chain is judged by the roots and at the time of its handshake: neither a rotation nor the end
/// of a short-lived certificate is a revocation.
pub enum PeerWatch {
    /// The agent has no revocation lists.
    Off,
    /// The peer's chain is not known.
    Untracked,
    #[doc(hidden)]
    Tracked(Box<Tracked>),
}

/// What it takes to judge a peer again.
pub struct Tracked {
    lists: watch::Receiver<Arc<RevocationList>>,
    chain: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    role: Role,
    at: UnixTime,
}

impl PeerWatch {
    /// Whether there are lists but nothing to compare them with.
    pub fn is_untracked(&self) -> bool {
        matches!(self, PeerWatch::Untracked)
    }

    /// Ready when lists in force name a certificate of the peer's chain, also if they came while the
    /// handshake was made; otherwise never.
    pub async fn revoked(self) {
        match self {
            PeerWatch::Off | PeerWatch::Untracked => std::future::pending().await,
            PeerWatch::Tracked(tracked) => tracked.revoked().await,
        }
    }
}

impl Tracked {
    async fn revoked(mut self) {
        loop {
            let lists = self.lists.borrow_and_update().clone();
            if lists.revokes(&self.chain, &self.roots.roots, self.role, self.at) {
                return;
            }
            if self.lists.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

#[cfg(test)]
mod tests;
