//! The live direct connections: told of when the kernel tells of them, judged again, and ended.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::addr::{Authority, OriginalDst};
use culvert_core::admit::{self, Admission, HeaderTo, Inbound};
use culvert_core::authorization::Connection;
use culvert_core::resolve::{self, Destination};
use culvert_core::service::Service;
use culvert_core::tables::NetnsCookie;
use culvert_core::view::{Answers, Step, View};
use culvert_core::workload::Workload;
use tokio::sync::oneshot;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use super::{Direct, LocalPod};
use crate::capture::Netns;
use crate::capture::direct::{self, DirectFlow, Ended, FlowEvent, SocketCookie, TcpFacts};
use crate::connections::{CloseReason, Direction, Guard, LiveConnection, Protocol};
use crate::node::{Node, denial};
use crate::session;
use crate::telemetry::{
    ConnectionContext, Failure, OpenConnection, Reporter, ResponseFlag, TransportFacts,
};

/// How long to wait for the kernel to tell how a connection ended that was ended on our word.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often live connections are compared with the kernel's list, in case an event was lost.
const COMPARE: Duration = Duration::from_secs(10);

/// Follows all direct connections for as long as it is polled.
pub(super) async fn follow(direct: Direct, node: Arc<Node>) {
    let Some(mut events) = node.capture.direct().and_then(|kernel| kernel.events()) else {
        return std::future::pending().await;
    };
    let mut flows = Flows { direct: direct.clone(), node, live: HashMap::new() };
    let mut compare = interval(COMPARE);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            // What has happened is taken before a look at what is.
            biased;
            event = events.next() => match event {
                Ok(FlowEvent::Opened(flow)) => flows.open(flow),
                Ok(FlowEvent::Closed(flow, facts)) => flows.close(flow, facts),
                Err(error) => {
                    tracing::error!(%error, "nothing is heard of direct connections any more");
                    return std::future::pending().await;
                }
            },
            sources = direct.taken_back() => flows.look_at(sources),
            _ = compare.tick() => flows.compare(),
        }
    }
}

struct Flows {
    direct: Direct,
    node: Arc<Node>,
    live: HashMap<SocketCookie, Live>,
}

struct Live {
    /// Where its task hears of its end, with what is known of it. Without a word, when nobody follows
    /// it any more.
    ended: oneshot::Sender<Option<TcpFacts>>,
    /// How many times in a row it was missing from the kernel's list.
    missing: u8,
}

impl Flows {
    fn open(&mut self, flow: DirectFlow) {
        if self.live.contains_key(&flow.socket) {
            return;
        }
        let Some(told) = self.told(&flow) else { return };
        let (ended, end) = oneshot::channel();
        self.live.insert(flow.socket, Live { ended, missing: 0 });
        // Registered before it is judged, and both before the next event.
        let open = Open::new(self.node.clone(), flow, told);
        open.judge();
        tokio::spawn(open.watch(end));
    }

    fn close(&mut self, flow: DirectFlow, facts: TcpFacts) {
        if let Some(live) = self.live.remove(&flow.socket) {
            // Whoever waited may have given up.
            let _ = live.ended.send(Some(facts));
            return;
        }
        // It was over before it was heard of, or never was.
        let Some(told) = self.told(&flow) else { return };
        let open = Open::new(self.node.clone(), flow, told);
        let outcome = match facts.ended {
            Ended::Refused => Err(refused()),
            Ended::Finished | Ended::Aborted => {
                open.judge();
                Ok(())
            }
        };
        open.end(Some(facts), outcome);
    }

    /// Tells of what is live, though its opening was not heard of yet: new connections of pods whose
    /// verdicts were taken back must be judged now.
    fn look_at(&mut self, sources: impl IntoIterator<Item = NetnsCookie>) {
        let Some(kernel) = self.node.capture.direct() else { return };
        let mut new = Vec::new();
        for source in sources {
            let flows = match kernel.flows(source) {
                Ok(flows) => flows,
                Err(error) => {
                    tracing::warn!(%source, %error, "cannot list a pod's direct connections");
                    continue;
                }
            };
            for flow in flows {
                match self.live.get_mut(&flow.socket) {
                    Some(live) => live.missing = 0,
                    None if flow.established_at.is_some() => new.push(flow),
                    None => {}
                }
            }
        }
        new.into_iter().for_each(|flow| self.open(flow));
    }

