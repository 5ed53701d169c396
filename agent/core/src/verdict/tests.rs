#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::net::IpAddr;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::authorization::{Action, Authorization};
use crate::fixtures::*;
use crate::service::{BalanceMode, Scope};
use crate::snapshot::{Change, RequireWaypoint};
use crate::view::{Answers, Chosen, Coverage, Enrolled};
use crate::workload::{
    ApplicationTunnel, ApplicationTunnelProtocol, GatewayAddress, TunnelProtocol,
};

const API: &str = "shop/api.shop";

fn front() -> Workload {
    pod("web", "front", &["10.2.0.3", "fd00::3"])
}

/// A service `shop/api.shop` at 10.96.0.10 with endpoints `api-0`, `api-1` and so on at 10.1.0.x, of
/// these capacities.
fn mesh(capacities: &[u32]) -> Snapshot {
    let endpoints = capacities.iter().enumerate().map(|(number, capacity)| {
        let endpoint = pod("shop", &format!("api-{number}"), &[&format!("10.1.0.{number}")]);
        Workload { capacity: *capacity, ..endpoint.behind(API, &[]) }
    });
    snapshot(
        endpoints.chain([front()]),
        [service("shop", "api", &["10.96.0.10", "fd00::96"], &[(80, 8080)])],
    )
}

fn endpoint(snapshot: &Snapshot, number: usize, change: impl FnOnce(&mut Workload)) -> Change {
    let uid = format!("c1//Pod/shop/api-{number}");
    let mut workload = Workload::clone(snapshot.workload(&uid).unwrap());
    change(&mut workload);
    Change::workload(workload)
}

fn enrolled(names: &[&str]) -> Enrolled {
    names.iter().map(|name| Arc::from(format!("c1//Pod/{name}"))).collect()
}

/// Runs a decision about connections of `source`.
fn asked<T>(
    snapshot: &Snapshot,
    enrolled: &Enrolled,
    source: &Workload,
    to: &str,
    decision: impl FnOnce(&View<'_>, &Outbound<'_>) -> T,
) -> T {
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
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == destination.ip().is_ipv4();
    let client = *source.addresses.iter().find(same_family).unwrap();
    decision(&view, &Outbound { source, client, destination })
}

fn verdict(snapshot: &Snapshot, enrolled: &Enrolled, to: &str) -> Result<Verdict, AskAgent> {
    let random = &mut StdRng::seed_from_u64(1);
    asked(snapshot, enrolled, &front(), to, |view, request| decide(view, request, random))
}

/// `address*weight …, elsewhere weight`, or why not.
fn line(verdict: Result<Verdict, AskAgent>) -> String {
    match verdict {
        Ok(verdict) => {
            let backends = verdict.backends.iter().map(|it| format!("{}*{} ", it.to(), it.weight));
            format!("{}elsewhere {}", backends.collect::<String>(), verdict.elsewhere)
        }
        Err(ask) => ask.to_string(),
    }
}

const AWAY: &str = "it does not lead straight to a pod of this node";

#[test]
fn a_pod_of_this_node_is_admitted_by_address() {
    let mesh = mesh(&[1]);
    let here = enrolled(&["shop/api-0"]);
    assert_eq!(line(verdict(&mesh, &here, "10.1.0.0:9")), "10.1.0.0:9*1 elsewhere 0");
    assert_eq!(line(verdict(&mesh, &Enrolled::default(), "10.1.0.0:9")), AWAY);
    assert_eq!(line(verdict(&mesh, &here, "10.9.9.9:9")), AWAY);
    let plain = mesh.with([endpoint(&mesh, 0, |it| it.tunnel_protocol = TunnelProtocol::None)]);
    assert_eq!(line(verdict(&plain, &here, "10.1.0.0:9")), AWAY);
}

