//! Which verdicts the kernel is given, and when they are taken back.
//!
//! A verdict is decided and written under one lock, on what is published then; each publication takes
//! the same lock and decides anew what it touches. So none is in the kernel that what is published
//! would not give, once whoever published is told so.

mod adoption;
mod decision;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use culvert_core::addr::OriginalDst;
use culvert_core::tables::{self, NetnsCookie, VerdictId, VerdictKey};
use culvert_core::verdict;
use culvert_core::view::{Chosen, Coverage};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::table::{Grant, Room, Table};
use crate::ca::Certificates;
use crate::capture::direct::since_boot;
use crate::capture::{self, CaptureError, Redirection};
use crate::node::{LocalPods, Mesh, Publication};
use adoption::Adopted;
pub(super) use adoption::Pending;
pub use decision::NoVerdict;
use decision::{PodIndex, World};

/// A certificate that was renewed moves the end of a verdict by more than this.
const RENEWED: Duration = Duration::from_secs(1);

/// What verdicts are decided by, besides the mesh.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The agent's own network and node.
    pub network: Arc<str>,
    pub node: Arc<str>,
    pub coverage: Coverage,
    /// How many verdicts one pod may have.
    pub per_pod: usize,
    /// How long they count without an agent.
    pub admit_time: Duration,
    /// Whose connections among each other may be accelerated.
    pub accelerated: Chosen,
}

/// The verdicts of one agent.
pub(super) struct Verdicts {
    capture: Redirection,
    certificates: Arc<Certificates>,
    terms: Terms,
    state: Mutex<State>,
    /// Verdicts that found no room.
    refused: AtomicU64,
    /// Whose verdicts were taken back since somebody asked.
    touched: Mutex<HashSet<NetnsCookie>>,
    touch: Notify,
}

struct State {
    table: Table,
    stage: Stage,
    /// Another agent may give verdicts and take them back.
    away: bool,
    adopted: Adopted,
    /// What the kernel did not let go of. As long as there is any, nothing extends the time for
    /// which verdicts count.
    stuck: Vec<VerdictKey>,
    pods: Arc<PodIndex>,
    /// The machine has shown that it accelerates well.
    accelerates: bool,
}

/// How far this agent has come with what an earlier one let the kernel admit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// There is no whole mesh to decide on.
    Starting,
    /// Some of it has not been decided anew.
    Adopting,
    /// All that the kernel holds is its own: from now on there are new verdicts.
    Serving,
}

impl Verdicts {
    pub fn new(capture: Redirection, certificates: Arc<Certificates>, terms: Terms) -> Self {
        // The clock has passed whatever number an earlier agent of this machine's run reached.
        let first = u64::try_from(since_boot().as_nanos()).unwrap_or(u64::MAX);
        let state = State {
            table: Table::new(terms.per_pod, first),
            stage: Stage::Starting,
            away: false,
            adopted: Adopted::default(),
            stuck: Vec::new(),
            pods: Arc::default(),
            accelerates: false,
        };
        Self {
            capture,
            certificates,
            terms,
            state: Mutex::new(state),
            refused: AtomicU64::new(0),
            touched: Mutex::default(),
            touch: Notify::new(),
        }
    }

    /// Ready when verdicts of these pods were taken back since the last call.
    pub async fn taken_back(&self) -> Vec<NetnsCookie> {
        loop {
            let touched = std::mem::take(&mut *self.touched.lock());
            if !touched.is_empty() {
                return touched.into_iter().collect();
            }
            self.touch.notified().await;
        }
    }

