//! The mesh as the control plane sends it: messages from what the mesh file says.

use std::net::IpAddr;

use culvert_core::addr::NetworkAddress;
use culvert_core::authorization::{
    Action, Authorization, Match, PolicyScope, ServiceAccountMatch, StringMatch,
};
use culvert_core::service::{
    BalanceMode, HealthPolicy, IpFamilies, LoadBalancer, Scope, Service, Visibility,
};
use culvert_core::workload::{
    ApplicationTunnelProtocol, GatewayAddress, GatewayDestination, Health, NetworkMode, PortMap,
    TunnelProtocol, Workload,
};
use culvert_proto::istio::{security, workload as proto};
use ipnet::IpNet;

/// `istio.workload.Workload`.
pub fn workload(it: &Workload) -> proto::Workload {
    let tunnel = it.application_tunnel.map(|tunnel| proto::ApplicationTunnel {
        protocol: match tunnel.protocol {
            ApplicationTunnelProtocol::None => 0,
            ApplicationTunnelProtocol::Proxy => 1,
        },
        port: tunnel.port.unwrap_or(0).into(),
    });
    let services = it
        .services
        .iter()
        .map(|(key, own)| (key.to_string(), proto::PortList { ports: ports(own) }));
    proto::Workload {
        uid: it.uid.to_string(),
        name: it.name.to_string(),
        namespace: it.namespace.to_string(),
        addresses: it.addresses.iter().map(|ip| octets(*ip)).collect(),
        hostname: it.hostname.to_string(),
        network: it.network.to_string(),
        tunnel_protocol: match it.tunnel_protocol {
            TunnelProtocol::None => 0,
            TunnelProtocol::Hbone => 1,
        },
        trust_domain: it.trust_domain.to_string(),
        service_account: it.service_account.to_string(),
        waypoint: it.waypoint.as_deref().map(gateway),
        network_gateway: it.network_gateway.as_deref().map(gateway),
        node: it.node.to_string(),
        canonical_name: it.canonical_name.to_string(),
        canonical_revision: it.canonical_revision.to_string(),
        workload_type: match &*it.workload_type {
            "cronjob" => 1,
            "pod" => 2,
            "job" => 3,
            _ => 0,
        },
        workload_name: it.workload_name.to_string(),
        native_tunnel: it.native_tunnel,
        application_tunnel: tunnel,
        services: services.collect(),
        authorization_policies: it.authorization_policies.iter().map(ToString::to_string).collect(),
        status: match it.status {
            Health::Healthy => 0,
            Health::Unhealthy => 1,
        },
        cluster_id: it.cluster_id.to_string(),
        locality: Some(proto::Locality {
            region: it.locality.region.to_string(),
            zone: it.locality.zone.to_string(),
            subzone: it.locality.subzone.to_string(),
        }),
        network_mode: match it.network_mode {
            NetworkMode::Standard => 0,
            NetworkMode::HostNetwork => 1,
        },
        extensions: Vec::new(),
        capacity: Some(it.capacity),
    }
}

/// `istio.workload.Service`.
pub fn service(it: &Service) -> proto::Service {
    let vips = it.vips.iter().map(address);
    let ranges = it.cidr_vips.iter().map(|range| proto::NetworkAddress {
        network: range.network.to_string(),
        address: octets(range.cidr.addr()),
        length: Some(range.cidr.prefix_len().into()),
    });
    let weighted = it.weighted_waypoints.iter().map(|waypoint| proto::WeightedWaypoint {
        destination: Some(gateway(&waypoint.destination)),
        weight: waypoint.weight,
    });
    proto::Service {
        name: it.name.to_string(),
        namespace: it.namespace.to_string(),
        hostname: it.hostname.to_string(),
        addresses: vips.chain(ranges).collect(),
        ports: ports(&it.ports),
        subject_alt_names: it.subject_alt_names.iter().map(ToString::to_string).collect(),
        waypoint: it.waypoint.as_deref().map(gateway),
        load_balancing: it.load_balancer.as_ref().map(load_balancing),
        ip_families: match it.ip_families {
            IpFamilies::Automatic => 0,
            IpFamilies::Ipv4Only => 1,
            IpFamilies::Ipv6Only => 2,
            IpFamilies::Dual => 3,
        },
        extensions: Vec::new(),
        canonical: it.canonical,
        ingress_use_waypoint: false,
        weighted_waypoints: weighted.collect(),
        visibility: match it.visibility {
            Visibility::Public => 0,
            Visibility::Namespace => 1,
        },
    }
}

