//! Policies as the dump shows them.

use culvert_core::authorization::{
    Action, Authorization, Match, PolicyScope, ServiceAccountMatch, StringMatch,
};
use ipnet::IpNet;
use serde::Serialize;

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PolicyDump<'a> {
    name: &'a str,
    namespace: &'a str,
    scope: &'static str,
    action: &'static str,
    rules: Vec<Vec<Vec<MatchDump<'a>>>>,
    dry_run: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MatchDump<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    namespaces: Vec<StringMatchDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_namespaces: Vec<StringMatchDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    principals: Vec<StringMatchDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_principals: Vec<StringMatchDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    service_accounts: Vec<ServiceAccountDump<'a>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    not_service_accounts: Vec<ServiceAccountDump<'a>>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    source_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_source_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    destination_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_destination_ips: &'a [IpNet],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    destination_ports: &'a [u16],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    not_destination_ports: &'a [u16],
}

/// `{"Exact": "x"}`, `{"Presence": []}`
#[derive(Serialize)]
enum StringMatchDump<'a> {
    Exact(&'a str),
    Prefix(&'a str),
    Suffix(&'a str),
    Presence([(); 0]),
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ServiceAccountDump<'a> {
    namespace: &'a str,
    service_account: &'a str,
}

impl<'a> PolicyDump<'a> {
    pub(super) fn of(policy: &'a Authorization) -> Self {
        Self {
            name: &policy.name,
            namespace: &policy.namespace,
            scope: match policy.scope {
                PolicyScope::Global => "Global",
                PolicyScope::Namespace => "Namespace",
                PolicyScope::WorkloadSelector => "WorkloadSelector",
            },
            action: match policy.action {
                Action::Allow => "Allow",
                Action::Deny => "Deny",
            },
            rules: policy
                .rules
                .iter()
                .map(|rule| {
                    let clauses = rule.clauses.iter();
                    clauses
                        .map(|clause| clause.matches.iter().map(MatchDump::of).collect())
                        .collect()
                })
                .collect(),
            dry_run: policy.dry_run,
        }
    }
}

impl<'a> MatchDump<'a> {
    fn of(matched: &'a Match) -> Self {
        Self {
            namespaces: strings(&matched.namespaces),
            not_namespaces: strings(&matched.not_namespaces),
            principals: strings(&matched.principals),
            not_principals: strings(&matched.not_principals),
            service_accounts: accounts(&matched.service_accounts),
            not_service_accounts: accounts(&matched.not_service_accounts),
            source_ips: &matched.source_ips,
            not_source_ips: &matched.not_source_ips,
            destination_ips: &matched.destination_ips,
            not_destination_ips: &matched.not_destination_ips,
            destination_ports: &matched.destination_ports,
            not_destination_ports: &matched.not_destination_ports,
        }
    }
}

fn strings(matches: &[StringMatch]) -> Vec<StringMatchDump<'_>> {
    let dumps = matches.iter().map(|matched| match matched {
        StringMatch::Exact(text) => StringMatchDump::Exact(text),
        StringMatch::Prefix(text) => StringMatchDump::Prefix(text),
        StringMatch::Suffix(text) => StringMatchDump::Suffix(text),
        StringMatch::Presence => StringMatchDump::Presence([]),
    });
    dumps.collect()
}

fn accounts(matches: &[ServiceAccountMatch]) -> Vec<ServiceAccountDump<'_>> {
    let dumps = matches.iter().map(|ServiceAccountMatch { namespace, service_account }| {
        ServiceAccountDump { namespace, service_account }
    });
    dumps.collect()
}
