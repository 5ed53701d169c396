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
        let Self { trust_domain, namespace, service_account } = self;
        let parts = ["spiffe://", trust_domain, "/ns/", namespace, "/sa/", service_account];
        parts.iter().try_for_each(|part| f.write_str(part))
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

/// The trust domains that name this mesh: its own, and what it is or was called besides.
///
/// An alias brings no roots with it: whoever proves an identity of an alias has a certificate of this
/// mesh's own authorities. It says that the same namespace and service account is the same workload
/// under each of the names. A domain outside of the set equals only itself, so aliases mean nothing
/// for workloads of other meshes. The default set knows no alias.
///
/// Policies are not widened: a principal is compared with the identity as it was presented.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustDomains(Arc<[Arc<str>]>);

impl TrustDomains {
    /// `own` is the mesh's trust domain. Empty aliases are left out: nobody can be of them.
    pub fn new(own: Arc<str>, aliases: impl IntoIterator<Item = Arc<str>>) -> Self {
        let aliases = aliases.into_iter().filter(|alias| !alias.is_empty());
        Self(std::iter::once(own).chain(aliases).collect())
    }

    /// Whether both names are of one mesh.
    pub fn are_one(&self, one: &str, other: &str) -> bool {
        let known = |name: &str| self.0.iter().any(|domain| **domain == *name);
        one == other || (known(one) && known(other))
    }

    /// Whether both identities are of one workload.
    pub fn same_workload(&self, one: &Identity, other: &Identity) -> bool {
        one.namespace == other.namespace
            && one.service_account == other.service_account
            && self.are_one(&one.trust_domain, &other.trust_domain)
    }
}

#[cfg(test)]
mod tests;
