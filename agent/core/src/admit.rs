//! What an inbound connection is for, and how the application is dialled.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use crate::addr::{AppAddr, Authority, NamespacedHostname, NetworkAddress, RESERVED_PORTS};
use crate::authorization::Connection;
use crate::identity::Identity;
use crate::resolve::{self, Destination};
use crate::service::Service;
use crate::snapshot::Snapshot;
use crate::view::{ResourceKey, Step, Stop, Unanswered, View};
use crate::workload::{ApplicationTunnelProtocol, Workload};

mod proxy_header;

pub use proxy_header::ProxyHeader;

/// One CONNECT request to a local workload.
#[derive(Clone, Copy, Debug)]
pub struct Inbound<'a> {
    /// The workload that owns the listener.
    pub local: &'a Workload,
    /// The address that the HBONE connection was made to.
    pub addressed: IpAddr,
    /// Where the HBONE connection comes from.
    pub peer: SocketAddr,
    /// What the peer's certificate proves.
    pub identity: &'a Identity,
    pub authority: &'a Authority,
    /// The `host` of the `forwarded` header (RFC 7239); names the service in telemetry only.
    pub forwarded_host: Option<&'a str>,
    pub header_to: HeaderTo,
}

/// Where a workload listens whose application tunnel has a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderTo {
    /// At a loopback address, where nobody but the agent can send it one.
    Loopback,
    /// At the address that the connection was made to.
    Address,
}

/// How to deliver a connection once it is authorized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    pub to: AppAddr,
    pub from: DialFrom,
    /// To be sent to the application before anything else.
    pub proxy: Option<ProxyHeader>,
    /// What policies judge.
    pub connection: Connection,
    /// The service that the connection is taken to be for, in telemetry.
    pub service: Option<Arc<Service>>,
}

/// The source address of the connection to the application.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DialFrom {
    /// The client's, so that the application sees who calls.
    Client(IpAddr),
    /// The pod's own: it calls itself.
    Own,
    /// That of the loopback device, to which the destination belongs too.
    Loopback,
}

/// Why an inbound connection is not delivered, before any policy is asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("ip mismatch: {addressed} != {authority}")]
    IpMismatch { addressed: IpAddr, authority: IpAddr },
    #[error("no service or workload for hostname: {0}")]
    NoHostname(Arc<str>),
    #[error("requested service {hostname}:{port} found, but cannot resolve port")]
    NoPort { hostname: Arc<str>, port: u16 },
    #[error("requested service {0} found, but has no IP addresses")]
    NoVip(Arc<str>),
    #[error("attempted recursive call to ourselves")]
    SelfCall,
}

impl Refusal {
    /// The HTTP status that answers the CONNECT request.
    pub fn status(&self) -> u16 {
        match self {
            Refusal::IpMismatch { .. } => 400,
            Refusal::NoHostname(_)
            | Refusal::NoPort { .. }
            | Refusal::NoVip(_)
            | Refusal::SelfCall => 503,
        }
    }
}

/// Decides on one CONNECT request. The result still has to be authorized.
pub fn admit(view: &View<'_>, inbound: &Inbound<'_>) -> Step<Result<Admission, Refusal>> {
    decide(view, inbound).into()
}

fn decide(view: &View<'_>, inbound: &Inbound<'_>) -> Result<Admission, Stop<Refusal>> {
    let local = inbound.local;
    let addressed = inbound.addressed.to_canonical();
    check_destination(view, inbound, addressed)?;

    let snapshot = view.snapshot;
    let target = match inbound.authority {
        Authority::Addr(target) => Target { port: target.port(), service: None },
        Authority::Host { host, port } => named_target(view, local, host, *port)?,
    };
    if RESERVED_PORTS.contains(&target.port) {
        return Err(Refusal::SelfCall.into());
    }

    let port = local.application_tunnel.and_then(|tunnel| tunnel.port).unwrap_or(target.port);
    let wants_header = local
        .application_tunnel
        .is_some_and(|tunnel| tunnel.protocol == ApplicationTunnelProtocol::Proxy);
    let proxy = match wants_header {
        true => Some(ProxyHeader {
            source: inbound.peer,
            destination: shown_destination(view, inbound.authority, target.service)?,
            identity: Some(inbound.identity.clone()),
        }),
        false => None,
    };
    let (to, from) = match (&proxy, inbound.header_to) {
        (Some(_), HeaderTo::Loopback) => (loopback_like(addressed), DialFrom::Loopback),
        (Some(_), HeaderTo::Address) | (None, _) => (addressed, dial_from(inbound.peer, addressed)),
    };
    let connection = Connection {
        source: inbound.peer.ip().to_canonical(),
        identity: Some(inbound.identity.clone()),
        destination: addressed,
        port,
    };
    let service = target
        .service
        .or_else(|| likely_service(snapshot, local, port, inbound.forwarded_host))
        .cloned();
    Ok(Admission { to: AppAddr::new(SocketAddr::new(to, port)), from, proxy, connection, service })
}