#[test]
fn a_service_has_its_endpoints_of_this_node_and_the_rest_elsewhere() {
    let mesh = mesh(&[1, 2, 4, 8, 0]);
    let here = enrolled(&["shop/api-1", "shop/api-3", "shop/api-4"]);
    let expected = "10.1.0.1:8080*2 10.1.0.3:8080*8 elsewhere 5";
    assert_eq!(line(verdict(&mesh, &here, "10.96.0.10:80")), expected);
    assert_eq!(line(verdict(&mesh, &enrolled(&[]), "10.96.0.10:80")), AWAY);
    let other_port = line(verdict(&mesh, &here, "10.96.0.10:81"));
    assert_eq!(other_port, "no healthy upstream: 10.96.0.10:81");
    let remote = mesh.with([endpoint(&mesh, 1, |it| it.network = "n2".into())]);
    let expected = "10.1.0.3:8080*8 elsewhere 7";
    assert_eq!(line(verdict(&remote, &here, "10.96.0.10:80")), expected);
}

#[test]
fn what_the_destination_refuses_is_elsewhere() {
    let mesh = mesh(&[1, 2]);
    let here = enrolled(&["shop/api-0", "shop/api-1"]);
    let deny = policy("shop", "no", Action::Deny, &["DIP=10.1.0.0/32 or PORT=9"]);
    let judged = mesh.with([Change::Authorization(deny)]);
    let expected = "10.1.0.1:8080*2 elsewhere 1";
    assert_eq!(line(verdict(&judged, &here, "10.96.0.10:80")), expected);
    let denied = "explicitly denied by: shop/no";
    assert_eq!(line(verdict(&judged, &here, "10.1.0.0:8080")), denied);
    assert_eq!(line(verdict(&judged, &here, "10.1.0.1:9")), denied);
    let recursive = "attempted recursive call to ourselves";
    assert_eq!(line(verdict(&mesh, &here, "10.1.0.1:15008")), recursive);
}

#[test]
fn policies_see_the_source_as_the_agent_does() {
    let mesh = mesh(&[1]);
    let here = enrolled(&["shop/api-0"]);
    let allowed = |rule: &str| {
        let allow = policy("shop", "only", Action::Allow, &[rule]);
        verdict(&mesh.with([Change::Authorization(allow)]), &here, "10.1.0.0:80").is_ok()
    };
    assert!(allowed("P=cluster.local/ns/web/sa/front SIP=10.2.0.3/32 PORT=80"));
    assert!(!allowed("P=cluster.local/ns/web/sa/other"));
    assert!(!allowed("SIP=10.2.0.4/32"));
}

#[test]
fn waypoints_and_application_tunnels_are_asked_for() {
    let mesh = mesh(&[1]);
    let here = enrolled(&["shop/api-0", "shop/wp"]);
    let waypoint = pod("shop", "wp", &["10.1.0.99"]).behind("shop/wp.shop", &[]);
    let waypoint = [
        Change::workload(waypoint),
        Change::service(service("shop", "wp", &["10.96.0.20"], &[(15008, 15008)])),
    ];
    let mesh = mesh.with(waypoint);
    let bound =
        mesh.with([endpoint(&mesh, 0, |it| it.waypoint = Some(by_hostname("shop/wp.shop")))]);
    assert_eq!(line(verdict(&bound, &here, "10.1.0.0:80")), AWAY);
    let demanded = bound.with([Change::RequireWaypoint(RequireWaypoint::EveryBound)]);
    let refused = "not from waypoint: shop/wp.shop";
    assert_eq!(line(verdict(&demanded, &here, "10.96.0.10:80")), refused);
    let mut api = Service::clone(mesh.service(&key(API)).unwrap());
    api.waypoint = Some(by_hostname("shop/wp.shop"));
    let served = mesh.with([Change::service(api)]);
    assert_eq!(line(verdict(&served, &here, "10.96.0.10:80")), AWAY);
    let protocol = ApplicationTunnelProtocol::Proxy;
    let tunnelled = Some(ApplicationTunnel { protocol, port: None });
    let told = mesh.with([endpoint(&mesh, 0, |it| it.application_tunnel = tunnelled)]);
    assert_eq!(line(verdict(&told, &here, "10.1.0.0:80")), AWAY);
}

