#![allow(clippy::unwrap_used)]

use std::collections::HashSet;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::fixtures::*;
use crate::service::{BalanceMode, WeightedWaypoint};
use crate::snapshot::{Change, Snapshot};
use crate::view::{Answers, Coverage, Enrolled, Fetched, Need};

mod on_demand;
mod vectors;

const API: &str = "shop/api.shop";
const WAYPOINT: &str = "shop/waypoint.shop";

fn front() -> Workload {
    pod("a", "front", &["10.2.0.3"])
}

/// A service `shop/api.shop` at 10.96.0.10, its endpoint 10.1.0.7, and a waypoint 10.1.0.20.
fn mesh() -> Snapshot {
    let endpoint = pod("shop", "api", &["10.1.0.7"]).behind(API, &[]);
    let waypoint = pod("shop", "wp", &["10.1.0.20"]).behind(WAYPOINT, &[]);
    snapshot(
        [front(), endpoint, waypoint],
        [
            service("shop", "api", &["10.96.0.10"], &[(80, 8080)]),
            service("shop", "waypoint", &["10.96.0.20"], &[(15008, 15008)]),
        ],
    )
}

fn changed_api(change: impl FnOnce(&mut Service)) -> Change {
    let mut api = Service::clone(mesh().service(&key(API)).unwrap());
    change(&mut api);
    Change::service(api)
}

fn changed_endpoint(change: impl FnOnce(&mut Workload)) -> Change {
    let mut endpoint = Workload::clone(mesh().workload("c1//Pod/shop/api").unwrap());
    change(&mut endpoint);
    Change::workload(endpoint)
}

fn run(
    snapshot: &Snapshot,
    source: &Workload,
    to: &str,
    enrolled: &Enrolled,
) -> Result<Routed, NoRoute> {
    let answers = Answers::default();
    let view = View {
        snapshot,
        network: "n1",
        node: "",
        enrolled,
        answers: &answers,
        coverage: Coverage::Whole,
    };
    let destination = OriginalDst::new(to.parse().unwrap());
    let client = source.addresses.first().copied().unwrap();
    let request = Outbound { source, client, destination };
    match route(&view, &request, &mut StdRng::seed_from_u64(5)) {
        Step::Done(result) => result,
        Step::Need(need) => panic!("unexpected {need:?}"),
    }
}

/// One line that says all of a route: how, where to, which authority, who is expected, why.
fn line(result: Result<Routed, NoRoute>) -> String {
    let Routed { route, because, .. } = match result {
        Ok(routed) => routed,
        Err(error) => return error.to_string(),
    };
    let route = match route {
        Route::Passthrough { to } => format!("passthrough {to}"),
        Route::Direct { to, workload } => format!("direct {to} {}", workload.name),
        Route::Local { to, workload } => format!("local {to} {}", workload.name),
        Route::Tunnel { tunnel, .. } => tunnel_line(&tunnel),
    };
    format!("{route} ({because})")
}

fn tunnel_line(tunnel: &Tunnel) -> String {
    let expect: Vec<String> =
        tunnel.expect.iter().map(|id| format!("{}/{}", id.namespace, id.service_account)).collect();
    let inner = match &tunnel.inner {
        Some(inner) => format!(" [{}]", tunnel_line(inner)),
        None => String::new(),
    };
    format!("hbone {} {} {}{inner}", tunnel.via, tunnel.authority, expect.join("+"))
}

fn routes_to(changes: Vec<Change>, to: &str) -> String {
    line(run(&mesh().with(changes), &front(), to, &Enrolled::default()))
}

#[test]
fn pods_are_reached_by_their_protocol() {
    let plain = changed_endpoint(|w| w.tunnel_protocol = TunnelProtocol::None);
    assert_eq!(
        routes_to(vec![], "10.1.0.7:8080"),
        "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (workload address)"
    );
    assert_eq!(
        routes_to(vec![plain], "10.1.0.7:8080"),
        "direct 10.1.0.7:8080 api (workload address)"
    );
}

#[test]
fn a_workload_waypoint_takes_what_is_addressed_to_the_workload() {
    for reference in [by_hostname(WAYPOINT), by_address("n1", "10.1.0.20")] {
        let bound = changed_endpoint(|w| w.waypoint = Some(reference));
        assert_eq!(
            routes_to(vec![bound.clone()], "10.1.0.7:8080"),
            "hbone 10.1.0.20:15008 10.1.0.7:8080 shop/wp (workload waypoint)"
        );
        assert_eq!(
            routes_to(vec![bound], "10.96.0.10:80"),
            "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (endpoint of service)"
        );
    }
}

