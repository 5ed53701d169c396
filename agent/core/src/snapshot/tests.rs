#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::addr::{NetworkAddress, NetworkCidr};
use crate::authorization::{Action, PolicyScope};
use crate::fixtures::*;
use crate::service::{BalanceMode, LoadBalancer, Visibility};
use crate::workload::NetworkMode;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn cidr(network: &str, range: &str) -> NetworkCidr {
    NetworkCidr { network: network.into(), cidr: range.parse().unwrap() }
}

/// The endpoints of `shop/api.shop`, by the names of their pods.
fn endpoints(snapshot: &Snapshot) -> Vec<String> {
    let service = snapshot.service(&key("shop/api.shop")).unwrap();
    let mut names: Vec<_> =
        snapshot.endpoints(service).map(|endpoint| endpoint.workload.name.to_string()).collect();
    names.sort_unstable();
    names
}

fn api() -> Service {
    service("shop", "api", &["10.96.0.10"], &[(80, 8080)])
}

fn endpoint(name: &str) -> Workload {
    pod("shop", name, &["10.1.0.7"]).behind("shop/api.shop", &[(80, 8080)])
}

#[test]
fn endpoints_need_no_order_of_arrival() {
    let workload = Snapshot::default().with([Change::workload(endpoint("a"))]);
    let both = workload.with([Change::service(api())]);
    assert_eq!(endpoints(&both), ["a"]);
    let again = both
        .with([Change::RemoveService(key("shop/api.shop"))])
        .with([Change::workload(endpoint("b"))])
        .with([Change::service(api())]);
    assert_eq!(endpoints(&again), ["a", "b"]);
    let less = again.with([Change::RemoveWorkload("c1//Pod/shop/a".into())]);
    assert_eq!(endpoints(&less), ["b"]);
    assert_eq!(endpoints(&again), ["a", "b"]);
    let left = less.with([Change::workload(pod("shop", "b", &["10.1.0.7"]))]);
    assert_eq!(endpoints(&left), [""; 0]);
}

/// A large step is made by two threads.
#[test]
fn a_large_step_equals_many_small_ones() {
    let workload = |number: usize, host: u8| {
        let (service, place) = (number % 100, number / 100);
        let address = format!("10.{host}.{service}.{place}");
        pod("shop", &format!("w{number}"), &[&address])
            .behind(&format!("shop/s{service}.shop"), &[(80, 8080)])
    };
    let service = |number: usize| {
        service("shop", &format!("s{number}"), &[&format!("10.96.0.{number}")], &[(80, 80)])
    };
    let mut first: Vec<Change> = (0..100).map(|number| Change::service(service(number))).collect();
    first.extend((0..WORTH_A_THREAD).map(|number| Change::workload(workload(number, 1))));
    let second = (0..WORTH_A_THREAD).map(|number| match number % 8 {
        0 => Change::RemoveWorkload(workload(number, 1).uid),
        _ => Change::workload(workload(number, 2)),
    });
    let second: Vec<Change> = second.collect();
    let large = Snapshot::default().with(first.clone()).with(second.clone());
    let steps = first.chunks(1000).chain(second.chunks(1000));
    let small = steps.fold(Snapshot::default(), |it, step| it.with(step.iter().cloned()));
    assert_eq!(large.workload_count(), WORTH_A_THREAD - WORTH_A_THREAD / 8);
    assert_eq!(small.workload_count(), large.workload_count());
    for number in 0..WORTH_A_THREAD {
        let Workload { uid, name, addresses, .. } = workload(number, 2);
        let found = small.workload(&uid);
        assert_eq!(found.is_some(), number % 8 != 0);
        assert_eq!(large.workload(&uid), found);
        assert_eq!(large.workload_at("n1", addresses[0]), found);
        assert_eq!(large.workloads_of_pod("shop", &name).next(), found);
        assert_eq!(large.workload_at("n1", workload(number, 1).addresses[0]), None);
    }
    for number in 0..100 {
        let service = service(number);
        assert_eq!(large.service(&service.key()).map(AsRef::as_ref), Some(&service));
        assert_eq!(large.declared_count(&service), small.declared_count(&service));
        let name = format!("s{number}.shop");
        assert!(
            large.members(&service).all(|it| *it.services.keys().next().unwrap().hostname == *name)
        );
    }
}

