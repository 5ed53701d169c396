//! Where a captured outbound connection goes.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use crate::addr::{
    AppAddr, Authority, HBONE_PORT, HboneAddr, NetworkAddress, OriginalDst, RESERVED_PORTS,
};
use crate::balance::{self, Mode, NoAddress, Upstream};
use crate::identity::Identity;
use crate::resolve::{self, Destination};
use crate::service::Service;
use crate::view::{ResourceKey, Step, Stop, Unanswered, View};
use crate::workload::{GatewayAddress, GatewayDestination, TunnelProtocol, Workload};

/// A connection that an enrolled workload opened.
#[derive(Clone, Copy, Debug)]
pub struct Outbound<'a> {
    /// Known from the socket, never from what the client says.
    pub source: &'a Workload,
    /// The address that the client connects from.
    pub client: IpAddr,
    pub destination: OriginalDst,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Routed {
    pub route: Route,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
    pub because: Because,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// Plain TCP to an address that the mesh does not manage.
    Passthrough { to: AppAddr },
    /// Plain TCP to a known workload that has no tunnel.
    Direct { to: AppAddr, workload: Arc<Workload> },
    /// To an HBONE workload that is enrolled at this very agent, with no waypoint in between.
    Local { to: AppAddr, workload: Arc<Workload> },
    /// Through a tunnel that ends at the next hop: a workload, a waypoint or a gateway.
    Tunnel { tunnel: Tunnel, next_hop: Arc<Workload> },
}

/// One HBONE tunnel, and perhaps another one inside of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Where it is dialled. An inner tunnel is not dialled: here it repeats that of the outer one.
    pub via: HboneAddr,
    /// The server must prove one of these. When empty, none will do.
    pub expect: Vec<Identity>,
    pub authority: Authority,
    /// A tunnel within the byte stream of this one, through a gateway to another network.
    pub inner: Option<Box<Tunnel>>,
}

/// The rule that chose a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Because {
    ServiceWaypoint,
    /// The service's waypoint is on another network.
    RemoteServiceWaypoint,
    WorkloadWaypoint,
    ServiceEndpoint,
    /// The chosen endpoint is on another network.
    RemoteServiceEndpoint,
    WorkloadAddress,
    PassthroughService,
    UnknownAddress,
}

impl fmt::Display for Because {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Because::ServiceWaypoint => "service waypoint",
            Because::RemoteServiceWaypoint => "service waypoint, through its network's gateway",
            Because::WorkloadWaypoint => "workload waypoint",
            Because::ServiceEndpoint => "endpoint of service",
            Because::RemoteServiceEndpoint => "endpoint of service, through its network's gateway",
            Because::WorkloadAddress => "workload address",
            Because::PassthroughService => "passthrough service",
            Because::UnknownAddress => "unknown address: passthrough",
        })
    }
}

/// Why a connection goes nowhere. It is refused, never sent another way.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoRoute {
    #[error("attempted recursive call to ourselves")]
    SelfCall,
    #[error("no healthy upstream: {0}")]
    NoHealthyUpstream(SocketAddr),
    #[error("unknown waypoint: waypoint {0} not found")]
    UnknownWaypoint(Arc<GatewayAddress>),
    #[error("unknown network gateway: network gateway {0} not found")]
    UnknownNetworkGateway(Arc<GatewayAddress>),
    /// Another network is reached by the name of a service only.
    #[error("no service for target address: {0}")]
    NoService(SocketAddr),
    #[error(transparent)]
    NoAddress(#[from] NoAddress),
    #[error(transparent)]
    Unanswered(#[from] Unanswered),
}

/// Decides for one connection.
///
/// When a [`Need`](crate::view::Need) is answered and the decision is taken again, `random` should
/// start from the same seed: then the same endpoint is drawn as the one that was asked for. With
/// other numbers it still ends, as no name is asked for twice.
pub fn route(
    view: &View<'_>,
    request: &Outbound<'_>,
    random: &mut impl Rng,
) -> Step<Result<Routed, NoRoute>> {
    Decision { view, request, random, endpoint: None }.decide().into()
}

/// The same for a connection whose endpoint has been drawn: `endpoint` is one of
/// [`balance::candidates`] of the service that is addressed.
pub(crate) fn route_to(
    view: &View<'_>,
    request: &Outbound<'_>,
    endpoint: Upstream,
    random: &mut impl Rng,
) -> Step<Result<Routed, NoRoute>> {
    Decision { view, request, random, endpoint: Some(endpoint) }.decide().into()
}

type Decided<T> = Result<T, Stop<NoRoute>>;

struct Decision<'a, R> {
    view: &'a View<'a>,
    request: &'a Outbound<'a>,
    random: &'a mut R,
    /// The endpoint, if it is not to be drawn.
    endpoint: Option<Upstream>,
}