fn load_balancing(it: &LoadBalancer) -> proto::LoadBalancing {
    let scope = |scope: &Scope| match scope {
        Scope::Region => 1,
        Scope::Zone => 2,
        Scope::Subzone => 3,
        Scope::Node => 4,
        Scope::Cluster => 5,
        Scope::Network => 6,
    };
    proto::LoadBalancing {
        routing_preference: it.routing_preferences.iter().map(scope).collect(),
        mode: match it.mode {
            BalanceMode::Standard => 0,
            BalanceMode::Strict => 1,
            BalanceMode::Failover => 2,
            BalanceMode::Passthrough => 3,
        },
        health_policy: match it.health_policy {
            HealthPolicy::OnlyHealthy => 0,
            HealthPolicy::AllowAll => 1,
        },
    }
}

fn gateway(it: &GatewayAddress) -> proto::GatewayAddress {
    use proto::gateway_address::Destination;
    let destination = match &it.destination {
        GatewayDestination::Address(at) => Destination::Address(address(at)),
        GatewayDestination::Hostname(name) => Destination::Hostname(proto::NamespacedHostname {
            namespace: name.namespace.to_string(),
            hostname: name.hostname.to_string(),
        }),
    };
    proto::GatewayAddress {
        destination: Some(destination),
        hbone_mtls_port: it.hbone_mtls_port.into(),
    }
}

fn address(at: &NetworkAddress) -> proto::NetworkAddress {
    let network = at.network.to_string();
    proto::NetworkAddress { network, address: octets(at.ip), length: None }
}

fn ports(map: &PortMap) -> Vec<proto::Port> {
    let port = |(from, to): (&u16, &u16)| proto::Port {
        service_port: (*from).into(),
        target_port: (*to).into(),
        app_protocol: 0,
    };
    map.iter().map(port).collect()
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// `istio.security.Authorization`.
pub fn authorization(it: &Authorization) -> security::Authorization {
    let rules = it.rules.iter().map(|rule| {
        let clauses = rule.clauses.iter().map(|clause| security::Clause {
            matches: clause.matches.iter().map(one_match).collect(),
        });
        security::Rule { clauses: clauses.collect() }
    });
    security::Authorization {
        name: it.name.to_string(),
        namespace: it.namespace.to_string(),
        scope: match it.scope {
            PolicyScope::Global => 0,
            PolicyScope::Namespace => 1,
            PolicyScope::WorkloadSelector => 2,
        },
        action: match it.action {
            Action::Allow => 0,
            Action::Deny => 1,
        },
        rules: rules.collect(),
        dry_run: it.dry_run,
        extensions: Vec::new(),
    }
}

fn one_match(it: &Match) -> security::Match {
    security::Match {
        namespaces: strings(&it.namespaces),
        not_namespaces: strings(&it.not_namespaces),
        principals: strings(&it.principals),
        not_principals: strings(&it.not_principals),
        source_ips: ranges(&it.source_ips),
        not_source_ips: ranges(&it.not_source_ips),
        destination_ips: ranges(&it.destination_ips),
        not_destination_ips: ranges(&it.not_destination_ips),
        destination_ports: it.destination_ports.iter().copied().map(u32::from).collect(),
        not_destination_ports: it.not_destination_ports.iter().copied().map(u32::from).collect(),
        service_accounts: accounts(&it.service_accounts),
        not_service_accounts: accounts(&it.not_service_accounts),
        extensions: Vec::new(),
    }
}

fn strings(list: &[StringMatch]) -> Vec<security::StringMatch> {
    use security::string_match::MatchType;
    let one = |it: &StringMatch| security::StringMatch {
        match_type: Some(match it {
            StringMatch::Exact(text) => MatchType::Exact(text.to_string()),
            StringMatch::Prefix(text) => MatchType::Prefix(text.to_string()),
            StringMatch::Suffix(text) => MatchType::Suffix(text.to_string()),
            StringMatch::Presence => MatchType::Presence(()),
        }),
    };
    list.iter().map(one).collect()
}

fn accounts(list: &[ServiceAccountMatch]) -> Vec<security::ServiceAccountMatch> {
    let one = |it: &ServiceAccountMatch| security::ServiceAccountMatch {
        namespace: it.namespace.to_string(),
        service_account: it.service_account.to_string(),
    };
    list.iter().map(one).collect()
}

fn ranges(list: &[IpNet]) -> Vec<security::Address> {
    let one = |range: &IpNet| security::Address {
        address: octets(range.addr()),
        length: range.prefix_len().into(),
    };
    list.iter().map(one).collect()
}