#[test]
fn what_goes_and_comes_back_within_a_step_is_there_once() {
    let (workload, service) = (Arc::new(endpoint("a")), api());
    let before = snapshot([endpoint("a")], [api()]).with([Change::workload(workload.clone())]);
    let other = Workload { status: Health::Unhealthy, ..endpoint("a") };
    let steps = [
        Change::RemoveWorkload(workload.uid.clone()),
        Change::workload(other.clone()),
        Change::RemoveWorkload(workload.uid.clone()),
        Change::workload(workload.clone()),
        Change::RemoveService(service.key()),
        Change::service(service.clone()),
    ];
    let now = before.with(steps.clone());
    assert_eq!((now.workload_count(), now.service_count()), (1, 1));
    assert_eq!(now.workload(&workload.uid), Some(&workload));
    assert_eq!(now.workload_at("n1", workload.addresses[0]), Some(&workload));
    assert_eq!(now.workloads_of_pod("shop", "a").count(), 1);
    assert_eq!(now.declared_count(&service), 1);
    assert_eq!(endpoints(&now), ["a"]);
    let gone = now.with(steps.into_iter().take(3));
    assert_eq!((gone.workload_count(), gone.declared_count(&service)), (0, 0));
    assert_eq!(gone.workload_at("n1", workload.addresses[0]), None);
}

#[test]
fn unhealthy_endpoints_return_with_their_health_or_policy() {
    let sick = Workload { status: Health::Unhealthy, ..endpoint("a") };
    let all = LoadBalancer {
        health_policy: HealthPolicy::AllowAll,
        ..balancer(BalanceMode::Standard, &[])
    };
    let lenient = Service { load_balancer: Some(all), ..api() };
    let snapshot = snapshot([sick], [api()]);
    assert_eq!(endpoints(&snapshot), [""; 0]);
    assert_eq!(snapshot.members(snapshot.service(&key("shop/api.shop")).unwrap()).count(), 1);
    assert_eq!(endpoints(&snapshot.with([Change::service(lenient)])), ["a"]);
    assert_eq!(endpoints(&snapshot.with([Change::workload(endpoint("a"))])), ["a"]);
}

#[test]
fn fixed_endpoints_join_the_declared_ones_whatever_their_health() {
    let fixed = |uid: &str| (Arc::from(uid), PortMap::from([(80, 9999)]));
    let service = Service {
        fixed_endpoints: ["a", "b", "c"].map(|n| fixed(&format!("c1//Pod/shop/{n}"))).into(),
        ..api()
    };
    let sick = |workload| Workload { status: Health::Unhealthy, ..workload };
    let other = sick(pod("shop", "b", &["10.1.0.8"]));
    let snapshot = snapshot([endpoint("a"), other.clone()], [service.clone()]);
    let ports = |snapshot: &Snapshot| {
        let mut ports: Vec<_> = snapshot
            .endpoints(&service)
            .map(|endpoint| (endpoint.workload.name.to_string(), endpoint.ports[&80]))
            .collect();
        ports.sort_unstable();
        ports
    };
    assert_eq!(ports(&snapshot), [("a".to_owned(), 8080), ("b".to_owned(), 9999)]);
    assert_eq!(snapshot.services_of(&other).count(), 1);
    let snapshot = snapshot.with([Change::workload(sick(endpoint("a")))]);
    assert_eq!(ports(&snapshot), [("a".to_owned(), 9999), ("b".to_owned(), 9999)]);
    assert_eq!(snapshot.members(&service).count(), 2);
}

