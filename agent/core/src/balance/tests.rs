#![allow(clippy::unwrap_used)]

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::fixtures::*;
use crate::service::{HealthPolicy, IpFamilies};
use crate::view::Stop;
use crate::workload::{ApplicationTunnel, ApplicationTunnelProtocol, Health, Locality};

const API: &str = "shop/api.shop";

fn locality(region: &str, zone: &str, subzone: &str) -> Arc<Locality> {
    Arc::new(Locality { region: region.into(), zone: zone.into(), subzone: subzone.into() })
}

fn source() -> Workload {
    Workload {
        locality: locality("r", "z", "s"),
        node: "n".into(),
        ..pod("web", "front", &["10.2.0.3"])
    }
}

/// Endpoint number 1 to 5, as the vectors describe them.
fn endpoint(number: usize) -> Workload {
    let name = format!("e{number}");
    let plain = pod("shop", &name, &["10.1.0.7"]).behind(API, &[]);
    let near = Workload { locality: locality("r", "z", "s"), node: "n".into(), ..plain.clone() };
    match number {
        1 => near,
        2 => Workload { locality: locality("r", "z", "elsewhere"), ..plain },
        3 => plain,
        4 => Workload { locality: locality("elsewhere", "elsewhere", ""), ..plain },
        5 => Workload {
            network: "n2".into(),
            network_gateway: Some(by_address("n2", "9.9.9.9")),
            ..near
        },
        _ => panic!("no such endpoint"),
    }
}

fn api(load_balancer: Option<LoadBalancer>) -> Service {
    Service { load_balancer, ..service("shop", "api", &["10.96.0.10"], &[(80, 8080)]) }
}

#[test]
fn localities_decide_as_the_vectors_say() {
    use BalanceMode::{Failover, Standard, Strict};
    use Scope::{Network, Node, Region, Subzone, Zone};
    type Numbers = &'static [usize];
    let vectors: &[(BalanceMode, &[Scope], Numbers, Numbers)] = &[
        (Standard, &[Network], &[1, 2, 3, 4, 5], &[1, 2, 3, 4, 5]),
        (Strict, &[Region, Zone, Subzone], &[1, 2, 3, 4, 5], &[1, 5]),
        (Strict, &[Network, Region, Zone], &[1, 2, 3, 4, 5], &[1, 2]),
        (Strict, &[Node], &[2, 3, 4], &[]),
        (Failover, &[Region, Zone, Subzone], &[1, 2, 3, 4, 5], &[1, 5]),
        (Failover, &[Network, Region, Zone], &[1, 2, 3, 4, 5], &[1, 2]),
        (Failover, &[Network, Region, Zone], &[4, 5], &[4]),
        (Failover, &[Network, Region, Zone], &[5], &[5]),
        (Failover, &[Region, Zone], &[3, 4], &[3, 4]),
        (Failover, &[Region, Network], &[4], &[4]),
    ];
    for (mode, scopes, endpoints, expected) in vectors {
        let service = api(Some(balancer(*mode, scopes)));
        let snapshot =
            snapshot(endpoints.iter().map(|number| endpoint(*number)), [service.clone()]);
        let found = candidates(&snapshot, &source(), &service, 80, Mode::Standard);
        let mut found: Vec<&str> = found.iter().map(|e| &*e.workload.name).collect();
        found.sort_unstable();
        let expected: Vec<String> = expected.iter().map(|number| format!("e{number}")).collect();
        assert_eq!(found, expected, "{mode:?} {scopes:?} of {endpoints:?}");
    }
}

#[test]
fn without_a_balancer_any_endpoint_is_a_candidate() {
    let snapshot = snapshot((1..=5).map(endpoint), [api(None)]);
    assert_eq!(candidates(&snapshot, &source(), &api(None), 80, Mode::Standard).len(), 5);
}

#[test]
fn ranks_are_those_of_the_table() {
    use Scope::{Network, Region, Zone};
    let balancer = balancer(BalanceMode::Failover, &[Network, Region, Zone]);
    let at = |network: &str, region: &str, zone: &str| Workload {
        network: network.into(),
        locality: locality(region, zone, ""),
        ..endpoint(3)
    };
    let vectors = [
        (at("n1", "r", "z"), 5),
        (at("n1", "r", "y"), 4),
        (at("n1", "q", "z"), 3),
        (at("n2", "r", "z"), 2),
        (at("n2", "r", "y"), 1),
        (at("n2", "q", "z"), 0),
    ];
    for (workload, expected) in vectors {
        assert_eq!(rank(&balancer, &source(), &workload), Some(expected));
    }
}

