//! The live direct connections: told of when the kernel tells of them, judged again, and ended.

mod told;

use std::collections::HashSet;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use culvert_core::tables::NetnsCookie;
use culvert_core::workload::Workload;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::Direct;
use super::meter::Meter;
use crate::capture::direct::{self, DirectFlow, Ended, FlowEvent, SocketCookie, TcpFacts};
use crate::capture::{Carried, Direct as Kernel, Netns};
use crate::connections::{CloseReason, Guard};
use crate::node::{Node, denial};
use crate::session;
use crate::telemetry::{Failure, OpenConnection, Reporter, ResponseFlag, TransportFacts};

use told::Told;

/// How long to wait for the kernel to tell how a connection ended that was ended on our word.
const END_LIMIT: Duration = Duration::from_secs(5);
/// How often live connections are compared with the kernel's list, in case an event was lost.
const COMPARE: Duration = Duration::from_secs(10);
/// A connection that was let go before its verdict was taken back is established within this, and
/// looked for so often.
const UNDER_WAY: Duration = Duration::from_millis(200);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// After so many events the processor is left to whoever waits for it (`sched_yield(2)`).
const PORTION: usize = 64;
/// No longer, or under load they would be told ever later.
const YIELDING: Duration = Duration::from_millis(50);

/// Follows all direct connections for as long as it is polled.
pub(super) async fn follow(direct: Direct, node: Arc<Node>) {
    let Some(mut events) = node.capture.direct().and_then(|kernel| kernel.events()) else {
        return std::future::pending().await;
    };
    let mut flows = Flows { direct: direct.clone(), node, again: HashSet::new() };
    let mut compare = interval(COMPARE);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look_again = Instant::now();
    loop {
        let again = !flows.again.is_empty();
        tokio::select! {
            // What has happened is taken before a look at what is.
            biased;
            told = events.next() => match told {
                Ok(events) => flows.hear(&events),
                Err(error) => {
                    tracing::error!(%error, "nothing is heard of direct connections any more");
                    return std::future::pending().await;
                }
            },
            sources = direct.taken_back() => {
                flows.look_at(sources);
                look_again = Instant::now() + LOOK_AGAIN;
            }
            () = sleep_until(look_again), if again => {
                let sources = std::mem::take(&mut flows.again);
                flows.look_at(sources);
                look_again = Instant::now() + LOOK_AGAIN;
            }
            _ = compare.tick() => flows.compare(),
        }
    }
}

struct Flows {
    direct: Direct,
    node: Arc<Node>,
    /// Pods whose verdicts were taken back while connections of theirs were under way.
    again: HashSet<NetnsCookie>,
}

/// A connection that is followed.
#[derive(Debug)]
pub(super) struct Live {
    /// Where its task hears of its end, with what is known of it. Without a word, when nobody follows
    /// it any more.
    ended: oneshot::Sender<Option<TcpFacts>>,
    /// How many times in a row it was missing from the kernel's list.
    missing: u8,
    pub meter: Arc<Meter>,
}

impl Flows {
    fn hear(&mut self, events: &[FlowEvent]) {
        let socket = |event: &FlowEvent| match event {
            FlowEvent::Closed(flow, _) => Some(flow.socket),
            FlowEvent::Opened(_) => None,
        };
        let over: HashSet<SocketCookie> = events.iter().filter_map(socket).collect();
        let began = Instant::now();
        for portion in events.chunks(PORTION) {
            for event in portion {
                match event {
                    // Of most connections both are heard at once.
                    FlowEvent::Opened(flow) if over.contains(&flow.socket) => {}
                    FlowEvent::Opened(flow) => self.open(*flow),
                    FlowEvent::Closed(flow, facts) => self.close(*flow, *facts),
                }
            }
            if portion.len() == PORTION && began.elapsed() < YIELDING {
                thread::yield_now();
            }
        }
    }

