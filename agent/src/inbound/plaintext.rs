//! Inbound connections without a tunnel: the same policies, and no identity but of those that the
//! kernel vouches for.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;

use culvert_core::addr::Authority;
use culvert_core::admit::{self, Admission, Inbound, Refusal};
use culvert_core::workload::Workload;
use tokio::net::TcpStream;

use crate::accept::reset;
use crate::ca::CaError;
use crate::capture::{CaptureError, plaintext_dst};
use crate::connections::{Direction, LiveConnection, Protocol};
use crate::decide::decide;
use crate::drain::DrainWatch;
use crate::node::{Node, denial};
use crate::pods::Pod;
use crate::relay;
use crate::session::{self, Ends};
use crate::telemetry::{ConnectionContext, Failure, Reporter, ResponseFlag};

/// Who a connection is from.
#[derive(Clone, Copy)]
pub(super) enum From {
    /// Nobody known.
    Anyone,
    /// A pod of this node: a direct connection whose verdict was taken back under way.
    Neighbour,
}

pub(super) async fn carry(
    node: &Node,
    pod: &Arc<Pod>,
    tcp: TcpStream,
    (from, peer): (From, SocketAddr),
    drain: DrainWatch,
) {
    let _open = node.telemetry.socket_opened(Reporter::Destination);
    let addressed = match plaintext_dst(&tcp) {
        Ok(addressed) => addressed,
        Err(_gone) => return reset(tcp),
    };
    let failed = |tcp, error: &dyn std::fmt::Display| {
        node.telemetry.failed_early(Reporter::Destination, peer, addressed, error);
        reset(tcp);
    };
    let local = match node.workload_of(pod).await {
        Ok(local) => local,
        Err(error) => return failed(tcp, &error),
    };
    let arrival = Arrival { node, pod, peer, local, drain };
    let admitted = match from {
        From::Anyone => {
            admit::admit_plaintext(&node.mesh.snapshot(), &arrival.local, addressed, peer)
                .map(|admission| (None, admission))
                .map_err(NotAdmitted::from)
        }
        // Few come this way: it takes no room in the others' tasks.
        From::Neighbour => Box::pin(arrival.admit_direct(addressed)).await,
    };
    match admitted {
        Ok((source, admission)) => arrival.judge(tcp, source, admission).await,
        Err(error) => failed(tcp, &error),
    }
}

/// A connection that has arrived.
struct Arrival<'a> {
    node: &'a Node,
    pod: &'a Arc<Pod>,
    peer: SocketAddr,
    local: Arc<Workload>,
    drain: DrainWatch,
}

/// Why a connection goes no further.
#[derive(Debug, thiserror::Error)]
enum NotAdmitted {
    #[error("cannot tell which pod it comes from: {0}")]
    Unknown(#[from] CaptureError),
    #[error("its client has closed it before it was known which pod it comes from")]
    Closed,
    #[error("the pod it comes from is not enrolled any more")]
    Stranger,
    #[error("identity error: {0}")]
    Identity(Arc<CaError>),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl Arrival<'_> {
    /// A direct connection whose verdict was taken back meanwhile: who it comes from is proven, and it
    /// is judged as one that went through the agent all the way.
    async fn admit_direct(
        &self,
        addressed: SocketAddr,
    ) -> Result<(Option<Arc<Workload>>, Admission), NotAdmitted> {
        let node = self.node;
        let direct = node.direct.as_ref().ok_or(NotAdmitted::Stranger)?;
        let flow = direct.retracted(self.peer, addressed)?.ok_or(NotAdmitted::Closed)?;
        let pods = node.mesh.pods();
        let source = pods.iter().find(|(pod, _)| pod.netns.cookie() == flow.source);
        let source = source
            .and_then(|(_, uid)| Some(node.mesh.snapshot().workload(uid.as_deref()?)?.clone()));
        let source = source.ok_or(NotAdmitted::Stranger)?;
        let identity = source.identity();
        for identity in [&identity, &self.local.identity()] {
            node.certificates.fetch(identity).await.map_err(NotAdmitted::Identity)?;
        }
        let authority = Authority::Addr(flow.server);
        let inbound = Inbound {
            local: &self.local,
            addressed: flow.server.ip(),
            peer: self.peer,
            identity: &identity,
            authority: &authority,
            forwarded_host: None,
            header_to: node.options.header_to,
        };
        let admission = decide(node, |view| admit::admit(view, &inbound)).await?;
        Ok((Some(source), admission))
    }

    /// `proven` is the source, where the kernel vouches for it.
    async fn judge(self, tcp: TcpStream, proven: Option<Arc<Workload>>, admission: Admission) {
        let Arrival { node, pod, peer, local, drain } = self;
        let to = admission.to.addr();
        let identities = proven.as_ref().map(|source| (source.identity(), local.identity()));
        let (source_identity, destination_identity) = identities.unzip();
        let snapshot = node.mesh.snapshot();
        let open = node.telemetry.open(ConnectionContext {
            reporter: Reporter::Destination,
            source: proven.or_else(|| snapshot.workload_at(&node.network, peer.ip()).cloned()),
            mutual_tls: source_identity.is_some(),
            source_identity,
            baggage: None,
            destination: Some(local.clone()),
            destination_identity,
            service: admission.service.clone(),
            src: peer,
            dst: to,
            hbone_addr: None,
        });
        drop(snapshot);
        let guard = node.connections.register(LiveConnection {
            direction: Direction::Inbound,
            protocol: Protocol::Tcp,
            about: open.context().clone(),
            original_dst: None,
            actual_dst: to,
            pod: pod.uid.clone(),
            workload: local.uid.clone(),
            connection: Some(admission.connection.clone()),
            counters: open.counters(),
        });
        let permit = match node.authorize(&local, &admission.connection) {
            Ok(permit) => permit,
            Err(denied) => {
                reset(tcp);
                let error = format!("connection closed due to policy rejection: {denied}");
                return open.close(Err(Failure::denied(error, denial(&denied))));
            }
        };
        guard.entry().permitted(permit.by());
        let server = match session::deliver(pod, &admission, permit).await {
            Ok(server) => server,
            Err(error) => {
                reset(tcp);
                let error = format!("connection failed: {error}");
                return open.close(Err(Failure::new(ResponseFlag::Connect, error)));
            }
        };
        let ends = Ends::of(&guard, drain, pod);
        let closing = pin!(ends.wait());
        let counters = open.counters();
        let relayed = relay::tcp_tcp(tcp, server, &*counters, closing).await;
        open.close(session::outcome(relayed));
    }
}