fn choose(workloads: Vec<Workload>, service: Service, port: u16, mode: Mode) -> Option<Upstream> {
    let snapshot = snapshot(workloads, [service.clone()]);
    let service = Arc::new(service);
    let mut random = StdRng::seed_from_u64(1);
    choose_endpoint(&snapshot, &source(), &service, port, mode, &mut random)
}

#[test]
fn endpoints_without_weight_take_nothing() {
    let weightless = |number| Workload { capacity: 0, ..endpoint(number) };
    let failover = api(Some(balancer(BalanceMode::Failover, &[Scope::Region])));
    let none =
        choose(vec![weightless(1), weightless(2), endpoint(4)], failover, 80, Mode::Standard);
    assert_eq!(none, None);
    let some = choose(vec![weightless(1), endpoint(2)], api(None), 80, Mode::Standard).unwrap();
    assert_eq!(&*some.workload.name, "e2");
}

#[test]
fn draws_follow_the_weights() {
    let mut random = StdRng::seed_from_u64(7);
    let mut hits = [0; 3];
    for _ in 0..10_000 {
        let index = weighted(&[0usize, 1, 2], |i| [1, 0, 3][*i], &mut random).unwrap();
        hits[*index] += 1;
    }
    assert_eq!(hits[1], 0);
    assert!((2_200..2_800).contains(&hits[0]), "{hits:?}");
}

#[test]
fn draws_among_many_follow_the_weights_and_pass_over_who_is_not_usable() {
    // A third weighs 1, a third 3, a third nothing; every fifth is unhealthy, one cannot be dialled.
    let member = |number: u32| Workload {
        capacity: [1, 3, 0][number as usize % 3],
        status: if number.is_multiple_of(5) { Health::Unhealthy } else { Health::Healthy },
        addresses: if number == 1 { vec![] } else { vec!["10.1.0.7".parse().unwrap()] },
        ..pod("shop", &format!("e{number}"), &[]).behind(API, &[])
    };
    let service = Arc::new(api(None));
    let snapshot = snapshot((0..300).map(member), [api(None)]);
    assert_eq!(snapshot.declared_count(&service), 300);
    let mut random = StdRng::seed_from_u64(11);
    let mut hits = std::collections::HashMap::new();
    for _ in 0..20_000 {
        let chosen =
            choose_endpoint(&snapshot, &source(), &service, 80, Mode::Standard, &mut random);
        let name = chosen.unwrap().workload.name.clone();
        *hits.entry(name[1..].parse::<u32>().unwrap()).or_insert(0) += 1;
    }
    assert!(hits.keys().all(|number| number % 5 != 0 && number % 3 != 2 && *number != 1));
    let of_weight = |rest| -> u32 {
        hits.iter().filter(|(number, _)| *number % 3 == rest).map(|(_, hits)| hits).sum()
    };
    let share = f64::from(of_weight(1)) / f64::from(of_weight(0));
    assert!((2.7..3.3).contains(&share), "{share}");
    assert_eq!(hits.len(), 159);
}

#[test]
fn a_zone_of_the_same_name_in_another_region_matches() {
    let far = Workload { locality: locality("elsewhere", "z", "s"), ..endpoint(3) };
    let strict = api(Some(balancer(BalanceMode::Strict, &[Scope::Zone])));
    let chosen = choose(vec![far], strict, 80, Mode::Standard).unwrap();
    assert_eq!(&*chosen.workload.name, "e3");
}

#[test]
fn ports_translate_as_the_vectors_say() {
    let tunnel =
        ApplicationTunnel { protocol: ApplicationTunnelProtocol::Proxy, port: Some(15088) };
    type Ports = &'static [(u16, u16)];
    type Tunnel = Option<ApplicationTunnel>;
    type Vector = (Ports, Ports, u16, Mode, Tunnel, Option<u16>);
    let vectors: &[Vector] = &[
        (&[(80, 8080)], &[(80, 8080)], 80, Mode::Standard, None, Some(8080)),
        (&[(80, 8080)], &[], 80, Mode::Standard, None, Some(8080)),
        (&[(80, 8080)], &[(80, 9090)], 80, Mode::Standard, None, Some(9090)),
        (&[(80, 0)], &[(80, 9090)], 80, Mode::Standard, None, Some(9090)),
        (&[(80, 0)], &[], 80, Mode::Standard, None, None),
        (&[(80, 8080)], &[(81, 9090)], 81, Mode::Standard, None, None),
        (&[], &[], 15008, Mode::Waypoint, Some(tunnel), Some(15008)),
        (&[], &[], 15008, Mode::Waypoint, None, None),
        (&[], &[], 15008, Mode::Standard, Some(tunnel), None),
    ];
    for (ports, own, port, mode, application_tunnel, expected) in vectors {
        let endpoint = Workload {
            application_tunnel: *application_tunnel,
            ..pod("shop", "e", &["10.1.0.7"]).behind(API, own)
        };
        let found = choose(vec![endpoint], service("shop", "api", &[], ports), *port, *mode);
        assert_eq!(found.map(|upstream| upstream.port), *expected, "{ports:?} {own:?} {port}");
    }
}

