//! The corridor of connections that an enrolled pod opens: original destination, route, relay.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_core::addr::{ClientAddr, OriginalDst};
use culvert_core::route::{self, NoRoute, Outbound, Route, Routed};
use culvert_core::service::Service;
use culvert_core::verdict;
use culvert_core::workload::Workload;
use futures_util::FutureExt;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tokio::net::{TcpListener, TcpStream};

use crate::accept::{accept_until, ended, prepare, reset};
use crate::capture::{Original, VerdictId};
use crate::decide::decide_for;
use crate::drain::DrainWatch;
use crate::node::Node;
use crate::pods::Pod;
use crate::session::{self, Carrying};
use crate::telemetry::{Reporter, SocketGuard};

mod local;
mod plain;
mod tunnel;

/// Serves the captured connections of `pod` until it leaves or the agent drains. `retracted` gets the
/// direct connections to it that the kernel could not admit after all.
pub async fn serve<F: Future<Output = ()> + Send + 'static>(
    node: Arc<Node>,
    pod: Arc<Pod>,
    listener: TcpListener,
    drain: DrainWatch,
    retracted: impl Fn(Arc<Node>, Arc<Pod>, TcpStream, SocketAddr, DrainWatch) -> F
    + Copy
    + Send
    + 'static,
) {
    prepare(&listener, node.keepalive);
    let end = ended(&pod, drain.clone());
    accept_until(&listener, end, |client, peer| {
        let (node, pod, drain) = (node.clone(), node.successor(&pod), drain.clone());
        session::spawn(async move {
            if node.capture.is_retracted(&client) {
                return Some(retracted(node, pod, client, peer, drain).boxed());
            }
            open(node, pod, client, peer, drain).await
        });
    })
    .await;
}

/// A captured connection whose destination and owner are known.
struct Captured {
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    client: ClientAddr,
    original: OriginalDst,
    source: Arc<Workload>,
    /// The service that was addressed.
    service: Option<Arc<Service>>,
    drain: DrainWatch,
    _open: SocketGuard,
}

/// Finds out where a connection is to go, and begins it.
async fn open(
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    drain: DrainWatch,
) -> Option<Carrying> {
    let _open = node.telemetry.socket_opened(Reporter::Source);
    let failed = |tcp: TcpStream, client, dst, error: &dyn std::fmt::Display| {
        node.telemetry.failed_early(Reporter::Source, client, dst, error);
        reset(tcp);
        None
    };
    let Original { to: original, elsewhere } = match node.capture.outbound_dst(&tcp) {
        Ok(original) => original,
        Err(error) => {
            let own = tcp.local_addr().unwrap_or(peer);
            return failed(tcp, peer, own, &error);
        }
    };
    let source = match node.workload_of(&pod).await {
        Ok(source) => source,
        Err(error) => return failed(tcp, peer, original.addr(), &error),
    };
    let client = ClientAddr::new(client_addr(peer, &source, original.ip()));
    // One seed for all rounds of the decision, so that it draws the endpoint that it asked about.
    let seed = rand::rng().random();
    let request = Outbound { source: &source, client: client.ip(), destination: original };
    // What not every connection needs takes no room while the others are opened.
    let (routed, server) = match Box::pin(choose(&node, &request, elsewhere, seed)).await {
        Ok(chosen) => chosen,
        Err(error) => return failed(tcp, client.addr(), original.addr(), &*error),
    };
    tracing::debug!(src = %client, dst = %original, because = %routed.because, "routed");
    let service = routed.service;
    let captured =
        |node, tcp| Captured { node, pod, tcp, client, original, source, service, drain, _open };
    match (routed.route, server) {
        (Route::Passthrough { to }, _) => Some(plain::carry(captured(node, tcp), to, None).boxed()),
        (Route::Direct { to, workload }, _) => {
            Some(plain::carry(captured(node, tcp), to, Some(workload)).boxed())
        }
        (Route::Local { to, workload }, Some(server)) => {
            Some(local::carry(captured(node, tcp), to, workload, server).boxed())
        }
        (Route::Local { .. }, None) => {
            failed(tcp, client.addr(), original.addr(), &"the pod comes and goes")
        }
        (Route::Tunnel { tunnel, next_hop }, _) => {
            tunnel::open(captured(node, tcp), tunnel, next_hop).await
        }
    }
}

/// How often a route is chosen anew because its pod was withdrawn after it was chosen.
const CHOICES: usize = 4;

/// The route, and the destination's pod if that is of this node. A pod may be withdrawn between the
/// two; then another route holds for its workload.
///
/// Where the kernel has drawn that a connection goes to none of the endpoints of a verdict, it is one
/// of the others.
async fn choose(
    node: &Node,
    request: &Outbound<'_>,
    elsewhere: Option<VerdictId>,
    seed: u64,
) -> Result<(Routed, Option<Arc<Pod>>), Box<NoRoute>> {
    let drawn = node.direct.as_ref().and_then(|direct| direct.verdict(elsewhere?));
    let mut choices = 0;
    loop {
        choices += 1;
        let decided = decide_for(node, request.source, |view| {
            let random = &mut SmallRng::seed_from_u64(seed);
            match &drawn {
                Some(drawn) => {
                    let carried = |uid: &str| drawn.verdict.carries(uid);
                    verdict::route_elsewhere(view, request, carried, random)
                }
                None => route::route(view, request, random),
            }
        });
        let routed = decided.await.map_err(Box::new)?;
        let Route::Local { workload, .. } = &routed.route else { return Ok((routed, None)) };
        let server = node.mesh.pod(&workload.uid);
        if server.is_some() || choices == CHOICES {
            return Ok((routed, server));
        }
    }
}

/// The address that a captured connection really comes from: on its way to the agent the kernel
/// programs may have led it over loopback, where it keeps its port.
fn client_addr(peer: SocketAddr, source: &Workload, destination: IpAddr) -> SocketAddr {
    if !peer.ip().is_loopback() {
        return peer;
    }
    let family = |ip: &&IpAddr| ip.is_ipv4() == destination.is_ipv4();
    let own = source.addresses.iter().find(family).copied();
    SocketAddr::new(own.unwrap_or(peer.ip()), peer.port())
}