    pub fn capture(&self) -> &Redirection {
        &self.capture
    }

    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.state.lock().table.len()
    }

    pub fn count_of(&self, pod: NetnsCookie) -> usize {
        self.state.lock().table.count_of(pod)
    }

    /// How many found no room so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Also one that was taken back not long ago.
    pub fn find(&self, id: VerdictId) -> Option<Arc<Grant>> {
        self.state.lock().table.find(id).cloned()
    }

    /// What holds for connections of a workload of this node, or would if one were made.
    pub fn explain(
        &self,
        mesh: &Mesh,
        source: &str,
        to: SocketAddr,
    ) -> Result<Option<VerdictId>, NoVerdict> {
        let mut state = self.state.lock();
        let (snapshot, enrolled) = (mesh.snapshot(), mesh.enrolled());
        let pods = state.pods(&mesh.pods());
        let pod = pods.of_workload(source).ok_or(NoVerdict::Unknown)?;
        let key = VerdictKey { source: pod.netns, destination: to };
        if let Some(grant) = state.table.get(&key) {
            return Ok(Some(grant.id));
        }
        let world = World { snapshot: &snapshot, enrolled: &enrolled, pods: &pods };
        self.decide(&world, key, VerdictId(0)).map(|_| None)
    }

    /// Connections that are made from now on are accelerated, where both workloads are named for it.
    pub fn accelerate(&self) {
        let mut state = self.state.lock();
        state.accelerates = true;
        if state.away {
            return;
        }
        let Some(kernel) = self.capture.direct() else { return };
        for key in state.table.keys() {
            let Some(grant) = state.table.get(&key).cloned() else { continue };
            // What fails goes on as it is.
            if let Err(error) = kernel.set_verdict(&key, &self.to_kernel(&state, &grant)) {
                tracing::warn!(source = %key.source, to = %key.destination, %error, "goes on unaccelerated");
            }
        }
    }

    fn to_kernel(&self, state: &State, grant: &Grant) -> tables::Verdict {
        let chosen = Some(&self.terms.accelerated).filter(|_| state.accelerates);
        grant.to_kernel(chosen)
    }

    /// Gives the kernel a verdict, if there is one to give.
    pub fn grant(&self, mesh: &Mesh, key: VerdictKey) {
        let mut state = self.state.lock();
        if !state.is_serving() || state.table.get(&key).is_some() {
            return;
        }
        let (snapshot, enrolled) = (mesh.snapshot(), mesh.enrolled());
        let pods = state.pods(&mesh.pods());
        let world = World { snapshot: &snapshot, enrolled: &enrolled, pods: &pods };
        let id = state.table.next_id();
        let grant = match self.decide(&world, key, id) {
            Ok(grant) => grant,
            Err(because) => {
                let (source, to) = (key.source, key.destination);
                return tracing::debug!(%source, %to, %because, "the kernel gets no verdict");
            }
        };
        match state.table.room(key.source, since_boot()) {
            Room::Free => {}
            Room::Instead(unused) => self.take_back(&mut state, &unused),
            Room::None => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                return;
            }
        }
        self.write(&mut state, grant);
    }

    /// Decides anew what a publication touches.
    pub fn follow(&self, publication: &Publication<'_>) {
        let mut state = self.state.lock();
        if state.away {
            return;
        }
        let pods = state.pods(publication.pods);
        let Publication { before, now, enrolled, same_pods, .. } = *publication;
        let world = World { snapshot: now, enrolled, pods: &pods };
        for key in state.table.keys() {
            let Some(grant) = state.table.get(&key).cloned() else { continue };
            let (network, destination) = (&*self.terms.network, OriginalDst::new(key.destination));
            let is_alike = same_pods
                && verdict::decides_alike(
                    before,
                    now,
                    network,
                    &grant.source,
                    destination,
                    &grant.verdict,
                );
            if !is_alike {
                self.renew(&mut state, &world, &grant);
            }
        }
        if state.stage == Stage::Adopting
            && let Err(error) = self.sift(&mut state, &world, false)
        {
            tracing::error!(%error, "cannot look at the verdicts of an earlier agent");
        }
    }

    /// Lets verdicts count for a while longer, and hold for whom and until when the certificates of now
    /// do.
    pub fn extend(&self, mesh: &Mesh) -> Result<(), CaptureError> {
        // Unless that was done when this agent began.
        self.settle(mesh)?;
        let mut state = self.state.lock();
        let Some(kernel) = self.capture.direct() else { return Ok(()) };
        if !state.is_serving() {
            return Ok(());
        }
        for key in std::mem::take(&mut state.stuck) {
            self.take_back(&mut state, &key);
        }
        if !state.stuck.is_empty() {
            return Ok(());
        }
        let (snapshot, enrolled) = (mesh.snapshot(), mesh.enrolled());
        let pods = state.pods(&mesh.pods());
        let world = World { snapshot: &snapshot, enrolled: &enrolled, pods: &pods };
        for key in state.table.keys() {
            let Some(grant) = state.table.get(&key).cloned() else { continue };
            let expires = self.expires(&grant.source, &grant.verdict);
            let same_end = |expires: Duration| expires.abs_diff(grant.expires) <= RENEWED;
            if grant.lacking.is_some() || !expires.is_some_and(same_end) {
                self.renew(&mut state, &world, &grant);
            }
        }
        kernel.admit_until(since_boot() + self.terms.admit_time)
    }

    fn renew(&self, state: &mut State, world: &World<'_>, grant: &Grant) {
        let again = match self.decide(world, grant.key, grant.id) {
            Ok(again) => again,
            Err(because) => {
                let (source, to, id) = (grant.key.source, grant.key.destination, grant.id);
                tracing::debug!(%source, %to, %id, %because, "verdict taken back");
                return self.take_back(state, &grant.key);
            }
        };
        again.used.store(grant.used.load(Ordering::Relaxed), Ordering::Relaxed);
        let same_end = again.expires.abs_diff(grant.expires) <= RENEWED;
        if again.is_like(grant) && same_end {
            // Nothing that the kernel knows has changed.
            state.table.insert(Grant { expires: grant.expires, ..again });
        } else if again.covers(grant) {
            self.write(state, again);
        } else {
            let id = state.table.next_id();
            self.write(state, Grant { id, ..again });
            self.touch(grant.key.source);
        }
    }

    fn write(&self, state: &mut State, grant: Grant) {
        let Some(kernel) = self.capture.direct() else { return };
        match kernel.set_verdict(&grant.key, &self.to_kernel(state, &grant)) {
            Ok(()) => state.table.insert(grant),
            Err(error) => {
                self.refused.fetch_add(1, Ordering::Relaxed);
                if !matches!(error, CaptureError::VerdictsFull { .. }) {
                    tracing::error!(%error, "cannot give the kernel a verdict");
                }
                // Whatever it was told before does not hold any more.
                self.take_back(state, &grant.key);
            }
        }
    }

    fn take_back(&self, state: &mut State, key: &VerdictKey) {
        let Some(kernel) = self.capture.direct() else { return };
        state.table.remove(key);
        if let Err(error) = kernel.remove_verdict(key) {
            tracing::error!(source = %key.source, to = %key.destination, %error, "verdict stays");
            if !state.stuck.contains(key) {
                state.stuck.push(*key);
            }
        }
        self.touch(key.source);
    }

    /// What was let in before is live now, or never will be.
    fn touch(&self, source: NetnsCookie) {
        self.touched.lock().insert(source);
        self.touch.notify_one();
    }
}

