#![allow(clippy::unwrap_used)]

use super::*;
use crate::addr::NetworkAddress;
use crate::fixtures::*;
use crate::service::{Visibility, WeightedWaypoint};
use crate::snapshot::Change;
use crate::view::{Answers, Coverage, Enrolled, Fetched, Need};
use crate::workload::ApplicationTunnel;

const HOST: &str = "api.shop";

fn local() -> Workload {
    pod("shop", "api", &["10.1.0.7"]).behind("shop/api.shop", &[])
}

fn tunnelled(protocol: ApplicationTunnelProtocol, port: Option<u16>) -> Workload {
    Workload { application_tunnel: Some(ApplicationTunnel { protocol, port }), ..local() }
}

/// The service `shop/api.shop` 80→8080 at 10.96.0.10, of which the local workload is an endpoint.
fn mesh(local: &Workload) -> Snapshot {
    snapshot([local.clone()], [service("shop", "api", &["10.96.0.10"], &[(80, 8080)])])
}

fn admitted(
    snapshot: &Snapshot,
    local: &Workload,
    authority: &str,
    forwarded_host: Option<&str>,
) -> Result<Admission, Refusal> {
    let enrolled = Enrolled::default();
    let answers = Answers::default();
    let view = View {
        snapshot,
        network: "n1",
        node: "",
        enrolled: &enrolled,
        answers: &answers,
        coverage: Coverage::Whole,
    };
    let inbound = Inbound {
        local,
        addressed: "10.1.0.7".parse().unwrap(),
        peer: "10.2.0.3:40000".parse().unwrap(),
        identity: &"spiffe://cluster.local/ns/web/sa/front".parse().unwrap(),
        authority: &authority.parse().unwrap(),
        forwarded_host,
        header_to: HeaderTo::Loopback,
    };
    match admit(&view, &inbound) {
        Step::Done(result) => result,
        Step::Need(need) => panic!("unexpected {need:?}"),
    }
}

/// `dial <address> from <source>, policy port <port>` or `<status> <reason>`.
fn line(snapshot: &Snapshot, local: &Workload, authority: &str) -> String {
    match admitted(snapshot, local, authority, None) {
        Ok(Admission { to, from, connection, .. }) => {
            format!("dial {to} from {from:?}, policy port {}", connection.port)
        }
        Err(refusal) => format!("{} {refusal}", refusal.status()),
    }
}

const CLIENT: &str = "Client(10.2.0.3)";

#[test]
fn requests_are_answered_as_the_vectors_say() {
    let dialled = |to: &str, port: u16| format!("dial {to} from {CLIENT}, policy port {port}");
    let self_call = "503 attempted recursive call to ourselves".to_owned();
    let vectors = [
        ("10.1.0.7:8080", dialled("10.1.0.7:8080", 8080)),
        ("[::ffff:10.1.0.7]:8080", dialled("10.1.0.7:8080", 8080)),
        ("10.1.0.9:8080", "400 ip mismatch: 10.1.0.7 != 10.1.0.9".to_owned()),
        ("10.96.0.10:80", "400 ip mismatch: 10.1.0.7 != 10.96.0.10".to_owned()),
        ("api.shop:80", dialled("10.1.0.7:8080", 8080)),
        ("api.shop:81", "503 requested service api.shop:81 found, but cannot resolve port".into()),
        ("nosuch.example:80", "503 no service or workload for hostname: nosuch.example".into()),
        ("10.1.0.7:15008", self_call.clone()),
        ("10.1.0.7:15001", self_call.clone()),
        ("10.1.0.7:15006", self_call),
    ];
    for (authority, expected) in vectors {
        assert_eq!(line(&mesh(&local()), &local(), authority), expected, "{authority}");
    }
}

