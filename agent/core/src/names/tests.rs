#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::addr::{NetworkAddress, NetworkCidr};
use crate::fixtures::{key, pod, snapshot};
use crate::service::Visibility;
use crate::snapshot::Change;
use crate::workload::{Health, Workload};

/// A service with this hostname; addresses are written `ip` or `network/ip`.
fn service(namespace: &str, hostname: &str, vips: &[&str]) -> Service {
    let vip = |text: &&str| {
        let (network, ip) = text.split_once('/').unwrap_or(("", text));
        NetworkAddress { network: network.into(), ip: ip.parse().unwrap() }
    };
    Service {
        hostname: hostname.into(),
        vips: vips.iter().map(vip).collect(),
        ..crate::fixtures::service(namespace, "any", &[], &[])
    }
}

fn endpoint(name: &str, addresses: &[&str], services: &[&str]) -> Workload {
    let pod = Workload { network: "".into(), ..pod("shop", name, addresses) };
    services.iter().fold(pod, |pod, service| pod.behind(service, &[]))
}

/// The data that the questions below are asked of.
fn mesh() -> Snapshot {
    let head = "shop/head.shop.svc.cluster.local";
    let headv4 = "shop/headv4.shop.svc.cluster.local";
    let range = NetworkCidr { network: "".into(), cidr: "240.241.0.0/24".parse().unwrap() };
    let workloads = [
        endpoint("h-0", &["10.1.0.1", "fd00::a1"], &[head, headv4]),
        endpoint("h-1", &["10.1.0.2", "10.1.0.22"], &[head]),
        Workload { status: Health::Unhealthy, ..endpoint("h-2", &["10.1.0.3"], &[head]) },
    ];
    let services = [
        service(
            "shop",
            "cart.shop.svc.cluster.local",
            &["10.96.0.1", "fd00:96::1", "n2/10.97.0.1"],
        ),
        service("other", "api.other.svc.cluster.local", &["10.96.0.2"]),
        service("shop", "head.shop.svc.cluster.local", &[]),
        Service {
            ip_families: IpFamilies::Ipv4Only,
            ..service("shop", "headv4.shop.svc.cluster.local", &[])
        },
        service("shop", "www.ext.example", &["240.240.0.1"]),
        service("shop", "novip.example", &[]),
        service("shop", "*.wild.example", &["240.240.0.2"]),
        service("a", "dup.example", &["240.240.0.3"]),
        Service { canonical: true, ..service("b", "dup.example", &["240.240.0.4"]) },
        Service {
            visibility: Visibility::Namespace,
            ..service("a", "priv.example", &["240.240.0.5"])
        },
        Service { cidr_vips: vec![range], ..service("shop", "cidr.example", &[]) },
        service("shop", "far.shop.svc.cluster.local", &["n2/10.97.0.9"]),
    ];
    snapshot(workloads, services)
}

fn directory(snapshot: &Snapshot) -> Directory<'_> {
    Directory { snapshot, cluster_domain: "cluster.local", preferred_namespace: None, ipv6: true }
}

const SHOP: Client<'_> = Client { namespace: "shop", network: "" };

/// `forward`, `empty`, or the addresses in order, after `CNAME → ` where one is told.
fn told(answer: &Answer) -> String {
    match answer {
        Answer::Unknown => "forward".to_owned(),
        Answer::Empty => "empty".to_owned(),
        Answer::Addresses { canonical, addresses } => {
            let mut addresses: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
            addresses.sort_unstable();
            let canonical = canonical.as_ref().map(|name| format!("{name} -> "));
            canonical.unwrap_or_default() + &addresses.join(" ")
        }
    }
}

fn family(kind: &str) -> Family {
    if kind == "AAAA" { Family::V6 } else { Family::V4 }
}

