//! SPIFFE identities of workloads.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// `spiffe://<trust domain>/ns/<namespace>/sa/<service account>` (SPIFFE-ID, in Istio's layout).
///
/// Compared byte by byte, without case folding.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    pub trust_domain: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

impl Identity {
    pub fn new(
        trust_domain: impl Into<Arc<str>>,
        namespace: impl Into<Arc<str>>,
        service_account: impl Into<Arc<str>>,
    ) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        }
    }

    /// The identity as policies write it: without `spiffe://`.
    pub fn principal(&self) -> String {
        format!("{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }

    /// Whether a certificate for this identity can be read back: no part empty, none with a `/`.
    pub fn is_complete(&self) -> bool {
        [&self.trust_domain, &self.namespace, &self.service_account]
            .iter()
            .all(|part| !part.is_empty() && !part.contains('/'))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/ns/{}/sa/{}",
            self.trust_domain, self.namespace, self.service_account
        )
    }
}

/// A URI that is not a SPIFFE identity of a mesh workload.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not spiffe://<trust domain>/ns/<namespace>/sa/<service account>")]
pub struct InvalidIdentity(pub String);

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(uri: &str) -> Result<Self, InvalidIdentity> {
        let parts: Vec<&str> = match uri.strip_prefix("spiffe://") {
            Some(rest) => rest.split('/').collect(),
            None => Vec::new(),
        };
        let identity = match parts.as_slice() {
            [trust_domain, "ns", namespace, "sa", service_account] => {
                Some(Identity::new(*trust_domain, *namespace, *service_account))
            }
            _ => None,
        };
        identity
            .filter(Identity::is_complete)
            .ok_or_else(|| InvalidIdentity(uri.chars().take(256).collect()))
    }
}

#[cfg(test)]
mod tests;