#[test]
fn a_waypoint_without_a_tunnel_takes_what_it_stands_before() {
    let local = pod("shop", "wp", &["10.1.0.7"]).behind("shop/waypoint.shop", &[]);
    let bound =
        |reference| Workload { waypoint: Some(reference), ..pod("shop", "x", &["10.1.0.9"]) };
    let mesh = snapshot(
        [local.clone(), bound(by_hostname("shop/waypoint.shop"))],
        [
            service("shop", "waypoint", &["10.96.0.20"], &[(15008, 15008)]),
            Service {
                waypoint: Some(by_hostname("shop/waypoint.shop")),
                ..service("shop", "api", &["10.9.9.9"], &[(80, 8080)])
            },
            Service {
                weighted_waypoints: vec![WeightedWaypoint {
                    destination: by_address("n1", "10.96.0.20"),
                    weight: 1,
                }],
                ..service("shop", "canary", &["10.9.9.8"], &[(80, 8080)])
            },
        ],
    );
    let dialled = |port: u16| format!("dial 10.1.0.7:{port} from {CLIENT}, policy port {port}");
    assert_eq!(line(&mesh, &local, "10.1.0.9:8080"), dialled(8080));
    assert_eq!(line(&mesh, &local, "10.9.9.9:80"), dialled(80));
    assert_eq!(line(&mesh, &local, "10.9.9.8:80"), dialled(80));

    let refused = "400 ip mismatch: 10.1.0.7 != 10.1.0.9";
    let by_own_address = mesh.with([Change::workload(bound(by_address("n1", "10.1.0.7")))]);
    assert_eq!(line(&by_own_address, &local, "10.1.0.9:8080"), dialled(8080));
    for elsewhere in
        [by_hostname("shop/api.shop"), by_hostname("shop/lost.shop"), by_address("n1", "10.1.0.9")]
    {
        let mesh = mesh.with([Change::workload(bound(elsewhere))]);
        assert_eq!(line(&mesh, &local, "10.1.0.9:8080"), refused);
    }
}

#[test]
fn a_tunnel_with_header_goes_over_loopback() {
    let local = tunnelled(ApplicationTunnelProtocol::Proxy, Some(15088));
    let admission = admitted(&mesh(&local), &local, "10.9.9.9:80", None).unwrap();
    assert_eq!(admission.to.to_string(), "127.0.0.1:15088");
    assert_eq!(admission.from, DialFrom::Loopback);
    let identity = "spiffe://cluster.local/ns/web/sa/front".parse().unwrap();
    let header = ProxyHeader {
        source: "10.2.0.3:40000".parse().unwrap(),
        destination: "10.9.9.9:80".parse().unwrap(),
        identity: Some(identity),
    };
    assert_eq!(admission.proxy, Some(header));
    assert_eq!(admission.connection.port, 15088);
    assert_eq!(admission.connection.destination.to_string(), "10.1.0.7");
}

#[test]
fn a_hostname_is_shown_as_the_address_of_the_own_network() {
    let local = tunnelled(ApplicationTunnelProtocol::Proxy, None);
    let shown = |vips: &[(&str, &str)]| {
        let vip = |(network, ip): &(&str, &str)| NetworkAddress {
            network: (*network).into(),
            ip: ip.parse().unwrap(),
        };
        let api = Service {
            vips: vips.iter().map(vip).collect(),
            ..service("shop", "api", &[], &[(80, 8080)])
        };
        let admission = admitted(&snapshot([local.clone()], [api]), &local, "api.shop:80", None)?;
        assert_eq!(admission.to.to_string(), "127.0.0.1:8080");
        Ok::<_, Refusal>(admission.proxy.unwrap().destination.to_string())
    };
    let own = [("n1", "fd96::10"), ("n1", "10.96.0.10"), ("n2", "10.97.0.10")];
    assert_eq!(shown(&own), Ok("10.96.0.10:80".to_owned()));
    assert_eq!(shown(&own[..1]), Ok("[fd96::10]:80".to_owned()));
    assert_eq!(shown(&own[2..]), Ok("10.97.0.10:80".to_owned()));
    let none = shown(&[]).unwrap_err();
    assert_eq!(none.to_string(), "requested service api.shop found, but has no IP addresses");
    assert_eq!(none.status(), 503);
}

#[test]
fn a_tunnel_without_header_replaces_the_port_only() {
    let local = tunnelled(ApplicationTunnelProtocol::None, Some(9000));
    let expected = format!("dial 10.1.0.7:9000 from {CLIENT}, policy port 9000");
    assert_eq!(line(&mesh(&local), &local, "10.1.0.7:80"), expected);
}