#[test]
fn a_pod_does_not_admit_itself_nor_an_address_it_does_not_own() {
    let mesh = mesh(&[1, 1]);
    let both = enrolled(&["shop/api-0", "shop/api-1"]);
    let api = mesh.workload("c1//Pod/shop/api-0").unwrap().clone();
    let random = &mut StdRng::seed_from_u64(1);
    let from_itself =
        asked(&mesh, &both, &api, "10.96.0.10:80", |view, request| decide(view, request, random));
    assert_eq!(line(from_itself), "10.1.0.1:8080*1 elsewhere 1");
    let shared =
        mesh.with([endpoint(&mesh, 1, |it| it.addresses = vec!["10.1.0.0".parse().unwrap()])]);
    let expected = "10.1.0.0:8080*1 elsewhere 1";
    assert_eq!(line(verdict(&shared, &both, "10.96.0.10:80")), expected);
    let other_family = "its address is of the other family, or another workload's";
    assert_eq!(line(verdict(&mesh, &both, "[fd00::96]:80")), other_family);
}

#[test]
fn tunnels_within_the_node_leave_no_verdict() {
    let mesh = mesh(&[1]);
    let here = || enrolled(&["shop/api-0"]);
    for tunnelled in [
        Chosen { everyone: true, ..Chosen::default() },
        Chosen { namespaces: ["web".into()].into(), ..Chosen::default() },
        Chosen { namespaces: ["shop".into()].into(), ..Chosen::default() },
        Chosen { workloads: [("shop".into(), "api-0".into())].into(), ..Chosen::default() },
    ] {
        let here = here().tunnelled(Arc::new(tunnelled));
        assert_eq!(line(verdict(&mesh, &here, "10.1.0.0:80")), AWAY);
    }
    let others = Chosen {
        namespaces: ["else".into()].into(),
        workloads: [("web".into(), "api-0".into())].into(),
        ..Chosen::default()
    };
    assert!(verdict(&mesh, &here().tunnelled(Arc::new(others)), "10.1.0.0:80").is_ok());
}

#[test]
fn of_many_endpoints_some_are_left_to_the_agent() {
    let of = |count: usize| {
        let mesh = mesh(&vec![2; count]);
        let all = (0..count).map(|number| format!("c1//Pod/shop/api-{number}").into()).collect();
        verdict(&mesh, &all, "10.96.0.10:80")
    };
    let some = of(40).unwrap();
    assert_eq!((some.backends.len(), some.elsewhere), (MAX_BACKENDS, 16));
    assert_eq!(of(200).unwrap().elsewhere, 2 * (200 - 32));
}

#[test]
fn a_service_of_very_many_endpoints_is_asked_for() {
    let endpoints = (0..=MAX_ENDPOINTS).map(|number| {
        let ip = format!("10.1.{}.{}", number / 256, number % 256);
        pod("shop", &format!("api-{number}"), &[&ip]).behind(API, &[])
    });
    let snapshot = snapshot(endpoints, [service("shop", "api", &["10.96.0.10"], &[(80, 8080)])]);
    let asked = verdict(&snapshot, &enrolled(&["shop/api-0"]), "10.96.0.10:80");
    assert_eq!(asked, Err(AskAgent::Many(MAX_ENDPOINTS + 1)));
}

/// How often each workload is drawn, by uid.
fn drawn(
    count: usize,
    snapshot: &Snapshot,
    enrolled: &Enrolled,
    mut draw: impl FnMut(&View<'_>, &Outbound<'_>) -> Step<Result<Routed, NoRoute>>,
) -> HashMap<String, usize> {
    let mut drawn = HashMap::new();
    for _ in 0..count {
        let step = asked(snapshot, enrolled, &front(), "10.96.0.10:80", &mut draw);
        let uid = match finished(step).unwrap().route {
            Route::Local { workload, .. } => workload.uid.to_string(),
            Route::Tunnel { next_hop, .. } => next_hop.uid.to_string(),
            other => panic!("{other:?}"),
        };
        *drawn.entry(uid).or_default() += 1;
    }
    drawn
}

