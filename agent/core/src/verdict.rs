//! Which connections between pods of this node need not be asked about one by one.
//!
//! A [`Verdict`] holds for every connection of one pod to one destination, for as long as nothing of
//! the mesh that it depends on changes. It is what `route`, `admit` and `authorize` say of each
//! endpoint that could be drawn, so that it never admits what they would refuse.

use std::net::SocketAddr;
use std::sync::Arc;

use rand::Rng;

use crate::addr::{Authority, OriginalDst};
use crate::admit::{self, Admission, DialFrom, HeaderTo, Inbound, Refusal};
use crate::authorize::{self, Denied, Permit, judges_alike};
use crate::balance::{self, Mode, Upstream};
use crate::resolve::{self, Destination};
use crate::route::{self, NoRoute, Outbound, Route, Routed};
use crate::service::Service;
use crate::snapshot::{Endpoint, Snapshot};
use crate::tables::MAX_BACKENDS;
use crate::view::{Need, Step, View};
use crate::workload::Workload;

/// From how many endpoints a verdict is made. Of a larger service few endpoints can be of this node,
/// and all of them would be counted anew whenever one changes.
pub const MAX_ENDPOINTS: usize = 1024;

/// What holds for every connection of a pod to one destination.
#[derive(Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Admitted as they are, by uid; at least one.
    pub backends: Vec<Backend>,
    /// The weight of all that is not among the backends: with it the agent is asked.
    pub elsewhere: u32,
    /// The service that is addressed.
    pub service: Option<Arc<Service>>,
}

/// An endpoint to which connections may go straight.
#[derive(Debug, PartialEq, Eq)]
pub struct Backend {
    pub workload: Arc<Workload>,
    /// Positive.
    pub weight: u32,
    pub admission: Admission,
    pub permit: Permit,
}

impl Backend {
    /// Where the connection is led.
    pub fn to(&self) -> SocketAddr {
        self.admission.to.addr()
    }

    fn is_at(&self, other: &Self) -> bool {
        self.workload.uid == other.workload.uid && self.to() == other.to()
    }
}

impl Verdict {
    /// Leaves to the agent what does not hold; says whether a backend remains.
    pub fn retain(&mut self, mut holds: impl FnMut(&Backend) -> bool) -> bool {
        let elsewhere = &mut self.elsewhere;
        self.backends.retain(|backend| {
            let stays = holds(backend);
            if !stays {
                // The sum of all weights fits.
                *elsewhere = elsewhere.saturating_add(backend.weight);
            }
            stays
        });
        !self.backends.is_empty()
    }

    /// Whether both lead to the same backends with the same probabilities.
    pub fn is_like(&self, other: &Self) -> bool {
        let pairs = || self.backends.iter().zip(&other.backends);
        self.backends.len() == other.backends.len()
            && self.elsewhere == other.elsewhere
            && pairs().all(|(one, other)| one.is_at(other) && one.weight == other.weight)
    }

    /// Whether it admits to every backend of the other one.
    pub fn covers(&self, other: &Self) -> bool {
        other.backends.iter().all(|backend| self.backends.iter().any(|own| own.is_at(backend)))
    }

    /// Whether the workload is one of its backends.
    pub fn carries(&self, uid: &str) -> bool {
        self.backends.iter().any(|backend| *backend.workload.uid == *uid)
    }
}

/// Why there is no verdict: the agent decides on each connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskAgent {
    #[error(transparent)]
    NoRoute(#[from] NoRoute),
    #[error("it does not lead straight to a pod of this node")]
    Away,
    #[error("it leads back to the pod itself")]
    Itself,
    #[error("its address is of the other family, or another workload's")]
    Address,
    #[error("something is to be found out for each connection")]
    Lacks(Need),
    #[error("the service has {0} endpoints")]
    Many(usize),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error(transparent)]
    Denied(#[from] Denied),
}