impl<'a, R: Rng> Decision<'a, R> {
    fn decide(mut self) -> Decided<Routed> {
        let original = self.request.destination;
        if original.ip().is_loopback() && RESERVED_PORTS.contains(&original.port()) {
            return Err(NoRoute::SelfCall.into());
        }
        let snapshot = self.view.snapshot;
        let namespace = Some(&*self.request.source.namespace);
        let destination = resolve::address(snapshot, self.view.network, original.ip(), namespace);
        match destination {
            Destination::Service(service) => match self.draw_waypoint(service) {
                Some(waypoint) => self.reach_service_waypoint(service, waypoint),
                None => self.reach_upstream(Some(service)),
            },
            Destination::Workload(_) => self.reach_upstream(None),
            Destination::Unknown => {
                self.confirm_absent(self.view.network.into(), original.ip())?;
                self.reach_upstream(None)
            }
        }
    }

    fn confirm_absent(&self, network: Arc<str>, ip: IpAddr) -> Decided<()> {
        let key = ResourceKey::Address(NetworkAddress { network, ip });
        self.view.confirm_absent(key).map_err(|stop| stop.map(NoRoute::Unanswered))
    }

    fn draw_waypoint(&mut self, service: &'a Service) -> Option<&'a Arc<GatewayAddress>> {
        balance::weighted(&service.weighted_waypoints, |waypoint| waypoint.weight, self.random)
            .map(|waypoint| &waypoint.destination)
            .or(service.waypoint.as_ref())
    }

    fn reach_service_waypoint(
        &mut self,
        service: &Arc<Service>,
        reference: &Arc<GatewayAddress>,
    ) -> Decided<Routed> {
        let (waypoint, wanted) = self.waypoint(reference)?;
        let (route, because) = if self.is_remote(&waypoint) {
            (self.through_gateway(&waypoint, service)?, Because::RemoteServiceWaypoint)
        } else {
            (self.through_waypoint(waypoint, wanted)?, Because::ServiceWaypoint)
        };
        Ok(Routed { route, service: Some(service.clone()), because })
    }

    fn reach_upstream(&mut self, addressed: Option<&Arc<Service>>) -> Decided<Routed> {
        let Outbound { source, destination: original, .. } = *self.request;
        let snapshot = self.view.snapshot;
        let namespace = Some(&*source.namespace);
        let upstream =
            match resolve::upstream_at(snapshot, &source.network, original.ip(), namespace) {
                Destination::Service(service) if service.is_passthrough() => {
                    return Ok(self.passthrough(Some(service), Because::PassthroughService));
                }
                Destination::Service(service) => {
                    let drawn = self.endpoint.take().or_else(|| {
                        balance::choose_endpoint(
                            snapshot,
                            source,
                            service,
                            original.port(),
                            Mode::Standard,
                            self.random,
                        )
                    });
                    drawn.ok_or(NoRoute::NoHealthyUpstream(original.addr()))?
                }
                Destination::Workload(workload) => {
                    Upstream { workload: workload.clone(), port: original.port(), service: None }
                }
                Destination::Unknown => match addressed {
                    None => {
                        self.confirm_absent(source.network.clone(), original.ip())?;
                        return Ok(self.passthrough(None, Because::UnknownAddress));
                    }
                    Some(service) if service.is_passthrough() => {
                        return Ok(self.passthrough(addressed, Because::PassthroughService));
                    }
                    Some(_) => return Err(NoRoute::NoHealthyUpstream(original.addr()).into()),
                },
            };
        if self.is_remote(&upstream) {
            let service = addressed.ok_or(NoRoute::NoService(original.addr()))?;
            let route = self.through_gateway(&upstream, service)?;
            let service = Some(service.clone());
            return Ok(Routed { route, service, because: Because::RemoteServiceEndpoint });
        }
        if let (None, Some(reference)) = (addressed, &upstream.workload.waypoint)
            && !self.is_source_behind(reference)
        {
            return self.reach_workload_waypoint(&upstream, reference);
        }
        self.reach_workload(upstream)
    }

    fn passthrough(&self, service: Option<&Arc<Service>>, because: Because) -> Routed {
        let to = AppAddr::new(self.request.destination.addr());
        Routed { route: Route::Passthrough { to }, service: service.cloned(), because }
    }

    fn reach_workload_waypoint(
        &mut self,
        upstream: &Upstream,
        reference: &Arc<GatewayAddress>,
    ) -> Decided<Routed> {
        let (waypoint, wanted) = self.waypoint(reference)?;
        if self.is_remote(&waypoint) {
            return Err(NoRoute::NoService(self.request.destination.addr()).into());
        }
        let route = self.through_waypoint(waypoint, wanted)?;
        let service = upstream.service.clone();
        Ok(Routed { route, service, because: Because::WorkloadWaypoint })
    }

    fn reach_workload(&mut self, upstream: Upstream) -> Decided<Routed> {
        let ip = self.address(&upstream, self.request.destination.ip())?;
        let expect = expected(&upstream);
        let Upstream { workload, port, service } = upstream;
        let target = SocketAddr::new(ip, port);
        let to = AppAddr::new(target);
        // Who wants to know the target of a connection learns it from the tunnel's far end only.
        let enrolled = self.view.enrolled;
        let is_local = enrolled.contains(&workload.uid)
            && workload.application_tunnel.is_none()
            && !enrolled.tunnels_between(self.request.source, &workload);
        let because = match service {
            Some(_) => Because::ServiceEndpoint,
            None => Because::WorkloadAddress,
        };
        let route = match workload.tunnel_protocol {
            TunnelProtocol::None => Route::Direct { to, workload },
            TunnelProtocol::Hbone if is_local => Route::Local { to, workload },
            TunnelProtocol::Hbone => {
                let via = HboneAddr::new(SocketAddr::new(ip, HBONE_PORT));
                let authority = Authority::Addr(target);
                let tunnel = Tunnel { via, expect, authority, inner: None };
                Route::Tunnel { tunnel, next_hop: workload }
            }
        };
        Ok(Routed { route, service, because })
    }

    /// The waypoint learns what was addressed, untranslated. It is always reached by HBONE.
    fn through_waypoint(&mut self, waypoint: Upstream, wanted: IpAddr) -> Decided<Route> {
        let ip = self.address(&waypoint, wanted)?;
        let tunnel = Tunnel {
            via: HboneAddr::new(SocketAddr::new(ip, waypoint.port)),
            expect: expected(&waypoint),
            authority: Authority::Addr(self.request.destination.addr()),
            inner: None,
        };
        Ok(Route::Tunnel { tunnel, next_hop: waypoint.workload })
    }

    /// Two tunnels, one in the other: the outer to the gateway of the upstream's network, the
    /// inner to whatever stands for the service there.
    fn through_gateway(&mut self, upstream: &Upstream, service: &Service) -> Decided<Route> {
        let workload = &upstream.workload;
        let reference = workload
            .network_gateway
            .as_ref()
            .ok_or_else(|| NoRoute::from(NoAddress::Unreachable(workload.uid.clone())))?;
        let (gateway, wanted) = self
            .gateway(reference, Mode::Standard)?
            .ok_or_else(|| NoRoute::UnknownNetworkGateway(reference.clone()))?;
        let ip = self.address(&gateway, wanted)?;
        let via = HboneAddr::new(SocketAddr::new(ip, gateway.port));
        let authority = Authority::Host {
            host: service.hostname.clone(),
            port: self.request.destination.port(),
        };
        let inner = Tunnel {
            via,
            // The upstream may be a mere summary of its network, so its own identity is no proof.
            expect: service_identities(upstream),
            authority: authority.clone(),
            inner: None,
        };
        let tunnel =
            Tunnel { via, expect: expected(&gateway), authority, inner: Some(Box::new(inner)) };
        Ok(Route::Tunnel { tunnel, next_hop: gateway.workload })
    }

    fn waypoint(&mut self, reference: &Arc<GatewayAddress>) -> Decided<(Upstream, IpAddr)> {
        self.gateway(reference, Mode::Waypoint)?
            .ok_or_else(|| NoRoute::UnknownWaypoint(reference.clone()).into())
    }

    /// What a reference leads to, and the address that guides the choice among its addresses.
    fn gateway(
        &mut self,
        reference: &Arc<GatewayAddress>,
        mode: Mode,
    ) -> Decided<Option<(Upstream, IpAddr)>> {
        let snapshot = self.view.snapshot;
        let source = self.request.source;
        let port = reference.hbone_mtls_port;
        let (destination, wanted) = match &reference.destination {
            GatewayDestination::Hostname(name) => {
                (resolve::hostname(snapshot, name), self.request.destination.ip())
            }
            GatewayDestination::Address(at) => {
                let namespace = Some(&*source.namespace);
                let found = resolve::upstream_at(snapshot, &at.network, at.ip, namespace);
                match found {
                    Destination::Service(service) if service.is_passthrough() => return Ok(None),
                    Destination::Service(_) | Destination::Workload(_) | Destination::Unknown => {
                        (found, at.ip.to_canonical())
                    }
                }
            }
        };
        let upstream = match destination {
            Destination::Service(service) => {
                balance::choose_endpoint(snapshot, source, service, port, mode, self.random)
            }
            Destination::Workload(workload) => {
                Some(Upstream { workload: workload.clone(), port, service: None })
            }
            Destination::Unknown => {
                let absent = self.view.confirm_absent(reference.into());
                absent.map_err(|stop| stop.map(NoRoute::Unanswered))?;
                None
            }
        };
        Ok(upstream.map(|upstream| (upstream, wanted)))
    }

    fn address(&mut self, upstream: &Upstream, wanted: IpAddr) -> Decided<IpAddr> {
        balance::choose_address(self.view.answers, upstream, wanted, self.random)
            .map_err(|stop| stop.map(NoRoute::NoAddress))
    }

    fn is_remote(&self, upstream: &Upstream) -> bool {
        upstream.workload.network != self.request.source.network
    }

    /// Whether the client is itself an instance of the waypoint.
    fn is_source_behind(&self, waypoint: &GatewayAddress) -> bool {
        let snapshot = self.view.snapshot;
        let identity = self.request.source.identity();
        let client = self.request.client.to_canonical();
        resolve::gateway(snapshot, waypoint)
            .workloads(snapshot)
            .iter()
            .any(|workload| workload.identity() == identity && workload.addresses.contains(&client))
    }
}

/// Who may answer at the upstream itself.
fn expected(upstream: &Upstream) -> Vec<Identity> {
    let mut identities = service_identities(upstream);
    let own = upstream.workload.identity();
    if !identities.contains(&own) {
        identities.push(own);
    }
    identities
}

fn service_identities(upstream: &Upstream) -> Vec<Identity> {
    upstream.service.iter().flat_map(|service| service.identities()).collect()
}

#[cfg(test)]
mod tests;