/// The kernel draws a backend or "elsewhere", by weight; the agent then draws among the others. Taken
/// together every endpoint must be as likely as when the agent draws alone.
#[test]
fn kernel_and_agent_together_draw_as_balance_does() {
    const COUNT: usize = 20_000;
    let mesh = mesh(&[1, 2, 3, 4, 10]);
    let here = enrolled(&["shop/api-0", "shop/api-3"]);
    let random = &mut StdRng::seed_from_u64(7);
    let alone = drawn(COUNT, &mesh, &here, |view, request| route::route(view, request, random));
    let verdict = verdict(&mesh, &here, "10.96.0.10:80").unwrap();
    let kernel: Vec<(String, u32)> = verdict
        .backends
        .iter()
        .map(|backend| (backend.workload.uid.to_string(), backend.weight))
        .chain([("elsewhere".to_owned(), verdict.elsewhere)])
        .collect();
    let mut together: HashMap<String, usize> = HashMap::new();
    for _ in 0..COUNT {
        let (uid, _) = balance::weighted(&kernel, |(_, weight)| *weight, random).unwrap();
        *together.entry(uid.clone()).or_default() += 1;
    }
    let left = together.remove("elsewhere").unwrap();
    let rest = drawn(left, &mesh, &here, |view, request| {
        route_elsewhere(view, request, |uid| verdict.carries(uid), random)
    });
    assert!(rest.keys().all(|uid| !verdict.carries(uid)), "{rest:?}");
    together.extend(rest);
    for (number, weight) in [1, 2, 3, 4, 10].into_iter().enumerate() {
        let uid = format!("c1//Pod/shop/api-{number}");
        let expected = COUNT * weight / 20;
        for counted in [alone[&uid], together[&uid]] {
            assert!(counted.abs_diff(expected) < 400, "{uid}: {counted}, not {expected}");
        }
    }
}

#[test]
fn what_is_rarely_drawn_is_found_elsewhere_all_the_same() {
    let mesh = mesh(&[1_000_000, 1]);
    let here = enrolled(&["shop/api-0"]);
    let random = &mut StdRng::seed_from_u64(7);
    let carried = |uid: &str| uid.ends_with("api-0");
    let drawn =
        drawn(20, &mesh, &here, |view, request| route_elsewhere(view, request, carried, random));
    assert_eq!(drawn, HashMap::from([("c1//Pod/shop/api-1".to_owned(), 20)]));
}

#[test]
fn elsewhere_is_anywhere_once_there_is_nothing_else() {
    let mesh = mesh(&[1]);
    let here = enrolled(&["shop/api-0"]);
    let random = &mut StdRng::seed_from_u64(7);
    let drawn =
        drawn(1, &mesh, &here, |view, request| route_elsewhere(view, request, |_| true, random));
    assert_eq!(drawn.len(), 1);
}

fn any_reference() -> impl Strategy<Value = Option<Arc<GatewayAddress>>> {
    prop::option::weighted(
        0.15,
        (0..3u8).prop_map(|number| by_hostname(&format!("ns/s{number}.ns"))),
    )
}

/// One of six pods at six addresses, two of which may get into the way of others.
fn any_pod() -> impl Strategy<Value = Workload> {
    let services = prop::collection::vec(0..3u8, 0..3);
    let odd = prop::bool::weighted(0.1);
    (0..6u8, 0..8u8, services, any_reference(), 0..4u32, odd, prop::bool::weighted(0.1)).prop_map(
        |(number, ip, services, waypoint, capacity, plain, remote)| {
            let ip = if ip < 6 { number } else { ip };
            let mut pod = pod("ns", &format!("p{number}"), &[&format!("10.0.0.{ip}")]);
            if plain {
                pod.tunnel_protocol = TunnelProtocol::None;
            }
            if remote {
                pod.network = "n2".into();
            }
            for service in services {
                pod = pod.behind(&format!("ns/s{service}.ns"), &[]);
            }
            Workload { waypoint, capacity, ..pod }
        },
    )
}