#[test]
fn an_instance_of_the_waypoint_reaches_the_workload_itself() {
    let bound = changed_endpoint(|w| w.waypoint = Some(by_hostname(WAYPOINT)));
    let snapshot = mesh().with([bound]);
    let from =
        |source: Workload| line(run(&snapshot, &source, "10.1.0.7:80", &Enrolled::default()));
    let instance = pod("shop", "wp", &["10.1.0.20"]);
    let elsewhere = pod("shop", "wp", &["10.1.0.99"]);
    assert_eq!(from(instance), "hbone 10.1.0.7:15008 10.1.0.7:80 shop/api (workload address)");
    assert_eq!(from(elsewhere), "hbone 10.1.0.20:15008 10.1.0.7:80 shop/wp (workload waypoint)");
}

#[test]
fn a_service_waypoint_takes_what_is_addressed_to_the_service() {
    let bound = || changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)));
    let expected = "hbone 10.1.0.20:15008 10.96.0.10:80 shop/wp (service waypoint)";
    assert_eq!(routes_to(vec![bound()], "10.96.0.10:80"), expected);
    let by_vip = changed_api(|s| s.waypoint = Some(by_address("n1", "10.96.0.20")));
    assert_eq!(routes_to(vec![by_vip], "10.96.0.10:80"), expected);
    // Also for the waypoint itself, and for a service without endpoint selection.
    let snapshot = mesh().with([bound()]);
    let waypoint = pod("shop", "wp", &["10.1.0.20"]);
    assert_eq!(line(run(&snapshot, &waypoint, "10.96.0.10:80", &Enrolled::default())), expected);
    let passthrough = changed_api(|s| {
        s.waypoint = Some(by_hostname(WAYPOINT));
        s.load_balancer = Some(balancer(BalanceMode::Passthrough, &[]));
    });
    assert_eq!(routes_to(vec![passthrough], "10.96.0.10:80"), expected);
}

#[test]
fn a_waypoint_that_cannot_be_resolved_closes_the_way() {
    let lost = changed_api(|s| s.waypoint = Some(by_hostname("shop/lost.shop")));
    assert_eq!(
        routes_to(vec![lost], "10.96.0.10:80"),
        "unknown waypoint: waypoint shop/lost.shop:15008 not found"
    );
    let bound = changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)));
    let gone = Change::RemoveWorkload("c1//Pod/shop/wp".into());
    assert!(routes_to(vec![bound, gone], "10.96.0.10:80").starts_with("unknown waypoint: "));
    let workload = changed_endpoint(|w| w.waypoint = Some(by_address("n1", "10.9.9.9")));
    assert_eq!(
        routes_to(vec![workload], "10.1.0.7:80"),
        "unknown waypoint: waypoint n1/10.9.9.9:15008 not found"
    );
}

#[test]
fn a_passthrough_service_is_no_waypoint_by_address() {
    let passthrough = Service {
        load_balancer: Some(balancer(BalanceMode::Passthrough, &[])),
        ..service("shop", "waypoint", &["10.96.0.20"], &[(15008, 15008)])
    };
    let bound = changed_api(|s| s.waypoint = Some(by_address("n1", "10.96.0.20")));
    let route = routes_to(vec![bound, Change::service(passthrough)], "10.96.0.10:80");
    assert!(route.starts_with("unknown waypoint: "), "{route}");
}

#[test]
fn services_choose_an_endpoint_or_refuse() {
    let gone = Change::RemoveWorkload("c1//Pod/shop/api".into());
    let passthrough =
        || changed_api(|s| s.load_balancer = Some(balancer(BalanceMode::Passthrough, &[])));
    assert_eq!(
        routes_to(vec![], "10.96.0.10:80"),
        "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (endpoint of service)"
    );
    assert_eq!(routes_to(vec![], "10.96.0.10:81"), "no healthy upstream: 10.96.0.10:81");
    assert_eq!(
        routes_to(vec![gone.clone()], "10.96.0.10:80"),
        "no healthy upstream: 10.96.0.10:80"
    );
    let plain = "passthrough 10.96.0.10:80 (passthrough service)";
    assert_eq!(routes_to(vec![passthrough()], "10.96.0.10:80"), plain);
    assert_eq!(routes_to(vec![passthrough(), gone], "10.96.0.10:80"), plain);
}

