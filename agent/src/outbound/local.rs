//! Connections between two pods of this node: judged as the destination's, never on a wire.
//!
//! Both identities are proven by the kernel: each socket's network namespace is an enrolled pod's. So
//! the bytes go from socket to socket, and both ends tell of the connection as of a tunnelled one.

use std::pin::pin;
use std::sync::Arc;

use culvert_core::addr::{AppAddr, Authority};
use culvert_core::admit::{self, Admission, Inbound, Refusal};
use culvert_core::authorize::Denied;
use culvert_core::identity::Identity;
use culvert_core::workload::Workload;
use tokio::net::TcpStream;

use super::Captured;
use crate::accept::reset;
use crate::ca::CaError;
use crate::connections::{CloseReason, Direction, Guard, LiveConnection, Protocol};
use crate::decide::decide;
use crate::node::{Node, denial};
use crate::pods::Pod;
use crate::relay;
use crate::session::{self, Both, Ends};
use crate::telemetry::{ConnectionContext, Failure, OpenConnection, Reporter, ResponseFlag};

pub(super) async fn carry(
    captured: Captured,
    to: AppAddr,
    destination: Arc<Workload>,
    pod: Arc<Pod>,
) {
    let flow = Flow { captured, to, destination };
    let identities = (flow.captured.source.identity(), flow.destination.identity());
    let source = flow.open_source(&identities);
    let guard = flow.register_source(&source);
    // What opening needs is not kept for as long as the connection lives.
    let admission = match Box::pin(flow.admit(&identities)).await {
        Ok(admission) => admission,
        Err(error) => return refuse(flow.captured.tcp, source, error.into()),
    };
    let inbound = flow.open_destination(&identities, &admission);
    let inbound_guard = flow.register_destination(&pod, &admission, &inbound);
    let node = &flow.captured.node;
    let permit = match node.authorize(&flow.destination, &admission.connection) {
        Ok(permit) => permit,
        Err(denied) => return deny(flow.captured.tcp, source, inbound, &denied),
    };
    inbound_guard.entry().permitted(permit.by());
    let server = match session::deliver(&pod, &admission, permit).await {
        Ok(server) => server,
        Err(error) => {
            let error = format!("connection failed: {error}");
            inbound.close(Err(Failure::new(ResponseFlag::Connect, error.clone())));
            return refuse(flow.captured.tcp, source, Failure::new(ResponseFlag::Connect, error));
        }
    };
    if let Some(direct) = &node.direct {
        direct.offer(&flow.captured.pod, flow.captured.original);
    }
    let Captured { tcp, drain, pod: own, _open, .. } = flow.captured;
    let (leaving, arriving) =
        (Ends::of(&guard, drain.clone(), &own), Ends::of(&inbound_guard, drain, &pod));
    let closing = pin!(either(leaving, arriving));
    let (ours, theirs) = (source.counters(), inbound.counters());
    let relayed = relay::tcp_tcp(tcp, server, &Both(&ours, &theirs), closing).await;
    let outcome = session::outcome(relayed);
    source.close(outcome.clone().map_err(session::as_source));
    inbound.close(outcome);
}

async fn either(leaving: Ends<'_>, arriving: Ends<'_>) -> CloseReason {
    tokio::select! {
        reason = leaving.wait() => reason,
        reason = arriving.wait() => reason,
    }
}

struct Flow {
    captured: Captured,
    to: AppAddr,
    destination: Arc<Workload>,
}

