//! Connections that leave through HBONE: to a workload, a waypoint or a network gateway.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;

use culvert_core::addr::HboneAddr;
use culvert_core::identity::Identity;
use culvert_core::route::Tunnel;
use culvert_core::workload::Workload;
use futures_util::future::BoxFuture;
use http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;

use super::Captured;
use crate::accept::tune;
use crate::ca::CaError;
use crate::connections::{Direction, LiveConnection, PEER_REVOKED, Protocol};
use crate::dial;
use crate::hbone::client::{Accepted, RequestError};
use crate::hbone::headers::{Baggage, ConnectHeaders, Forwarded, TraceParent};
use crate::hbone::pool::ConnectError;
use crate::hbone::{Dialled, First, HboneStream, PoolKey};
use crate::node::Node;
use crate::pods::Pod;
use crate::relay::{self, RelayError, Tcp};
use crate::session::{self, Carrying, DENIED_BY, Ends};
use crate::telemetry::{ConnectionContext, Failure, Reporter, ResponseFlag};
use crate::tls::{self, TlsError, TlsStream, WorkloadCertificate};

/// Opens the tunnel; what is given carries the connection.
pub(super) async fn open(
    captured: Captured,
    tunnel: Tunnel,
    next_hop: Arc<Workload>,
) -> Option<Carrying> {
    let Captured { node, pod, tcp, client, original, source, service, drain, _open } = captured;
    let identity = source.identity();
    let hostname = service.as_ref().map(|service| service.hostname.clone());
    let open = node.telemetry.open(ConnectionContext {
        reporter: Reporter::Source,
        source: Some(source.clone()),
        source_identity: Some(identity.clone()),
        baggage: None,
        destination: Some(next_hop),
        destination_identity: None,
        service,
        src: client.addr(),
        dst: tunnel.via.addr(),
        hbone_addr: Some(tunnel.authority.clone()),
        mutual_tls: true,
    });
    let guard = node.connections.register(LiveConnection {
        direction: Direction::Outbound,
        protocol: match tunnel.inner {
            Some(_) => Protocol::DoubleHbone,
            None => Protocol::Hbone,
        },
        about: open.context().clone(),
        original_dst: Some(original.to_string()),
        actual_dst: tunnel.via.addr(),
        pod: pod.uid.clone(),
        workload: source.uid.clone(),
        connection: None,
        counters: open.counters(),
    });
    let caller = Caller {
        node: &node,
        pod: &pod,
        source: &source,
        identity,
        client: client.addr(),
        hostname,
    };
    // Without a tunnel it ends with a reset.
    let tcp = Tcp::accepted(tcp);
    let mut first = First::of(&tcp);
    let Opened { stream, cut_off } = match caller.open(&tunnel, &mut first).await {
        Ok(opened) => opened,
        Err(TunnelError::Client(error)) => {
            open.close(session::outcome(Err(RelayError::Client(error))));
            return None;
        }
        Err(error) => {
            open.close(Err(error.into()));
            return None;
        }
    };
    open.counters().add_received(first.count());
    drop(first);
    let mut relay = relay::tcp_hbone(tcp, stream, open.counters());
    Some(Box::pin(async move {
        let _open = _open;
        let ends = Ends::of(&guard, drain, &pod).in_tunnel(cut_off);
        let closing = pin!(ends.wait());
        let relayed = relay.run(closing).await;
        open.close(session::outcome(relayed));
    }))
}

/// Who opens a tunnel, and for what.
struct Caller<'a> {
    node: &'a Arc<Node>,
    pod: &'a Arc<Pod>,
    source: &'a Workload,
    identity: Identity,
    client: SocketAddr,
    hostname: Option<Arc<str>>,
}

/// A stream to the destination.
struct Opened {
    stream: HboneStream,
    /// Cancelled when a peer of the tunnel, or of the one around it, is revoked.
    cut_off: CancellationToken,
}

