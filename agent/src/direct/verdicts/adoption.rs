//! Whose verdicts the kernel's are: those of an earlier agent are decided anew, those that a later one
//! may have are left alone.

use std::collections::HashSet;
use std::time::Duration;

use culvert_core::tables::{self, NetnsCookie, VerdictKey};

use super::{NoVerdict, Stage, State, Verdicts, World};
use crate::capture::CaptureError;
use crate::direct::table::Grant;
use crate::node::Mesh;

/// What became of an earlier agent's verdicts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Adopted {
    kept: usize,
    taken_back: usize,
}

/// What verdicts of an earlier agent wait for before they can be decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pending {
    Nothing,
    /// Policy permits them, but somebody's certificate has not come.
    Certificates,
    /// Somebody's pod is captured, and not known yet.
    Pods,
}

/// What becomes of one of them.
enum Judged {
    Adopted(Box<Grant>),
    /// It stands meanwhile, and why it could not be taken up now.
    Waits(Pending, NoVerdict),
    /// Nothing may go straight there.
    Denied(NoVerdict),
    /// Not all that it admits to is what would be chosen now.
    Changed,
}

impl Verdicts {
    /// Takes up the verdicts of an earlier agent that would be given now, and takes back those that
    /// would not. Each publication looks again at those that wait; once there are none, there are new
    /// verdicts. `mesh` is whole.
    pub fn adopt(&self, mesh: &Mesh) -> Result<Pending, CaptureError> {
        self.look(mesh, false)
    }

    /// The same, but nothing waits any more: what cannot be decided is taken back.
    pub fn settle(&self, mesh: &Mesh) -> Result<(), CaptureError> {
        self.look(mesh, true).map(|_nothing| ())
    }

    fn look(&self, mesh: &Mesh, is_last: bool) -> Result<Pending, CaptureError> {
        let mut state = self.state.lock();
        if state.stage == Stage::Serving {
            return Ok(Pending::Nothing);
        }
        if state.away {
            return Ok(Pending::Pods);
        }
        state.stage = Stage::Adopting;
        let (snapshot, enrolled) = (mesh.snapshot(), mesh.enrolled());
        let pods = state.pods(&mesh.pods());
        let world = World { snapshot: &snapshot, enrolled: &enrolled, pods: &pods };
        let pending = self.sift(&mut state, &world, is_last)?;
        if pending == Pending::Nothing {
            state.stage = Stage::Serving;
            let Adopted { kept, taken_back } = std::mem::take(&mut state.adopted);
            if kept + taken_back > 0 {
                tracing::info!(adopted = kept, taken_back, "verdicts of an earlier agent");
            }
        }
        Ok(pending)
    }

    /// Decides on what the kernel holds and this agent has not taken up.
    pub(super) fn sift(
        &self,
        state: &mut State,
        world: &World<'_>,
        is_last: bool,
    ) -> Result<Pending, CaptureError> {
        let Some(kernel) = self.capture.direct() else { return Ok(Pending::Nothing) };
        // Those whose namespace is gone, or that nobody wants any more, are no longer there.
        let captured: HashSet<NetnsCookie> = self.capture.pods().into_iter().collect();
        let mut pending = Pending::Nothing;
        for (key, found) in kernel.verdicts()? {
            if state.table.get(&key).is_some() {
                continue;
            }
            let because = match self.judge(world, &captured, key, &found) {
                Judged::Adopted(grant) => {
                    self.write(state, *grant);
                    state.adopted.kept += 1;
                    continue;
                }
                Judged::Waits(for_what, _) if !is_last => {
                    pending = pending.max(for_what);
                    continue;
                }
                Judged::Waits(_, because) => because.to_string(),
                Judged::Denied(because) => because.to_string(),
                Judged::Changed => "others are chosen now".to_owned(),
            };
            let (source, to) = (key.source, key.destination);
            tracing::debug!(%source, %to, %because, "an earlier agent's verdict taken back");
            self.take_back(state, &key);
            state.adopted.taken_back += 1;
        }
        Ok(pending)
    }

    fn judge(
        &self,
        world: &World<'_>,
        captured: &HashSet<NetnsCookie>,
        key: VerdictKey,
        found: &tables::Verdict,
    ) -> Judged {
        let ends = found.backends.iter().map(|backend| backend.netns).chain([key.source]);
        let unknown: Vec<NetnsCookie> = ends.filter(|pod| !world.pods.knows(*pod)).collect();
        if unknown.iter().any(|pod| !captured.contains(pod)) {
            return Judged::Denied(NoVerdict::Unknown);
        }
        if !unknown.is_empty() {
            return Judged::Waits(Pending::Pods, NoVerdict::Unknown);
        }
        let permitted = match self.permit(world, key) {
            Ok(permitted) => permitted,
            Err(because) => return Judged::Denied(because),
        };
        let is_permitted = permitted.admits_as(found);
        let lacking = match self.prove(world, permitted, found.id) {
            Ok(grant) if grant.admits_as(found) => return Judged::Adopted(Box::new(grant)),
            Ok(grant) => grant.lacking.map(NoVerdict::NoCertificate),
            Err(because) => Some(because),
        };
        match lacking {
            Some(because) if is_permitted => Judged::Waits(Pending::Certificates, because),
            Some(_) | None => Judged::Changed,
        }
    }

    /// Nothing is admitted by any verdict from now on, but by those of another agent that takes over.
    pub fn close(&self) -> Result<(), CaptureError> {
        let state = self.state.lock();
        let kernel = self.capture.direct().filter(|_| !state.away);
        kernel.map_or(Ok(()), |kernel| kernel.admit_until(Duration::ZERO))
    }

    /// Neither gives verdicts nor takes them back: another agent may do so from now on.
    pub fn leave(&self) {
        self.state.lock().away = true;
    }

    /// The other agent has not come. Decides anew on all that was given, since publications went by.
    pub fn resume(&self, mesh: &Mesh) {
        let mut state = self.state.lock();
        state.away = false;
        let (snapshot, enrolled) = (mesh.snapshot(), mesh.enrolled());
        let pods = state.pods(&mesh.pods());
        let world = World { snapshot: &snapshot, enrolled: &enrolled, pods: &pods };
        for key in state.table.keys() {
            if let Some(grant) = state.table.get(&key).cloned() {
                self.renew(&mut state, &world, &grant);
            }
        }
    }
}