impl Flow {
    /// What has to hold before the destination's policies are asked.
    async fn admit(
        &self,
        (source, destination): &(Identity, Identity),
    ) -> Result<Admission, NotAdmitted> {
        let node: &Node = &self.captured.node;
        // No wire, and still no traffic without valid certificates: a pod whose identity can no
        // longer be proven elsewhere has none here.
        for identity in [source, destination] {
            node.certificates.fetch(identity).await.map_err(NotAdmitted::Identity)?;
        }
        let authority = Authority::Addr(self.to.addr());
        let hostname = self.captured.service.as_ref().map(|service| service.hostname.clone());
        let request = Inbound {
            local: &self.destination,
            addressed: self.to.ip(),
            peer: self.captured.client.addr(),
            identity: source,
            authority: &authority,
            forwarded_host: hostname.as_deref(),
            header_to: node.options.header_to,
        };
        Ok(decide(node, |view| admit::admit(view, &request)).await?)
    }

    fn open_source(&self, (identity, destination): &(Identity, Identity)) -> OpenConnection {
        self.captured.node.telemetry.open(ConnectionContext {
            reporter: Reporter::Source,
            source: Some(self.captured.source.clone()),
            source_identity: Some(identity.clone()),
            baggage: None,
            destination: Some(self.destination.clone()),
            destination_identity: Some(destination.clone()),
            service: self.captured.service.clone(),
            src: self.captured.client.addr(),
            dst: self.to.addr(),
            hbone_addr: None,
            mutual_tls: true,
        })
    }

    fn open_destination(
        &self,
        (identity, destination): &(Identity, Identity),
        admission: &Admission,
    ) -> OpenConnection {
        self.captured.node.telemetry.open(ConnectionContext {
            reporter: Reporter::Destination,
            source: Some(self.captured.source.clone()),
            source_identity: Some(identity.clone()),
            baggage: None,
            destination: Some(self.destination.clone()),
            destination_identity: Some(destination.clone()),
            service: admission.service.clone(),
            src: self.captured.client.addr(),
            dst: self.to.addr(),
            hbone_addr: None,
            mutual_tls: true,
        })
    }

    fn register_source(&self, open: &OpenConnection) -> Guard {
        let pod = &self.captured.pod;
        self.captured.node.connections.register(LiveConnection {
            direction: Direction::Outbound,
            protocol: Protocol::Local,
            about: open.context().clone(),
            original_dst: Some(self.captured.original.to_string()),
            actual_dst: self.to.addr(),
            pod: pod.uid.clone(),
            workload: self.captured.source.uid.clone(),
            connection: None,
            counters: open.counters(),
        })
    }

    fn register_destination(
        &self,
        pod: &Pod,
        admission: &Admission,
        open: &OpenConnection,
    ) -> Guard {
        self.captured.node.connections.register(LiveConnection {
            direction: Direction::Inbound,
            protocol: Protocol::Local,
            about: open.context().clone(),
            original_dst: Some(self.captured.original.to_string()),
            actual_dst: admission.to.addr(),
            pod: pod.uid.clone(),
            workload: self.destination.uid.clone(),
            connection: Some(admission.connection.clone()),
            counters: open.counters(),
        })
    }
}

/// Why a connection to a pod of this node does not get as far as its policies.
#[derive(Debug, thiserror::Error)]
enum NotAdmitted {
    #[error("identity error: {0}")]
    Identity(Arc<CaError>),
    #[error(transparent)]
    Refused(#[from] Refusal),
}

impl From<NotAdmitted> for Failure {
    fn from(error: NotAdmitted) -> Failure {
        let flag = match error {
            NotAdmitted::Identity(_) => ResponseFlag::IdentityError,
            NotAdmitted::Refused(_) => ResponseFlag::Connect,
        };
        Failure::new(flag, error.to_string())
    }
}

fn refuse(tcp: TcpStream, open: OpenConnection, failure: Failure) {
    reset(tcp);
    open.close(Err(failure));
}

fn deny(tcp: TcpStream, source: OpenConnection, inbound: OpenConnection, denied: &Denied) {
    let error = format!("connection closed due to policy rejection: {denied}");
    inbound.close(Err(Failure::denied(error.clone(), denial(denied))));
    refuse(tcp, source, Failure::new(ResponseFlag::Connect, error));
}