#[test]
fn of_several_workloads_on_one_address_the_foremost_owns_it() {
    let with = |uid: &str, tunnel_protocol| Workload {
        uid: uid.into(),
        tunnel_protocol,
        ..pod("shop", uid, &["10.1.0.7"])
    };
    let (hbone, none) = (TunnelProtocol::Hbone, TunnelProtocol::None);
    let ascending = [
        with("entry-1", none),
        with("entry-2", none),
        with("entry-3", hbone),
        with("c//Pod/n/4", none),
        with("c//Pod/n/5", hbone),
        with("c//Pod/n/6", hbone),
    ];
    for count in 1..=ascending.len() {
        let shown = &ascending[..count];
        let snapshot = snapshot(shown.iter().cloned(), []);
        assert_eq!(snapshot.workload_at("n1", ip("10.1.0.7")).unwrap().uid, shown[count - 1].uid);
    }
    let backwards = snapshot(ascending[..5].iter().rev().cloned(), []);
    assert_eq!(&*backwards.workload_at("n1", ip("10.1.0.7")).unwrap().uid, "c//Pod/n/5");
}

#[test]
fn addresses_belong_to_a_network_and_not_to_host_network_pods() {
    let host =
        Workload { network_mode: NetworkMode::HostNetwork, ..pod("kube", "h", &["10.0.0.1"]) };
    let snapshot = snapshot([pod("shop", "a", &["10.1.0.7"]), host], []);
    assert!(snapshot.workload_at("n1", ip("10.1.0.7")).is_some());
    assert!(snapshot.workload_at("n2", ip("10.1.0.7")).is_none());
    assert!(snapshot.workload_at("n1", ip("10.0.0.1")).is_none());
}

#[test]
fn mapped_addresses_are_plain_ones() {
    let workload = pod("shop", "a", &["::ffff:10.1.0.7"]);
    let service = Service {
        cidr_vips: vec![cidr("n1", "::ffff:10.8.0.0/112"), cidr("n1", "fd00::/8")],
        ..service("shop", "api", &["::ffff:10.96.0.10"], &[])
    };
    let snapshot = snapshot([workload], [service]);
    let owner = snapshot.workload_at("n1", ip("::ffff:10.1.0.7")).unwrap();
    assert_eq!(owner.addresses, [ip("10.1.0.7")]);
    for address in ["10.96.0.10", "::ffff:10.96.0.10", "10.8.9.9", "::ffff:10.8.9.9", "fd01::1"] {
        assert!(snapshot.service_at("n1", ip(address), None).is_some(), "{address}");
    }
    assert!(snapshot.service_at("n1", ip("10.9.9.9"), None).is_none());
}

