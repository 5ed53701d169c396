//! What the agent does from when it may serve until it is told to end, or another takes over.

use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

use super::admin_addrs;
use super::ending::{End, Ending};
use super::enrolment::Enrolment;
use super::handover::{await_successor, give, take_over};
use super::news::News;
use super::state::State;
use crate::admin::readiness::{OpenTask, VERDICTS};
use crate::admin::{AdminServers, Sources};
use crate::config::Config;
use crate::direct::Direct;
use crate::drain::{self, DrainTrigger};
use crate::file::{FileSource, FileUpdate};
use crate::handover::{Asked, Bequest, HandoverError, Wish};
use crate::memory;
use crate::telemetry::Handover;
use crate::zds;

/// How often pods are looked after: namespaces that went, and enrolments to be tried again.
const LOOK_AFTER_PODS: Duration = Duration::from_secs(1);

/// The signals that tell the agent to end.
pub(super) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> std::io::Result<Signals> {
        let (terminate, interrupt) =
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Signals { terminate, interrupt })
    }

    /// Ready when one has come.
    pub async fn told(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// What an agent follows also while it ends: its mesh file, and who tells it to end.
pub(super) struct Follower {
    news: Arc<News>,
    source: Option<FileSource>,
    signals: Signals,
    stopped: mpsc::Receiver<()>,
}

enum Event {
    File(FileUpdate),
    Told,
}

impl Follower {
    pub fn new(
        news: Arc<News>,
        source: Option<FileSource>,
        signals: Signals,
        stopped: mpsc::Receiver<()>,
    ) -> Follower {
        Follower { news, source, signals, stopped }
    }

    async fn next(&mut self) -> Event {
        tokio::select! {
            update = next(&mut self.source) => Event::File(update),
            () = self.signals.told() => Event::Told,
            _ = self.stopped.recv() => Event::Told,
        }
    }

    /// Ready when it is told to end; connections are judged by the newest mesh until then.
    pub async fn told(&mut self) {
        while let Event::File(update) = self.next().await {
            if let FileUpdate::Changed(file) = update {
                self.news.apply(file.changes);
            }
        }
    }
}

/// Never ready without a file.
async fn next(source: &mut Option<FileSource>) -> FileUpdate {
    match source {
        Some(source) => source.next().await,
        None => std::future::pending().await,
    }
}

/// An agent that is complete.
pub(super) struct Duty {
    pub state: Arc<State>,
    pub enrolment: Enrolment,
    pub follower: Follower,
    pub sources: Sources,
    pub trigger: DrainTrigger,
}

impl Duty {
    /// Serves to the end. Pods of istio-cni are asked for when `synced` is ready, and then the kernel
    /// is told what it may admit.
    pub async fn run<S: Future<Output = ()> + Send + 'static>(
        mut self,
        bequest: Option<Bequest>,
        synced: impl Fn() -> S,
        starting: Vec<OpenTask>,
    ) -> anyhow::Result<()> {
        let state = self.state.clone();
        let (node, config) = (&state.node, &state.config);
        let mut bequest = bequest;
        let given = bequest.as_mut().map(|bequest| std::mem::take(&mut bequest.servers));
        let servers = AdminServers::bind(&admin_addrs(config), given.unwrap_or_default()).await?;
        match bequest {
            Some(mut bequest) => {
                self.enrolment.inherit(std::mem::take(&mut bequest.pods));
                self.enrolment.reconcile().await;
                take_over(bequest, &mut self.enrolment, node, &state.story).await?;
            }
            None => self.enrolment.open(),
        }
        if let Some(direct) = node.direct.clone() {
            let adopting = self.sources.readiness.open(VERDICTS);
            tokio::spawn(direct.clone().run(node.clone(), synced(), adopting));
            let (cgroup, pin_path) = (config.cgroup.clone(), config.pin_path.clone());
            tokio::spawn(async move { direct.qualify(&cgroup, &pin_path).await });
        }
        let descriptors = servers.descriptors()?;
        let (closing, open) = drain::drain();
        let serving = tokio::spawn(servers.serve(self.sources.clone(), open));
        let requests = follow_cni(config, synced());
        let (asking, netns) = await_successor(config);
        self.enrolment.reconcile().await;
        memory::settle();
        drop(starting);
        tracing::info!(node = %node.name, version = env!("CARGO_PKG_VERSION"), "culvert is up");
        let Duty { enrolment, mut follower, sources, trigger, .. } = self;
        let mut post = Post { state: &state, enrolment, asking, netns, descriptors };
        let end = post.hold(&mut follower, requests).await;
        let accepting = post.enrolment.accepting();
        // With it go the listeners that nobody accepts on, and the connection to istio-cni.
        drop(post);
        let ending = Ending { state: state.clone(), trigger, closing, serving, accepting, sources };
        ending.finish(end, &mut follower).await
    }
}