#[test]
fn named_ports_are_translated_by_the_endpoint() {
    let named = service("shop", "api", &[], &[(80, 0)]);
    let with = |ports: &[(u16, u16)]| {
        let local = pod("shop", "api", &["10.1.0.7"]).behind("shop/api.shop", ports);
        line(&snapshot([local.clone()], [named.clone()]), &local, "api.shop:80")
    };
    assert_eq!(with(&[(80, 9090)]), format!("dial 10.1.0.7:9090 from {CLIENT}, policy port 9090"));
    assert!(with(&[]).starts_with("503"));
    assert!(with(&[(80, 15008)]).starts_with("503 attempted recursive"));
}

#[test]
fn hostnames_prefer_the_own_namespace_and_respect_visibility() {
    let entry = |namespace: &str, target, visibility| Service {
        hostname: HOST.into(),
        visibility,
        ..service(namespace, "api", &[], &[(80, target)])
    };
    let of = |services: Vec<Service>| {
        admitted(&snapshot([local()], services), &local(), "api.shop:80", None)
            .map(|admission| admission.to.port())
    };
    let other = entry("other", 1, Visibility::Public);
    let own = entry("shop", 2, Visibility::Public);
    let hidden = entry("other", 3, Visibility::Namespace);
    assert_eq!(of(vec![other.clone(), own.clone()]), Ok(2));
    assert_eq!(of(vec![other]), Ok(1));
    assert_eq!(of(vec![hidden]), Err(Refusal::NoHostname(HOST.into())));
}

#[test]
fn a_pod_that_calls_itself_is_dialled_from_its_own_address() {
    let peer: SocketAddr = "10.1.0.7:40000".parse().unwrap();
    assert_eq!(dial_from(peer, "10.1.0.7".parse().unwrap()), DialFrom::Own);
}

#[test]
fn the_service_is_the_forwarded_or_the_first_that_leads_here() {
    let local = local().behind("shop/web.shop", &[(443, 9443)]);
    let web = service("shop", "web", &[], &[(443, 0), (80, 8080)]);
    let mesh = mesh(&local).with([Change::service(web)]);
    let named = |authority, forwarded| {
        let service = admitted(&mesh, &local, authority, forwarded).unwrap().service;
        service.map(|service| service.name.to_string()).unwrap_or_default()
    };
    assert_eq!(named("10.1.0.7:8080", None), "api");
    assert_eq!(named("10.1.0.7:8080", Some("web.shop")), "web");
    assert_eq!(named("10.1.0.7:8080", Some("nonsense")), "api");
    assert_eq!(named("10.1.0.7:9443", None), "web");
    assert_eq!(named("10.1.0.7:1", None), "");
    assert_eq!(named("web.shop:443", Some("api.shop")), "web");
}

#[test]
fn plaintext_goes_where_it_was_addressed_without_an_identity() {
    let snapshot = mesh(&local());
    let plaintext = |to: &str, from: &str| {
        admit_plaintext(&snapshot, &local(), to.parse().unwrap(), from.parse().unwrap())
    };
    let admission = plaintext("[::ffff:10.1.0.7]:8080", "10.2.0.3:40000").unwrap();
    assert_eq!(admission.to.to_string(), "10.1.0.7:8080");
    assert_eq!(admission.from, DialFrom::Client("10.2.0.3".parse().unwrap()));
    assert_eq!(admission.connection.identity, None);
    assert_eq!(&*admission.service.unwrap().name, "api");
    assert_eq!(plaintext("10.1.0.7:15001", "10.2.0.3:1"), Err(Refusal::SelfCall));
    assert_eq!(plaintext("10.1.0.7:80", "10.1.0.7:1").unwrap().from, DialFrom::Own);
}

