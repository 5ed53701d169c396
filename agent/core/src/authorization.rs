//! L4 authorization policies and whether one matches a connection.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::identity::Identity;
use crate::workload::PolicyKey;

/// One policy, as `istio.security.Authorization` describes it. `namespace/name` is its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: PolicyScope,
    pub action: Action,
    /// Any rule suffices; no rule never matches.
    pub rules: Vec<Rule>,
    /// Evaluated, logged and counted, never enforced.
    pub dry_run: bool,
}

/// All clauses must hold; without clauses it matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    pub clauses: Vec<Clause>,
}

/// Any match suffices; without matches it is true.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clause {
    pub matches: Vec<Match>,
}

/// All fields that are set must hold; with no field set it never matches.
///
/// A positive list holds when any element matches, a negative one when none does.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Match {
    pub namespaces: Vec<StringMatch>,
    pub not_namespaces: Vec<StringMatch>,
    /// Tested against the principal without `spiffe://`.
    pub principals: Vec<StringMatch>,
    pub not_principals: Vec<StringMatch>,
    pub service_accounts: Vec<ServiceAccountMatch>,
    pub not_service_accounts: Vec<ServiceAccountMatch>,
    pub source_ips: Vec<IpNet>,
    pub not_source_ips: Vec<IpNet>,
    pub destination_ips: Vec<IpNet>,
    pub not_destination_ips: Vec<IpNet>,
    pub destination_ports: Vec<u16>,
    pub not_destination_ports: Vec<u16>,
}

/// Byte-wise and case-sensitive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    /// The value is not empty.
    Presence,
}

/// The trust domain is not compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServiceAccountMatch {
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PolicyScope {
    /// Applies to every workload.
    Global,
    /// Applies to the workloads of the policy's namespace.
    Namespace,
    /// Applies to the workloads that name it.
    WorkloadSelector,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    Allow,
    Deny,
}

/// What is known of one inbound connection when it is authorized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The TCP peer's address.
    pub source: IpAddr,
    /// The verified peer identity; `None` for plaintext.
    pub identity: Option<Identity>,
    /// The local workload's address.
    pub destination: IpAddr,
    /// The application's port, after every translation.
    pub port: u16,
}

impl Authorization {
    pub fn key(&self) -> PolicyKey {
        format!("{}/{}", self.namespace, self.name).into()
    }

    /// Whether this is its key.
    pub fn has_key(&self, key: &str) -> bool {
        let name = key.strip_prefix(&*self.namespace).and_then(|rest| rest.strip_prefix('/'));
        name == Some(&*self.name)
    }

    /// The first rule that matches, by its place in `rules`.
    pub fn matching_rule(&self, connection: &Connection) -> Option<usize> {
        self.rules.iter().position(|rule| rule.matches(connection))
    }
}

impl Rule {
    fn matches(&self, connection: &Connection) -> bool {
        self.clauses.iter().all(|clause| clause.matches(connection))
    }
}

impl Clause {
    fn matches(&self, connection: &Connection) -> bool {
        self.matches.is_empty() || self.matches.iter().any(|m| m.matches(connection))
    }
}

impl Match {
    fn matches(&self, connection: &Connection) -> bool {
        if self.restricts_nothing() {
            return false;
        }
        let identity = connection.identity.as_ref();
        // Policies see a plaintext client in the namespace of the empty name, yet without any
        // principal, not even an empty one.
        let namespace = identity.map_or("", |identity| &identity.namespace);
        let principal = identity.map(Identity::principal);
        let source = connection.source.to_canonical();
        let destination = connection.destination.to_canonical();

        holds(&self.namespaces, &self.not_namespaces, |m| m.matches(namespace))
            && holds(&self.principals, &self.not_principals, |m| {
                principal.as_ref().is_some_and(|principal| m.matches(principal))
            })
            && holds(&self.service_accounts, &self.not_service_accounts, |m| {
                identity.is_some_and(|identity| m.matches(identity))
            })
            && holds(&self.source_ips, &self.not_source_ips, |range| range.contains(&source))
            && holds(&self.destination_ips, &self.not_destination_ips, |range| {
                range.contains(&destination)
            })
            && holds(&self.destination_ports, &self.not_destination_ports, |port| {
                *port == connection.port
            })
    }

    fn restricts_nothing(&self) -> bool {
        // Destructured, so that a new field cannot be forgotten.
        let Match {
            namespaces,
            not_namespaces,
            principals,
            not_principals,
            service_accounts,
            not_service_accounts,
            source_ips,
            not_source_ips,
            destination_ips,
            not_destination_ips,
            destination_ports,
            not_destination_ports,
        } = self;
        [namespaces, not_namespaces, principals, not_principals].iter().all(|l| l.is_empty())
            && [service_accounts, not_service_accounts].iter().all(|l| l.is_empty())
            && [source_ips, not_source_ips].iter().all(|l| l.is_empty())
            && [destination_ips, not_destination_ips].iter().all(|l| l.is_empty())
            && [destination_ports, not_destination_ports].iter().all(|l| l.is_empty())
    }
}

/// Any of the positive list, if there is one, and none of the negative list.
fn holds<T>(positive: &[T], negative: &[T], test: impl Fn(&T) -> bool) -> bool {
    (positive.is_empty() || positive.iter().any(&test)) && !negative.iter().any(&test)
}

impl StringMatch {
    fn matches(&self, value: &str) -> bool {
        match self {
            StringMatch::Exact(expected) => value == &**expected,
            StringMatch::Prefix(prefix) => value.starts_with(&**prefix),
            StringMatch::Suffix(suffix) => value.ends_with(&**suffix),
            StringMatch::Presence => !value.is_empty(),
        }
    }
}

impl ServiceAccountMatch {
    fn matches(&self, identity: &Identity) -> bool {
        self.namespace == identity.namespace && self.service_account == identity.service_account
    }
}

#[cfg(test)]
mod tests;