#[test]
fn the_best_service_is_chosen_as_the_vectors_say() {
    enum At {
        Vip,
        Range(&'static str),
    }
    use At::{Range, Vip};
    let of = |(namespace, at, canonical, hidden): &(&str, At, bool, bool)| {
        let service = service(namespace, "x", &[], &[]);
        Service {
            vips: match at {
                Vip => vec![NetworkAddress { network: "n1".into(), ip: ip("10.96.0.10") }],
                Range(_) => vec![],
            },
            cidr_vips: match at {
                Vip => vec![],
                Range(range) => vec![cidr("n1", range)],
            },
            canonical: *canonical,
            visibility: if *hidden { Visibility::Namespace } else { Visibility::Public },
            ..service
        }
    };
    let vectors = [
        (vec![("b", Vip, false, false), ("c", Vip, false, false)], Some("b")),
        (vec![("b", Vip, false, false), ("c", Vip, true, false)], Some("c")),
        (vec![("b", Vip, true, false), ("c", Vip, true, false)], Some("c")),
        (vec![("b", Vip, true, false), ("a", Vip, false, false)], Some("a")),
        (vec![("a", Vip, false, true), ("b", Vip, false, false)], Some("a")),
        (vec![("b", Vip, true, true), ("c", Vip, false, false)], Some("c")),
        (vec![("b", Vip, false, true)], None),
        (
            vec![
                ("b", Range("10.96.0.0/24"), false, false),
                ("a", Range("10.96.0.0/16"), false, false),
            ],
            Some("a"),
        ),
        (
            vec![
                ("b", Range("10.96.0.0/24"), false, false),
                ("c", Range("10.96.0.0/16"), true, false),
            ],
            Some("b"),
        ),
        (vec![("b", Vip, false, true), ("c", Range("10.0.0.0/8"), false, false)], Some("c")),
    ];
    for (number, (candidates, expected)) in vectors.iter().enumerate() {
        let snapshot = snapshot([], candidates.iter().map(of));
        let found = snapshot.service_at("n1", ip("10.96.0.10"), Some("a"));
        assert_eq!(found.map(|service| &*service.namespace), *expected, "{number}");
        assert_eq!(snapshot.service_at("n2", ip("10.96.0.10"), Some("a")), None);
    }
}

#[test]
fn hostnames_choose_like_addresses() {
    let named = |namespace: &str, canonical| Service {
        hostname: "db.example".into(),
        canonical,
        ..service(namespace, "db", &[], &[])
    };
    let snapshot = snapshot([], [named("b", true), named("a", false), named("c", false)]);
    let of = |namespace| &*snapshot.service_named("db.example", namespace).unwrap().namespace;
    assert_eq!((of(Some("a")), of(Some("x")), of(None)), ("a", "b", "b"));
    assert_eq!(snapshot.service_named("x.example", None), None);
}

#[test]
fn a_local_workload_is_of_the_node_unless_that_is_unknown() {
    let on = |node: &str, uid: &str| Workload {
        node: node.into(),
        uid: uid.into(),
        ..pod("shop", "api", &[])
    };
    let snapshot = snapshot([on("n-1", "x"), on("n-2", "y")], []);
    let find = |account, node| {
        snapshot.local_workload("shop", "api", account, node).map(|workload| &*workload.uid)
    };
    assert_eq!(find("api", "n-1"), Some("x"));
    assert_eq!(find("api", "n-3"), None);
    assert_eq!(find("api", ""), Some("y"));
    assert_eq!(find("other", "n-1"), None);
}

#[test]
fn only_a_changed_policy_ends_sharing() {
    let before = Snapshot::default().with([Change::Authorization(policy(
        "a",
        "p",
        Action::Deny,
        &["N=web"],
    ))]);
    let same = before.with([
        Change::Authorization(policy("a", "p", Action::Deny, &["N=web"])),
        Change::RemoveAuthorization("a/unknown".into()),
        Change::workload(endpoint("a")),
    ]);
    assert!(same.shares_policies_with(&before));
    let other = same.with([Change::Authorization(policy("a", "p", Action::Deny, &["N=x"]))]);
    assert!(!other.shares_policies_with(&before));
    assert!(!same.with([Change::RemoveAuthorization("a/p".into())]).shares_policies_with(&before));
}

#[test]
fn policies_move_with_their_scope() {
    let scoped = |scope| {
        let policy = policy("a", "p", Action::Deny, &[]);
        Change::Authorization(crate::authorization::Authorization { scope, ..policy })
    };
    let counts = |snapshot: &Snapshot| {
        (snapshot.global_policies().len(), snapshot.namespace_policies("a").count())
    };
    let mut snapshot = Snapshot::default();
    for (scope, expected) in [
        (PolicyScope::Global, (1, 0)),
        (PolicyScope::Namespace, (0, 1)),
        (PolicyScope::WorkloadSelector, (0, 0)),
        (PolicyScope::Global, (1, 0)),
    ] {
        snapshot = snapshot.with([scoped(scope)]);
        assert_eq!(counts(&snapshot), expected, "{scope:?}");
        assert!(snapshot.policy("a/p").is_some());
    }
}

#[test]
fn a_policy_for_the_namespace_without_a_name_is_for_all() {
    let policy = crate::authorization::Authorization {
        scope: PolicyScope::Namespace,
        ..policy("", "p", Action::Deny, &[""])
    };
    let snapshot = Snapshot::default().with([Change::Authorization(policy)]);
    assert_eq!(snapshot.global_policies().len(), 1);
    assert!(snapshot.policy("/p").is_some());
}

#[test]
fn ranges_of_mapped_addresses_in_policies_are_plain_ones() {
    let client = crate::fixtures::plaintext();
    let decides = |rule: &str| {
        let change = Change::Authorization(policy("a", "p", Action::Deny, &[rule]));
        let snapshot = Snapshot::default().with([change]);
        snapshot.policy("a/p").unwrap().matching_rule(&client).is_some()
    };
    for (rule, expected) in [
        ("SIP=::ffff:10.2.0.0/112", true),
        ("SIP=::ffff:10.2.0.3/128", true),
        ("SIP=::ffff:0.0.0.0/96", true),
        ("SIP=::ffff:10.3.0.0/112", false),
        ("DIP=::ffff:10.1.0.7/128", true),
        ("!SIP=::ffff:10.2.0.0/112", false),
        ("!DIP=::ffff:10.2.0.0/112", true),
        // These are ranges of IPv6.
        ("SIP=::/0", false),
        ("SIP=::ffff:10.2.0.0/80", false),
    ] {
        assert_eq!(decides(rule), expected, "{rule}");
    }
}

const NETWORKS: [&str; 2] = ["n1", "n2"];
const NAMESPACES: [&str; 2] = ["a", "b"];
const IPS: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.1.1", "fd00::1", "fd01::1"];
const RANGES: [&str; 4] = ["10.0.0.0/24", "10.0.0.0/8", "0.0.0.0/0", "fd00::/16"];
const HOSTS: [&str; 3] = ["s0.a", "s1.a", "s0.b"];

fn one_of(items: &'static [&'static str]) -> impl Strategy<Value = &'static str> {
    prop::sample::select(items)
}