    /// Compares what is told of with what the kernel lists, in case an event was lost.
    fn compare(&mut self) {
        for live in self.live.values_mut() {
            live.missing = live.missing.saturating_add(1);
        }
        let Some(kernel) = self.node.capture.direct() else { return };
        let sources = kernel.sources();
        self.look_at(sources);
        // Of what has ended just now the event is on its way.
        let is_lost = |_: &SocketCookie, live: &mut Live| live.missing >= 2;
        for (_, live) in self.live.extract_if(is_lost) {
            let _ = live.ended.send(None);
        }
        self.live.retain(|_, live| !live.ended.is_closed());
    }

    /// Who is at both ends.
    fn told(&self, flow: &DirectFlow) -> Option<Told> {
        let pods = self.node.mesh.pods();
        let snapshot = self.node.mesh.snapshot();
        let find = |cookie| {
            let (pod, uid) = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie)?;
            let workload = snapshot.workload(uid.as_deref()?)?.clone();
            Some((LocalPod { uid: pod.uid.clone(), netns: cookie }, workload))
        };
        let handed = self.direct.is_handed(flow.socket);
        if let Some(grant) = self.direct.verdict(flow.verdict) {
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
        let (network, ip) = (&*self.node.network, original.ip());
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
        let (enrolled, answers) = (self.node.mesh.enrolled(), Answers::default());
        let view = View {
            snapshot: &snapshot,
            network: &self.node.network,
            node: &self.node.name,
            enrolled: &enrolled,
            answers: &answers,
            coverage: self.direct.coverage(),
        };
        let Step::Done(Ok(admission)) = admit::admit(&view, &inbound) else { return None };
        let Admission { connection, service, .. } = admission;
        Some(Told { source, destination, addressed, service, connection, handed })
    }
}

/// The ends of a connection, as they are told of.
struct Told {
    source: (LocalPod, Arc<Workload>),
    destination: (LocalPod, Arc<Workload>),
    /// The service that the application connected to.
    addressed: Option<Arc<Service>>,
    /// The service that the destination takes it to be for.
    service: Option<Arc<Service>>,
    connection: Connection,
    /// The agent has accepted it in the destination's place, and tells of it there.
    handed: bool,
}

/// A connection that has been told of as opened.
struct Open {
    node: Arc<Node>,
    flow: DirectFlow,
    ends: Option<Ends>,
    workload: Arc<Workload>,
    /// Cancelled when the pod at an end is gone.
    gone: [CancellationToken; 2],
}

struct Ends {
    source: (OpenConnection, Guard),
    /// `None` when the destination's corridor tells of it.
    destination: Option<(OpenConnection, Guard)>,
}

impl Open {
    fn new(node: Arc<Node>, flow: DirectFlow, told: Told) -> Self {
        let source = told.open(&node, &flow, Reporter::Source);
        let destination = (!told.handed).then(|| told.open(&node, &flow, Reporter::Destination));
        let ends = Some(Ends { source, destination });
        let gone = [flow.source, flow.destination].map(|cookie| ending(&node, cookie));
        Self { node, flow, ends, workload: told.destination.1, gone }
    }

    /// Judges it by the policies of now, which also tells of policies in dry run.
    fn judge(&self) {
        let destination = self.ends.as_ref().and_then(|ends| ends.destination.as_ref());
        let Some((_, guard)) = destination else { return };
        let entry = guard.entry();
        let Some(connection) = &entry.live().connection else { return };
        match self.node.authorize(&self.workload, connection) {
            Ok(permit) => entry.permitted(permit.to_string()),
            Err(denied) => {
                let (policy, rule) = (denied.policy().cloned(), denied.rule());
                tracing::debug!(src = %self.flow.client, %denied, denial = ?denial(&denied), "ended");
                entry.close(CloseReason::PolicyChange { policy, rule });
            }
        }
    }

    async fn watch(self, mut end: oneshot::Receiver<Option<TcpFacts>>) {
        let reason = tokio::select! {
            told = &mut end => {
                // Without a word it goes on, and another agent will tell of its end.
                let Ok(facts) = told else { return };
                let outcome = match facts.map(|facts| facts.ended) {
                    Some(Ended::Refused) => Err(refused()),
                    Some(Ended::Finished | Ended::Aborted) | None => Ok(()),
                };
                return self.end(facts, outcome);
            }
            reason = self.closed() => reason,
        };
        self.destroy().await;
        let facts = timeout(END_LIMIT, &mut end).await.ok().and_then(Result::ok).flatten();
        self.end(facts, Err(reason.into()));
    }