#[test]
fn questions_from_shop_are_answered() {
    let snapshot = mesh();
    for (name, kind, expected) in [
        ("cart.shop.svc.cluster.local", "A", "10.96.0.1"),
        ("cart.shop.svc.cluster.local", "AAAA", "fd00:96::1"),
        ("cart.shop.svc.cluster.local.", "A", "10.96.0.1"),
        ("cart", "A", "10.96.0.1"),
        ("cart.shop", "A", "10.96.0.1"),
        ("cart.shop.svc", "A", "10.96.0.1"),
        ("CaRt.ShOp.svc.cluster.local", "A", "10.96.0.1"),
        ("api", "A", "forward"),
        ("api.other", "A", "10.96.0.2"),
        ("api.other.svc.cluster.local", "AAAA", "empty"),
        ("api.shop.svc.cluster.local", "A", "forward"),
        ("head.shop.svc.cluster.local", "A", "10.1.0.1 10.1.0.2"),
        ("head.shop.svc.cluster.local", "AAAA", "fd00::a1"),
        ("headv4.shop.svc.cluster.local", "A", "10.1.0.1"),
        ("headv4.shop.svc.cluster.local", "AAAA", "empty"),
        ("h-0.head.shop.svc.cluster.local", "A", "forward"),
        ("nosuch.shop.svc.cluster.local", "A", "forward"),
        ("www.ext.example", "A", "240.240.0.1"),
        ("www.ext.example", "AAAA", "empty"),
        ("novip.example", "A", "forward"),
        ("cidr.example", "A", "forward"),
        ("priv.example", "A", "forward"),
        ("wild.example", "A", "forward"),
        ("foo.wild.example", "A", "240.240.0.2"),
        ("a.b.wild.example", "A", "240.240.0.2"),
        ("dup.example", "A", "240.240.0.4"),
        ("far.shop.svc.cluster.local", "A", "empty"),
        (
            "cart.shop.svc.cluster.local.shop.svc.cluster.local",
            "A",
            "cart.shop.svc.cluster.local -> 10.96.0.1",
        ),
        ("cart.shop.shop.svc.cluster.local", "A", "cart.shop -> 10.96.0.1"),
        ("cart.svc.cluster.local", "A", "cart -> 10.96.0.1"),
        (
            "api.other.svc.cluster.local.cluster.local",
            "A",
            "api.other.svc.cluster.local -> 10.96.0.2",
        ),
        ("www.ext.example.shop.svc.cluster.local", "A", "www.ext.example -> 240.240.0.1"),
        ("www.ext.example.shop.svc.cluster.local", "AAAA", "empty"),
        ("foo.wild.example.svc.cluster.local", "A", "240.240.0.2"),
        (
            "head.shop.svc.cluster.local.svc.cluster.local",
            "A",
            "head.shop.svc.cluster.local -> 10.1.0.1 10.1.0.2",
        ),
        // Neither a search domain alone, nor one that is not a whole label, is taken off.
        ("shop.svc.cluster.local", "A", "forward"),
        ("svc.cluster.local", "A", "forward"),
        ("cluster.local", "A", "forward"),
        ("cartsvc.cluster.local", "A", "forward"),
        ("", "A", "forward"),
        (".", "A", "forward"),
        ("..", "A", "forward"),
    ] {
        let answer = answer(&directory(&snapshot), &SHOP, name, family(kind));
        assert_eq!(told(&answer), expected, "{name} {kind}");
    }
}

#[test]
fn a_private_service_is_known_in_its_own_namespace() {
    let snapshot = mesh();
    let client = Client { namespace: "a", network: "" };
    let told_to = |name| told(&answer(&directory(&snapshot), &client, name, Family::V4));
    assert_eq!(told_to("priv.example"), "240.240.0.5");
    assert_eq!(told_to("dup.example"), "240.240.0.3", "the client's own comes first");
}

#[test]
fn addresses_are_those_of_the_clients_network() {
    let snapshot = mesh();
    let client = Client { namespace: "shop", network: "n2" };
    let told_to = |name| told(&answer(&directory(&snapshot), &client, name, Family::V4));
    assert_eq!(told_to("cart"), "10.97.0.1");
    assert_eq!(told_to("far"), "10.97.0.9");
    assert_eq!(told_to("api.other"), "empty");
    assert_eq!(told_to("head"), "10.1.0.1 10.1.0.2", "endpoints of any network");
}

#[test]
fn without_ipv6_nobody_is_told_ipv6_addresses() {
    let snapshot = mesh();
    let directory = Directory { ipv6: false, ..directory(&snapshot) };
    let told_to = |name, family| told(&answer(&directory, &SHOP, name, family));
    assert_eq!(told_to("cart", Family::V6), "empty");
    assert_eq!(told_to("head", Family::V6), "empty");
    assert_eq!(told_to("cart", Family::V4), "10.96.0.1");
}

#[test]
fn ipv6_only_services_have_no_ipv4_addresses() {
    let only = Service {
        ip_families: IpFamilies::Ipv6Only,
        ..service("shop", "s.example", &["10.0.0.1", "fd00::1"])
    };
    let snapshot = snapshot([], [only]);
    let told_to = |family| told(&answer(&directory(&snapshot), &SHOP, "s.example", family));
    assert_eq!(told_to(Family::V4), "empty");
    assert_eq!(told_to(Family::V6), "fd00::1");
}