#[test]
fn the_names_of_a_service_are_expected_besides_the_endpoint() {
    let named = changed_api(|s| {
        s.subject_alt_names = vec!["spiffe://td/ns/far/sa/api".into(), "not-an-identity".into()];
    });
    assert_eq!(
        routes_to(vec![named], "10.96.0.10:80"),
        "hbone 10.1.0.7:15008 10.1.0.7:8080 far/api+shop/api (endpoint of service)"
    );
}

#[test]
fn unknown_addresses_pass_through() {
    assert_eq!(
        routes_to(vec![], "1.1.1.1:443"),
        "passthrough 1.1.1.1:443 (unknown address: passthrough)"
    );
    // A workload without addresses of its own does not make its node's known.
    let host = changed_endpoint(|w| w.network_mode = crate::workload::NetworkMode::HostNetwork);
    assert!(routes_to(vec![host], "10.1.0.7:8080").starts_with("passthrough"));
}

#[test]
fn calls_to_the_agent_itself_are_dropped() {
    for to in ["127.0.0.1:15001", "[::1]:15008", "127.1.2.3:15006"] {
        assert_eq!(routes_to(vec![], to), "attempted recursive call to ourselves", "{to}");
    }
    assert!(routes_to(vec![], "127.0.0.1:80").starts_with("passthrough"));
    assert!(routes_to(vec![], "10.1.0.7:15008").starts_with("hbone"));
}

#[test]
fn an_address_that_is_both_asks_for_waypoints_as_a_workload_and_for_endpoints_as_a_service() {
    let both = changed_api(|s| {
        s.vips.push(crate::addr::NetworkAddress {
            network: "n1".into(),
            ip: "10.1.0.20".parse().unwrap(),
        });
        s.waypoint = Some(by_hostname("shop/lost.shop"));
    });
    assert_eq!(
        routes_to(vec![both.clone()], "10.1.0.20:80"),
        "hbone 10.1.0.7:15008 10.1.0.7:8080 shop/api (endpoint of service)"
    );
    // Never past the mesh: there is someone who should have answered.
    let gone = Change::RemoveWorkload("c1//Pod/shop/api".into());
    assert_eq!(routes_to(vec![both, gone], "10.1.0.20:80"), "no healthy upstream: 10.1.0.20:80");
}

#[test]
fn weighted_waypoints_are_drawn_before_the_single_one() {
    let weighted = |weight| {
        let destination = by_hostname(WAYPOINT);
        changed_api(move |s| {
            s.waypoint = Some(by_hostname("shop/lost.shop"));
            s.weighted_waypoints = vec![WeightedWaypoint { destination, weight }];
        })
    };
    assert!(routes_to(vec![weighted(1)], "10.96.0.10:80").ends_with("(service waypoint)"));
    assert!(routes_to(vec![weighted(0)], "10.96.0.10:80").starts_with("unknown waypoint"));
}

#[test]
fn only_enrolled_workloads_without_a_waypoint_between_are_local() {
    let enrolled: Enrolled =
        ["c1//Pod/shop/api".into(), "c1//Pod/shop/wp".into()].into_iter().collect();
    let local =
        |changes: Vec<Change>, to| line(run(&mesh().with(changes), &front(), to, &enrolled));
    assert_eq!(local(vec![], "10.1.0.7:8080"), "local 10.1.0.7:8080 api (workload address)");
    assert_eq!(local(vec![], "10.96.0.10:80"), "local 10.1.0.7:8080 api (endpoint of service)");
    let plain = changed_endpoint(|w| w.tunnel_protocol = TunnelProtocol::None);
    assert!(local(vec![plain], "10.1.0.7:8080").starts_with("direct"));
    let bound = changed_endpoint(|w| w.waypoint = Some(by_hostname(WAYPOINT)));
    assert!(local(vec![bound], "10.1.0.7:8080").starts_with("hbone"));
    let service_bound = changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)));
    assert!(local(vec![service_bound], "10.96.0.10:80").starts_with("hbone"));
    let tunnel = changed_endpoint(|w| {
        w.application_tunnel = Some(crate::workload::ApplicationTunnel {
            protocol: crate::workload::ApplicationTunnelProtocol::Proxy,
            port: Some(15088),
        });
    });
    assert!(local(vec![tunnel], "10.1.0.7:8080").starts_with("hbone"));
}

mod other_networks {
    use super::*;