    fn open(&mut self, flow: DirectFlow) {
        if self.direct.live().contains_key(&flow.socket) {
            return;
        }
        if flow.arrival.is_none() {
            let (client, server) = (flow.client, flow.server);
            tracing::warn!(%client, %server, "a direct connection was answered by nobody of ours");
            // That it has ended is heard of.
            let node = self.node.clone();
            tokio::spawn(async move { destroy(&node, flow).await });
            return;
        }
        let Some(told) = Told::of(&self.direct, &self.node, &flow) else { return };
        let (ended, end) = oneshot::channel();
        // Registered before it is judged, and both before the next event.
        let open = Open::new(self.node.clone(), flow, told);
        let live = Live { ended, missing: 0, meter: open.meter.clone() };
        self.direct.live().insert(flow.socket, live);
        open.judge();
        tokio::spawn(open.watch(end));
    }

    fn close(&mut self, flow: DirectFlow, facts: TcpFacts) {
        let live = self.direct.live().remove(&flow.socket);
        if let Some(live) = live {
            // Whoever waited may have given up.
            let _ = live.ended.send(Some(facts));
            return;
        }
        // It was over before it was heard of, or never was.
        if let Some(told) = Told::of(&self.direct, &self.node, &flow) {
            tell_whole(&self.node, &flow, &told, facts);
        }
    }

    /// Tells of what is live, though its opening was not heard of yet: new connections of pods whose
    /// verdicts were taken back must be judged now.
    fn look_at(&mut self, sources: impl IntoIterator<Item = NetnsCookie>) {
        let Some(kernel) = self.node.capture.direct() else { return };
        let now = direct::since_boot();
        let mut new = Vec::new();
        for source in sources {
            let flows = match kernel.flows(source) {
                Ok(flows) => flows,
                Err(error) => {
                    tracing::warn!(%source, %error, "cannot list a pod's direct connections");
                    continue;
                }
            };
            let mut live = self.direct.live();
            for flow in flows {
                let flow = match flow.arrival {
                    // It was copied while it arrived, perhaps: what is established has arrived.
                    None if flow.established_at.is_some() => again(kernel, flow),
                    _ => Some(flow),
                };
                let Some(flow) = flow else { continue };
                match live.get_mut(&flow.socket) {
                    Some(live) => live.missing = 0,
                    None if flow.established_at.is_some() => new.push(flow),
                    None if now.saturating_sub(flow.connected_at) < UNDER_WAY => {
                        self.again.insert(source);
                    }
                    None => {}
                }
            }
        }
        new.into_iter().for_each(|flow| self.open(flow));
    }

    /// Compares what is told of with what the kernel lists, in case an event was lost, and reads what
    /// was carried so far.
    fn compare(&mut self) {
        for live in self.direct.live().values_mut() {
            live.missing = live.missing.saturating_add(1);
        }
        let Some(kernel) = self.node.capture.direct() else { return };
        let sources = kernel.sources();
        self.look_at(sources);
        // Of what has ended just now the event is on its way.
        let is_lost = |_: &SocketCookie, live: &mut Live| live.missing >= 2;
        for (_, live) in self.direct.live().extract_if(is_lost) {
            let _ = live.ended.send(None);
        }
        self.direct.live().retain(|_, live| !live.ended.is_closed());
        let (direct, pods) = (self.direct.clone(), self.node.mesh.pods());
        tokio::task::spawn_blocking(move || direct.measure(&pods));
    }
}

/// What the kernel says of a connection now, if it still lives.
fn again(kernel: &Kernel, flow: DirectFlow) -> Option<DirectFlow> {
    let now = kernel.flow(flow.client, flow.server);
    now.unwrap_or(Some(flow)).filter(|now| now.socket == flow.socket)
}

/// Ends a connection in the kernel.
async fn destroy(node: &Node, flow: DirectFlow) {
    let pods = node.mesh.pods();
    let netns = |cookie| {
        let found = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie);
        found.map(|(pod, _)| pod.netns.clone())
    };
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