#[test]
fn endpoints_that_cannot_be_dialled_are_left_out() {
    let gateway = Some(by_address("n2", "9.9.9.9"));
    let bare = |network: &str, network_gateway| Workload {
        network: network.into(),
        network_gateway,
        addresses: vec![],
        ..endpoint(3)
    };
    let named = Workload { hostname: "db.example".into(), ..bare("n1", None) };
    let cases = [
        (bare("n1", None), false),
        (bare("n1", gateway.clone()), false),
        (bare("n2", None), false),
        (bare("n2", gateway), true),
        (named, true),
    ];
    for (workload, usable) in cases {
        let found = choose(vec![workload.clone()], api(None), 80, Mode::Standard);
        assert_eq!(found.is_some(), usable, "{workload:?}");
    }
}

#[test]
fn unhealthy_endpoints_take_traffic_only_where_all_may() {
    let unhealthy = Workload { status: Health::Unhealthy, ..endpoint(1) };
    let any = LoadBalancer {
        health_policy: HealthPolicy::AllowAll,
        ..balancer(BalanceMode::Standard, &[])
    };
    assert_eq!(choose(vec![unhealthy.clone()], api(None), 80, Mode::Standard), None);
    assert!(choose(vec![unhealthy], api(Some(any)), 80, Mode::Standard).is_some());
}

fn address_of(
    workload: Workload,
    ip_families: IpFamilies,
    wanted: &str,
    answers: &Answers,
) -> Result<String, String> {
    let service = Arc::new(Service { ip_families, ..api(None) });
    let upstream = Upstream { workload: Arc::new(workload), port: 80, service: Some(service) };
    let mut random = StdRng::seed_from_u64(3);
    match choose_address(answers, &upstream, wanted.parse().unwrap(), &mut random) {
        Ok(ip) => Ok(ip.to_string()),
        Err(Stop::Need(Need::Dns(name))) => Err(format!("need {name}")),
        Err(Stop::Need(Need::Resource(key))) => panic!("no resource is asked for: {key}"),
        Err(Stop::Failed(error)) => Err(error.to_string()),
    }
}

#[test]
fn the_wanted_address_or_its_family_is_preferred() {
    let both = pod("shop", "e", &["10.1.0.7", "fd00::7"]);
    let none = Answers::default();
    let vectors = [
        (IpFamilies::Automatic, "fd00::7", "fd00::7"),
        (IpFamilies::Ipv4Only, "fd00::7", "fd00::7"),
        (IpFamilies::Dual, "10.96.0.10", "10.1.0.7"),
        (IpFamilies::Dual, "fd96::10", "fd00::7"),
        (IpFamilies::Ipv6Only, "10.96.0.10", "fd00::7"),
        (IpFamilies::Ipv4Only, "fd96::10", "10.1.0.7"),
    ];
    for (families, wanted, expected) in vectors {
        let found = address_of(both.clone(), families, wanted, &none);
        assert_eq!(found, Ok(expected.to_owned()), "{families:?} {wanted}");
    }
    let v6 = pod("shop", "e", &["fd00::7"]);
    assert_eq!(address_of(v6.clone(), IpFamilies::Dual, "10.96.0.10", &none).unwrap(), "fd00::7");
    assert_eq!(
        address_of(v6, IpFamilies::Ipv4Only, "10.96.0.10", &none).unwrap_err(),
        "no valid routing destination for workload: c1//Pod/shop/e"
    );
}

#[test]
fn a_hostname_is_asked_for_and_its_answer_used() {
    let named = Workload { hostname: "db.example".into(), ..pod("shop", "db", &[]) };
    let ask = |answers: &Answers| address_of(named.clone(), IpFamilies::Dual, "10.0.0.1", answers);
    let mut answers = Answers::default();
    assert_eq!(ask(&answers).unwrap_err(), "need db.example");
    answers.note_dns("db.example".into(), vec![]);
    assert_eq!(
        ask(&answers).unwrap_err(),
        "no ip addresses were resolved for workload: c1//Pod/shop/db"
    );
    answers.note_dns("db.example".into(), vec!["fd00::1".parse().unwrap()]);
    assert_eq!(ask(&answers).unwrap(), "fd00::1");
    let both = ["fd00::1", "::ffff:9.9.9.9"].map(|ip| ip.parse().unwrap()).to_vec();
    answers.note_dns("db.example".into(), both);
    assert_eq!(ask(&answers).unwrap(), "9.9.9.9");
}