fn some_of(items: &'static [&'static str]) -> impl Strategy<Value = Vec<&'static str>> {
    prop::sample::subsequence(items, 0..=2)
}

fn uid(number: u8) -> String {
    if number.is_multiple_of(2) { format!("c//Pod/{number}") } else { format!("entry-{number}") }
}

fn any_workload() -> impl Strategy<Value = Workload> {
    let flags = (any::<bool>(), prop::bool::weighted(0.2), any::<bool>(), any::<bool>());
    let place = (one_of(&NETWORKS), one_of(&NAMESPACES), some_of(&IPS));
    let services = prop::sample::subsequence(vec!["a/s0.a", "a/s1.a", "b/s0.b", "b/s1.b"], 0..3);
    (0..6u8, place, services, flags).prop_map(
        |(number, (network, namespace, ips), services, (hbone, host, healthy, named))| {
            let name = format!("w{}", number % 3);
            let mut workload = pod(namespace, &name, &ips);
            for service in services {
                workload = workload.behind(service, &[(80, u16::from(number))]);
            }
            Workload {
                uid: uid(number).into(),
                network: network.into(),
                hostname: if named { "s1.b".into() } else { "".into() },
                tunnel_protocol: if hbone { TunnelProtocol::Hbone } else { TunnelProtocol::None },
                network_mode: if host { NetworkMode::HostNetwork } else { NetworkMode::Standard },
                status: if healthy { Health::Healthy } else { Health::Unhealthy },
                ..workload
            }
        },
    )
}

