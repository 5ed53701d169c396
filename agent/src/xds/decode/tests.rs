#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;

use culvert_core::authorization::Connection;
use culvert_core::identity::Identity;
use culvert_core::service::{BalanceMode, HealthPolicy, IpFamilies, Scope, Visibility};
use culvert_core::workload::{
    ApplicationTunnelProtocol, GatewayDestination, Health, NetworkMode, TunnelProtocol,
};
use culvert_proto::istio::workload as proto;
use proto::address::Type;

use super::*;

fn decode(address: Type) -> Result<Address, Rejection> {
    let bytes = proto::Address { r#type: Some(address) }.encode_to_vec();
    Decoder::default().address(bytes.into())
}

fn workload(raw: proto::Workload) -> Result<Workload, Rejection> {
    match decode(Type::Workload(raw))? {
        Address::Workload(workload) => Ok(Arc::unwrap_or_clone(workload)),
        Address::Service(service) => panic!("{service:?}"),
    }
}

fn service(raw: proto::Service) -> Result<Service, Rejection> {
    match decode(Type::Service(raw))? {
        Address::Service(service) => Ok(Arc::unwrap_or_clone(service)),
        Address::Workload(workload) => panic!("{workload:?}"),
    }
}

fn plain() -> proto::Workload {
    proto::Workload { uid: "u".to_owned(), ..Default::default() }
}

fn vip(address: &[u8], length: Option<u32>) -> proto::NetworkAddress {
    proto::NetworkAddress { network: "n".to_owned(), address: address.to_vec(), length }
}

fn port(service_port: u32, target_port: u32) -> proto::Port {
    proto::Port { service_port, target_port, app_protocol: 99 }
}

fn by_name(namespace: &str, hostname: &str, hbone_mtls_port: u32) -> proto::GatewayAddress {
    let name = proto::NamespacedHostname {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
    };
    let destination = Some(proto::gateway_address::Destination::Hostname(name));
    proto::GatewayAddress { destination, hbone_mtls_port }
}

fn by_address(address: &[u8]) -> proto::GatewayAddress {
    let destination = Some(proto::gateway_address::Destination::Address(vip(address, None)));
    proto::GatewayAddress { destination, hbone_mtls_port: 15008 }
}

#[test]
fn what_is_no_text_rejects_the_workload() {
    let bad = || Bytes::from_static(b"w\xff");
    let named = || raw::Workload { uid: Bytes::from_static(b"u"), ..Default::default() };
    let region = raw::Locality { region: bad(), ..Default::default() };
    let membership = raw::Membership { service: bad(), ports: None };
    for (field, workload) in [
        ("uid", raw::Workload { uid: bad(), ..named() }),
        ("node", raw::Workload { node: bad(), ..named() }),
        (
            "authorization_policies",
            raw::Workload { authorization_policies: vec![bad()], ..named() },
        ),
        (
            "services",
            raw::Workload { services: vec![membership.encode_to_vec().into()], ..named() },
        ),
        ("locality", raw::Workload { locality: Some(region), ..named() }),
    ] {
        let address = raw::Address { r#type: Some(raw::Type::Workload(workload.into())) };
        let rejection = Decoder::default().address(address.encode_to_vec().into()).unwrap_err();
        assert_eq!(rejection.to_string(), format!("{field}: w\u{fffd} is not UTF-8"));
    }
}

#[test]
fn a_workload_has_nothing_of_the_one_before() {
    let service = |port_number| {
        let ports = proto::PortList { ports: vec![port(port_number, 8080)] };
        BTreeMap::from([("ns/api.ns".to_owned(), ports)])
    };
    let full = |services| proto::Workload {
        name: "pod".to_owned(),
        namespace: "ns".to_owned(),
        service_account: "api".to_owned(),
        canonical_name: "api".to_owned(),
        workload_name: "api-v2".to_owned(),
        canonical_revision: "v2".to_owned(),
        node: "node".to_owned(),
        locality: Some(proto::Locality { region: "r".to_owned(), ..Default::default() }),
        services,
        ..plain()
    };
    let mut decoder = Decoder::default();
    let mut read = |raw: proto::Workload| {
        let address = proto::Address { r#type: Some(Type::Workload(raw)) };
        match decoder.address(address.encode_to_vec().into()).unwrap() {
            Address::Workload(workload) => workload,
            Address::Service(service) => panic!("{service:?}"),
        }
    };
    for raw in [full(service(80)), full(service(81)), plain(), full(service(80)), plain()] {
        assert_eq!(*read(raw.clone()), workload(raw).unwrap());
    }
    let (one, two) = (read(full(service(80))), read(full(service(80))));
    assert!(Arc::ptr_eq(&one.workload_name, &two.workload_name));
    assert!(one.services.sharers() > 2);
}

#[test]
fn every_field_of_a_workload_arrives() {
    let decoded = workload(proto::Workload {
        uid: "c1//Pod/ns/pod".to_owned(),
        name: "pod".to_owned(),
        namespace: "ns".to_owned(),
        addresses: vec![vec![10, 0, 0, 1], vec![0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]],
        hostname: "h".to_owned(),
        network: "n1".to_owned(),
        tunnel_protocol: 1,
        trust_domain: "td".to_owned(),
        service_account: "sa".to_owned(),
        waypoint: Some(by_name("ns", "wp", 15008)),
        network_gateway: Some(by_address(&[1, 2, 3, 4])),
        node: "n".to_owned(),
        canonical_name: "cn".to_owned(),
        canonical_revision: "cr".to_owned(),
        workload_type: 3,
        workload_name: "wn".to_owned(),
        native_tunnel: true,
        application_tunnel: Some(proto::ApplicationTunnel { protocol: 1, port: 15088 }),
        services: BTreeMap::from([(
            "ns/a/b".to_owned(),
            proto::PortList { ports: vec![port(80, 1), port(80, 8080), port(65536 + 81, 81)] },
        )]),
        authorization_policies: vec!["ns/p".to_owned()],
        status: 1,
        cluster_id: "c1".to_owned(),
        locality: Some(proto::Locality {
            region: "r".to_owned(),
            zone: "z".to_owned(),
            subzone: "s".to_owned(),
        }),
        network_mode: 1,
        extensions: vec![proto::Extension::default()],
        capacity: Some(0),
    })
    .unwrap();
    assert_eq!(&*decoded.uid, "c1//Pod/ns/pod");
    let ips: [IpAddr; 2] = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
    assert_eq!(decoded.addresses, ips);
    assert_eq!(decoded.identity().to_string(), "spiffe://td/ns/ns/sa/sa");
    assert_eq!(decoded.tunnel_protocol, TunnelProtocol::Hbone);
    assert_eq!(decoded.network_mode, NetworkMode::HostNetwork);
    assert_eq!(decoded.status, Health::Unhealthy);
    assert_eq!(decoded.waypoint.unwrap().to_string(), "ns/wp:15008");
    assert_eq!(decoded.network_gateway.unwrap().to_string(), "n/1.2.3.4:15008");
    let tunnel = decoded.application_tunnel.unwrap();
    assert_eq!((tunnel.protocol, tunnel.port), (ApplicationTunnelProtocol::Proxy, Some(15088)));
    let (key, ports) = decoded.services.iter().next().unwrap();
    assert_eq!((&*key.namespace, &*key.hostname), ("ns", "a/b"));
    let ports: Vec<_> = ports.iter().map(|(from, to)| (*from, *to)).collect();
    assert_eq!(ports, [(80, 8080), (81, 81)]);
    for (text, expected) in [
        (&decoded.name, "pod"),
        (&decoded.hostname, "h"),
        (&decoded.network, "n1"),
        (&decoded.node, "n"),
        (&decoded.canonical_name, "cn"),
        (&decoded.canonical_revision, "cr"),
        (&decoded.workload_type, "job"),
        (&decoded.workload_name, "wn"),
        (&decoded.cluster_id, "c1"),
        (&decoded.locality.region, "r"),
        (&decoded.locality.zone, "z"),
        (&decoded.locality.subzone, "s"),
        (&decoded.authorization_policies[0], "ns/p"),
    ] {
        assert_eq!(&**text, expected);
    }
    assert!(decoded.native_tunnel);
    assert_eq!(decoded.capacity, 0);
}

#[test]
fn absent_fields_of_a_workload_stand_for_their_defaults() {
    let decoded = workload(plain()).unwrap();
    assert_eq!(decoded.identity().to_string(), "spiffe://cluster.local/ns//sa/default");
    assert_eq!((&*decoded.cluster_id, decoded.capacity), ("Kubernetes", 1));
    assert_eq!((&*decoded.workload_type, decoded.status), ("deployment", Health::Healthy));
    assert_eq!(decoded.tunnel_protocol, TunnelProtocol::None);
    assert_eq!(decoded.network_mode, NetworkMode::Standard);
    let tunnel = proto::ApplicationTunnel::default();
    let raw = proto::Workload { application_tunnel: Some(tunnel), workload_type: 77, ..plain() };
    let decoded = workload(raw).unwrap();
    assert_eq!(decoded.application_tunnel.unwrap().port, None);
    assert_eq!(&*decoded.workload_type, "deployment");
}

#[test]
fn bad_content_of_a_workload_rejects_it_with_field_and_value() {
    let tunnel = |protocol, port| Some(proto::ApplicationTunnel { protocol, port });
    let services = BTreeMap::from([("noslash".to_owned(), proto::PortList::default())]);
    let reject = |raw: proto::Workload| workload(raw).unwrap_err().to_string();
    for (raw, reason) in [
        (proto::Workload { uid: String::new(), ..plain() }, "uid is missing"),
        (
            proto::Workload { addresses: vec![vec![0; 5]], ..plain() },
            "addresses: an address of 5 bytes is neither IPv4 nor IPv6",
        ),
        (proto::Workload { services, ..plain() }, "services: noslash is not namespace/hostname"),
        (
            proto::Workload { tunnel_protocol: 2, ..plain() },
            "tunnel_protocol: LEGACY_ISTIO_MTLS is not spoken",
        ),
        (proto::Workload { tunnel_protocol: 9, ..plain() }, "tunnel_protocol: 9 is not defined"),
        (proto::Workload { network_mode: 9, ..plain() }, "network_mode: 9 is not defined"),
        (proto::Workload { status: 9, ..plain() }, "status: 9 is not defined"),
        (
            proto::Workload { waypoint: Some(Default::default()), ..plain() },
            "waypoint: reference has no destination",
        ),
        (
            proto::Workload { network_gateway: Some(by_address(&[1])), ..plain() },
            "network_gateway: an address of 1 bytes is neither IPv4 nor IPv6",
        ),
        (
            proto::Workload { waypoint: Some(by_name("a", "b", 65536)), ..plain() },
            "waypoint: 65536 is not a port",
        ),
        (
            proto::Workload { application_tunnel: tunnel(9, 0), ..plain() },
            "application_tunnel.protocol: 9 is not defined",
        ),
        (
            proto::Workload { application_tunnel: tunnel(1, 70000), ..plain() },
            "application_tunnel.port: 70000 is not a port",
        ),
    ] {
        assert_eq!(reject(raw), reason);
    }
}

#[test]
fn every_field_of_a_service_arrives() {
    let weighted = proto::WeightedWaypoint { destination: Some(by_name("ns", "w2", 1)), weight: 9 };
    let decoded = service(proto::Service {
        name: "s".to_owned(),
        namespace: "ns".to_owned(),
        hostname: "*.h".to_owned(),
        addresses: vec![
            vip(&[10, 0, 0, 1], None),
            vip(&[10, 0, 0, 2], Some(32)),
            vip(&[10, 0, 0, 0], Some(0)),
            vip(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], Some(128)),
            vip(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], Some(32)),
        ],
        ports: vec![port(80, 8080), port(443, 0)],
        subject_alt_names: vec!["spiffe://a/ns/b/sa/c".to_owned()],
        waypoint: Some(by_name("ns", "wp", 15008)),
        load_balancing: Some(proto::LoadBalancing {
            routing_preference: vec![1, 2, 3, 4, 5, 6],
            mode: 2,
            health_policy: 1,
        }),
        ip_families: 2,
        extensions: vec![proto::Extension::default()],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![weighted],
        visibility: 1,
    })
    .unwrap();
    assert_eq!(decoded.key().to_string(), "ns/*.h");
    assert_eq!(&*decoded.name, "s");
    let vips: Vec<_> = decoded.vips.iter().map(ToString::to_string).collect();
    assert_eq!(vips, ["n/10.0.0.1", "n/10.0.0.2", "n/fd00::1"]);
    let ranges: Vec<_> = decoded.cidr_vips.iter().map(|it| it.cidr.to_string()).collect();
    assert_eq!(ranges, ["10.0.0.0/0", "fd00::1/32"]);
    assert_eq!(decoded.ports.get(&443), Some(&0));
    assert_eq!(decoded.identities().count(), 1);
    assert!(matches!(
        decoded.waypoint.as_ref().unwrap().destination,
        GatewayDestination::Hostname(_)
    ));
    assert_eq!(decoded.weighted_waypoints[0].weight, 9);
    let balancer = decoded.load_balancer.as_ref().unwrap();
    assert_eq!(
        balancer.routing_preferences,
        [Scope::Region, Scope::Zone, Scope::Subzone, Scope::Node, Scope::Cluster, Scope::Network]
    );
    assert_eq!(balancer.mode, BalanceMode::Failover);
    assert_eq!(balancer.health_policy, HealthPolicy::AllowAll);
    assert_eq!(decoded.ip_families, IpFamilies::Ipv6Only);
    assert!(decoded.canonical);
    assert_eq!(decoded.visibility, Visibility::Namespace);
}

#[test]
fn unset_load_balancing_is_any_healthy_endpoint_and_unknown_visibility_is_public() {
    let decoded = service(proto::Service { visibility: 9, ..Default::default() }).unwrap();
    assert_eq!(decoded.load_balancer, None);
    assert_eq!(decoded.health_policy(), HealthPolicy::OnlyHealthy);
    assert_eq!(decoded.visibility, Visibility::Public);
    for (number, mode) in
        [(0, BalanceMode::Standard), (1, BalanceMode::Strict), (3, BalanceMode::Passthrough)]
    {
        let balancing = proto::LoadBalancing { mode: number, ..Default::default() };
        let raw = proto::Service { load_balancing: Some(balancing), ..Default::default() };
        assert_eq!(service(raw).unwrap().load_balancer.unwrap().mode, mode);
    }
}

#[test]
fn bad_content_of_a_service_rejects_it_with_field_and_value() {
    let balancing = |preference: Vec<i32>, mode, health_policy| proto::Service {
        load_balancing: Some(proto::LoadBalancing {
            routing_preference: preference,
            mode,
            health_policy,
        }),
        ..Default::default()
    };
    let at = |address: &[u8], length| proto::Service {
        addresses: vec![vip(address, length)],
        ..Default::default()
    };
    let weighted = proto::Service {
        weighted_waypoints: vec![proto::WeightedWaypoint::default()],
        ..Default::default()
    };
    for (raw, reason) in [
        (balancing(vec![0], 0, 0), "load_balancing.routing_preference: 0 is not defined"),
        (balancing(vec![1, 7], 0, 0), "load_balancing.routing_preference: 7 is not defined"),
        (balancing(vec![], 4, 0), "load_balancing.mode: 4 is not defined"),
        (balancing(vec![], 0, 2), "load_balancing.health_policy: 2 is not defined"),
        (at(&[10, 0, 0, 0], Some(40)), "addresses: 10.0.0.0/40 is too long"),
        (at(&[10, 0, 0, 0], Some(300)), "addresses: 10.0.0.0/300 is too long"),
        (at(&[10], None), "addresses: an address of 1 bytes is neither IPv4 nor IPv6"),
        (weighted, "weighted_waypoints.destination is missing"),
        (
            proto::Service { waypoint: Some(Default::default()), ..Default::default() },
            "waypoint: reference has no destination",
        ),
        (proto::Service { ip_families: 4, ..Default::default() }, "ip_families: 4 is not defined"),
    ] {
        assert_eq!(service(raw).unwrap_err().to_string(), reason);
    }
}

#[test]
fn addresses_lose_their_ipv4_mapping() {
    let mapped = [[0; 10].as_slice(), &[0xff, 0xff, 10, 0, 0, 1]].concat();
    let plain_ip: IpAddr = "10.0.0.1".parse().unwrap();
    let waypoint = Some(by_address(&mapped));
    let raw = proto::Workload { addresses: vec![mapped.clone()], waypoint, ..plain() };
    let decoded = workload(raw).unwrap();
    assert_eq!(decoded.addresses, [plain_ip]);
    let waypoint = decoded.waypoint.unwrap();
    let GatewayDestination::Address(at) = &waypoint.destination else { panic!() };
    assert_eq!(at.ip, plain_ip);
    let addresses = vec![vip(&mapped, None), vip(&mapped, Some(128))];
    let decoded = service(proto::Service { addresses, ..Default::default() }).unwrap();
    assert_eq!(decoded.vips.iter().map(|vip| vip.ip).collect::<Vec<_>>(), [plain_ip; 2]);
}

#[test]
fn an_address_that_is_neither_is_rejected() {
    let error = Decoder::default().address(Bytes::new()).unwrap_err();
    assert_eq!(error.to_string(), "both workload and service is missing");
}

fn policy(matches: Vec<security::Match>) -> security::Authorization {
    let clause = security::Clause { matches };
    security::Authorization {
        name: "p".to_owned(),
        namespace: "shop".to_owned(),
        rules: vec![security::Rule { clauses: vec![clause] }],
        ..Default::default()
    }
}

fn authorization(raw: security::Authorization) -> Result<Authorization, Rejection> {
    Decoder::default().authorization(raw.encode_to_vec().into())
}

/// Rows 45 to 47 of the matching vectors, and what else is left out.
#[test]
fn elements_that_say_nothing_are_left_out() {
    let connection = Connection {
        source: "10.2.0.3".parse().unwrap(),
        identity: Some(Identity::new("cluster.local", "web", "front")),
        destination: "10.1.0.7".parse().unwrap(),
        port: 8080,
    };
    let short = || security::Address { address: vec![10, 2, 0], length: 8 };
    let long = security::Address { address: vec![10, 2, 0, 3], length: 33 };
    let longer = security::Address { address: vec![10, 2, 0, 3], length: 256 + 8 };
    let matched = |m: security::Match| {
        authorization(policy(vec![m])).unwrap().matching_rule(&connection).is_some()
    };
    let base = security::Match::default;
    for (row, raw, expected) in [
        (45, security::Match { source_ips: vec![short()], ..base() }, false),
        (
            46,
            security::Match { source_ips: vec![short()], destination_ports: vec![8080], ..base() },
            true,
        ),
        (47, security::Match { destination_ports: vec![73616], ..base() }, true),
        (0, security::Match { source_ips: vec![long, longer], ..base() }, false),
        (0, security::Match { principals: vec![Default::default()], ..base() }, false),
        (
            0,
            security::Match {
                namespaces: vec![Default::default()],
                destination_ports: vec![8080],
                ..base()
            },
            true,
        ),
    ] {
        assert_eq!(matched(raw), expected, "row {row}");
    }
}

#[test]
fn every_field_of_a_policy_arrives() {
    use security::string_match::MatchType;
    let text = |kind: MatchType| vec![security::StringMatch { match_type: Some(kind) }];
    let account = |name: &str| {
        vec![security::ServiceAccountMatch {
            namespace: "ns".to_owned(),
            service_account: name.to_owned(),
        }]
    };
    let range = |last: u8| vec![security::Address { address: vec![10, 0, 0, last], length: 24 }];
    let raw = security::Match {
        namespaces: text(MatchType::Exact("a".to_owned())),
        not_namespaces: text(MatchType::Prefix("b".to_owned())),
        principals: text(MatchType::Suffix("c".to_owned())),
        not_principals: text(MatchType::Presence(())),
        source_ips: range(1),
        not_source_ips: range(2),
        destination_ips: range(3),
        not_destination_ips: range(4),
        destination_ports: vec![1],
        not_destination_ports: vec![2],
        service_accounts: account("x"),
        not_service_accounts: account("y"),
        extensions: Vec::new(),
    };
    let decoded = authorization(security::Authorization {
        scope: 2,
        action: 1,
        dry_run: true,
        ..policy(vec![raw])
    })
    .unwrap();
    assert_eq!(&*decoded.key(), "shop/p");
    let told = format!("{decoded:?}");
    for part in [
        "scope: WorkloadSelector",
        "action: Deny",
        "dry_run: true",
        "namespaces: [Exact(\"a\")]",
        "not_namespaces: [Prefix(\"b\")]",
        "principals: [Suffix(\"c\")]",
        "not_principals: [Presence]",
        "source_ips: [10.0.0.1/24]",
        "not_source_ips: [10.0.0.2/24]",
        "destination_ips: [10.0.0.3/24]",
        "not_destination_ips: [10.0.0.4/24]",
        "destination_ports: [1]",
        "not_destination_ports: [2]",
        "service_accounts: [ServiceAccountMatch { namespace: \"ns\", service_account: \"x\" }]",
        "not_service_accounts: [ServiceAccountMatch { namespace: \"ns\", service_account: \"y\" }]",
    ] {
        assert!(told.contains(part), "{part} in {told}");
    }
}

#[test]
fn an_unknown_scope_or_action_rejects_the_policy() {
    for (scope, action, reason) in
        [(3, 0, "scope: 3 is not defined"), (0, 2, "action: 2 is not defined")]
    {
        let raw = security::Authorization { scope, action, ..policy(Vec::new()) };
        assert_eq!(authorization(raw).unwrap_err().to_string(), reason);
    }
}
