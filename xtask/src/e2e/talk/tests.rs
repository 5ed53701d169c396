#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn addresses_lose_their_port_and_brackets() {
    assert_eq!(ip("10.1.0.7:8080"), "10.1.0.7");
    assert_eq!(ip("[fd00::7]:8080"), "fd00::7");
    assert_eq!(ip(""), "");
}

#[test]
fn ipv6_gets_brackets() {
    assert_eq!(at("fd00::7", 80), "[fd00::7]:80");
    assert_eq!(at("server", 80), "server:80");
}

#[test]
fn a_refusal_is_not_a_timeout() {
    let of = |text: &str| serde_json::from_str::<Outcome>(text).unwrap();
    assert!(of(r#"{"ok":false,"kind":"cut","error":"e","took_ms":1}"#).is_refusal());
    assert!(!of(r#"{"ok":false,"kind":"timeout","error":"e","took_ms":1}"#).is_refusal());
    assert!(!of(r#"{"ok":true,"took_ms":1}"#).is_refusal());
}

#[test]
fn a_waypoint_is_told_by_the_request_id() {
    let text =
        r#"{"ok":true,"answer":{"pod":"p","remote":"10.1.0.7:1","headers":{"x-request-id":"1"}}}"#;
    let outcome: Outcome = serde_json::from_str(text).unwrap();
    assert!(outcome.by_waypoint());
    assert_eq!((outcome.server(), outcome.seen_ip()), ("p", "10.1.0.7"));
}