fn any_service() -> impl Strategy<Value = Service> {
    (0..3u8, 0..4u8, any_reference(), prop::option::of(0..3usize)).prop_map(
        |(number, ip, waypoint, mode)| {
            let modes = [BalanceMode::Strict, BalanceMode::Failover, BalanceMode::Passthrough];
            let balancer = mode.map(|mode| balancer(modes[mode], &[Scope::Network]));
            // One address is that of a pod.
            let ip = if ip == 3 { "10.0.0.1".to_owned() } else { format!("10.96.0.{number}") };
            Service {
                waypoint,
                load_balancer: balancer,
                ..service("ns", &format!("s{number}"), &[&ip], &[(80, 8080)])
            }
        },
    )
}

fn any_policy() -> impl Strategy<Value = Authorization> {
    let rule = prop::sample::select(vec![
        "N=ns",
        "P=cluster.local/ns/ns/sa/p0",
        "SIP=10.0.0.1/32",
        "DIP=10.0.0.2/31",
        "PORT=8080",
        "!P=cluster.local/ns/ns/sa/p1",
    ]);
    (0..3u8, rule, any::<bool>()).prop_map(|(number, rule, deny)| {
        let action = if deny { Action::Deny } else { Action::Allow };
        policy("ns", &format!("a{number}"), action, &[rule])
    })
}

fn any_change() -> impl Strategy<Value = Change> {
    let require = prop::sample::select(vec![RequireWaypoint::Nobody, RequireWaypoint::EveryBound]);
    prop_oneof![
        any_pod().prop_map(Change::workload),
        (0..6u8).prop_map(|it| Change::RemoveWorkload(format!("c1//Pod/ns/p{it}").into())),
        any_service().prop_map(Change::service),
        (0..3u8).prop_map(|it| Change::RemoveService(key(&format!("ns/s{it}.ns")))),
        any_policy().prop_map(Change::Authorization),
        (0..3u8).prop_map(|it| Change::RemoveAuthorization(format!("ns/a{it}").into())),
        require.prop_map(Change::RequireWaypoint),
    ]
}

fn any_mesh() -> impl Strategy<Value = (Snapshot, Enrolled)> {
    let pods = prop::collection::vec(any_pod(), 2..8);
    let services = prop::collection::vec(any_service(), 0..4);
    let policies = prop::collection::vec(any_policy(), 0..2);
    let require = prop::bool::weighted(0.2);
    let here = prop::collection::vec(prop::bool::weighted(0.7), 6);
    (pods, services, policies, require, here).prop_map(|(pods, services, policies, all, here)| {
        let require = if all { RequireWaypoint::EveryBound } else { RequireWaypoint::Nobody };
        let policies = policies.into_iter().map(Change::Authorization);
        let further = policies.chain([Change::RequireWaypoint(require)]);
        let here = here.into_iter().enumerate().filter(|(_, here)| *here);
        let enrolled = here.map(|(number, _)| format!("c1//Pod/ns/p{number}").into()).collect();
        (snapshot(pods, services).with(further), enrolled)
    })
}

fn any_destination() -> impl Strategy<Value = String> {
    let ip = prop_oneof![
        (0..8u8).prop_map(|it| format!("10.0.0.{it}")),
        (0..3u8).prop_map(|it| format!("10.96.0.{it}")),
    ];
    (ip, prop::sample::select(vec![80, 8080, 15008])).prop_map(|(ip, port)| format!("{ip}:{port}"))
}

/// What the agent itself would do with a connection that was routed so.
fn is_admitted(view: &View<'_>, request: &Outbound<'_>, routed: &Routed) -> bool {
    let Route::Local { to, workload } = &routed.route else { return false };
    let (identity, authority) = (request.source.identity(), Authority::Addr(to.addr()));
    let inbound = Inbound {
        local: workload,
        addressed: to.ip(),
        peer: SocketAddr::new(request.client, 40_000),
        identity: &identity,
        authority: &authority,
        forwarded_host: None,
        header_to: HeaderTo::Address,
    };
    let Step::Done(Ok(admission)) = admit::admit(view, &inbound) else { return false };
    authorize::authorize(view.snapshot, workload, &admission.connection).verdict.is_ok()
}

