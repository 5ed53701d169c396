#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use http::{HeaderMap, HeaderName, HeaderValue};
use proptest::prelude::*;

use super::*;

fn forwarded(client: &str, host: Option<&str>) -> String {
    Forwarded { client: client.parse().unwrap(), host: host.map(Arc::from) }.to_string()
}

fn received(name: &'static str, value: impl AsRef<[u8]>) -> ReceivedHeaders {
    let mut headers = HeaderMap::new();
    headers.insert(HeaderName::from_static(name), HeaderValue::from_bytes(value.as_ref()).unwrap());
    ReceivedHeaders::parse(&headers)
}

fn host(value: impl AsRef<[u8]>) -> Option<String> {
    received("forwarded", value).forwarded_host
}

fn baggage(value: &str) -> Baggage {
    received("baggage", value).baggage.unwrap()
}

fn cart() -> Baggage {
    Baggage {
        cluster: Some("c1".into()),
        namespace: Some("shop".into()),
        owner: Some(Owner { kind: "deployment".into(), name: "cart".into() }),
        service_name: Some("cart".into()),
        service_version: Some("v2".into()),
        region: Some("r1".into()),
        zone: Some("z1".into()),
    }
}

const CART: &str = "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=cart,\
                    service.name=cart,service.version=v2,cloud.region=r1,\
                    cloud.availability_zone=z1";

#[test]
fn forwarded_names_client_and_service() {
    assert_eq!(
        forwarded("10.0.0.5:4321", Some("api.shop.svc.cluster.local")),
        "for=\"10.0.0.5:4321\";host=api.shop.svc.cluster.local"
    );
    assert_eq!(forwarded("[fd00::5]:4321", None), "for=\"[fd00::5]:4321\"");
}

#[test]
fn forwarded_host_is_read_as_peers_write_it() {
    assert_eq!(host("by=x;for=y;host=example.com;proto=https").unwrap(), "example.com");
    assert_eq!(host("by=x;host=\"example.com\"").unwrap(), "example.com");
    assert_eq!(host("by=x; host=example.com").unwrap(), "example.com");
    assert_eq!(host("for=y;proto=https"), None);
    assert_eq!(host("for=y;host="), None);
    assert_eq!(host("host=\"\""), None);
    assert_eq!(host("Host=example.com"), None);
    assert_eq!(host("host=h;proto=\"pröto\"".as_bytes()), None);
}

#[test]
fn baggage_keeps_its_order_and_leaves_out_what_is_empty() {
    assert_eq!(cart().to_string(), CART);
    let bare = Baggage { service_version: None, region: None, zone: None, ..cart() };
    assert_eq!(
        bare.to_string(),
        "k8s.cluster.name=c1,k8s.namespace.name=shop,k8s.deployment.name=cart,service.name=cart"
    );
    assert_eq!(Baggage::default().to_string(), "");
}

#[test]
fn baggage_is_read_tolerantly() {
    assert_eq!(baggage(CART), cart());
    assert_eq!(baggage("k8s.cluster.name=a=b").cluster.unwrap(), "a");
    assert_eq!(baggage(",k8s.cluster.name").cluster, None);
    assert_eq!(baggage("x=y,k8s.cluster.name=").cluster, None);
    assert_eq!(baggage(" k8s.cluster.name=a").cluster, None);
    assert_eq!(baggage(", k8s.cluster.name=a").cluster, None);
    assert_eq!(baggage("k8s.cronjob.name=n").owner.unwrap().kind, "cronjob");
    assert_eq!(baggage("k8s.daemon.name=n").owner, None);
    assert_eq!(received("baggage", b"k8s.cluster.name=\xff").baggage, None);
}

#[test]
fn baggage_on_several_lines_is_one() {
    let mut headers = HeaderMap::new();
    headers.append("baggage", HeaderValue::from_static("k8s.cluster.name=c1"));
    headers.append("baggage", HeaderValue::from_static("service.name=cart"));
    let baggage = Baggage::parse(&headers).unwrap();
    assert_eq!(
        (baggage.cluster.as_deref(), baggage.service_name.as_deref()),
        (Some("c1"), Some("cart"))
    );
    headers.append("baggage", HeaderValue::from_bytes(b"\xff").unwrap());
    assert_eq!(Baggage::parse(&headers), None);
}

#[test]
fn traceparent_of_the_right_length_but_wrong_shape_is_ignored() {
    let trace = TraceParent { trace_id: 0xabc, parent_id: 0xdef };
    let text = "00-00000000000000000000000000000abc-0000000000000def-00";
    assert_eq!(trace.to_string(), text);
    assert_eq!(received("traceparent", text).traceparent, Some(trace));
    for wrong in [
        "0".repeat(55),
        format!("00-{}", "0".repeat(52)),
        text.replace("00-0", "00--"),
        text.to_uppercase(),
        format!("{text}-"),
        "-".repeat(55),
    ] {
        assert_eq!(received("traceparent", &wrong).traceparent, None, "{wrong}");
    }
}

#[test]
fn own_network_in_any_case_is_not_another() {
    assert!(!received("x-forwarded-network", "NET1").is_from_another_network("net1"));
    assert!(received("x-forwarded-network", "").is_from_another_network("net1"));
    assert!(!ReceivedHeaders::default().is_from_another_network("net1"));
}

#[test]
fn request_has_authority_and_all_headers() {
    let mut headers = ConnectHeaders {
        authority: "[fd00::1]:8080".parse().unwrap(),
        baggage: Baggage::default(),
        forwarded: Forwarded { client: "10.0.0.5:1".parse().unwrap(), host: None },
        traceparent: TraceParent { trace_id: 1, parent_id: 2 },
        x_forwarded_network: None,
    };
    let request = headers.request().unwrap();
    assert_eq!(request.uri().authority().unwrap().as_str(), "[fd00::1]:8080");
    assert_eq!(request.headers()["baggage"], "");
    assert!(!request.headers().contains_key("x-forwarded-network"));
    headers.x_forwarded_network = Some("".into());
    assert_eq!(headers.request().unwrap().headers()["x-forwarded-network"], "");
}

proptest! {
    #[test]
    fn any_bytes_parse_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        if let Ok(value) = HeaderValue::from_bytes(&bytes) {
            let mut headers = HeaderMap::new();
            for name in ["baggage", "forwarded", "traceparent", "x-forwarded-network"] {
                headers.append(name, value.clone());
            }
            let _ = ReceivedHeaders::parse(&headers).is_from_another_network("n");
        }
    }

    #[test]
    fn dashes_and_digits_parse_without_panic(text in "[-0-9a-f=;,\"]{0,60}") {
        let _ = TraceParent::parse(&text);
        let _ = forwarded_host(&text);
    }

    #[test]
    fn what_is_printed_parses_back(trace_id: u128, parent_id: u64, name in "[a-z0-9.-]{1,20}") {
        let trace = TraceParent { trace_id, parent_id };
        prop_assert_eq!(TraceParent::parse(&trace.to_string()), Some(trace));
        let with_name = Baggage { service_name: Some(name), ..cart() };
        prop_assert_eq!(baggage(&with_name.to_string()), with_name);
    }
}