    fn gateway() -> Vec<Change> {
        let gateway = Workload { network: "n2".into(), ..pod("gw", "ew", &["9.9.9.9"]) };
        vec![Change::workload(gateway)]
    }

    fn remote_endpoint() -> Change {
        changed_endpoint(|w| {
            w.network = "n2".into();
            w.addresses = vec![];
            w.network_gateway = Some(by_address("n2", "9.9.9.9"));
        })
    }

    fn named_api(waypoint: Option<Arc<GatewayAddress>>) -> Change {
        changed_api(|s| {
            s.subject_alt_names = vec!["spiffe://td/ns/far/sa/api".into()];
            s.waypoint = waypoint;
        })
    }

    fn with_gateway(changes: impl IntoIterator<Item = Change>, to: &str) -> String {
        routes_to(gateway().into_iter().chain(changes).collect(), to)
    }

    #[test]
    fn an_endpoint_is_reached_through_its_gateway() {
        let expected = "hbone 9.9.9.9:15008 api.shop:80 gw/ew \
             [hbone 9.9.9.9:15008 api.shop:80 far/api] \
             (endpoint of service, through its network's gateway)";
        let changes = [remote_endpoint(), named_api(None)];
        assert_eq!(with_gateway(changes, "10.96.0.10:80"), expected);
    }

    #[test]
    fn a_gateway_service_translates_its_port() {
        let service = Service {
            subject_alt_names: vec!["spiffe://td/ns/gw/sa/named".into()],
            ..service("gw", "gate", &[], &[(15008, 16008)])
        };
        let gate = pod("gw", "ew", &["9.9.9.9"]).behind("gw/gate.gw", &[]);
        let endpoint = changed_endpoint(|w| {
            w.network = "n2".into();
            w.network_gateway = Some(by_hostname("gw/gate.gw"));
        });
        let changes =
            vec![Change::service(service), Change::workload(gate), endpoint, named_api(None)];
        assert_eq!(
            routes_to(changes, "10.96.0.10:80"),
            "hbone 9.9.9.9:16008 api.shop:80 gw/named+gw/ew \
             [hbone 9.9.9.9:16008 api.shop:80 far/api] \
             (endpoint of service, through its network's gateway)"
        );
    }

    #[test]
    fn without_a_gateway_the_connection_is_refused() {
        let no_gateway = changed_endpoint(|w| {
            w.network = "n2".into();
            w.addresses = vec![];
        });
        assert_eq!(
            routes_to(vec![no_gateway], "10.96.0.10:80"),
            "no healthy upstream: 10.96.0.10:80"
        );
        let with_address = changed_endpoint(|w| w.network = "n2".into());
        assert_eq!(
            routes_to(vec![with_address], "10.96.0.10:80"),
            "no valid routing destination for workload: c1//Pod/shop/api"
        );
        assert_eq!(
            routes_to(vec![remote_endpoint()], "10.96.0.10:80"),
            "unknown network gateway: network gateway n2/9.9.9.9:15008 not found"
        );
    }

    #[test]
    fn a_remote_service_waypoint_is_reached_through_its_own_gateway() {
        let waypoint = Workload {
            network: "n2".into(),
            network_gateway: Some(by_address("n2", "9.9.9.9")),
            ..pod("shop", "wp", &[]).behind(WAYPOINT, &[])
        };
        let named = Service {
            subject_alt_names: vec!["spiffe://td/ns/far/sa/wp".into()],
            ..service("shop", "waypoint", &["10.96.0.20"], &[(15008, 15008)])
        };
        let changes = [
            Change::workload(waypoint),
            Change::service(named),
            named_api(Some(by_hostname(WAYPOINT))),
        ];
        assert_eq!(
            with_gateway(changes, "10.96.0.10:80"),
            "hbone 9.9.9.9:15008 api.shop:80 gw/ew \
             [hbone 9.9.9.9:15008 api.shop:80 far/wp] \
             (service waypoint, through its network's gateway)"
        );
    }

    #[test]
    fn a_remote_waypoint_needs_a_service_to_be_addressed() {
        let waypoint = Workload { network: "n2".into(), ..pod("shop", "wp", &["10.1.0.20"]) };
        let changes = [
            Change::workload(waypoint.behind(WAYPOINT, &[])),
            changed_endpoint(|w| w.waypoint = Some(by_hostname(WAYPOINT))),
        ];
        assert_eq!(
            with_gateway(changes, "10.1.0.7:80"),
            "no service for target address: 10.1.0.7:80"
        );
    }
}

