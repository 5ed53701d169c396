//! Bytes of the authorization messages, written by hand from the protocol's numbers.

use super::wire::{any, assert_wire, block, number};
use crate::istio::security::*;
use crate::istio::workload::Extension;

fn string_match(match_type: string_match::MatchType) -> StringMatch {
    StringMatch { match_type: Some(match_type) }
}

fn exact(value: &str) -> StringMatch {
    string_match(string_match::MatchType::Exact(value.to_owned()))
}

fn address(first: u8) -> Address {
    Address { address: vec![first, 0, 0, 0], length: 8 }
}

fn address_wire(first: u8) -> Vec<u8> {
    [block(1, [first, 0, 0, 0]), number(2, 8)].concat()
}

fn account(name: &str) -> ServiceAccountMatch {
    ServiceAccountMatch { namespace: "n".to_owned(), service_account: name.to_owned() }
}

fn account_wire(name: &str) -> Vec<u8> {
    [block(1, "n"), block(2, name)].concat()
}

#[test]
fn every_field_of_a_match_has_its_number() {
    let config = prost_types::Any { type_url: "t".to_owned(), value: vec![7] };
    let all = Match {
        namespaces: vec![exact("1")],
        not_namespaces: vec![exact("2")],
        principals: vec![exact("3")],
        not_principals: vec![exact("4")],
        source_ips: vec![address(5)],
        not_source_ips: vec![address(6)],
        destination_ips: vec![address(7)],
        not_destination_ips: vec![address(8)],
        destination_ports: vec![80, 8080],
        not_destination_ports: vec![443],
        service_accounts: vec![account("11")],
        not_service_accounts: vec![account("12")],
        extensions: vec![Extension { name: "e".to_owned(), config: Some(config) }],
    };
    let wire = [
        block(1, block(1, "1")),
        block(2, block(1, "2")),
        block(3, block(1, "3")),
        block(4, block(1, "4")),
        block(5, address_wire(5)),
        block(6, address_wire(6)),
        block(7, address_wire(7)),
        block(8, address_wire(8)),
        // 8080 takes two bytes: 0x3f << 7 | 0x10.
        block(9, [80, 0x90, 0x3f]),
        block(10, [0xbb, 0x03]),
        block(11, account_wire("11")),
        block(12, account_wire("12")),
        block(13, [block(1, "e"), block(2, any("t", &[7]))].concat()),
    ];
    assert_wire(all, wire.concat());
}

#[test]
fn policy_nests_rules_clauses_and_matches() {
    let match_ = Match { destination_ports: vec![80], ..Match::default() };
    let rule = Rule { clauses: vec![Clause { matches: vec![match_] }] };
    let policy = Authorization {
        name: "p".to_owned(),
        namespace: "n".to_owned(),
        scope: Scope::WorkloadSelector.into(),
        action: Action::Deny.into(),
        rules: vec![rule, Rule::default()],
        dry_run: true,
        extensions: vec![Extension { name: "e".to_owned(), config: None }],
    };
    let wire = [
        block(1, "p"),
        block(2, "n"),
        number(3, 2),
        number(4, 1),
        block(5, block(1, block(2, block(9, [80])))),
        block(5, []),
        number(6, 1),
        block(7, block(1, "e")),
    ];
    assert_wire(policy, wire.concat());
}

#[test]
fn string_match_has_four_forms() {
    assert_wire(exact("a"), block(1, "a"));
    assert_wire(string_match(string_match::MatchType::Prefix("a".to_owned())), block(2, "a"));
    assert_wire(string_match(string_match::MatchType::Suffix("a".to_owned())), block(3, "a"));
    assert_wire(string_match(string_match::MatchType::Presence(())), block(4, []));
}

#[test]
fn empty_string_match_is_not_an_absent_one() {
    assert_wire(exact(""), block(1, ""));
    assert_wire(StringMatch { match_type: None }, []);
}

#[test]
fn scopes_and_actions_have_their_numbers() {
    let scopes = [Scope::Global, Scope::Namespace, Scope::WorkloadSelector];
    assert_eq!(scopes.map(i32::from), [0, 1, 2]);
    assert_eq!([Action::Allow, Action::Deny].map(i32::from), [0, 1]);
    assert!(Scope::try_from(3).is_err());
    assert!(Action::try_from(2).is_err());
}