impl Caller<'_> {
    /// With `first` goes what the application sends meanwhile.
    async fn open(&self, tunnel: &Tunnel, first: &mut First<'_>) -> Result<Opened, TunnelError> {
        // Even with a tunnel at hand, a pod without a valid certificate sends nothing.
        let certificate = self.node.certificates.fetch(&self.identity).await;
        let certificate = certificate.map_err(TunnelError::Identity)?;
        let key = PoolKey {
            source: self.identity.clone(),
            expect: tunnel.expect.clone(),
            next_hop: tunnel.via,
            source_ip: self.client.ip(),
        };
        let headers = self.headers(tunnel, None);
        // Most find a tunnel that is there.
        let dial = || Box::pin(self.dial(tunnel.via, &tunnel.expect, &certificate));
        let Some(inner) = &tunnel.inner else {
            let accepted = self.pod.pool.connect_sending(first, &key, &headers, dial).await?;
            return Ok(Opened { stream: accepted.stream, cut_off: accepted.cut_off });
        };
        let outer = self.pod.pool.connect(&key, &headers, dial).await?;
        Box::pin(self.open_inner(inner, outer, &certificate, first)).await
    }

    /// One TLS and HTTP/2 connection per user connection, within the byte stream of the outer one:
    /// the far end balances load by connection.
    async fn open_inner(
        &self,
        tunnel: &Tunnel,
        outer: Accepted,
        certificate: &WorkloadCertificate,
        first: &mut First<'_>,
    ) -> Result<Opened, TunnelError> {
        let secured = self.secure(outer.stream, &tunnel.expect, certificate).await?;
        let revoked = self.revoked(certificate, &secured);
        let outer_cut_off = outer.cut_off;
        let cut_off = async move {
            tokio::select! {
                () = revoked => {}
                () = outer_cut_off.cancelled() => {}
            }
        };
        let settings = &self.node.tunnels;
        let (connection, driver) = crate::hbone::client::handshake(secured, settings);
        tokio::spawn(driver.run(cut_off));
        let network = self.node.network.clone();
        let request = self.headers(tunnel, Some(network)).request();
        let request = request.map_err(|error| TunnelError::Tunnel(error.to_string()))?;
        let Accepted { stream, cut_off, .. } = connection.connect(request, first).await?;
        Ok(Opened { stream, cut_off })
    }

    async fn secure<S>(
        &self,
        stream: S,
        expect: &[Identity],
        certificate: &WorkloadCertificate,
    ) -> Result<TlsStream<S>, DialError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let secured = tls::connect(stream, certificate, expect, tls::HANDSHAKE_LIMIT).await;
        secured.map_err(|error| {
            if error.is_revoked() {
                self.node.telemetry.crl_rejected(Reporter::Source);
            }
            DialError::Tls(error)
        })
    }

    /// Ready when the server of the connection is revoked.
    fn revoked<S>(
        &self,
        certificate: &WorkloadCertificate,
        stream: &TlsStream<S>,
    ) -> BoxFuture<'static, ()> {
        let (watch, telemetry) = (certificate.watch_server(stream), self.node.telemetry.clone());
        if watch.is_untracked() {
            telemetry.crl_untracked(Reporter::Source);
        }
        Box::pin(async move {
            watch.revoked().await;
            telemetry.crl_rejected(Reporter::Source);
        })
    }

    fn headers(&self, tunnel: &Tunnel, network: Option<Arc<str>>) -> ConnectHeaders {
        ConnectHeaders {
            authority: tunnel.authority.clone(),
            baggage: Baggage::of(self.source),
            forwarded: Forwarded { client: self.client, host: self.hostname.clone() },
            traceparent: TraceParent::random(&mut rand::rng()),
            x_forwarded_network: network,
        }
    }

    async fn dial(
        &self,
        via: HboneAddr,
        expect: &[Identity],
        certificate: &WorkloadCertificate,
    ) -> Result<Dialled<TlsStream>, DialError> {
        // Waypoints judge by the source address: it is the client's where the families agree.
        // A guest of the pod, behind an interface of its own, has an address that is not the pod's.
        let is_own = |ip: &IpAddr| self.source.addresses.contains(ip);
        let source = Some(self.client.ip());
        let source = source.filter(|ip| ip.is_ipv4() == via.ip().is_ipv4() && is_own(ip));
        let (netns, capture) = (&self.pod.netns, &self.node.capture);
        let tcp = dial::dial_out(netns, capture, source, via.addr()).await;
        let tcp = tcp.map_err(DialError::Tcp)?;
        tune(&tcp, self.node.keepalive);
        let io = self.secure(tcp, expect, certificate).await?;
        let cut_off = self.revoked(certificate, &io);
        Ok(Dialled { io, cut_off })
    }
}