#[derive(Clone, Debug)]
enum Address {
    Ip(u8),
    Name(u8),
    None,
}

fn any_reference() -> impl Strategy<Value = Option<Arc<GatewayAddress>>> {
    prop::option::weighted(
        0.3,
        (0..6u8, any::<bool>()).prop_map(|(number, by_ip)| {
            if by_ip {
                by_address("n1", &format!("10.0.0.{number}"))
            } else {
                by_hostname(&format!("ns/s{number}.ns"))
            }
        }),
    )
}

fn any_workload() -> impl Strategy<Value = Workload> {
    let address = prop_oneof![
        (0..6u8).prop_map(Address::Ip),
        (0..4u8).prop_map(Address::Name),
        Just(Address::None),
    ];
    let services = prop::collection::vec((0..6u8, any::<bool>()), 0..3);
    (0..8u8, address, services, any_reference(), any_reference(), any::<bool>()).prop_map(
        |(number, address, services, waypoint, network_gateway, remote)| {
            let mut workload = pod("ns", &format!("w{number}"), &[]);
            match address {
                Address::Ip(ip) => {
                    workload.addresses = vec![format!("10.0.0.{ip}").parse().unwrap()]
                }
                Address::Name(name) => workload.hostname = format!("h{name}.example").into(),
                Address::None => {}
            }
            if remote {
                workload.network = "n2".into();
            }
            for (service, own) in services {
                let ports: &[_] = if own { &[(80, 8080), (15008, 15008)] } else { &[] };
                workload = workload.behind(&format!("ns/s{service}.ns"), ports);
            }
            Workload { waypoint, network_gateway, ..workload }
        },
    )
}

fn any_service() -> impl Strategy<Value = Service> {
    (0..6u8, 0..6u8, any_reference(), prop::option::of(0..3usize)).prop_map(
        |(number, ip, waypoint, mode)| {
            let modes = [BalanceMode::Strict, BalanceMode::Failover, BalanceMode::Passthrough];
            let name = format!("s{number}");
            let ports = [(80, 0), (15008, 15008)];
            Service {
                waypoint,
                load_balancer: mode.map(|mode| balancer(modes[mode], &[])),
                ..service("ns", &name, &[&format!("10.0.0.{ip}")], &ports)
            }
        },
    )
}

proptest! {
    #[test]
    fn routing_ends_and_asks_nothing_twice(
        workloads in prop::collection::vec(any_workload(), 0..8),
        services in prop::collection::vec(any_service(), 0..6),
        to in 0..6u8,
        port in prop::sample::select(vec![80, 443, 15008]),
        absent in any::<bool>(),
        on_demand in any::<bool>(),
        unanswered in any::<bool>(),
        seed in any::<u64>(),
        reseed in any::<bool>(),
    ) {
        let snapshot = snapshot(workloads, services);
        let source = front();
        let destination = OriginalDst::new(format!("10.0.0.{to}:{port}").parse().unwrap());
        let request = Outbound { source: &source, client: source.addresses[0], destination };
        let enrolled = Enrolled::default();
        let mut answers = Answers::default();
        let coverage = if on_demand { Coverage::OnDemand } else { Coverage::Whole };
        let fetched = if unanswered { Fetched::Unanswered } else { Fetched::Answered };
        let mut asked = HashSet::new();
        let mut random = StdRng::seed_from_u64(seed);
        loop {
            if reseed {
                random = StdRng::seed_from_u64(seed);
            }
            let view = View {
                snapshot: &snapshot, network: "n1", node: "", enrolled: &enrolled, answers: &answers,
                coverage,
            };
            match route(&view, &request, &mut random) {
                Step::Done(_) => break,
                Step::Need(need) => {
                    match need.clone() {
                        Need::Dns(name) => {
                            let ips =
                                if absent { vec![] } else { vec!["9.9.9.9".parse().unwrap()] };
                            answers.note_dns(name, ips);
                        }
                        Need::Resource(key) => {
                            prop_assert!(on_demand, "asked for what does not exist");
                            answers.note_resource(key, fetched);
                        }
                    }
                    prop_assert!(asked.insert(need), "asked twice");
                }
            }
        }
        // A name, and on demand the address or a waypoint and a gateway.
        let most = if reseed { 4 } else { 16 };
        prop_assert!(asked.len() <= most);
    }
}
