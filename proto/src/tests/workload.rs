//! Bytes of the workload messages, written by hand from the protocol's numbers.

use std::collections::BTreeMap;

use super::wire::{any, assert_wire, block, number};
use crate::istio::workload::*;
use prost::Message;

fn text(value: &str) -> String {
    value.to_owned()
}

fn hostname_gateway() -> GatewayAddress {
    let hostname = NamespacedHostname { namespace: text("n"), hostname: text("h") };
    GatewayAddress {
        destination: Some(gateway_address::Destination::Hostname(hostname)),
        hbone_mtls_port: 15008,
    }
}

fn hostname_gateway_wire() -> Vec<u8> {
    let hostname = [block(1, "n"), block(2, "h")].concat();
    [block(1, hostname), number(3, 15008)].concat()
}

fn extension() -> Extension {
    let config = prost_types::Any { type_url: text("t"), value: vec![1, 2] };
    Extension { name: text("e"), config: Some(config) }
}

fn extension_wire() -> Vec<u8> {
    [block(1, "e"), block(2, any("t", &[1, 2]))].concat()
}

#[test]
fn every_field_of_a_workload_has_its_number() {
    let ports = PortList {
        ports: vec![Port {
            service_port: 80,
            target_port: 8080,
            app_protocol: AppProtocol::Http2.into(),
        }],
    };
    let workload = Workload {
        uid: text("uid"),
        name: text("name"),
        namespace: text("namespace"),
        addresses: vec![vec![10, 0, 0, 1], vec![0; 16]],
        hostname: text("hostname"),
        network: text("network"),
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        trust_domain: text("td"),
        service_account: text("sa"),
        waypoint: Some(hostname_gateway()),
        network_gateway: Some(hostname_gateway()),
        node: text("node"),
        canonical_name: text("cn"),
        canonical_revision: text("cr"),
        workload_type: WorkloadType::Pod.into(),
        workload_name: text("wn"),
        native_tunnel: true,
        application_tunnel: Some(ApplicationTunnel {
            protocol: application_tunnel::Protocol::Proxy.into(),
            port: 15088,
        }),
        services: BTreeMap::from([(text("n/h"), ports)]),
        authorization_policies: vec![text("n/p"), text("n/q")],
        status: WorkloadStatus::Unhealthy.into(),
        cluster_id: text("c"),
        locality: Some(Locality { region: text("r"), zone: text("z"), subzone: text("s") }),
        network_mode: NetworkMode::HostNetwork.into(),
        extensions: vec![extension()],
        capacity: Some(3),
    };
    let port = [number(1, 80), number(2, 8080), number(3, 2)].concat();
    let wire = [
        block(1, "name"),
        block(2, "namespace"),
        block(3, [10, 0, 0, 1]),
        block(3, [0; 16]),
        block(4, "network"),
        number(5, 1),
        block(6, "td"),
        block(7, "sa"),
        block(8, hostname_gateway_wire()),
        block(9, "node"),
        block(10, "cn"),
        block(11, "cr"),
        number(12, 2),
        block(13, "wn"),
        number(14, 1),
        block(16, "n/p"),
        block(16, "n/q"),
        number(17, 1),
        block(18, "c"),
        block(19, hostname_gateway_wire()),
        block(20, "uid"),
        block(21, "hostname"),
        block(22, [block(1, "n/h"), block(2, block(1, port))].concat()),
        block(23, [number(1, 1), number(2, 15088)].concat()),
        block(24, [block(1, "r"), block(2, "z"), block(3, "s")].concat()),
        number(25, 1),
        block(26, extension_wire()),
        block(27, number(1, 3)),
    ]
    .concat();
    assert_wire(workload.clone(), &wire);
    assert_wire(Address { r#type: Some(address::Type::Workload(workload)) }, block(1, &wire));
}

#[test]
fn every_field_of_a_service_has_its_number() {
    let service = Service {
        name: text("name"),
        namespace: text("namespace"),
        hostname: text("hostname"),
        addresses: vec![NetworkAddress {
            network: text("net"),
            address: vec![10, 96, 0, 0],
            length: Some(16),
        }],
        ports: vec![Port { service_port: 80, target_port: 8080, app_protocol: 0 }],
        subject_alt_names: vec![text("spiffe://td/ns/n/sa/s")],
        waypoint: Some(hostname_gateway()),
        load_balancing: Some(LoadBalancing {
            routing_preference: vec![
                load_balancing::Scope::Network.into(),
                load_balancing::Scope::Region.into(),
            ],
            mode: load_balancing::Mode::Failover.into(),
            health_policy: load_balancing::HealthPolicy::AllowAll.into(),
        }),
        ip_families: IpFamilies::Dual.into(),
        extensions: vec![extension()],
        canonical: true,
        ingress_use_waypoint: true,
        weighted_waypoints: vec![WeightedWaypoint {
            destination: Some(hostname_gateway()),
            weight: 90,
        }],
        visibility: service::Visibility::Namespace.into(),
    };
    let range = [block(1, "net"), block(2, [10, 96, 0, 0]), number(3, 16)].concat();
    let wire = [
        block(1, "name"),
        block(2, "namespace"),
        block(3, "hostname"),
        block(4, range),
        block(5, [number(1, 80), number(2, 8080)].concat()),
        block(6, "spiffe://td/ns/n/sa/s"),
        block(7, hostname_gateway_wire()),
        block(8, [block(1, [6, 1]), number(2, 2), number(3, 1)].concat()),
        number(9, 3),
        block(10, extension_wire()),
        number(11, 1),
        number(12, 1),
        block(13, [block(1, hostname_gateway_wire()), number(2, 90)].concat()),
        number(14, 1),
    ]
    .concat();
    assert_wire(service.clone(), &wire);
    assert_wire(Address { r#type: Some(address::Type::Service(service)) }, block(2, &wire));
}

#[test]
fn gateway_may_be_an_address() {
    let address = NetworkAddress { network: text("net"), address: vec![1; 16], length: None };
    let gateway = GatewayAddress {
        destination: Some(gateway_address::Destination::Address(address)),
        hbone_mtls_port: 15008,
    };
    let wire = [block(2, [block(1, "net"), block(2, [1; 16])].concat()), number(3, 15008)].concat();
    assert_wire(gateway, wire);
}

#[test]
fn absent_capacity_is_not_zero() {
    let zero = Workload { capacity: Some(0), ..Workload::default() };
    assert_wire(zero, block(27, []));
    assert_wire(Workload::default(), []);
}

#[test]
fn absent_prefix_length_is_not_zero() {
    assert_wire(NetworkAddress { length: Some(0), ..NetworkAddress::default() }, number(3, 0));
    assert_wire(NetworkAddress::default(), []);
}

#[test]
fn preferences_may_come_unpacked() {
    // A proto3 reader accepts both forms of a repeated number.
    let wire = [number(1, 6), number(1, 1)].concat();
    let scopes = LoadBalancing::decode(wire.as_slice()).unwrap().routing_preference;
    assert_eq!(scopes, [6, 1]);
}

#[test]
fn enum_values_have_their_numbers() {
    use load_balancing::{HealthPolicy, Mode, Scope};

    let numbers = |values: &[i32]| assert_eq!(values, (0..values.len() as i32).collect::<Vec<_>>());
    numbers(&[
        TunnelProtocol::None.into(),
        TunnelProtocol::Hbone.into(),
        TunnelProtocol::LegacyIstioMtls.into(),
    ]);
    numbers(&[NetworkMode::Standard.into(), NetworkMode::HostNetwork.into()]);
    numbers(&[WorkloadStatus::Healthy.into(), WorkloadStatus::Unhealthy.into()]);
    numbers(&[
        WorkloadType::Deployment.into(),
        WorkloadType::Cronjob.into(),
        WorkloadType::Pod.into(),
        WorkloadType::Job.into(),
    ]);
    numbers(&[
        application_tunnel::Protocol::None.into(),
        application_tunnel::Protocol::Proxy.into(),
    ]);
    numbers(&[
        IpFamilies::Automatic.into(),
        IpFamilies::Ipv4Only.into(),
        IpFamilies::Ipv6Only.into(),
        IpFamilies::Dual.into(),
    ]);
    numbers(&[
        Scope::UnspecifiedScope.into(),
        Scope::Region.into(),
        Scope::Zone.into(),
        Scope::Subzone.into(),
        Scope::Node.into(),
        Scope::Cluster.into(),
        Scope::Network.into(),
    ]);
    numbers(&[
        Mode::UnspecifiedMode.into(),
        Mode::Strict.into(),
        Mode::Failover.into(),
        Mode::Passthrough.into(),
    ]);
    numbers(&[HealthPolicy::OnlyHealthy.into(), HealthPolicy::AllowAll.into()]);
    numbers(&[service::Visibility::Public.into(), service::Visibility::Namespace.into()]);
    numbers(&[
        AppProtocol::Unknown.into(),
        AppProtocol::Http11.into(),
        AppProtocol::Http2.into(),
        AppProtocol::Grpc.into(),
        AppProtocol::Tcp.into(),
        AppProtocol::Tls.into(),
    ]);
}

#[test]
fn unknown_enum_number_survives_for_the_decoder_to_judge() {
    let workload = Workload::decode(number(5, 77).as_slice()).unwrap();
    assert_eq!(workload.tunnel_protocol, 77);
    assert!(TunnelProtocol::try_from(workload.tunnel_protocol).is_err());
}