/// Decides for all connections like this one.
///
/// `view` should have no answers: what is found out for one connection does not hold for the next.
/// `random` decides nothing; what is drawn besides the endpoint leads to a tunnel.
pub fn decide(
    view: &View<'_>,
    request: &Outbound<'_>,
    random: &mut impl Rng,
) -> Result<Verdict, AskAgent> {
    if *request.source.network != *view.network {
        return Err(AskAgent::Away);
    }
    let Some(service) = addressed(view, request) else {
        let routed = finished(route::route(view, request, random))?;
        let backend = backend(view, request, routed, 1)?;
        return Ok(Verdict { backends: vec![backend], elsewhere: 0, service: None });
    };
    let known = view.snapshot.declared_count(service) + service.fixed_endpoints.len();
    if known > MAX_ENDPOINTS {
        return Err(AskAgent::Many(known));
    }
    let mut backends = Vec::new();
    let mut told = None;
    let mut elsewhere: u64 = 0;
    let mut total: u64 = 0;
    for endpoint in candidates(view, request, service) {
        let weight = endpoint.workload.capacity;
        total += u64::from(weight);
        if weight == 0 {
            continue;
        }
        match reach(view, request, service, &endpoint, random) {
            Ok(backend) => backends.push(backend),
            Err(ask) => {
                elsewhere += u64::from(weight);
                told = Some(ask);
            }
        }
    }
    if backends.is_empty() || total > u64::from(u32::MAX) {
        let nobody = || NoRoute::NoHealthyUpstream(request.destination.addr()).into();
        return Err(told.unwrap_or_else(nobody));
    }
    backends.sort_unstable_by(|one, other| one.workload.uid.cmp(&other.workload.uid));
    let spare = backends.iter().skip(MAX_BACKENDS).map(|backend| u64::from(backend.weight));
    elsewhere += spare.sum::<u64>();
    backends.truncate(MAX_BACKENDS);
    // Not more than the sum of all weights.
    let elsewhere = u32::try_from(elsewhere).unwrap_or(u32::MAX);
    Ok(Verdict { backends, elsewhere, service: Some(service.clone()) })
}

/// How often to draw anew before looking at all endpoints.
const DRAWS: usize = 32;

/// The route of a connection that was drawn to go to none of a verdict's backends, which are those
/// that are `carried`.
pub fn route_elsewhere(
    view: &View<'_>,
    request: &Outbound<'_>,
    carried: impl Fn(&str) -> bool,
    random: &mut impl Rng,
) -> Step<Result<Routed, NoRoute>> {
    for _ in 0..DRAWS {
        match route::route(view, request, random) {
            Step::Done(Ok(Routed { route: Route::Local { workload, .. }, .. }))
                if carried(&workload.uid) => {}
            step => return step,
        }
    }
    let others = addressed(view, request).and_then(|service| {
        let mut others = candidates(view, request, service);
        others.retain(|endpoint| !carried(&endpoint.workload.uid));
        let drawn = balance::weighted(&others, |endpoint| endpoint.workload.capacity, random)?;
        balance::upstream(service, drawn, request.destination.port())
    });
    match others {
        Some(endpoint) => route::route_to(view, request, endpoint, random),
        // There is nothing elsewhere any more.
        None => route::route(view, request, random),
    }
}

/// Whether [`decide`] surely says the same of both snapshots as when it gave `verdict` for the earlier
/// one. False says nothing.
pub fn decides_alike(
    before: &Snapshot,
    after: &Snapshot,
    network: &str,
    source: &Workload,
    destination: OriginalDst,
    verdict: &Verdict,
) -> bool {
    let ip = destination.ip();
    let service = |snapshot: &Snapshot| {
        snapshot.service_at(network, ip, Some(&source.namespace)).map(Arc::as_ptr)
    };
    let workload = |snapshot: &Snapshot| snapshot.workload_at(network, ip).map(Arc::as_ptr);
    let same_members = verdict.service.as_ref().is_none_or(|service| {
        service.fixed_endpoints.is_empty() && before.shares_members_with(after, &service.key())
    });
    let is_same = |uid: &str| match (before.workload(uid), after.workload(uid)) {
        (Some(earlier), Some(later)) => Arc::ptr_eq(earlier, later),
        (_, _) => false,
    };
    let judged_alike = |backend: &Backend| {
        let workload = &backend.workload;
        let owner =
            |snapshot: &Snapshot| snapshot.workload_at(network, backend.to().ip()).map(Arc::as_ptr);
        workload.waypoint.is_none()
            && owner(before) == owner(after)
            && judges_alike(before, after, &workload.uid)
    };
    is_same(&source.uid)
        && service(before) == service(after)
        && workload(before) == workload(after)
        && same_members
        && verdict.backends.iter().all(judged_alike)
}

