//! Connections between pods of this node that the kernel carries: which it may admit, and what is
//! told of them.
//!
//! The first connection to a destination goes through the agent. When it was admitted, the kernel is
//! given a verdict for all that follow, for as long as `core::verdict` says the same of them. They go
//! from application to application, also while no agent runs. What happens to them is heard from the
//! kernel, and told as of any other connection; one that is no longer permitted is ended.

mod acceleration;
mod flows;
mod meter;
mod table;
mod verdicts;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::addr::OriginalDst;
use culvert_core::tables::{NetnsCookie, VerdictId, VerdictKey};
use culvert_core::view::Coverage;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::admin::readiness::OpenTask;
use crate::ca::Certificates;
use crate::capture::direct::{DirectFlow, SocketCookie};
use crate::capture::{CaptureError, Redirection};
use crate::node::{LocalPods, Mesh, Node};
use crate::pods::Pod;
use crate::telemetry::DirectReading;

pub use acceleration::Standing;
pub use table::{Grant, LocalPod};
pub use verdicts::{NoVerdict, Terms};

use flows::Live;
use verdicts::{Pending, Verdicts};

/// How many destinations may wait for their verdict.
const OFFERS: usize = 1024;
/// The longest time between two looks at what verdicts depend on besides the mesh: certificates, and
/// that there is an agent.
const LONGEST_BEAT: Duration = Duration::from_secs(10);
/// How long an agent that starts waits for the pods and certificates of an earlier one's verdicts.
const ADOPTION_LIMIT: Duration = Duration::from_secs(20);
/// How often it looks meanwhile.
const ADOPTION_LOOK: Duration = Duration::from_millis(20);

/// The kernel's share of the connections between pods of this node. Cloning copies a pointer.
#[derive(Clone)]
pub struct Direct(Arc<Inner>);

struct Inner {
    verdicts: Verdicts,
    offers: mpsc::Sender<VerdictKey>,
    offered: Mutex<Option<mpsc::Receiver<VerdictKey>>>,
    live: Mutex<HashMap<SocketCookie, Live>>,
    standing: Mutex<Standing>,
    stopped: CancellationToken,
}

impl Direct {
    /// `None` where the kernel can admit nothing. `irrevocable`: also where the agent could not end
    /// what it has admitted.
    pub fn new(
        capture: Redirection,
        certificates: Arc<Certificates>,
        terms: Terms,
        irrevocable: bool,
    ) -> Option<Self> {
        capture.direct()?;
        if !irrevocable && !verdicts::is_revocable(&capture) {
            tracing::warn!(
                "the kernel cannot end connections on the agent's word (CONFIG_INET_DIAG_DESTROY): \
                 those within the node go through the agent"
            );
            return None;
        }
        let standing = Standing::at_first(&terms.accelerated, &capture);
        let (offers, offered) = mpsc::channel(OFFERS);
        Some(Self(Arc::new(Inner {
            verdicts: Verdicts::new(capture, certificates, terms),
            offers,
            offered: Mutex::new(Some(offered)),
            live: Mutex::default(),
            standing: Mutex::new(standing),
            stopped: CancellationToken::new(),
        })))
    }

    /// Takes verdicts back with each publication, before whoever published goes on.
    pub fn follow(&self, mesh: &Mesh) {
        // What the mesh holds must not keep the mesh.
        let inner = Arc::downgrade(&self.0);
        mesh.follow(Box::new(move |publication| {
            if let Some(inner) = inner.upgrade() {
                inner.verdicts.follow(publication);
            }
        }));
    }

    /// Leaves verdicts as they are to another agent, before that one begins to give its own: two that
    /// write would undo what the other has taken back.
    pub fn leave(&self) {
        self.0.verdicts.leave();
    }

    /// The other agent has not come: this one goes on.
    pub fn resume(&self, mesh: &Mesh) {
        self.0.verdicts.resume(mesh);
    }

    /// The other agent is there, and tells of connections, too.
    pub fn stop(&self) {
        self.0.verdicts.leave();
        self.0.stopped.cancel();
    }

    /// A connection of `source` was admitted: those that follow may go straight. Costs nothing where
    /// they do already.
    pub fn offer(&self, source: &Pod, to: OriginalDst) {
        let key = VerdictKey { source: source.netns.cookie(), destination: to.addr() };
        // Where there is no room now, the next connection offers the same.
        let _ = self.0.offers.try_send(key);
    }

    /// The verdict with this number, also if it was taken back not long ago.
    pub fn verdict(&self, id: VerdictId) -> Option<Arc<Grant>> {
        self.0.verdicts.find(id)
    }

    /// The direct connection that arrived with these addresses at the agent, because its verdict was
    /// taken back while it was on its way. Who it comes from is proven by the kernel; `None` when its
    /// client has closed it meanwhile.
    pub fn retracted(
        &self,
        client: SocketAddr,
        server: SocketAddr,
    ) -> Result<Option<DirectFlow>, CaptureError> {
        let Some(kernel) = self.0.verdicts.capture().direct() else { return Ok(None) };
        kernel.flow(client, server)
    }

