//! Which endpoint of a service takes a connection, on which of its ports and addresses.

use std::net::IpAddr;
use std::sync::Arc;

use rand::{Rng, RngExt};

use crate::service::{BalanceMode, LoadBalancer, Scope, Service};
use crate::snapshot::{Endpoint, Snapshot, declared_endpoint};
use crate::view::{Answers, Need, Stop};
use crate::workload::Workload;

/// What a service is resolved for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The service port must be declared.
    Standard,
    /// As a waypoint: workloads with an application tunnel need no declared port.
    Waypoint,
}

/// A workload that was chosen, and the port to reach there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Upstream {
    pub workload: Arc<Workload>,
    /// After translation from the service's port.
    pub port: u16,
    /// The service it was chosen from.
    pub service: Option<Arc<Service>>,
}

/// Draws one endpoint among the best, weighted by capacity; `None` if none is usable.
pub fn choose_endpoint(
    snapshot: &Snapshot,
    source: &Workload,
    service: &Arc<Service>,
    port: u16,
    mode: Mode,
    random: &mut impl Rng,
) -> Option<Upstream> {
    let chosen = match draw_among_many(snapshot, source, service, port, mode, random) {
        Some(drawn) => drawn,
        None => {
            let candidates = candidates(snapshot, source, service, port, mode);
            *weighted(&candidates, |endpoint| endpoint.workload.capacity, random)?
        }
    };
    upstream(service, &chosen, port)
}

/// An endpoint as what a connection to this port of the service is led to.
pub(crate) fn upstream(
    service: &Arc<Service>,
    endpoint: &Endpoint<'_>,
    port: u16,
) -> Option<Upstream> {
    Some(Upstream {
        port: target_port(service, endpoint, port)?,
        workload: endpoint.workload.clone(),
        service: Some(service.clone()),
    })
}

/// From how many workloads on a service's endpoints are drawn without looking at all of them.
const MANY: usize = 64;
/// How often to draw before looking at all of them after all.
const DRAWS: usize = 32;

/// Draws any workload until one is usable and its weight lets it pass: the distribution is the same
/// as among all that are usable. `None` says nothing about there being any.
fn draw_among_many<'a>(
    snapshot: &'a Snapshot,
    source: &Workload,
    service: &Service,
    port: u16,
    mode: Mode,
    random: &mut impl Rng,
) -> Option<Endpoint<'a>> {
    let is_any_alike = match &service.load_balancer {
        None => true,
        Some(balancer) => balancer.mode == BalanceMode::Standard,
    };
    let is_large = snapshot.declared_count(service) >= MANY;
    if !is_any_alike || !is_large || !service.fixed_endpoints.is_empty() {
        return None;
    }
    let (key, roster) = (service.key(), snapshot.roster(service)?);
    (0..DRAWS).find_map(|_| {
        let workload = roster.workloads.get(random.random_range(0..roster.workloads.len()))?;
        let endpoint = declared_endpoint(service, &key, workload)?;
        let weighs_enough =
            workload.capacity > 0 && random.random_range(0..roster.heaviest) < workload.capacity;
        (weighs_enough && is_usable(source, service, &endpoint, port, mode)).then_some(endpoint)
    })
}

/// The endpoints among which the service's load balancing does not distinguish.
pub fn candidates<'a>(
    snapshot: &'a Snapshot,
    source: &Workload,
    service: &'a Service,
    port: u16,
    mode: Mode,
) -> Vec<Endpoint<'a>> {
    let usable = snapshot
        .endpoints(service)
        .filter(|endpoint| is_usable(source, service, endpoint, port, mode));
    let balancer = match &service.load_balancer {
        Some(balancer) if balancer.mode != BalanceMode::Standard => balancer,
        Some(_) | None => return usable.collect(),
    };
    let mut best = Vec::new();
    let mut best_rank = 0;
    for endpoint in usable {
        let Some(rank) = rank(balancer, source, endpoint.workload) else { continue };
        if rank > best_rank {
            best.clear();
            best_rank = rank;
        }
        if rank == best_rank {
            best.push(endpoint);
        }
    }
    best
}

