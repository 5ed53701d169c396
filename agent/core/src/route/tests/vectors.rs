//! Rows of the tables that any agent of the mesh follows: decisions of a source.

use super::*;
use crate::addr::NetworkAddress;
use crate::service::{BalanceMode, Visibility};
use crate::workload::{ApplicationTunnel, ApplicationTunnelProtocol};

#[test]
fn decisions_follow_the_table() {
    let own_waypoint = || changed_endpoint(|w| w.waypoint = Some(by_hostname(WAYPOINT)));
    let service_waypoint = || changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)));
    let lost = || changed_api(|s| s.waypoint = Some(by_hostname("shop/lost.shop")));
    let passthrough =
        || changed_api(|s| s.load_balancer = Some(balancer(BalanceMode::Passthrough, &[])));
    let plain = || changed_endpoint(|w| w.tunnel_protocol = TunnelProtocol::None);
    let native = || changed_endpoint(|w| w.native_tunnel = true);
    let native_in_plain = || {
        changed_endpoint(|w| {
            w.native_tunnel = true;
            w.tunnel_protocol = TunnelProtocol::None;
        })
    };
    let gone = || Change::RemoveWorkload("c1//Pod/shop/api".into());
    let hidden = || changed_api(|s| s.visibility = Visibility::Namespace);
    let elsewhere = || {
        changed_endpoint(|w| {
            w.network = "n2".into();
            w.addresses = vec![];
        })
    };
    let to_pod = "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (workload address)";
    let to_endpoint = "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (endpoint of service)";
    let rows: Vec<(&str, Vec<Change>, &str, &str)> = vec![
        ("pod, HBONE", vec![], "10.1.0.7:8080", to_pod),
        ("pod, TCP", vec![plain()], "10.1.0.7:8080", "direct 10.1.0.7:8080 api (workload address)"),
        ("pod, native tunnel", vec![native()], "10.1.0.7:8080", to_pod),
        (
            "pod, native tunnel without HBONE",
            vec![native_in_plain()],
            "10.1.0.7:8080",
            "direct 10.1.0.7:8080 api (workload address)",
        ),
        (
            "pod with a waypoint",
            vec![own_waypoint()],
            "10.1.0.7:8080",
            "hbone 10.1.0.20:15008 10.1.0.7:8080 shop/wp (workload waypoint)",
        ),
        ("VIP, pod with a waypoint", vec![own_waypoint()], "10.96.0.10:80", to_endpoint),
        (
            "VIP with a waypoint",
            vec![service_waypoint()],
            "10.96.0.10:80",
            "hbone 10.1.0.20:15008 10.96.0.10:80 shop/wp (service waypoint)",
        ),
        (
            "VIP with a waypoint, undeclared port",
            vec![service_waypoint()],
            "10.96.0.10:81",
            "hbone 10.1.0.20:15008 10.96.0.10:81 shop/wp (service waypoint)",
        ),
        (
            "VIP, lost waypoint",
            vec![lost()],
            "10.96.0.10:80",
            "unknown waypoint: waypoint shop/lost.shop:15008 not found",
        ),
        ("VIP, no endpoints", vec![gone()], "10.96.0.10:80", "no healthy upstream: 10.96.0.10:80"),
        ("VIP, undeclared port", vec![], "10.96.0.10:81", "no healthy upstream: 10.96.0.10:81"),
        (
            "VIP, PASSTHROUGH with HBONE endpoints",
            vec![passthrough()],
            "10.96.0.10:443",
            "passthrough 10.96.0.10:443 (passthrough service)",
        ),
        (
            "unknown",
            vec![],
            "192.0.2.1:443",
            "passthrough 192.0.2.1:443 (unknown address: passthrough)",
        ),
        (
            "VIP of another namespace only",
            vec![hidden()],
            "10.96.0.10:80",
            "passthrough 10.96.0.10:80 (unknown address: passthrough)",
        ),
        (
            "VIP, endpoint on n2 without gateway",
            vec![elsewhere()],
            "10.96.0.10:80",
            "no healthy upstream: 10.96.0.10:80",
        ),
        ("reserved port of a loopback address", vec![], "127.0.0.1:15001", RECURSIVE),
    ];
    for (row, changes, to, expected) in rows {
        assert_eq!(routes_to(changes, to), expected, "{row}");
    }
}

const RECURSIVE: &str = "attempted recursive call to ourselves";

#[test]
fn a_reference_by_hostname_finds_a_service_and_else_a_workload() {
    let named = Workload { hostname: "gate.example".into(), ..pod("shop", "gate", &["10.1.0.30"]) };
    let bound = || changed_api(|s| s.waypoint = Some(by_hostname("shop/gate.example")));
    assert_eq!(
        routes_to(vec![Change::workload(named.clone()), bound()], "10.96.0.10:80"),
        "hbone 10.1.0.30:15008 10.96.0.10:80 shop/gate (service waypoint)"
    );
    // Exactly that namespace.
    let other = Workload { uid: "c1//Pod/a/gate".into(), namespace: "a".into(), ..named.clone() };
    let route = routes_to(vec![Change::workload(other), bound()], "10.96.0.10:80");
    assert!(route.starts_with("unknown waypoint"), "{route}");
    let service = Service {
        hostname: "gate.example".into(),
        visibility: Visibility::Namespace,
        ..service("shop", "gate", &[], &[(15008, 16008)])
    };
    let behind = pod("shop", "other", &["10.1.0.31"]).behind("shop/gate.example", &[]);
    let changes =
        vec![Change::workload(named), Change::workload(behind), Change::service(service), bound()];
    assert_eq!(
        routes_to(changes, "10.96.0.10:80"),
        "hbone 10.1.0.31:16008 10.96.0.10:80 shop/other (service waypoint)"
    );
}