fn any_service() -> impl Strategy<Value = Service> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    let fixed = prop::collection::btree_map(
        (0..6u8).prop_map(|number| Arc::from(uid(number))),
        Just(PortMap::from([(80, 1)])),
        0..2,
    );
    let addresses = (one_of(&NETWORKS), some_of(&IPS), some_of(&RANGES));
    (one_of(&NAMESPACES), one_of(&HOSTS), addresses, fixed, flags).prop_map(
        |(namespace, host, (network, vips, ranges), fixed_endpoints, (canonical, hidden, all))| {
            let all = LoadBalancer {
                health_policy: if all { HealthPolicy::AllowAll } else { HealthPolicy::OnlyHealthy },
                ..balancer(BalanceMode::Standard, &[])
            };
            let vip = |text: &&str| NetworkAddress { network: network.into(), ip: ip(text) };
            Service {
                hostname: host.into(),
                vips: vips.iter().map(vip).collect(),
                cidr_vips: ranges.into_iter().map(|range| cidr(network, range)).collect(),
                canonical,
                visibility: if hidden { Visibility::Namespace } else { Visibility::Public },
                load_balancer: Some(all),
                fixed_endpoints,
                ..service(namespace, "s", &[], &[(80, 8080)])
            }
        },
    )
}

fn any_policy() -> impl Strategy<Value = crate::authorization::Authorization> {
    let scopes = [PolicyScope::Global, PolicyScope::Namespace, PolicyScope::WorkloadSelector];
    (one_of(&NAMESPACES), 0..3u8, prop::sample::select(scopes.to_vec()), any::<bool>()).prop_map(
        |(namespace, name, scope, dry_run)| crate::authorization::Authorization {
            scope,
            dry_run,
            ..policy(namespace, &format!("p{name}"), Action::Deny, &[])
        },
    )
}

fn any_change() -> impl Strategy<Value = Change> {
    let service_key = (one_of(&NAMESPACES), one_of(&HOSTS))
        .prop_map(|(namespace, host)| key(&format!("{namespace}/{host}")));
    let policy_key = (one_of(&NAMESPACES), 0..3u8)
        .prop_map(|(namespace, name)| Arc::from(format!("{namespace}/p{name}")));
    prop_oneof![
        4 => any_workload().prop_map(Change::workload),
        2 => (0..6u8).prop_map(|number| Change::RemoveWorkload(uid(number).into())),
        4 => any_service().prop_map(Change::service),
        2 => service_key.prop_map(Change::RemoveService),
        2 => any_policy().prop_map(Change::Authorization),
        1 => policy_key.prop_map(Change::RemoveAuthorization),
        1 => prop::sample::select(vec![RequireWaypoint::Nobody, RequireWaypoint::EveryBound])
            .prop_map(Change::RequireWaypoint),
    ]
}

/// What a change is about.
fn subject(change: &Change) -> String {
    match change {
        Change::Workload(workload) => format!("workload {}", workload.uid),
        Change::RemoveWorkload(uid) => format!("workload {uid}"),
        Change::Service(service) => format!("service {}", service.key()),
        Change::RemoveService(key) => format!("service {key}"),
        Change::Authorization(policy) => format!("policy {}", policy.key()),
        Change::RemoveAuthorization(key) => format!("policy {key}"),
        Change::RequireWaypoint(_) => "require".to_owned(),
    }
}

/// The changes that are left when each undoes or replaces what came before it.
fn surviving(changes: &[Change]) -> Vec<Change> {
    let mut left: Vec<Change> = Vec::new();
    for change in changes {
        if !left.contains(change) {
            left.retain(|other| subject(other) != subject(change));
            left.push(change.clone());
        }
    }
    left
}

