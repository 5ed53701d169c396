#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use culvert_core::tables::canonical;

use super::*;

fn any_ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        any::<u32>().prop_map(|ip| IpAddr::V4(ip.into())),
        any::<u128>().prop_map(|ip| IpAddr::V6(ip.into()).to_canonical()),
    ]
}

fn any_cidr() -> impl Strategy<Value = IpNet> {
    (any_ip(), 0u8..=128).prop_map(|(ip, length)| {
        let length = if ip.is_ipv4() { length % 33 } else { length };
        canonical(IpNet::new(ip, length).unwrap())
    })
}

proptest! {
    #[test]
    fn range_read_back_is_the_range_written(cookie in any::<u64>(), cidr in any_cidr()) {
        let key = excluded_net(NetnsCookie(cookie), cidr);
        prop_assert_eq!(cidr_of(&key), Some((NetnsCookie(cookie), cidr)));
    }

    #[test]
    fn address_read_back_is_the_address_written(ip in any_ip()) {
        prop_assert_eq!(IpAddr::from(Address::from(ip)), ip);
    }

    #[test]
    fn pod_read_back_is_the_pod_written(v4 in 1u32.., v6 in 1u128 << 64.., flags in any::<u16>()) {
        let is = |bit: u16| flags & bit != 0;
        let entry = PodEntry {
            ipv4: is(1).then(|| v4.into()),
            ipv6: is(2).then(|| v6.into()),
            excludes_outbound_ports: is(4),
            excludes_inbound_ports: is(8),
            excludes_cidrs: is(16),
            leaving: is(32),
            captures_dns: is(64),
            beside_cni: is(128),
            by_agent: is(256),
        };
        prop_assert_eq!(pod_entry(pod_value(entry)), entry);
    }
}
