#![allow(clippy::unwrap_used)]

use super::*;
use crate::fixtures::{authenticated, plaintext, policy};

const FRONT: &str = "cluster.local/ns/web/sa/front";

fn matches(rules: &[&str], connection: &Connection) -> bool {
    let rules: Vec<String> = rules.iter().map(|r| r.replace("cl/", "cluster.local/")).collect();
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    policy("shop", "p", Action::Allow, &rules).matching_rule(connection).is_some()
}

/// Number, rules, and whether they match the authenticated client, the plaintext client, and the
/// client of another trust domain.
const VECTORS: &[(u8, &[&str], [bool; 3])] = &[
    (1, &[], [false, false, false]),
    (2, &[""], [true, true, true]),
    (3, &["any"], [true, true, true]),
    (4, &["{}"], [false, false, false]),
    (5, &["{} or PORT=8080"], [true, true, true]),
    (6, &["P=cl/ns/web/sa/front"], [true, false, false]),
    (7, &["P=spiffe://cl/ns/web/sa/front"], [false, false, false]),
    (8, &["P^=cl/"], [true, false, false]),
    (9, &["P^=spiffe://cl/"], [false, false, false]),
    (10, &["P$=/sa/front"], [true, false, true]),
    (11, &["P?"], [true, false, true]),
    (12, &["!P?"], [false, true, false]),
    (13, &["!P=cl/ns/web/sa/front"], [false, true, true]),
    (14, &["N=web"], [true, false, true]),
    (15, &["N=WEB"], [false, false, false]),
    (16, &["N^=we"], [true, false, true]),
    (16, &["N$=eb"], [true, false, true]),
    (17, &["N?"], [true, false, true]),
    (18, &["!N=web"], [false, true, false]),
    (19, &["N="], [false, true, false]),
    (20, &["!N=other"], [true, true, true]),
    (21, &["SA=web/front"], [true, false, true]),
    (22, &["SA=web/back"], [false, false, false]),
    (23, &["!SA=web/front"], [false, true, false]),
    (24, &["SIP=10.2.0.0/16"], [true, true, true]),
    (25, &["SIP=10.2.9.9/16"], [true, true, true]),
    (26, &["SIP=10.2.0.3/32"], [true, true, true]),
    (27, &["SIP=::/0"], [false, false, false]),
    (28, &["SIP=0.0.0.0/0"], [true, true, true]),
    (29, &["!SIP=10.2.0.0/16"], [false, false, false]),
    (30, &["DIP=10.1.0.7/32"], [true, true, true]),
    (31, &["PORT=80|8080"], [true, true, true]),
    (32, &["!PORT=8080"], [false, false, false]),
    (33, &["N=web PORT=9090"], [false, false, false]),
    (34, &["N=web or PORT=9090"], [true, false, true]),
    (35, &["N=web and PORT=9090"], [false, false, false]),
    (36, &["N=web and PORT=8080"], [true, false, true]),
    (37, &["N=x", "PORT=8080"], [true, true, true]),
    (38, &["P=a|cl/ns/web/sa/front"], [true, false, false]),
    (39, &["N=web !P=cl/ns/web/sa/front"], [false, false, true]),
    (40, &["!N=web|other"], [false, true, false]),
    (41, &["!P? and !PORT=9090"], [false, true, false]),
    (43, &["PORT=9090 !P?"], [false, false, false]),
    (48, &["any and PORT=9090"], [false, false, false]),
    (49, &["P^="], [true, false, true]),
    (50, &["N^="], [true, true, true]),
    (51, &["N=web !N=web"], [false, false, false]),
];

/// The same for connections to port 9090.
const VECTORS_TO_9090: &[(u8, &[&str], [bool; 3])] = &[
    (42, &["!P? and !PORT=9090"], [false, false, false]),
    (44, &["PORT=9090 !P?"], [false, true, false]),
];

fn check(vectors: &[(u8, &[&str], [bool; 3])], port: u16) {
    let clients = [authenticated(FRONT), plaintext(), authenticated("other.td/ns/web/sa/front")];
    for (number, rules, expected) in vectors {
        let found =
            clients.clone().map(|connection| matches(rules, &Connection { port, ..connection }));
        assert_eq!(found, *expected, "vector {number}: {rules:?}");
    }
}

#[test]
fn policies_match_as_the_vectors_say() {
    check(VECTORS, 8080);
    check(VECTORS_TO_9090, 9090);
}

#[test]
fn mapped_addresses_match_as_ipv4() {
    let connection = Connection {
        source: "::ffff:10.2.0.3".parse().unwrap(),
        destination: "::ffff:10.1.0.7".parse().unwrap(),
        ..plaintext()
    };
    assert!(matches(&["SIP=10.2.0.3/32 DIP=10.1.0.7/32"], &connection));
    assert!(!matches(&["SIP=::/0"], &connection));
}

#[test]
fn the_first_matching_rule_is_told() {
    let policy = policy("shop", "p", Action::Deny, &["PORT=1", "N=web", ""]);
    assert_eq!(policy.matching_rule(&authenticated(FRONT)), Some(1));
    assert_eq!(policy.matching_rule(&plaintext()), Some(2));
}