/// Tells of a connection that nobody can close any more, and nobody see.
fn tell_whole(node: &Node, flow: &DirectFlow, told: &Told, facts: TcpFacts) {
    let outcome = match facts.ended {
        Ended::Refused => Err(refused()),
        Ended::Finished | Ended::Aborted if flow.arrival.is_none() => Err(astray()),
        Ended::Finished | Ended::Aborted => {
            if !told.handed {
                // For the log, and for policies in dry run.
                let _ended = node.authorize(&told.destination.1, &told.connection);
            }
            Ok(())
        }
    };
    let source = told.open(node, flow, Reporter::Source);
    let destination = (!told.handed).then(|| told.open(node, flow, Reporter::Destination));
    for open in [Some(&source), destination.as_ref()].into_iter().flatten() {
        open.counters().add_received(facts.sent);
        open.counters().add_sent(facts.received);
    }
    settle(node, flow, source, destination, Some(facts), outcome);
}

/// Tells how a connection ended.
fn settle(
    node: &Node,
    flow: &DirectFlow,
    source: OpenConnection,
    destination: Option<OpenConnection>,
    facts: Option<TcpFacts>,
    outcome: Result<(), Failure>,
) {
    let began = flow.established_at.unwrap_or(flow.connected_at);
    let lasted = facts.map_or_else(direct::since_boot, |facts| facts.at).saturating_sub(began);
    if let Some(facts) = facts {
        let measured = TransportFacts {
            connect: flow.established_at.map(|at| at.saturating_sub(flow.connected_at)),
            round_trip: facts.srtt,
            retransmits: facts.retransmits,
        };
        node.telemetry.transport(source.context(), &measured);
    }
    source.close_after(lasted, outcome.clone().map_err(session::as_source));
    if let Some(destination) = destination {
        destination.close_after(lasted, outcome);
    }
}

/// A connection that has been told of as opened.
struct Open {
    node: Arc<Node>,
    flow: DirectFlow,
    ends: Option<Ends>,
    workload: Arc<Workload>,
    meter: Arc<Meter>,
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
        let end = |reporter| {
            let open = told.open(&node, &flow, reporter);
            let guard = told.register(&node, &flow, reporter, &open);
            (open, guard)
        };
        let source = end(Reporter::Source);
        let destination = (!told.handed).then(|| end(Reporter::Destination));
        let counted = [Some(&source), destination.as_ref()].into_iter().flatten();
        let counters = counted.map(|(open, _)| open.counters()).collect();
        let meter = Arc::new(Meter::new(flow, counters));
        let ends = Some(Ends { source, destination });
        let gone = [flow.source, flow.destination].map(|cookie| ending(&node, cookie));
        Self { node, flow, ends, workload: told.destination.1, meter, gone }
    }

    /// Judges it by the policies of now, which also tells of policies in dry run.
    fn judge(&self) {
        let destination = self.ends.as_ref().and_then(|ends| ends.destination.as_ref());
        let Some((_, guard)) = destination else { return };
        let entry = guard.entry();
        let Some(connection) = &entry.live().connection else { return };
        match self.node.authorize(&self.workload, connection) {
            Ok(permit) => entry.permitted(permit.by()),
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
        destroy(&self.node, self.flow).await;
        if let CloseReason::PolicyChange { .. } = reason {
            let overdue =
                self.ends.as_ref().and_then(|ends| ends.destination.as_ref()?.1.overdue());
            overdue.into_iter().for_each(|time| self.node.telemetry.revoked(time));
        }
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

    fn end(mut self, facts: Option<TcpFacts>, outcome: Result<(), Failure>) {
        let Some(Ends { source, destination }) = self.ends.take() else { return };
        if let Some(facts) = facts {
            self.meter.advance(Carried { sent: facts.sent, received: facts.received });
        }
        let (source, _registered) = source;
        let (destination, _registered_too) = destination.unzip();
        settle(&self.node, &self.flow, source, destination, facts, outcome);
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

/// Cancelled when the pod is gone; never, if it is not known any more.
fn ending(node: &Node, cookie: NetnsCookie) -> CancellationToken {
    let pods = node.mesh.pods();
    let found = pods.iter().find(|(pod, _)| pod.netns.cookie() == cookie);
    found.map(|(pod, _)| pod.ending()).unwrap_or_default()
}

fn astray() -> Failure {
    Failure::new(ResponseFlag::Connect, "connection failed: its address is another pod's now")
}

fn refused() -> Failure {
    Failure::new(ResponseFlag::Connect, "connection failed: not accepted by the application")
}
