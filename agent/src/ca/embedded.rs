//! A certificate authority inside the agent, for meshes without another one.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::Identity;
use futures_util::future::BoxFuture;
use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose,
    SanType,
};
use time::OffsetDateTime;

use super::root::{BACKDATED, Root, RootError};
use super::{CaError, IdentitySource, Refusal};
use crate::tls::Issued;

/// Whether a certificate may be issued here: whether a workload of this node has the identity now.
pub type MayIssue = Arc<dyn Fn(&Identity) -> bool + Send + Sync>;

/// Certificates shorter than this could not be refreshed in time.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(10);

/// Longer than the root's own.
const LONGEST_LIFETIME: Duration = Duration::from_secs(3650 * 24 * 3600);

/// Signs with a root from a directory. Agents with the same directory form one mesh.
pub struct EmbeddedCa {
    root: Root,
    lifetime: Duration,
    trust_domain: Arc<str>,
    may_issue: MayIssue,
}

impl EmbeddedCa {
    /// Opens the authority in `directory`: `root.key` and `root.pem`, made there if there are none.
    ///
    /// The directory is made with mode 0700. A key that others may read is refused, as are files that
    /// do not belong together; the error names the file. Reads and writes files, blocking.
    pub fn open(
        directory: &Path,
        lifetime: Duration,
        trust_domain: impl Into<Arc<str>>,
        may_issue: MayIssue,
    ) -> Result<Self, RootError> {
        if !(SHORTEST_LIFETIME..=LONGEST_LIFETIME).contains(&lifetime) {
            return Err(RootError::Lifetime(lifetime));
        }
        let trust_domain = trust_domain.into();
        let root = Root::open(directory, &trust_domain)?;
        Ok(Self { root, lifetime, trust_domain, may_issue })
    }

    fn permitted(&self, identity: &Identity) -> Result<(), Refusal> {
        if !identity.is_complete() {
            return Err(Refusal::Incomplete);
        }
        if identity.trust_domain != self.trust_domain {
            return Err(Refusal::ForeignTrustDomain(self.trust_domain.to_string()));
        }
        match (self.may_issue)(identity) {
            true => Ok(()),
            false => Err(Refusal::NotOfThisNode),
        }
    }

    fn sign(&self, identity: &Identity) -> Result<Issued, CaError> {
        self.permitted(identity)
            .map_err(|reason| CaError::Refused { identity: identity.clone(), reason })?;
        let failed =
            |reason| CaError::Failed { identity: identity.clone(), ca: self.authority(), reason };

        let now = OffsetDateTime::now_utc();
        if self.root.not_after <= now {
            return Err(failed(format!("root certificate expired at {}", self.root.not_after)));
        }
        let (leaf, key) = self.leaf(identity, now).map_err(|error| failed(error.to_string()))?;
        Ok(Issued { chain: vec![leaf], key, roots: vec![self.root.certificate.clone()] })
    }

    /// A new leaf and its key (PKCS#8), both DER.
    fn leaf(
        &self,
        identity: &Identity,
        now: OffsetDateTime,
    ) -> Result<(Vec<u8>, Vec<u8>), rcgen::Error> {
        let mut params = CertificateParams::default();
        // With an empty subject the alternative names are critical (RFC 5280, section 4.2.1.6).
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        // Of a short life only a quarter, so that half life is not over when the life begins.
        params.not_before = now - BACKDATED.min(self.lifetime / 4);
        params.not_after = (now + self.lifetime).min(self.root.not_after);
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.root.issuer)?;
        Ok((leaf.der().to_vec(), key.serialize_der()))
    }
}

impl IdentitySource for EmbeddedCa {
    fn authority(&self) -> Arc<str> {
        "the embedded authority".into()
    }

    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, CaError>> {
        Box::pin(async move { self.sign(identity) })
    }
}

impl fmt::Debug for EmbeddedCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EmbeddedCa")
            .field("trust_domain", &self.trust_domain)
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
