#![allow(clippy::unwrap_used)]

use super::*;

fn header(source: &str, destination: &str) -> ProxyHeader {
    ProxyHeader {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
        identity: None,
    }
}

const START: &[u8] = b"\x0d\x0a\x0d\x0a\x00\x0d\x0aQUIT\x0a\x21";

#[test]
fn ipv4_addresses_and_ports_follow_the_signature() {
    let expected =
        [START, b"\x11\x00\x0c\x0a\x02\x00\x03\x0a\x60\x00\x0a\x9c\x40\x00\x50"].concat();
    assert_eq!(header("10.2.0.3:40000", "10.96.0.10:80").to_bytes(), expected);
    assert_eq!(header("[::ffff:10.2.0.3]:40000", "10.96.0.10:80").to_bytes(), expected);
}

#[test]
fn mixed_families_travel_as_ipv6() {
    let bytes = header("10.2.0.3:1", "[fd00::7]:2").to_bytes();
    assert_eq!(bytes.len(), 16 + 36);
    assert_eq!(bytes[13..16], [0x21, 0, 36]);
    assert_eq!(bytes[26..32], [0xff, 0xff, 10, 2, 0, 3]);
}

#[test]
fn the_identity_is_appended() {
    let identity = "spiffe://td/ns/a/sa/x";
    let with_identity = ProxyHeader {
        identity: Some(identity.parse().unwrap()),
        ..header("1.1.1.1:1", "2.2.2.2:2")
    };
    let bytes = with_identity.to_bytes();
    let length = identity.len() as u8;
    assert_eq!(bytes[14..16], [0, 12 + 3 + length]);
    assert_eq!(bytes[28..31], [0xD0, 0, length]);
    assert_eq!(&bytes[31..], identity.as_bytes());
}
