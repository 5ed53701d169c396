//! `istio.security.Authorization`.
//!
//! Elements that say nothing are left out instead of rejecting the policy, as peers do: a policy
//! means the same on every node. The control plane does not send such.

use culvert_core::authorization::{
    Action, Authorization, Clause, Match, PolicyScope, Rule, ServiceAccountMatch, StringMatch,
};
use culvert_core::intern::Interner;
use culvert_proto::istio::security as proto;
use ipnet::IpNet;

use super::{Rejection, fields};

pub(super) fn decode(
    raw: proto::Authorization,
    texts: &mut Interner,
) -> Result<Authorization, Rejection> {
    let scope = match proto::Scope::try_from(raw.scope) {
        Ok(proto::Scope::Global) => PolicyScope::Global,
        Ok(proto::Scope::Namespace) => PolicyScope::Namespace,
        Ok(proto::Scope::WorkloadSelector) => PolicyScope::WorkloadSelector,
        Err(_) => return Err(Rejection::undefined("scope", raw.scope)),
    };
    let action = match proto::Action::try_from(raw.action) {
        Ok(proto::Action::Allow) => Action::Allow,
        Ok(proto::Action::Deny) => Action::Deny,
        Err(_) => return Err(Rejection::undefined("action", raw.action)),
    };
    let mut rules = Vec::with_capacity(raw.rules.len());
    for rule in raw.rules {
        let mut clauses = Vec::with_capacity(rule.clauses.len());
        for clause in rule.clauses {
            let matches = clause.matches.into_iter().map(|raw| one_match(raw, texts));
            clauses.push(Clause { matches: matches.collect() });
        }
        rules.push(Rule { clauses });
    }
    Ok(Authorization {
        name: texts.text(&raw.name),
        namespace: texts.text(&raw.namespace),
        scope,
        action,
        rules,
        dry_run: raw.dry_run,
        // `extensions` are absent, here and in a match: they are for other consumers.
    })
}

fn one_match(raw: proto::Match, texts: &mut Interner) -> Match {
    Match {
        namespaces: strings(raw.namespaces, texts),
        not_namespaces: strings(raw.not_namespaces, texts),
        principals: strings(raw.principals, texts),
        not_principals: strings(raw.not_principals, texts),
        service_accounts: accounts(raw.service_accounts, texts),
        not_service_accounts: accounts(raw.not_service_accounts, texts),
        source_ips: ranges(raw.source_ips),
        not_source_ips: ranges(raw.not_source_ips),
        destination_ips: ranges(raw.destination_ips),
        not_destination_ips: ranges(raw.not_destination_ips),
        destination_ports: ports(raw.destination_ports),
        not_destination_ports: ports(raw.not_destination_ports),
    }
}

fn strings(list: Vec<proto::StringMatch>, texts: &mut Interner) -> Vec<StringMatch> {
    use proto::string_match::MatchType;
    let one = |raw: proto::StringMatch| match raw.match_type {
        Some(MatchType::Exact(text)) => Some(StringMatch::Exact(texts.text(&text))),
        Some(MatchType::Prefix(text)) => Some(StringMatch::Prefix(texts.text(&text))),
        Some(MatchType::Suffix(text)) => Some(StringMatch::Suffix(texts.text(&text))),
        Some(MatchType::Presence(_)) => Some(StringMatch::Presence),
        None => None,
    };
    list.into_iter().filter_map(one).collect()
}

fn accounts(
    list: Vec<proto::ServiceAccountMatch>,
    texts: &mut Interner,
) -> Vec<ServiceAccountMatch> {
    let one = |raw: proto::ServiceAccountMatch| ServiceAccountMatch {
        namespace: texts.text(&raw.namespace),
        service_account: texts.text(&raw.service_account),
    };
    list.into_iter().map(one).collect()
}

fn ranges(list: Vec<proto::Address>) -> Vec<IpNet> {
    let one = |raw: proto::Address| {
        let length = u8::try_from(raw.length).ok()?;
        IpNet::new(fields::ip(&raw.address)?, length).ok()
    };
    list.into_iter().filter_map(one).collect()
}

/// Peers truncate to 16 bits.
fn ports(list: Vec<u32>) -> Vec<u16> {
    list.into_iter().map(|port| port as u16).collect()
}
