//! Inbound tunnels: mutual TLS, then one CONNECT for each connection to the application.

use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::addr::Authority;
use culvert_core::admit::{self, Admission, DialFrom, Inbound};
use culvert_core::authorize::Denied;
use culvert_core::identity::Identity;
use culvert_core::workload::Workload;
use http::{HeaderMap, Method, StatusCode};
use tokio::net::TcpStream;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::connections::{Direction, Guard, LiveConnection, PEER_REVOKED, Protocol};
use crate::decide::decide;
use crate::drain::DrainWatch;
use crate::hbone::headers::{Baggage, ReceivedHeaders};
use crate::hbone::{self, Request};
use crate::node::{Node, denial};
use crate::pods::Pod;
use crate::relay;
use crate::session::{self, Carrying, Ends};
use crate::telemetry::{self, ConnectionContext, Failure, OpenConnection, Reporter, ResponseFlag};
use crate::tls;

/// How long the streams of a pod that leaves the mesh may go on: until their own end.
const UNLIMITED: Duration = Duration::from_secs(365 * 24 * 60 * 60);

/// How long a tunnel connection may last when its peer was revoked and its streams have ended.
const GOODBYE: Duration = Duration::from_millis(500);

/// Serves one TCP connection to port 15008 of `pod`.
pub(super) async fn serve(
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    drain: DrainWatch,
) {
    let _open = node.telemetry.socket_opened(Reporter::Destination);
    let Ok(own) = tcp.local_addr() else { return };
    let failed = |error: &dyn std::fmt::Display| {
        node.telemetry.failed_early(Reporter::Destination, peer, own, error);
    };
    let local = match node.workload_of(&pod).await {
        Ok(local) => local,
        Err(error) => return failed(&error),
    };
    let certificate = match node.certificates.fetch(&local.identity()).await {
        Ok(certificate) => certificate,
        Err(error) => return failed(&format_args!("identity error: {error}")),
    };
    drop(local);
    // Not kept for as long as the tunnel lives.
    let accepting = Box::pin(tls::accept(tcp, &certificate, tls::HANDSHAKE_LIMIT));
    let (stream, identity) = match accepting.await {
        Ok(accepted) => accepted,
        Err(error) => {
            if error.is_revoked() {
                node.telemetry.crl_rejected(Reporter::Destination);
            }
            return failed(&format_args!("tls handshake with {peer} failed: {error}"));
        }
    };
    let watch = certificate.watch_client(&stream);
    if watch.is_untracked() {
        node.telemetry.crl_untracked(Reporter::Destination);
    }
    let revoked = CancellationToken::new();
    let tunnel = Arc::new(Tunnel {
        node: node.clone(),
        pod: pod.clone(),
        peer,
        addressed: own.ip().to_canonical(),
        identity,
        revoked: revoked.clone(),
    });
    let streams = drain.clone();
    let handler =
        move |request| session::carry(Box::pin(tunnel.clone().answer(request, streams.clone())));
    let leaving = leaving(&pod, drain, revoked.clone());
    let mut served = pin!(hbone::serve(stream, &node.tunnels, handler, leaving));
    tokio::select! {
        served = &mut served => match served {
            Err(error) if error.is_fault_of_peer() => failed(&error),
            Err(error) => tracing::debug!(%peer, %error, "tunnel ended"),
            Ok(()) => {}
        },
        () = pod.is_gone() => {}
        () = watch.revoked() => {
            node.telemetry.crl_rejected(Reporter::Destination);
            // Its streams end at once and tell why; then the peer is told, which must not take long.
            revoked.cancel();
            let _ = tokio::time::timeout(2 * GOODBYE, served).await;
            failed(&PEER_REVOKED);
        }
    }
}

/// When to tell the peer to go elsewhere; gives until when its streams may go on.
async fn leaving(pod: &Pod, mut drain: DrainWatch, revoked: CancellationToken) -> Instant {
    tokio::select! {
        () = revoked.cancelled() => Instant::now() + GOODBYE,
        deadline = drain.begun() => deadline,
        // Not as soon as it leaves: a peer that has not heard of it yet is about to send more streams
        // along, and not every peer sends again what crosses a farewell.
        () = pod.is_closed() => Instant::now() + UNLIMITED,
    }
}

/// One verified tunnel connection.
struct Tunnel {
    node: Arc<Node>,
    pod: Arc<Pod>,
    peer: SocketAddr,
    /// The pod's address that the peer dialled.
    addressed: IpAddr,
    identity: Identity,
    /// Cancelled when the peer's certificate was revoked.
    revoked: CancellationToken,
}

impl Tunnel {
    async fn answer(self: Arc<Self>, request: Request, drain: DrainWatch) -> Option<Carrying> {
        if self.revoked.is_cancelled() {
            return self.refuse(request, StatusCode::UNAUTHORIZED, &PEER_REVOKED);
        }
        if *request.method() != Method::CONNECT {
            let why = format!("method {} is not CONNECT", request.method());
            return self.refuse(request, StatusCode::BAD_REQUEST, &why);
        }
        let authority = match Authority::from_str(request.authority()) {
            Ok(authority) => authority,
            Err(error) => return self.refuse(request, StatusCode::BAD_REQUEST, &error),
        };
        let local = match self.node.workload_of(&self.pod).await {
            Ok(local) => local,
            Err(error) => return self.refuse(request, StatusCode::SERVICE_UNAVAILABLE, &error),
        };
        let headers = ReceivedHeaders::parse(request.headers());
        let inbound = Inbound {
            local: &local,
            addressed: self.addressed,
            peer: self.peer,
            identity: &self.identity,
            authority: &authority,
            forwarded_host: headers.forwarded_host.as_deref(),
            header_to: self.node.options.header_to,
        };
        match decide(&self.node, |view| admit::admit(view, &inbound)).await {
            Ok(mut admission) => {
                if !self.pod.keeps_clients {
                    admission.from = DialFrom::Own;
                }
                self.judge(request, &local, &authority, &headers, admission, drain).await
            }
            Err(refusal) => {
                let status = StatusCode::from_u16(refusal.status());
                let status = status.unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
                self.refuse(request, status, &refusal)
            }
        }
    }