/// Why there is no connection to the next hop.
#[derive(Debug, thiserror::Error)]
enum DialError {
    #[error("{0}")]
    Tcp(io::Error),
    #[error("{0}")]
    Tls(TlsError),
}

/// Why a connection does not get its tunnel.
#[derive(Debug, thiserror::Error)]
enum TunnelError {
    #[error("identity error: {0}")]
    Identity(Arc<CaError>),
    #[error("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008: {0}")]
    TimedOut(io::Error),
    #[error("io error: {0}")]
    Io(#[from] DialError),
    #[error("tls error: {0}")]
    TlsSetUp(TlsError),
    #[error("{}", PEER_REVOKED)]
    PeerRevoked,
    #[error("http status: {status}{reason}")]
    Status { status: StatusCode, reason: String },
    #[error("{0}")]
    Tunnel(String),
    /// The application's connection failed meanwhile.
    #[error("{0}")]
    Client(io::Error),
}

impl From<ConnectError<DialError>> for TunnelError {
    fn from(error: ConnectError<DialError>) -> Self {
        match error {
            ConnectError::Dial(DialError::Tcp(error))
                if error.kind() == io::ErrorKind::TimedOut =>
            {
                TunnelError::TimedOut(error)
            }
            ConnectError::Dial(DialError::Tls(error @ TlsError::Own { .. })) => {
                TunnelError::TlsSetUp(error)
            }
            ConnectError::Dial(error) => TunnelError::Io(error),
            ConnectError::Request(error) => error.into(),
            error @ (ConnectError::Invalid(_) | ConnectError::Closed) => {
                TunnelError::Tunnel(error.to_string())
            }
        }
    }
}

impl From<RequestError> for TunnelError {
    fn from(error: RequestError) -> Self {
        match error {
            RequestError::Refused { status, headers } => {
                let told = headers.get(DENIED_BY).and_then(|reason| reason.to_str().ok());
                let reason = told.map_or(String::new(), |told| {
                    format!(", {}", told.chars().take(256).collect::<String>())
                });
                TunnelError::Status { status, reason }
            }
            RequestError::CutOff => TunnelError::PeerRevoked,
            RequestError::Source(error) => TunnelError::Client(error),
            error @ (RequestError::Unprocessed(_) | RequestError::Failed(_)) => {
                TunnelError::Tunnel(error.to_string())
            }
        }
    }
}

impl From<TunnelError> for Failure {
    fn from(error: TunnelError) -> Failure {
        let flag = match &error {
            TunnelError::Identity(_) => ResponseFlag::IdentityError,
            TunnelError::TimedOut(_) => ResponseFlag::NetworkPolicy,
            TunnelError::TlsSetUp(_) => ResponseFlag::TlsFailure,
            TunnelError::Tunnel(_) => ResponseFlag::H2HandshakeFailure,
            TunnelError::PeerRevoked => ResponseFlag::CertRevoked,
            TunnelError::Io(_) | TunnelError::Status { .. } | TunnelError::Client(_) => {
                ResponseFlag::Connect
            }
        };
        Failure::new(flag, error.to_string())
    }
}