/// Every answer of every look-up, for all keys that the generators know.
fn answers(snapshot: &Snapshot) -> Vec<String> {
    let mut answers = Vec::new();
    let clients = [None, Some("a"), Some("b")];
    let name_of = |service: Option<&Arc<Service>>| service.map(|service| format!("{service:?}"));
    for network in NETWORKS {
        for address in IPS.map(ip) {
            answers.push(format!("{:?}", snapshot.workload_at(network, address)));
            for client in clients {
                answers
                    .push(format!("{:?}", name_of(snapshot.service_at(network, address, client))));
            }
        }
    }
    for host in ["s0.a", "s1.a", "s0.b", "s1.b"] {
        for client in clients {
            answers.push(format!("{:?}", name_of(snapshot.service_named(host, client))));
        }
        for namespace in NAMESPACES {
            let key = key(&format!("{namespace}/{host}"));
            answers.push(format!("{:?}", snapshot.service(&key)));
            answers.push(format!("{:?}", snapshot.workload_named(&key)));
        }
    }
    for namespace in NAMESPACES {
        let policies: Vec<_> = snapshot.namespace_policies(namespace).collect();
        answers.push(format!("{policies:?}"));
        for name in ["w0", "w1", "w2"] {
            let of_pod: Vec<_> = snapshot.workloads_of_pod(namespace, name).collect();
            answers.push(format!("{of_pod:?}"));
            answers.push(format!("{:?}", snapshot.local_workload(namespace, name, name, "")));
        }
    }
    for number in 0..6 {
        answers.push(format!("{:?}", snapshot.workload(&uid(number))));
    }
    answers.push(format!("{:?}", snapshot.global_policies()));
    answers.push(format!("{:?}", snapshot.require_waypoint()));
    answers.push(format!("{} {}", snapshot.workload_count(), snapshot.service_count()));

    let mut unordered: Vec<String> = Vec::new();
    unordered.extend(snapshot.policies().map(|policy| format!("{policy:?}")));
    unordered.extend(snapshot.policies().map(|p| format!("{:?}", snapshot.policy(&p.key()))));
    unordered.extend(snapshot.services().map(|service| format!("{service:?}")));
    for service in snapshot.services() {
        let key = service.key();
        let endpoints = snapshot.endpoints(service);
        unordered.extend(endpoints.map(|endpoint| format!("endpoint {key} {endpoint:?}")));
        let members = snapshot.members(service);
        unordered.extend(members.map(|workload| format!("member {key} {workload:?}")));
    }
    for workload in snapshot.workloads() {
        unordered.push(format!("{workload:?}"));
        let services = snapshot.services_of(workload);
        unordered.extend(services.map(|service| format!("{} in {}", workload.uid, service.key())));
    }
    unordered.sort_unstable();
    answers.extend(unordered);
    answers
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn an_incremental_snapshot_equals_a_rebuilt_one(
        batches in prop::collection::vec(prop::collection::vec(any_change(), 1..6), 1..12),
    ) {
        let mut current = Snapshot::default();
        let mut earlier = Vec::new();
        for batch in &batches {
            earlier.push((current.clone(), answers(&current)));
            current = current.with(batch.iter().cloned());
        }
        let rebuilt = Snapshot::default().with(surviving(&batches.concat()));
        prop_assert_eq!(answers(&current), answers(&rebuilt));
        for (snapshot, before) in earlier {
            prop_assert_eq!(answers(&snapshot), before);
        }
    }

    #[test]
    fn endpoints_and_memberships_agree(
        changes in prop::collection::vec(any_change(), 1..40),
    ) {
        let snapshot = Snapshot::default().with(changes);
        for service in snapshot.services() {
            for workload in snapshot.workloads() {
                let is_member = snapshot.members(service).any(|member| member.uid == workload.uid);
                prop_assert_eq!(is_member, service.endpoint_ports(workload).is_some());
                let of_workload = snapshot.services_of(workload).any(|s| s.key() == service.key());
                prop_assert_eq!(is_member, of_workload);
                let endpoints = snapshot.endpoints(service);
                let count = endpoints.filter(|e| e.workload.uid == workload.uid).count();
                prop_assert!(count <= usize::from(is_member));
            }
        }
    }
}