/// Where the agent stands while it serves.
struct Post<'a> {
    state: &'a State,
    enrolment: Enrolment,
    asking: mpsc::Receiver<Asked>,
    /// The cookie of the agent's own network namespace.
    netns: u64,
    /// Those of the agent's own servers.
    descriptors: Vec<std::os::fd::OwnedFd>,
}

impl Post<'_> {
    /// Follows the sources and looks after the pods.
    async fn hold(
        &mut self,
        follower: &mut Follower,
        mut requests: Option<mpsc::Receiver<zds::Request>>,
    ) -> End {
        let mut look_after = tokio::time::interval(LOOK_AFTER_PODS);
        look_after.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = follower.next() => match event {
                    Event::File(FileUpdate::Changed(file)) => {
                        tracing::info!(changes = file.changes.len(), "the mesh file changed");
                        follower.news.apply(file.changes);
                        self.enrolment.follow(file.culvert.pods).await;
                    }
                    Event::File(FileUpdate::Rejected(error)) => {
                        tracing::error!(%error, "the mesh file stays as it was");
                    }
                    Event::Told => return End::Told,
                },
                request = next_request(&mut requests) => self.enrolment.obey(request).await,
                _ = look_after.tick() => self.enrolment.reconcile().await,
                Some(asked) = self.asking.recv() => {
                    if let Some(end) = self.answer(asked).await {
                        return end;
                    }
                }
            }
        }
    }

    /// A successor has asked; `None` when this agent goes on.
    async fn answer(&mut self, asked: Asked) -> Option<End> {
        let story = &self.state.story;
        if asked.wish == Wish::LetGo {
            story.tell(format_args!("made room for {}", asked.by));
            self.state.node.telemetry.handover(Handover::LetGo);
            return Some(End::LetGo(asked));
        }
        story.tell(format_args!("handing over to {}", asked.by));
        tracing::info!(to = %asked.by, "handing over");
        let servers_too = asked.by.netns == self.netns;
        let error = match self.hand_over(&asked, servers_too).await {
            Ok(()) => {
                if let Some(direct) = &self.state.node.direct {
                    direct.stop();
                }
                story.tell(format_args!("handed over to {}", asked.by));
                self.state.node.telemetry.handover(Handover::Given);
                return Some(End::HandedOver { to: asked.by, servers_too });
            }
            Err(error) => error,
        };
        tracing::error!(to = %asked.by, %error, "the hand-over failed: this agent goes on");
        self.state.node.telemetry.handover(Handover::Failed);
        story.tell(format_args!("could not hand over to {}: {error}", asked.by));
        asked.refuse(&error).await;
        self.enrolment.reclaim().await;
        None
    }

    async fn hand_over(&self, asked: &Asked, servers_too: bool) -> Result<(), HandoverError> {
        let Some(kernel) = self.state.node.capture.kernel() else {
            return Err(HandoverError::Refused("nothing of ours is in the kernel".to_owned()));
        };
        let servers = if servers_too { self.descriptors.as_slice() } else { &[] };
        give(asked, &self.enrolment, kernel, servers).await?;
        let node = &self.state.node;
        node.direct.iter().for_each(Direct::leave);
        let given = asked.yours().await;
        if given.is_err() {
            node.direct.iter().for_each(|direct| direct.resume(&node.mesh));
        }
        given
    }
}

/// Begins to follow istio-cni, if pods come from there. It is contacted once `synced` is ready.
fn follow_cni(
    config: &Config,
    synced: impl Future<Output = ()> + Send + 'static,
) -> Option<mpsc::Receiver<zds::Request>> {
    let path = config.cni.clone()?;
    let (orders, requests) = mpsc::channel(1);
    tokio::spawn(async move { zds::run(&path, synced, orders).await });
    Some(requests)
}

/// Never ready without istio-cni.
async fn next_request(requests: &mut Option<mpsc::Receiver<zds::Request>>) -> zds::Request {
    if let Some(requests) = requests
        && let Some(request) = requests.recv().await
    {
        return request;
    }
    std::future::pending().await
}