#[test]
fn the_preferred_namespace_decides_among_strangers() {
    let services =
        [service("x", "s.example", &["240.0.0.1"]), service("y", "s.example", &["240.0.0.2"])];
    let snapshot = snapshot([], services);
    let first = answer(&directory(&snapshot), &SHOP, "s.example", Family::V4);
    assert_eq!(told(&first), "240.0.0.1");
    let directory = Directory { preferred_namespace: Some("y"), ..directory(&snapshot) };
    assert_eq!(told(&answer(&directory, &SHOP, "s.example", Family::V4)), "240.0.0.2");
}

#[test]
fn a_candidate_without_an_answer_leaves_the_name_to_others() {
    // The client's own has nothing to answer with; the other one has.
    let services = [service("shop", "s.example", &[]), service("x", "s.example", &["240.0.0.1"])];
    let snapshot = snapshot([], services);
    let answered = answer(&directory(&snapshot), &SHOP, "s.example", Family::V4);
    assert_eq!(told(&answered), "240.0.0.1");
}

#[test]
fn a_wildcard_of_an_earlier_alias_comes_before_a_later_alias() {
    let broad = service("shop", "*.svc.cluster.local", &["240.0.0.9"]);
    let snapshot = mesh().with([Change::service(broad)]);
    let told_to = |name| told(&answer(&directory(&snapshot), &SHOP, name, Family::V4));
    assert_eq!(told_to("cart.shop.svc.cluster.local"), "10.96.0.1");
    assert_eq!(told_to("cart.svc.cluster.local"), "240.0.0.9");
    assert_eq!(told_to("cart.shop.shop.svc.cluster.local"), "240.0.0.9");
}

#[test]
fn headless_services_follow_their_endpoints() {
    let snapshot = mesh();
    let gone = snapshot.with([
        Change::RemoveWorkload("c1//Pod/shop/h-0".into()),
        Change::RemoveWorkload("c1//Pod/shop/h-1".into()),
    ]);
    let told_to = |snapshot| told(&answer(&directory(snapshot), &SHOP, "head", Family::V4));
    assert_eq!(told_to(&snapshot), "10.1.0.1 10.1.0.2");
    assert_eq!(told_to(&gone), "empty", "known still, and never forwarded");
    assert!(gone.service(&key("shop/head.shop.svc.cluster.local")).is_some());
}

/// Labels that together make known names, search domains and neither.
fn label() -> impl Strategy<Value = String> {
    let known = [
        "cart", "api", "head", "shop", "other", "svc", "cluster", "local", "www", "ext", "example",
        "foo", "wild", "*", "", "dup", "far", "a", "Ü",
    ];
    prop_oneof![
        proptest::sample::select(known.to_vec()).prop_map(str::to_owned),
        "[a-zA-Z0-9_-]{1,10}",
    ]
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => proptest::collection::vec(label(), 0..9).prop_map(|labels| labels.join(".")),
        1 => any::<String>(),
    ]
}

proptest! {
    #[test]
    fn case_makes_no_difference(name in name(), seed in any::<u64>()) {
        let snapshot = mesh();
        let mixed: String = name.chars().enumerate().map(|(n, c)| match seed >> (n % 64) & 1 {
            0 => c.to_ascii_uppercase(),
            _ => c.to_ascii_lowercase(),
        }).collect();
        for family in [Family::V4, Family::V6] {
            let directory = directory(&snapshot);
            let (one, other) =
                (answer(&directory, &SHOP, &name, family), answer(&directory, &SHOP, &mixed, family));
            prop_assert_eq!(told(&one), told(&other));
        }
    }

    #[test]
    fn families_are_known_alike_and_never_mixed(name in name()) {
        let snapshot = mesh();
        let of = |family| answer(&directory(&snapshot), &SHOP, &name, family);
        let (v4, v6) = (of(Family::V4), of(Family::V6));
        prop_assert_eq!(v4 == Answer::Unknown, v6 == Answer::Unknown);
        for (answer, is_v4) in [(v4, true), (v6, false)] {
            if let Answer::Addresses { addresses, canonical } = answer {
                prop_assert!(!addresses.is_empty());
                prop_assert!(addresses.iter().all(|ip| ip.is_ipv4() == is_v4));
                let name = name.to_ascii_lowercase();
                prop_assert!(canonical.is_none_or(|canonical| name.starts_with(&*canonical)));
            }
        }
    }
}
