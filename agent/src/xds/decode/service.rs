//! `istio.workload.Service`.

use culvert_core::addr::{NetworkAddress, NetworkCidr};
use culvert_core::intern::Interner;
use culvert_core::service::{
    BalanceMode, HealthPolicy, IpFamilies, LoadBalancer, Scope, Service, Visibility,
    WeightedWaypoint,
};
use culvert_proto::istio::workload as proto;
use ipnet::IpNet;

use super::{Rejection, fields};

pub(super) fn decode(raw: proto::Service, texts: &mut Interner) -> Result<Service, Rejection> {
    let (mut vips, mut cidr_vips) = (Vec::new(), Vec::new());
    for address in &raw.addresses {
        let ip = fields::address("addresses", &address.address)?;
        let network = texts.text(&address.network);
        let full = if ip.is_ipv4() { 32 } else { 128 };
        match address.length {
            None => vips.push(NetworkAddress { network, ip: ip.to_canonical() }),
            Some(length) if length == full => {
                vips.push(NetworkAddress { network, ip: ip.to_canonical() });
            }
            Some(length) => {
                let prefix = u8::try_from(length).ok().and_then(|len| IpNet::new(ip, len).ok());
                let cidr = prefix.ok_or_else(|| {
                    Rejection::invalid("addresses", format!("{ip}/{length}"), "is too long")
                })?;
                cidr_vips.push(NetworkCidr { network, cidr });
            }
        }
    }
    let waypoint = raw.waypoint.map(|raw| fields::gateway("waypoint", raw, texts)).transpose()?;
    let weighted = raw.weighted_waypoints.into_iter().map(|it| weighted_waypoint(it, texts));
    let weighted_waypoints = weighted.collect::<Result<_, _>>()?;
    let visibility = match proto::service::Visibility::try_from(raw.visibility) {
        Ok(proto::service::Visibility::Namespace) => Visibility::Namespace,
        // The protocol says so of a number that it does not define.
        Ok(proto::service::Visibility::Public) | Err(_) => Visibility::Public,
    };
    Ok(Service {
        name: texts.text(&raw.name),
        namespace: texts.text(&raw.namespace),
        // Shared with the workloads that name it.
        hostname: texts.text(&raw.hostname),
        vips,
        cidr_vips,
        ports: texts.ports(fields::ports(raw.ports)),
        subject_alt_names: raw.subject_alt_names.iter().map(|name| texts.text(name)).collect(),
        waypoint,
        weighted_waypoints,
        load_balancer: raw.load_balancing.map(load_balancer).transpose()?,
        ip_families: ip_families(raw.ip_families)?,
        canonical: raw.canonical,
        visibility,
        // Only a file gives endpoints with the service.
        fixed_endpoints: Default::default(),
        // `extensions` and `ingress_use_waypoint` are absent: the first are for other consumers of
        // the resource, the second is for gateways.
    })
}

fn weighted_waypoint(
    raw: proto::WeightedWaypoint,
    texts: &mut Interner,
) -> Result<WeightedWaypoint, Rejection> {
    let destination =
        raw.destination.ok_or(Rejection::Missing("weighted_waypoints.destination"))?;
    let destination = fields::gateway("weighted_waypoints", destination, texts)?;
    Ok(WeightedWaypoint { destination, weight: raw.weight })
}

fn load_balancer(raw: proto::LoadBalancing) -> Result<LoadBalancer, Rejection> {
    use proto::load_balancing as lb;
    let mode = match lb::Mode::try_from(raw.mode) {
        Ok(lb::Mode::UnspecifiedMode) => BalanceMode::Standard,
        Ok(lb::Mode::Strict) => BalanceMode::Strict,
        Ok(lb::Mode::Failover) => BalanceMode::Failover,
        Ok(lb::Mode::Passthrough) => BalanceMode::Passthrough,
        Err(_) => return Err(Rejection::undefined("load_balancing.mode", raw.mode)),
    };
    let health_policy = match lb::HealthPolicy::try_from(raw.health_policy) {
        Ok(lb::HealthPolicy::OnlyHealthy) => HealthPolicy::OnlyHealthy,
        Ok(lb::HealthPolicy::AllowAll) => HealthPolicy::AllowAll,
        Err(_) => {
            return Err(Rejection::undefined("load_balancing.health_policy", raw.health_policy));
        }
    };
    let preferences = raw.routing_preference.into_iter().map(scope);
    Ok(LoadBalancer {
        routing_preferences: preferences.collect::<Result<_, _>>()?,
        mode,
        health_policy,
    })
}

fn scope(number: i32) -> Result<Scope, Rejection> {
    use proto::load_balancing::Scope as Raw;
    match Raw::try_from(number) {
        Ok(Raw::Region) => Ok(Scope::Region),
        Ok(Raw::Zone) => Ok(Scope::Zone),
        Ok(Raw::Subzone) => Ok(Scope::Subzone),
        Ok(Raw::Node) => Ok(Scope::Node),
        Ok(Raw::Cluster) => Ok(Scope::Cluster),
        Ok(Raw::Network) => Ok(Scope::Network),
        Ok(Raw::UnspecifiedScope) | Err(_) => {
            Err(Rejection::undefined("load_balancing.routing_preference", number))
        }
    }
}

fn ip_families(number: i32) -> Result<IpFamilies, Rejection> {
    match proto::IpFamilies::try_from(number) {
        Ok(proto::IpFamilies::Automatic) => Ok(IpFamilies::Automatic),
        Ok(proto::IpFamilies::Ipv4Only) => Ok(IpFamilies::Ipv4Only),
        Ok(proto::IpFamilies::Ipv6Only) => Ok(IpFamilies::Ipv6Only),
        Ok(proto::IpFamilies::Dual) => Ok(IpFamilies::Dual),
        Err(_) => Err(Rejection::undefined("ip_families", number)),
    }
}