    async fn closed(&self) -> CloseReason {
        let closed = async |end: Option<&(OpenConnection, Guard)>| match end {
            Some((_, guard)) => guard.closed().await,
            None => std::future::pending().await,
        };
        let ends = self.ends.as_ref();
        tokio::select! {
            reason = closed(ends.map(|ends| &ends.source)) => reason,
            reason = closed(ends.and_then(|ends| ends.destination.as_ref())) => reason,
            () = self.gone[0].cancelled() => CloseReason::PodGone,
            () = self.gone[1].cancelled() => CloseReason::PodGone,
        }
    }

    async fn destroy(&self) {
        let pods = self.node.mesh.pods();
        let netns = |cookie| {
            let found = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie);
            found.map(|(pod, _)| pod.netns.clone())
        };
        let flow = self.flow;
        let (source, destination) = (netns(flow.source), netns(flow.destination));
        let destroyed = tokio::task::spawn_blocking(move || {
            let (source, destination): (Option<&Netns>, Option<&Netns>) =
                (source.as_deref(), destination.as_deref());
            direct::destroy(&flow, source, destination)
        });
        match destroyed.await {
            Ok(Ok(existed)) => tracing::debug!(src = %flow.client, existed, "connection ended"),
            Ok(Err(error)) => tracing::error!(src = %flow.client, %error, "connection goes on"),
            Err(error) => tracing::error!(src = %flow.client, %error, "connection goes on"),
        }
    }

    fn end(mut self, facts: Option<TcpFacts>, outcome: Result<(), Failure>) {
        let Some(Ends { source, destination }) = self.ends.take() else { return };
        let flow = &self.flow;
        let began = flow.established_at.unwrap_or(flow.connected_at);
        let lasted = facts.map_or_else(direct::since_boot, |facts| facts.at).saturating_sub(began);
        let count = |open: &OpenConnection| {
            if let Some(facts) = facts {
                open.counters().add_received(facts.sent);
                open.counters().add_sent(facts.received);
            }
        };
        if let Some(facts) = facts {
            let measured = TransportFacts {
                connect: flow.established_at.map(|at| at.saturating_sub(flow.connected_at)),
                round_trip: facts.srtt,
                retransmits: facts.retransmits,
            };
            self.node.telemetry.transport(source.0.context(), &measured);
        }
        count(&source.0);
        source.0.close_after(lasted, outcome.clone().map_err(session::as_source));
        if let Some((destination, _registered)) = destination {
            count(&destination);
            destination.close_after(lasted, outcome);
        }
    }
}

/// It goes on when this agent ends or lets go of it.
impl Drop for Open {
    fn drop(&mut self) {
        if let Some(Ends { source, destination }) = self.ends.take() {
            source.0.hand_on();
            if let Some((destination, _registered)) = destination {
                destination.hand_on();
            }
        }
    }
}

impl Told {
    fn open(&self, node: &Node, flow: &DirectFlow, reporter: Reporter) -> (OpenConnection, Guard) {
        let identities = (self.source.1.identity(), self.destination.1.identity());
        let (direction, end, connection, service) = match reporter {
            Reporter::Source => (Direction::Outbound, &self.source, None, &self.addressed),
            Reporter::Destination => {
                (Direction::Inbound, &self.destination, Some(&self.connection), &self.service)
            }
        };
        let open = node.telemetry.open(ConnectionContext {
            reporter,
            source: Some(self.source.1.clone()),
            source_identity: Some(identities.0.clone()),
            baggage: None,
            destination: Some(self.destination.1.clone()),
            destination_identity: Some(identities.1.clone()),
            service: service.clone(),
            src: flow.client,
            dst: flow.server,
            hbone_addr: None,
            mutual_tls: true,
        });
        let guard = node.connections.register(LiveConnection {
            direction,
            protocol: Protocol::Direct,
            src: flow.client,
            original_dst: Some(flow.original.to_string()),
            actual_dst: flow.server,
            pod: end.0.uid.clone(),
            workload: end.1.uid.clone(),
            connection: connection.cloned(),
            source_identity: Some(identities.0),
            destination_identity: Some(identities.1),
            service: service.as_ref().map(|service| service.hostname.clone()),
            counters: open.counters(),
        });
        (open, guard)
    }
}

/// Cancelled when the pod is gone; never, if it is not known any more.
fn ending(node: &Node, cookie: NetnsCookie) -> CancellationToken {
    let pods = node.mesh.pods();
    let found = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie);
    found.map(|(pod, _)| pod.ending()).unwrap_or_default()
}

fn refused() -> Failure {
    Failure::new(ResponseFlag::Connect, "connection failed: not accepted by the application")
}