/// Decides on a captured connection without a tunnel. The result still has to be authorized.
pub fn admit_plaintext(
    snapshot: &Snapshot,
    local: &Workload,
    addressed: SocketAddr,
    peer: SocketAddr,
) -> Result<Admission, Refusal> {
    let to = AppAddr::new(addressed);
    if RESERVED_PORTS.contains(&to.port()) {
        return Err(Refusal::SelfCall);
    }
    let connection = Connection {
        source: peer.ip().to_canonical(),
        identity: None,
        destination: to.ip(),
        port: to.port(),
    };
    let service = likely_service(snapshot, local, to.port(), None).cloned();
    Ok(Admission { to, from: dial_from(peer, to.ip()), proxy: None, connection, service })
}

/// The authority must be this pod, or something that this pod is the waypoint of.
fn check_destination(
    view: &View<'_>,
    inbound: &Inbound<'_>,
    addressed: IpAddr,
) -> Result<(), Stop<Refusal>> {
    let Authority::Addr(target) = inbound.authority else {
        // Whether the name leads here shows when its port is looked up.
        return Ok(());
    };
    let authority = target.ip().to_canonical();
    if authority == addressed || inbound.local.application_tunnel.is_some() {
        return Ok(());
    }
    let snapshot = view.snapshot;
    let waypoints: Vec<_> = match resolve::address(snapshot, view.network, authority, None) {
        Destination::Workload(workload) => workload.waypoint.iter().collect(),
        Destination::Service(service) => service.waypoints().collect(),
        Destination::Unknown => {
            let at = NetworkAddress { network: view.network.into(), ip: authority };
            look_once(view, ResourceKey::Address(at))?;
            Vec::new()
        }
    };
    for reference in waypoints {
        let is_waypoint = match resolve::gateway(snapshot, reference) {
            Destination::Service(service) => service.endpoint_ports(inbound.local).is_some(),
            Destination::Workload(workload) => workload.addresses.contains(&addressed),
            Destination::Unknown => {
                look_once(view, reference.into())?;
                false
            }
        };
        if is_waypoint {
            return Ok(());
        }
    }
    Err(Refusal::IpMismatch { addressed, authority }.into())
}

/// What nobody tells about is refused like what does not exist.
fn look_once(view: &View<'_>, key: ResourceKey) -> Result<(), Stop<Refusal>> {
    match view.confirm_absent(key) {
        Err(Stop::Need(need)) => Err(Stop::Need(need)),
        Ok(()) | Err(Stop::Failed(Unanswered(_))) => Ok(()),
    }
}

struct Target<'a> {
    /// The application's port, before an application tunnel replaces it.
    port: u16,
    service: Option<&'a Arc<Service>>,
}

fn named_target<'a>(
    view: &View<'a>,
    local: &Workload,
    hostname: &Arc<str>,
    port: u16,
) -> Result<Target<'a>, Stop<Refusal>> {
    let Some(service) = view.snapshot.service_named(hostname, Some(&local.namespace)) else {
        // One of the services that the workload says it belongs to, if any has this name.
        let own = local.services.keys().find(|key| key.hostname == *hostname).cloned();
        let namespace = local.namespace.clone();
        let key = own.unwrap_or(NamespacedHostname { namespace, hostname: hostname.clone() });
        look_once(view, ResourceKey::Hostname(key))?;
        return Err(Refusal::NoHostname(hostname.clone()).into());
    };
    let own = service.endpoint_ports(local).and_then(|ports| ports.get(&port));
    let port = own
        .or_else(|| service.ports.get(&port))
        .copied()
        .filter(|target| *target != 0)
        .ok_or_else(|| Refusal::NoPort { hostname: hostname.clone(), port })?;
    Ok(Target { port, service: Some(service) })
}

/// The destination to tell the application: the PROXY protocol has no field for a hostname, so
/// one of the service's addresses stands for it.
fn shown_destination(
    view: &View<'_>,
    authority: &Authority,
    service: Option<&Arc<Service>>,
) -> Result<SocketAddr, Refusal> {
    let preference = |vip: &&NetworkAddress| match (*vip.network == *view.network, vip.ip) {
        (true, IpAddr::V4(_)) => 2,
        (true, IpAddr::V6(_)) => 1,
        (false, _) => 0,
    };
    match authority {
        Authority::Addr(target) => Ok(*target),
        Authority::Host { host, port } => service
            .and_then(|service| service.vips.iter().max_by_key(preference))
            .map(|vip| SocketAddr::new(vip.ip, *port))
            .ok_or_else(|| Refusal::NoVip(host.clone())),
    }
}

fn loopback_like(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

fn dial_from(peer: SocketAddr, own: IpAddr) -> DialFrom {
    let client = peer.ip().to_canonical();
    if client == own { DialFrom::Own } else { DialFrom::Client(client) }
}

/// Which of the workload's services a connection to one of its ports is for: the one that the
/// client says, else the first that leads to this port.
fn likely_service<'a>(
    snapshot: &'a Snapshot,
    local: &'a Workload,
    port: u16,
    forwarded_host: Option<&str>,
) -> Option<&'a Arc<Service>> {
    let leads_here = |service: &&Arc<Service>| {
        let own = service.endpoint_ports(local);
        service.ports.iter().any(|(service_port, target)| {
            *target == port || own.and_then(|own| own.get(service_port)) == Some(&port)
        })
    };
    snapshot
        .services_of(local)
        .find(|service| Some(&*service.hostname) == forwarded_host)
        .or_else(|| snapshot.services_of(local).find(leads_here))
}

#[cfg(test)]
mod tests;
