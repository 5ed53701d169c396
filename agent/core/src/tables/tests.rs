#![allow(clippy::unwrap_used)]

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const POD: NetnsCookie = NetnsCookie(7);
const OTHER: NetnsCookie = NetnsCookie(8);

fn spec(addresses: &[&str]) -> PodSpec {
    PodSpec {
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        ..PodSpec::default()
    }
}

#[test]
fn enrolled_pod_has_one_address_of_each_family() {
    let mut tables = Tables::default();
    tables.enrol(POD, &spec(&["10.0.0.1", "10.0.0.2", "fd00::1"]));
    let pod = tables.pods[&POD];
    assert_eq!(pod.ipv4, Some("10.0.0.1".parse().unwrap()));
    assert_eq!(pod.ipv6, Some("fd00::1".parse().unwrap()));
    assert_eq!(tables.addresses.len(), 3);
}

#[test]
fn withdrawing_leaves_nothing() {
    let mut tables = Tables::default();
    let spec = PodSpec {
        exclude_outbound_ports: vec![9999],
        exclude_outbound_cidrs: vec!["10.9.0.0/16".parse().unwrap()],
        exclude_inbound_ports: vec![9090],
        ..spec(&["10.0.0.1", "fd00::1"])
    };
    tables.enrol(POD, &spec);
    tables.withdraw(POD);
    assert_eq!(tables, Tables::default());
}

#[test]
fn address_belongs_to_the_pod_enrolled_last() {
    let mut tables = Tables::default();
    tables.enrol(POD, &spec(&["10.0.0.1"]));
    tables.enrol(OTHER, &spec(&["10.0.0.1"]));
    tables.withdraw(POD);
    assert_eq!(tables.addresses[&"10.0.0.1".parse::<IpAddr>().unwrap()], OTHER);
}

#[test]
fn pod_is_set_after_what_it_keeps_to_itself() {
    let mut want = Tables::default();
    want.enrol(POD, &PodSpec { exclude_outbound_ports: vec![1], ..spec(&["10.0.0.1"]) });
    let changes = diff(&Tables::default(), &want);
    assert!(matches!(changes.last(), Some(TableChange::SetPod(POD, _))));
    let changes = diff(&want, &Tables::default());
    assert!(matches!(changes.first(), Some(TableChange::RemovePod(POD))));
}

#[test]
fn mapped_range_is_the_ipv4_range() {
    let mapped: IpNet = "::ffff:10.1.2.3/112".parse().unwrap();
    assert_eq!(canonical(mapped), "10.1.0.0/16".parse().unwrap());
    let all: IpNet = "::/0".parse().unwrap();
    assert_eq!(canonical(all), all);
}

fn any_spec() -> impl Strategy<Value = PodSpec> {
    let address = prop_oneof![
        (0u8..4).prop_map(|n| IpAddr::from([10, 0, 0, n])),
        (0u16..4).prop_map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n])),
    ];
    let cidr = (any::<u32>(), 0u8..=32)
        .prop_map(|(ip, length)| IpNet::new(IpAddr::from(ip.to_be_bytes()), length).unwrap());
    let ports = || vec(0u16..8, 0..4);
    let flags = any::<[bool; 3]>();
    (vec(address, 0..4), ports(), vec(cidr, 0..4), ports(), flags).prop_map(
        |(
            addresses,
            outbound_ports,
            outbound_cidrs,
            inbound_ports,
            [capture_dns, beside_cni, by_agent],
        )| {
            PodSpec {
                addresses,
                exclude_outbound_ports: outbound_ports,
                exclude_outbound_cidrs: outbound_cidrs,
                exclude_inbound_ports: inbound_ports,
                capture_dns,
                beside_cni,
                by_agent,
            }
        },
    )
}

fn any_tables() -> impl Strategy<Value = Tables> {
    vec((0u64..5, any_spec(), 0u8..4), 0..8).prop_map(|pods| {
        let mut tables = Tables::default();
        for (cookie, spec, what) in pods {
            match what {
                0 => tables.withdraw(NetnsCookie(cookie)),
                1 => tables.leave(NetnsCookie(cookie)),
                _ => tables.enrol(NetnsCookie(cookie), &spec),
            }
        }
        tables
    })
}

proptest! {
    #[test]
    fn applying_the_difference_makes_one_the_other(have in any_tables(), want in any_tables()) {
        let mut tables = have.clone();
        for change in diff(&have, &want) {
            tables.apply(&change);
        }
        prop_assert_eq!(tables, want);
    }

    #[test]
    fn nothing_differs_from_itself(tables in any_tables()) {
        prop_assert_eq!(diff(&tables, &tables), vec![]);
    }
}