/// The service among whose endpoints is drawn.
fn addressed<'a>(view: &View<'a>, request: &Outbound<'_>) -> Option<&'a Arc<Service>> {
    let (source, ip) = (request.source, request.destination.ip());
    let namespace = Some(&*source.namespace);
    match resolve::upstream_at(view.snapshot, &source.network, ip, namespace) {
        Destination::Service(service) => Some(service),
        Destination::Workload(_) | Destination::Unknown => None,
    }
}

fn candidates<'a>(
    view: &View<'a>,
    request: &Outbound<'_>,
    service: &'a Service,
) -> Vec<Endpoint<'a>> {
    let port = request.destination.port();
    balance::candidates(view.snapshot, request.source, service, port, Mode::Standard)
}

fn reach(
    view: &View<'_>,
    request: &Outbound<'_>,
    service: &Arc<Service>,
    endpoint: &Endpoint<'_>,
    random: &mut impl Rng,
) -> Result<Backend, AskAgent> {
    let destination = request.destination;
    let upstream: Upstream = balance::upstream(service, endpoint, destination.port())
        .ok_or(NoRoute::NoHealthyUpstream(destination.addr()))?;
    let routed = finished(route::route_to(view, request, upstream, random))?;
    backend(view, request, routed, endpoint.workload.capacity)
}

/// What the destination would say, if the connection went to one of this node's pods.
fn backend(
    view: &View<'_>,
    request: &Outbound<'_>,
    routed: Routed,
    weight: u32,
) -> Result<Backend, AskAgent> {
    let Route::Local { to, workload } = routed.route else { return Err(AskAgent::Away) };
    let source = request.source;
    if workload.uid == source.uid || request.client.to_canonical() == to.ip() {
        return Err(AskAgent::Itself);
    }
    let owner = view.snapshot.workload_at(view.network, to.ip());
    let is_owned = owner.is_some_and(|owner| owner.uid == workload.uid);
    let same_family = to.ip().is_ipv4() == request.destination.ip().is_ipv4();
    if !same_family || !is_owned {
        return Err(AskAgent::Address);
    }
    let (identity, authority) = (source.identity(), Authority::Addr(to.addr()));
    let inbound = Inbound {
        local: &workload,
        addressed: to.ip(),
        // Each connection has a port of its own, and none of them counts.
        peer: SocketAddr::new(request.client, 0),
        identity: &identity,
        authority: &authority,
        forwarded_host: routed.service.as_ref().map(|service| &*service.hostname),
        header_to: HeaderTo::Address,
    };
    let admission = finished(admit::admit(view, &inbound))?;
    let is_plain = admission.proxy.is_none()
        && admission.to == to
        && matches!(admission.from, DialFrom::Client(_));
    if !is_plain {
        return Err(AskAgent::Away);
    }
    let permit = authorize::authorize(view.snapshot, &workload, &admission.connection).verdict?;
    Ok(Backend { workload, weight, admission, permit })
}

fn finished<T, E: Into<AskAgent>>(step: Step<Result<T, E>>) -> Result<T, AskAgent> {
    match step {
        Step::Done(done) => done.map_err(Into::into),
        Step::Need(need) => Err(AskAgent::Lacks(need)),
    }
}

#[cfg(test)]
mod tests;