impl State {
    fn is_serving(&self) -> bool {
        self.stage == Stage::Serving && !self.away
    }

    fn pods(&mut self, pods: &Arc<LocalPods>) -> Arc<PodIndex> {
        if !Arc::ptr_eq(&self.pods.of, pods) {
            self.pods = Arc::new(PodIndex::new(pods));
        }
        self.pods.clone()
    }
}

impl Grant {
    /// Both ends notice an acceleration, so that both have to be among the chosen.
    fn backends(&self, chosen: Option<&Chosen>) -> Vec<tables::Backend> {
        let chosen = chosen.filter(|chosen| chosen.includes(&self.source));
        let backends = self.verdict.backends.iter().zip(&self.pods);
        let backends = backends.map(|(backend, pod)| tables::Backend {
            to: backend.to(),
            netns: pod.netns,
            weight: backend.weight,
            accelerated: chosen.is_some_and(|chosen| chosen.includes(&backend.workload)),
        });
        backends.collect()
    }

    fn to_kernel(&self, chosen: Option<&Chosen>) -> tables::Verdict {
        let backends = self.backends(chosen);
        let elsewhere = self.verdict.elsewhere;
        tables::Verdict { id: self.id, expires: self.expires, backends, elsewhere }
    }
}

impl std::fmt::Debug for Verdicts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verdicts").field("terms", &self.terms).finish_non_exhaustive()
    }
}

/// Whether a live connection can be ended on the agent's word.
pub(super) fn is_revocable(capture: &capture::Redirection) -> bool {
    capture.direct().is_some_and(capture::Direct::can_destroy)
}