#[test]
fn a_waypoint_that_wants_to_know_targets_needs_no_declared_port() {
    let gate = |application_tunnel| Workload {
        application_tunnel,
        ..pod("shop", "wp", &["10.1.0.20"]).behind(WAYPOINT, &[])
    };
    let tunnel =
        |port| Some(ApplicationTunnel { protocol: ApplicationTunnelProtocol::Proxy, port });
    let undeclared = Change::service(service("shop", "waypoint", &["10.96.0.20"], &[(80, 80)]));
    let bound = || changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)));
    let through = |application_tunnel| {
        let changes = vec![undeclared.clone(), Change::workload(gate(application_tunnel)), bound()];
        routes_to(changes, "10.96.0.10:80")
    };
    let expected = "hbone 10.1.0.20:15008 10.96.0.10:80 shop/wp (service waypoint)";
    assert_eq!(through(tunnel(Some(15088))), expected);
    assert!(through(tunnel(None)).starts_with("unknown waypoint"));
    assert!(through(None).starts_with("unknown waypoint"));
}

#[test]
fn weighted_waypoints_share_connections_by_their_weights() {
    let canary = pod("shop", "canary", &["10.1.0.21"]).behind("shop/canary.shop", &[]);
    let entry = |name: &str, weight| crate::service::WeightedWaypoint {
        destination: by_hostname(name),
        weight,
    };
    let snapshot = mesh().with([
        Change::workload(canary),
        Change::service(service("shop", "canary", &[], &[(15008, 15008)])),
        changed_api(|s| {
            s.waypoint = Some(by_hostname(WAYPOINT));
            s.weighted_waypoints = vec![
                entry(WAYPOINT, 90),
                entry("shop/canary.shop", 10),
                entry("shop/lost.shop", 0),
            ];
        }),
    ]);
    let (source, enrolled, answers) = (front(), Enrolled::default(), Answers::default());
    let view = View {
        snapshot: &snapshot,
        network: "n1",
        node: "",
        enrolled: &enrolled,
        answers: &answers,
        coverage: Coverage::Whole,
    };
    let destination = OriginalDst::new("10.96.0.10:80".parse().unwrap());
    let request = Outbound { source: &source, client: source.addresses[0], destination };
    let mut random = StdRng::seed_from_u64(3);
    let to_canary = (0..10_000)
        .filter(|_| match route(&view, &request, &mut random) {
            Step::Done(result) => line(result).contains("10.1.0.21"),
            Step::Need(need) => panic!("unexpected {need:?}"),
        })
        .count();
    assert!((850..1_150).contains(&to_canary), "{to_canary}");
}

#[test]
fn a_range_stands_for_a_service_to_its_clients() {
    let range = |namespace: &str, cidr: &str| Service {
        cidr_vips: vec![crate::addr::NetworkCidr {
            network: "n1".into(),
            cidr: cidr.parse().unwrap(),
        }],
        ..service(namespace, "range", &[], &[(443, 8443)])
    };
    let endpoint = pod("shop", "edge", &["10.1.0.40"]).behind("shop/range.shop", &[]);
    let with = |extra: Vec<Change>| {
        let base =
            [Change::service(range("shop", "203.0.113.0/24")), Change::workload(endpoint.clone())];
        routes_to(base.into_iter().chain(extra).collect(), "203.0.113.9:443")
    };
    assert_eq!(
        with(vec![]),
        "hbone 10.1.0.40:15008 10.1.0.40:8443 shop/edge (endpoint of service)"
    );
    // The client's own namespace comes before the narrower range.
    assert_eq!(
        with(vec![Change::service(range("a", "203.0.0.0/16"))]),
        "no healthy upstream: 203.0.113.9:443"
    );
    // A range of another network is nobody's here.
    let elsewhere = range("shop", "198.51.100.0/24");
    let cidr_vips = elsewhere.cidr_vips.iter().cloned().map(|mut vip| {
        vip.network = "n2".into();
        vip
    });
    let elsewhere = Service { cidr_vips: cidr_vips.collect(), ..elsewhere };
    assert!(
        routes_to(vec![Change::service(elsewhere)], "198.51.100.1:443").starts_with("passthrough")
    );
}

#[test]
fn an_address_that_is_both_keeps_the_two_orders_of_lookup() {
    let both = |waypoint: Option<Arc<GatewayAddress>>| {
        changed_api(|s| {
            let ip = "10.1.0.20".parse().unwrap();
            s.vips.push(NetworkAddress { network: "n1".into(), ip });
            s.waypoint = waypoint;
        })
    };
    // The question for the service's waypoint takes it for a workload, that for an endpoint for a VIP.
    let expected = "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (endpoint of service)";
    assert_eq!(routes_to(vec![both(Some(by_hostname(WAYPOINT)))], "10.1.0.20:80"), expected);
    assert_eq!(routes_to(vec![both(None)], "10.1.0.20:80"), expected);
}