    /// Ready when verdicts of these pods were taken back.
    async fn taken_back(&self) -> Vec<NetnsCookie> {
        self.0.verdicts.taken_back().await
    }

    fn coverage(&self) -> Coverage {
        self.0.verdicts.terms().coverage
    }

    fn live(&self) -> MutexGuard<'_, HashMap<SocketCookie, Live>> {
        self.0.live.lock()
    }

    /// Counts what live connections have carried so far. Blocks for some microseconds for each.
    pub fn measure(&self, pods: &LocalPods) {
        let meters: Vec<_> = self.live().values().map(|live| live.meter.clone()).collect();
        if let Some(kernel) = self.0.verdicts.capture().direct() {
            meter::read(kernel, &meters, pods);
        }
    }

    /// The verdict that holds for connections from a workload of this node; none yet; or why none.
    pub fn explain(
        &self,
        mesh: &Mesh,
        source: &str,
        to: SocketAddr,
    ) -> Result<Option<VerdictId>, NoVerdict> {
        self.0.verdicts.explain(mesh, source, to)
    }

    /// How many verdicts a pod has.
    pub fn verdicts_of(&self, pod: NetnsCookie) -> usize {
        self.0.verdicts.count_of(pod)
    }

    pub fn reading(&self) -> DirectReading {
        let counts = self.0.verdicts.capture().direct().map(|kernel| kernel.counts());
        let counts = match counts {
            Some(Ok(counts)) => counts,
            Some(Err(error)) => {
                tracing::warn!(%error, "cannot read the kernel's counters");
                Default::default()
            }
            None => Default::default(),
        };
        DirectReading {
            verdicts: self.0.verdicts.count() as u64,
            refused: self.0.verdicts.refused(),
            opened: counts.opened,
            elsewhere: counts.elsewhere,
            expired: counts.expired,
            full: counts.full,
            special: counts.special,
            retracted: counts.retracted,
            backend_gone: counts.backend_gone,
            unrecorded: counts.unrecorded,
            astray: counts.astray,
            joined: counts.joined,
            joint_full: counts.joint_full,
            joint_unequal: counts.joint_unequal,
            left_full: counts.left_full,
            left_low_water: counts.left_low_water,
            left_layered: counts.left_layered,
            left_closing: counts.left_closing,
            qualified: self.standing().qualifies(),
            events_lost: counts.events_lost,
        }
    }

    /// Serves until another agent is there. `synced` is ready when there is a whole mesh to decide on;
    /// `adopting` is open until nothing is admitted any more by what only an earlier agent decided.
    pub async fn run(self, node: Arc<Node>, synced: impl Future<Output = ()>, adopting: OpenTask) {
        let Some(offered) = self.0.offered.lock().take() else { return };
        synced.await;
        let limit = Instant::now() + ADOPTION_LIMIT;
        let known = self.adopt(&node.mesh, Pending::Certificates, limit).await;
        // From here on it is known whose the connections are.
        let following = flows::follow(self.clone(), node.clone());
        let deciding = async {
            let adopted = match known {
                Ok(()) => self.adopt(&node.mesh, Pending::Nothing, limit).await,
                Err(error) => Err(error),
            };
            let Err(error) = adopted else {
                drop(adopting);
                return self.decide(&node.mesh, offered).await;
            };
            tracing::error!(%error, "the kernel admits nothing by itself");
            match self.0.verdicts.close() {
                Ok(()) => drop(adopting),
                Err(error) => tracing::error!(%error, "but by the verdicts of an earlier agent"),
            }
            // What lives is followed all the same.
            std::future::pending().await
        };
        tokio::select! {
            () = following => {}
            () = deciding => {}
            () = self.0.stopped.cancelled() => {}
        }
    }

    /// Gives the verdicts that connections ask for, and extends their time.
    async fn decide(&self, mesh: &Mesh, mut offered: mpsc::Receiver<VerdictKey>) {
        let verdicts = &self.0.verdicts;
        let beat = (verdicts.terms().admit_time / 4).min(LONGEST_BEAT);
        let mut beats = interval(beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                Some(key) = offered.recv() => verdicts.grant(mesh, key),
                _ = beats.tick() => if let Err(error) = verdicts.extend(mesh) {
                    tracing::error!(%error, "cannot extend the time of admission");
                },
            }
        }
    }

    /// An agent that starts finds verdicts of an earlier one. What their pods are, and that they have
    /// certificates, shows in a moment. Ready when they wait for no more than `for_what`; what still
    /// does at `limit` is taken back.
    async fn adopt(
        &self,
        mesh: &Mesh,
        for_what: Pending,
        limit: Instant,
    ) -> Result<(), CaptureError> {
        let mut looks = interval(ADOPTION_LOOK);
        loop {
            looks.tick().await;
            if self.0.verdicts.adopt(mesh)? <= for_what {
                return Ok(());
            }
            if Instant::now() >= limit {
                break;
            }
        }
        tracing::warn!("not all pods of the kernel's verdicts are known, or have a certificate");
        self.0.verdicts.settle(mesh)
    }
}

impl std::fmt::Debug for Direct {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.verdicts.fmt(f)
    }
}