fn is_usable(
    source: &Workload,
    service: &Service,
    endpoint: &Endpoint<'_>,
    port: u16,
    mode: Mode,
) -> bool {
    let workload = endpoint.workload;
    let has_address = !workload.addresses.is_empty() || !workload.hostname.is_empty();
    let is_behind_gateway =
        workload.network != source.network && workload.network_gateway.is_some();
    let has_port = match (service.ports.get(&port), mode) {
        (None, Mode::Standard) => false,
        (None, Mode::Waypoint) => workload.application_tunnel.is_some(),
        (Some(0), Mode::Standard) => endpoint.ports.contains_key(&port),
        (Some(_), Mode::Standard | Mode::Waypoint) => true,
    };
    (has_address || is_behind_gateway) && has_port
}

/// How well an endpoint matches, the higher the better; `None` if it must not be used.
fn rank(balancer: &LoadBalancer, source: &Workload, endpoint: &Workload) -> Option<usize> {
    let scopes = balancer.routing_preferences.as_slice();
    let prefers_network = scopes.first() == Some(&Scope::Network);
    let mut matched = 0;
    let mut bonus = 0;
    for scope in scopes {
        match (shares(*scope, source, endpoint), *scope) {
            (true, Scope::Network) if prefers_network => {
                // Any endpoint of the own network outranks all of other networks.
                matched += 1;
                bonus = scopes.len() - 1;
            }
            (true, _) => matched += 1,
            (false, Scope::Network) if prefers_network => {}
            (false, _) => break,
        }
    }
    match balancer.mode {
        BalanceMode::Strict if matched != scopes.len() => None,
        BalanceMode::Strict
        | BalanceMode::Failover
        | BalanceMode::Standard
        | BalanceMode::Passthrough => Some(matched + bonus),
    }
}

/// Compares this one field only; empty equals empty.
fn shares(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster_id == b.cluster_id,
        Scope::Network => a.network == b.network,
    }
}

fn target_port(service: &Service, endpoint: &Endpoint<'_>, port: u16) -> Option<u16> {
    let own = endpoint.ports.get(&port).copied();
    let numeric = || service.ports.get(&port).copied().filter(|target| *target > 0);
    let tunnel = || endpoint.workload.application_tunnel?.port.map(|_| port);
    own.or_else(numeric).or_else(tunnel)
}

/// Draws one item with a probability proportional to its weight; `None` if all weights are 0.
pub(crate) fn weighted<'a, T>(
    items: &'a [T],
    weight: impl Fn(&T) -> u32,
    random: &mut impl Rng,
) -> Option<&'a T> {
    let total: u64 = items.iter().map(|item| u64::from(weight(item))).sum();
    if total == 0 {
        return None;
    }
    let mut draw = random.random_range(0..total);
    items.iter().find(|item| {
        let weight = u64::from(weight(item));
        let hit = draw < weight;
        draw = draw.saturating_sub(weight);
        hit
    })
}

/// Why a workload has no address to dial.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    #[error("no valid routing destination for workload: {0}")]
    Unreachable(Arc<str>),
    #[error("no ip addresses were resolved for workload: {0}")]
    Unresolved(Arc<str>),
}

/// The address at which to dial the workload, for a connection that was addressed to `wanted`:
/// that very one if it is the workload's, else preferably one of the same family.
pub(crate) fn choose_address(
    answers: &Answers,
    upstream: &Upstream,
    wanted: IpAddr,
    random: &mut impl Rng,
) -> Result<IpAddr, Stop<NoAddress>> {
    let workload = &upstream.workload;
    if workload.addresses.contains(&wanted) {
        return Ok(wanted);
    }
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == wanted.is_ipv4();
    let accepted = |ip: &&IpAddr| {
        upstream.service.as_ref().is_none_or(|service| service.ip_families.accepts(**ip))
    };
    let own = || workload.addresses.iter().filter(accepted);
    if let Some(ip) = own().find(same_family).or_else(|| own().next()) {
        return Ok(*ip);
    }
    if workload.hostname.is_empty() {
        return Err(NoAddress::Unreachable(workload.uid.clone()).into());
    }
    let Some(answer) = answers.dns(&workload.hostname) else {
        return Err(Stop::Need(Need::Dns(workload.hostname.clone())));
    };
    let preferred: Vec<&IpAddr> = answer.iter().filter(same_family).collect();
    let choice = if preferred.is_empty() { answer.iter().collect() } else { preferred };
    weighted(&choice, |_| 1, random)
        .map(|ip| **ip)
        .ok_or_else(|| NoAddress::Unresolved(workload.uid.clone()).into())
}

#[cfg(test)]
mod tests;
