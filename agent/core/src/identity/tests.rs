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