    async fn judge(
        self: Arc<Self>,
        request: Request,
        local: &Arc<Workload>,
        authority: &Authority,
        headers: &ReceivedHeaders,
        admission: Admission,
        drain: DrainWatch,
    ) -> Option<Carrying> {
        let open = self.open(local, authority, headers, &admission);
        let guard = self.register(headers, local, &admission, &open);
        let permit = match self.node.authorize(local, &admission.connection) {
            Ok(permit) => permit,
            Err(denied) => return deny(request, open, &denied),
        };
        guard.entry().permitted(permit.by());
        let server = match session::deliver(&self.pod, &admission, permit).await {
            Ok(server) => server,
            Err(error) => {
                request.refuse(StatusCode::SERVICE_UNAVAILABLE, HeaderMap::new());
                let error = format!("connection failed: {error}");
                open.close(Err(Failure::new(ResponseFlag::Connect, error)));
                return None;
            }
        };
        let described = self.node.options.response_baggage.then(|| Baggage::of(local).to_string());
        let stream = match request.accept(described.as_deref()) {
            Ok(stream) => stream,
            Err(error) => {
                let error = error.to_string();
                open.close(Err(Failure::new(ResponseFlag::H2HandshakeFailure, error)));
                return None;
            }
        };
        let mut relay = relay::hbone_tcp(stream, server, open.counters());
        Some(Box::pin(async move {
            let ends = Ends::of(&guard, drain, &self.pod).in_tunnel(self.revoked.clone());
            let closing = pin!(ends.wait());
            let relayed = relay.run(closing).await;
            open.close(session::outcome(relayed));
        }))
    }

    fn open(
        &self,
        local: &Arc<Workload>,
        authority: &Authority,
        headers: &ReceivedHeaders,
        admission: &Admission,
    ) -> OpenConnection {
        let source = match headers.is_from_another_network(&self.node.network) {
            true => None,
            false => {
                let snapshot = self.node.mesh.snapshot();
                snapshot.workload_at(&self.node.network, self.peer.ip()).cloned()
            }
        };
        let baggage = match self.node.options.response_baggage {
            true => headers.baggage.as_ref(),
            false => None,
        };
        self.node.telemetry.open(ConnectionContext {
            reporter: Reporter::Destination,
            source,
            source_identity: Some(self.identity.clone()),
            baggage: baggage.map(described).map(Box::new),
            destination: Some(local.clone()),
            destination_identity: None,
            service: admission.service.clone(),
            src: self.peer,
            dst: SocketAddr::new(self.addressed, culvert_core::addr::HBONE_PORT),
            hbone_addr: Some(authority.clone()),
            mutual_tls: true,
        })
    }

    fn register(
        &self,
        headers: &ReceivedHeaders,
        local: &Workload,
        admission: &Admission,
        open: &OpenConnection,
    ) -> Guard {
        self.node.connections.register(LiveConnection {
            direction: Direction::Inbound,
            protocol: Protocol::Hbone,
            about: open.context().clone(),
            original_dst: headers.forwarded_host.clone(),
            actual_dst: admission.to.addr(),
            pod: self.pod.uid.clone(),
            workload: local.uid.clone(),
            connection: Some(admission.connection.clone()),
            counters: open.counters(),
        })
    }

    /// Refuses what never became a connection.
    fn refuse<T>(
        &self,
        request: Request,
        status: StatusCode,
        why: &dyn std::fmt::Display,
    ) -> Option<T> {
        let own = SocketAddr::new(self.addressed, culvert_core::addr::HBONE_PORT);
        self.node.telemetry.failed_early(Reporter::Destination, self.peer, own, why);
        request.refuse(status, HeaderMap::new());
        None
    }
}

fn deny<T>(request: Request, open: OpenConnection, denied: &Denied) -> Option<T> {
    request.refuse(StatusCode::UNAUTHORIZED, session::denied_headers(denied));
    let error = format!("connection closed due to policy rejection: {denied}");
    open.close(Err(Failure::denied(error, denial(denied))));
    None
}

/// What a peer says of its workload, as telemetry names it.
fn described(baggage: &Baggage) -> telemetry::Baggage {
    let text = |value: &Option<String>| value.as_deref().map(Arc::from);
    telemetry::Baggage {
        cluster_id: text(&baggage.cluster),
        namespace: text(&baggage.namespace),
        workload_name: baggage.owner.as_ref().map(|owner| owner.name.as_str().into()),
        canonical_name: text(&baggage.service_name),
        canonical_revision: text(&baggage.service_version),
        region: text(&baggage.region),
        zone: text(&baggage.zone),
    }
}
