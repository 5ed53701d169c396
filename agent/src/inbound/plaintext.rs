//! Inbound connections without a tunnel: no identity, the same policies.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_core::admit::{self, Admission};
use culvert_core::workload::Workload;
use tokio::net::TcpStream;

use crate::accept::{reset, tune};
use crate::capture::plaintext_dst;
use crate::connections::{Direction, LiveConnection, Protocol};
use crate::drain::DrainWatch;
use crate::node::{Node, denial};
use crate::pods::Pod;
use crate::relay;
use crate::session::{self, Ends};
use crate::telemetry::{ConnectionContext, Failure, Reporter, ResponseFlag};

pub(super) async fn carry(
    node: &Node,
    pod: &Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    drain: DrainWatch,
) {
    let _open = node.telemetry.socket_opened(Reporter::Destination);
    tune(&tcp, node.keepalive);
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
    match admit::admit_plaintext(&node.mesh.snapshot(), &local, addressed, peer) {
        Ok(admission) => judge(node, pod, tcp, peer, &local, admission, drain).await,
        Err(refusal) => failed(tcp, &refusal),
    }
}

async fn judge(
    node: &Node,
    pod: &Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    local: &Arc<Workload>,
    admission: Admission,
    drain: DrainWatch,
) {
    let to = admission.to.addr();
    let snapshot = node.mesh.snapshot();
    let open = node.telemetry.open(ConnectionContext {
        reporter: Reporter::Destination,
        source: snapshot.workload_at(&node.network, peer.ip()).cloned(),
        source_identity: None,
        baggage: None,
        destination: Some(local.clone()),
        destination_identity: None,
        service: admission.service.clone(),
        src: peer,
        dst: to,
        hbone_addr: None,
        mutual_tls: false,
    });
    drop(snapshot);
    let guard = node.connections.register(LiveConnection {
        direction: Direction::Inbound,
        protocol: Protocol::Tcp,
        src: peer,
        original_dst: None,
        actual_dst: to,
        pod: pod.uid.clone(),
        workload: local.uid.clone(),
        connection: Some(admission.connection.clone()),
        source_identity: None,
        destination_identity: None,
        service: admission.service.as_ref().map(|service| service.hostname.clone()),
        counters: open.counters(),
    });
    let permit = match node.authorize(local, &admission.connection) {
        Ok(permit) => permit,
        Err(denied) => {
            reset(tcp);
            let error = format!("connection closed due to policy rejection: {denied}");
            return open.close(Err(Failure::denied(error, denial(&denied))));
        }
    };
    guard.entry().permitted(permit.to_string());
    let server = match session::deliver(pod, &admission, permit).await {
        Ok(server) => server,
        Err(error) => {
            reset(tcp);
            let error = format!("connection failed: {error}");
            return open.close(Err(Failure::new(ResponseFlag::Connect, error)));
        }
    };
    let closing = Ends::of(&guard, drain, pod);
    let counters = open.counters();
    let relayed = relay::tcp_tcp(tcp, server, &*counters, closing.wait()).await;
    open.close(session::outcome(relayed));
}