proptest! {
    #[test]
    fn a_verdict_admits_nothing_that_the_agent_would_refuse(
        (snapshot, enrolled) in any_mesh(),
        source in 0..6u8,
        to in any_destination(),
    ) {
        let Some(source) = snapshot.workload(&format!("c1//Pod/ns/p{source}")) else {
            return Ok(());
        };
        asked(&snapshot, &enrolled, source, &to, |view, request| {
            let Ok(verdict) = decide(view, request, &mut StdRng::seed_from_u64(0)) else {
                return Ok(());
            };
            prop_assert!(!verdict.backends.is_empty());
            let mut missing: Vec<&Backend> = verdict.backends.iter().collect();
            // So often that no endpoint is likely to be missed: the least has a 24th of all weight.
            for seed in 0..400 {
                let Ok(routed) = finished(route::route(view, request, &mut StdRng::seed_from_u64(seed)))
                else {
                    prop_assert!(verdict.elsewhere > 0, "refused, though all is admitted");
                    continue;
                };
                let Route::Local { to, workload } = &routed.route else {
                    prop_assert!(verdict.elsewhere > 0, "sent elsewhere: {:?}", routed.route);
                    continue;
                };
                let same = |it: &&Backend| it.workload.uid == workload.uid && it.to() == to.addr();
                if verdict.backends.iter().any(|backend| same(&backend)) {
                    prop_assert!(is_admitted(view, request, &routed));
                    missing.retain(|backend| !same(backend));
                } else {
                    prop_assert!(verdict.elsewhere > 0, "not told of {}", workload.uid);
                }
            }
            prop_assert!(missing.is_empty(), "never routed to: {missing:?}");
            Ok(())
        })?;
    }

    #[test]
    fn a_verdict_weighs_what_balance_weighs(
        (snapshot, enrolled) in any_mesh(),
        source in 0..6u8,
        to in any_destination(),
    ) {
        let Some(source) = snapshot.workload(&format!("c1//Pod/ns/p{source}")) else {
            return Ok(());
        };
        asked(&snapshot, &enrolled, source, &to, |view, request| {
            let Ok(verdict) = decide(view, request, &mut StdRng::seed_from_u64(0)) else {
                return Ok(());
            };
            let Some(service) = &verdict.service else {
                prop_assert_eq!((verdict.backends.len(), verdict.elsewhere), (1, 0));
                return Ok(());
            };
            let all = candidates(view, request, service);
            for backend in &verdict.backends {
                let uid = &backend.workload.uid;
                let found = all.iter().filter(|it| it.workload.uid == *uid);
                let weights: Vec<u32> = found.map(|it| it.workload.capacity).collect();
                prop_assert_eq!(weights, vec![backend.weight]);
            }
            let own: u32 = verdict.backends.iter().map(|backend| backend.weight).sum();
            let total: u32 = all.iter().map(|it| it.workload.capacity).sum();
            prop_assert_eq!(own + verdict.elsewhere, total);
            Ok(())
        })?;
    }

    #[test]
    fn what_decides_alike_is_the_same_verdict(
        (snapshot, enrolled) in any_mesh(),
        changes in prop::collection::vec(any_change(), 1..4),
        source in 0..6u8,
        to in any_destination(),
    ) {
        let Some(source) = snapshot.workload(&format!("c1//Pod/ns/p{source}")) else {
            return Ok(());
        };
        let decided = |snapshot: &Snapshot| {
            let random = &mut StdRng::seed_from_u64(0);
            asked(snapshot, &enrolled, source, &to, |view, request| decide(view, request, random))
        };
        let Ok(earlier) = decided(&snapshot) else { return Ok(()) };
        let after = snapshot.with(changes);
        let destination = OriginalDst::new(to.parse().unwrap());
        if decides_alike(&snapshot, &after, "n1", source, destination, &earlier) {
            let later = decided(&after);
            prop_assert!(later.as_ref().is_ok_and(|later| later.is_like(&earlier)), "{later:?}");
        }
    }
}
