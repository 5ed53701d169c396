#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn well_formed_uris_parse() {
    let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
    assert_eq!(identity, Identity::new("td", "a", "b"));
    assert_eq!(identity.to_string(), "spiffe://td/ns/a/sa/b");
    assert_eq!(identity.principal(), "td/ns/a/sa/b");
}

#[test]
fn everything_else_is_refused() {
    for uri in [
        "spiffe://td/ns/a/sa/b/c",
        "spiffe://td/ns/a/sa",
        "spiffe://td/sa/a/ns/b",
        "td/ns/a/sa/b",
        "SPIFFE://td/ns/a/sa/b",
        "spiffe://td/ns//sa/",
        "spiffe:///ns/a/sa/b",
        "spiffe://example.org/my/workload",
        "",
    ] {
        assert!(uri.parse::<Identity>().is_err(), "{uri}");
    }
}

#[test]
fn aliases_name_the_same_workloads_and_nobody_elses() {
    let domains = TrustDomains::new("td1".into(), ["old".into(), "".into()]);
    let id = |domain: &str, account: &str| Identity::new(domain, "a", account);
    for (one, other, same) in [
        (id("td1", "x"), id("td1", "x"), true),
        (id("td1", "x"), id("old", "x"), true),
        (id("old", "x"), id("td1", "x"), true),
        (id("old", "x"), id("td1", "y"), false),
        (id("td1", "x"), id("td2", "x"), false),
        // A workload of another mesh is not ours, and our aliases are not its.
        (id("td2", "x"), id("old", "x"), false),
        (id("td2", "x"), id("td2", "x"), true),
        (id("", "x"), id("td1", "x"), false),
        (id("TD1", "x"), id("td1", "x"), false),
    ] {
        assert_eq!(domains.same_workload(&one, &other), same, "{one} {other}");
    }
    assert!(!domains.same_workload(&Identity::new("td1", "b", "x"), &id("old", "x")));
    assert!(!TrustDomains::default().are_one("td1", "old"));
    assert!(TrustDomains::default().are_one("td1", "td1"));
}