/// Asks until it is decided; gives what was asked for, and the decision.
fn on_demand(
    local: &Workload,
    authority: &str,
    mut tell: impl FnMut(&str) -> (Snapshot, Fetched),
) -> (Vec<String>, Result<Admission, Refusal>) {
    let (mut snapshot, enrolled) = (snapshot([local.clone()], []), Enrolled::default());
    let (mut answers, mut asked) = (Answers::default(), Vec::new());
    loop {
        let view = View {
            snapshot: &snapshot,
            network: "n1",
            node: "",
            enrolled: &enrolled,
            answers: &answers,
            coverage: Coverage::OnDemand,
        };
        let inbound = Inbound {
            local,
            addressed: "10.1.0.7".parse().unwrap(),
            peer: "10.2.0.3:40000".parse().unwrap(),
            identity: &"spiffe://cluster.local/ns/web/sa/front".parse().unwrap(),
            authority: &authority.parse().unwrap(),
            forwarded_host: None,
            header_to: HeaderTo::Loopback,
        };
        match admit(&view, &inbound) {
            Step::Done(result) => return (asked, result),
            Step::Need(Need::Resource(key)) => {
                assert!(!asked.contains(&key.to_string()), "asked twice for {key}");
                let (next, fetched) = tell(&key.to_string());
                asked.push(key.to_string());
                answers.note_resource(key, fetched);
                snapshot = next;
            }
            Step::Need(Need::Dns(name)) => panic!("no name is asked for: {name}"),
        }
    }
}

#[test]
fn what_is_not_known_is_asked_for_once_and_then_refused() {
    let mesh = || snapshot([local()], []);
    for fetched in [Fetched::Answered, Fetched::Unanswered] {
        let (asked, result) = on_demand(&local(), "10.1.0.9:80", |_| (mesh(), fetched));
        assert_eq!(asked, ["n1/10.1.0.9"]);
        assert_eq!(result.unwrap_err().status(), 400);
        let (asked, result) = on_demand(&local(), "api.shop:80", |_| (mesh(), fetched));
        assert_eq!(asked, ["shop/api.shop"]);
        assert_eq!(result.unwrap_err().status(), 503);
    }
    let (asked, result) = on_demand(&local(), "10.1.0.7:80", |_| (mesh(), Fetched::Answered));
    assert_eq!((asked.len(), result.is_ok()), (0, true));
}

#[test]
fn a_name_and_a_waypoint_are_found_on_demand() {
    let api = || service("shop", "api", &["10.96.0.10"], &[(80, 8080)]);
    let whole = || snapshot([local()], [api()]);
    let (_, result) = on_demand(&local(), "api.shop:80", |_| (whole(), Fetched::Answered));
    assert_eq!(result.unwrap().to.port(), 8080);

    let gate = pod("shop", "wp", &["10.1.0.7"]).behind("shop/waypoint.shop", &[]);
    let bound = Service { waypoint: Some(by_hostname("shop/waypoint.shop")), ..api() };
    let waypoint = service("shop", "waypoint", &[], &[(15008, 15008)]);
    let (asked, result) = on_demand(&gate, "10.96.0.10:80", |key| {
        let mut services = vec![bound.clone()];
        services.extend((key == "shop/waypoint.shop").then(|| waypoint.clone()));
        (snapshot([gate.clone()], services), Fetched::Answered)
    });
    assert_eq!(asked, ["n1/10.96.0.10", "shop/waypoint.shop"]);
    assert_eq!(result.unwrap().to.to_string(), "10.1.0.7:80");
}

#[test]
fn a_header_goes_to_the_own_address_where_the_operator_says_so() {
    let local = tunnelled(ApplicationTunnelProtocol::Proxy, Some(15088));
    let snapshot = mesh(&local);
    let (enrolled, answers) = (Enrolled::default(), Answers::default());
    let view = View {
        snapshot: &snapshot,
        network: "n1",
        node: "",
        enrolled: &enrolled,
        answers: &answers,
        coverage: Coverage::Whole,
    };
    let inbound = Inbound {
        local: &local,
        addressed: "10.1.0.7".parse().unwrap(),
        peer: "10.2.0.3:40000".parse().unwrap(),
        identity: &"spiffe://cluster.local/ns/web/sa/front".parse().unwrap(),
        authority: &"10.9.9.9:80".parse().unwrap(),
        forwarded_host: None,
        header_to: HeaderTo::Address,
    };
    let Step::Done(Ok(admission)) = admit(&view, &inbound) else { panic!("not admitted") };
    assert_eq!(admission.to.to_string(), "10.1.0.7:15088");
    assert_eq!(admission.from, DialFrom::Client("10.2.0.3".parse().unwrap()));
    assert!(admission.proxy.is_some());
}
