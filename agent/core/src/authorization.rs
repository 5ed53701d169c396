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
}
