#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

#[test]
fn authorities_are_an_address_or_a_host_with_a_port() {
    let addr = |text: &str| Authority::Addr(text.parse().unwrap());
    let host = |host: &str, port| Authority::Host { host: host.into(), port };
    let accepted = [
        ("10.1.0.7:8080", addr("10.1.0.7:8080")),
        ("[fd00::1]:80", addr("[fd00::1]:80")),
        ("[::ffff:10.1.0.7]:80", addr("10.1.0.7:80")),
        ("api.shop.svc.cluster.local:80", host("api.shop.svc.cluster.local", 80)),
        ("*.wild.example:443", host("*.wild.example", 443)),
    ];
    for (text, expected) in accepted {
        assert_eq!(text.parse(), Ok(expected), "{text}");
    }
    let refused = [
        "10.1.0.7",
        "",
        ":80",
        "host",
        "host:",
        "host:+80",
        "host:65536",
        "ho st:80",
        "fd00::1:80",
        "https://host:80",
        "user@host:80",
        "höst:80",
    ];
    for text in refused {
        assert!(text.parse::<Authority>().is_err(), "{text}");
    }
}

proptest! {
    #[test]
    fn an_address_survives_being_printed(ip in any::<IpAddr>(), port in any::<u16>()) {
        let authority = Authority::Addr(SocketAddr::new(ip.to_canonical(), port));
        prop_assert_eq!(authority.to_string().parse(), Ok(authority));
    }

    #[test]
    fn a_host_survives_being_printed(host in "[a-z*_][a-zA-Z0-9._-]{0,60}", port in any::<u16>()) {
        let authority = Authority::Host { host: host.into(), port };
        prop_assert_eq!(authority.to_string().parse(), Ok(authority));
    }

    #[test]
    fn what_parses_survives_being_printed(text in ".{0,40}|[0-9a-f:.\\[\\]%]{0,30}:[0-9]{1,6}") {
        if let Ok(authority) = text.parse::<Authority>() {
            prop_assert_eq!(authority.to_string().parse(), Ok(authority));
        }
    }
}
