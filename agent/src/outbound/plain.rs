//! Connections that leave without a tunnel: to what the mesh does not manage, or has no tunnel.

use std::pin::pin;
use std::sync::Arc;

use culvert_core::addr::AppAddr;
use culvert_core::workload::Workload;

use super::Captured;
use crate::accept::{reset, tune};
use crate::connections::{Direction, LiveConnection, Protocol};
use crate::dial;
use crate::relay;
use crate::session::{self, Ends};
use crate::telemetry::{ConnectionContext, Failure, Reporter, ResponseFlag};

pub(super) async fn carry(captured: Captured, to: AppAddr, workload: Option<Arc<Workload>>) {
    let Captured { node, pod, tcp, client, original, source, service, drain, _open } = captured;
    let open = node.telemetry.open(ConnectionContext {
        reporter: Reporter::Source,
        source: Some(source.clone()),
        source_identity: None,
        baggage: None,
        destination: workload,
        destination_identity: None,
        service,
        src: client.addr(),
        dst: to.addr(),
        hbone_addr: None,
        mutual_tls: false,
    });
    let guard = node.connections.register(LiveConnection {
        direction: Direction::Outbound,
        protocol: Protocol::Tcp,
        about: open.context().clone(),
        original_dst: Some(original.to_string()),
        actual_dst: to.addr(),
        pod: pod.uid.clone(),
        workload: source.uid.clone(),
        connection: None,
        counters: open.counters(),
    });
    let server = match dial::dial_out(&pod.netns, &node.capture, None, to.addr()).await {
        Ok(server) => {
            tune(&server, node.keepalive);
            server
        }
        Err(error) => {
            reset(tcp);
            let error = format!("connection failed: {error}");
            return open.close(Err(Failure::new(ResponseFlag::Connect, error)));
        }
    };
    let ends = Ends::of(&guard, drain, &pod);
    let closing = pin!(ends.wait());
    let counters = open.counters();
    let relayed = relay::tcp_tcp(tcp, server, &*counters, closing).await;
    open.close(session::outcome(relayed));
}
