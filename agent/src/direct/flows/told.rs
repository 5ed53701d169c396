//! Who is at the ends of a direct connection.

use std::sync::Arc;

use culvert_core::addr::{Authority, OriginalDst};
use culvert_core::admit::{self, Admission, HeaderTo, Inbound};
use culvert_core::authorization::Connection;
use culvert_core::resolve::{self, Destination};
use culvert_core::service::Service;
use culvert_core::view::{Answers, Step, View};
use culvert_core::workload::Workload;

use crate::capture::direct::{Arrival, DirectFlow};
use crate::connections::{Direction, Guard, LiveConnection, Protocol};
use crate::direct::{Direct, LocalPod};
use crate::node::Node;
use crate::telemetry::{ConnectionContext, OpenConnection, Reporter};

/// The ends of a connection, as they are told of.
pub(super) struct Told {
    source: (LocalPod, Arc<Workload>),
    pub destination: (LocalPod, Arc<Workload>),
    /// The service that the application connected to.
    addressed: Option<Arc<Service>>,
    /// The service that the destination takes it to be for.
    service: Option<Arc<Service>>,
    pub connection: Connection,
    /// The agent has it in the destination's place, and tells of it there.
    pub handed: bool,
}

impl Told {
    /// `None` if nobody knows any more.
    pub fn of(direct: &Direct, node: &Node, flow: &DirectFlow) -> Option<Self> {
        let pods = node.mesh.pods();
        let snapshot = node.mesh.snapshot();
        let find = |cookie| {
            let (pod, uid) = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie)?;
            let workload = snapshot.workload(uid.as_deref()?)?.clone();
            Some((LocalPod { uid: pod.uid.clone(), netns: cookie }, workload))
        };
        let handed = flow.arrival == Some(Arrival::Retracted);
        if let Some(grant) = direct.verdict(flow.verdict) {
            grant.touch(flow.connected_at);
            let backends = grant.verdict.backends.iter().zip(&grant.pods);
            let mut backends = backends.filter(|(backend, pod)| {
                pod.netns == flow.destination && backend.to() == flow.server
            });
            if let Some((backend, pod)) = backends.next() {
                let Admission { connection, service, .. } = backend.admission.clone();
                return Some(Told {
                    source: (grant.source_pod.clone(), grant.source.clone()),
                    destination: (pod.clone(), backend.workload.clone()),
                    addressed: grant.verdict.service.clone(),
                    service,
                    connection,
                    handed,
                });
            }
        }
        // A verdict of an earlier agent.
        let (source, destination) = (find(flow.source)?, find(flow.destination)?);
        let original = OriginalDst::new(flow.original);
        let namespace = Some(&*source.1.namespace);
        let (network, ip) = (&*node.network, original.ip());
        let addressed = match resolve::upstream_at(&snapshot, network, ip, namespace) {
            Destination::Service(service) => Some(service.clone()),
            Destination::Workload(_) | Destination::Unknown => None,
        };
        let (identity, authority) = (source.1.identity(), Authority::Addr(flow.server));
        let inbound = Inbound {
            local: &destination.1,
            addressed: flow.server.ip(),
            peer: flow.client,
            identity: &identity,
            authority: &authority,
            forwarded_host: addressed.as_ref().map(|service| &*service.hostname),
            header_to: HeaderTo::Address,
        };
        let (enrolled, answers) = (node.mesh.enrolled(), Answers::default());
        let view = View {
            snapshot: &snapshot,
            network: &node.network,
            node: &node.name,
            enrolled: &enrolled,
            answers: &answers,
            coverage: direct.coverage(),
        };
        let Step::Done(Ok(admission)) = admit::admit(&view, &inbound) else { return None };
        let Admission { connection, service, .. } = admission;
        Some(Told { source, destination, addressed, service, connection, handed })
    }

    /// Counts it as opened, at one end.
    pub fn open(&self, node: &Node, flow: &DirectFlow, reporter: Reporter) -> OpenConnection {
        let service = match reporter {
            Reporter::Source => &self.addressed,
            Reporter::Destination => &self.service,
        };
        node.telemetry.open(ConnectionContext {
            reporter,
            source: Some(self.source.1.clone()),
            source_identity: Some(self.source.1.identity()),
            baggage: None,
            destination: Some(self.destination.1.clone()),
            destination_identity: Some(self.destination.1.identity()),
            service: service.clone(),
            src: flow.client,
            dst: flow.server,
            hbone_addr: None,
            mutual_tls: true,
        })
    }

    /// Adds it to the live connections, at one end.
    pub fn register(
        &self,
        node: &Node,
        flow: &DirectFlow,
        reporter: Reporter,
        open: &OpenConnection,
    ) -> Guard {
        let (direction, end, connection) = match reporter {
            Reporter::Source => (Direction::Outbound, &self.source, None),
            Reporter::Destination => {
                (Direction::Inbound, &self.destination, Some(&self.connection))
            }
        };
        node.connections.register(LiveConnection {
            direction,
            protocol: Protocol::Direct,
            about: open.context().clone(),
            original_dst: Some(flow.original.to_string()),
            actual_dst: flow.server,
            pod: end.0.uid.clone(),
            workload: end.1.uid.clone(),
            connection: connection.cloned(),
            counters: open.counters(),
        })
    }
}
