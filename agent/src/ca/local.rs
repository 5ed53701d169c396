//! Which identities the workloads of this node have: what to fetch ahead, and what to forget.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use culvert_core::identity::Identity;
use culvert_core::snapshot::Change;
use culvert_core::workload::{TunnelProtocol, Workload};

/// The identities of one node's workloads, followed change by change.
///
/// It looks at the changes only, never at the mesh: what a change costs depends neither on how many
/// workloads there are nor on how many other nodes have.
pub struct LocalIdentities {
    node: Arc<str>,
    by_uid: HashMap<Arc<str>, Identity>,
    /// How many workloads have it; never 0.
    workloads: HashMap<Identity, usize>,
    /// Whether each identity that the step touched was there before it.
    before: HashMap<Identity, bool>,
}

/// What the certificate cache has to do after a step of the mesh. Nothing is in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentityChanges {
    /// The first workload of these has come.
    pub prefetch: Vec<Identity>,
    /// The last workload of these has gone.
    pub forget: Vec<Identity>,
}

impl LocalIdentities {
    /// Of a node without workloads.
    pub fn new(node: Arc<str>) -> Self {
        let (by_uid, workloads, before) = Default::default();
        Self { node, by_uid, workloads, before }
    }

    /// Follows one change of a step. Those of a step come in the order in which they apply.
    pub fn note(&mut self, change: &Change) {
        match change {
            Change::Workload(workload) => {
                let now = self.needs_certificate(workload).then(|| workload.identity());
                self.set(&workload.uid, now);
            }
            Change::RemoveWorkload(uid) => self.set(uid, None),
            Change::Service(_)
            | Change::RemoveService(_)
            | Change::Authorization(_)
            | Change::RemoveAuthorization(_)
            | Change::RequireWaypoint(_) => {}
        }
    }

    /// Ends a step.
    ///
    /// A workload that moves to another identity within the step counts once, by what it is in the end.
    pub fn due(&mut self) -> IdentityChanges {
        let mut due = IdentityChanges::default();
        for (identity, was) in self.before.drain() {
            match (was, self.workloads.contains_key(&identity)) {
                (false, true) => due.prefetch.push(identity),
                (true, false) => due.forget.push(identity),
                (true, true) | (false, false) => {}
            }
        }
        due.prefetch.sort();
        due.forget.sort();
        due
    }

    /// A pod on this node that has tunnels, by this agent or by itself.
    fn needs_certificate(&self, workload: &Workload) -> bool {
        let in_mesh = workload.tunnel_protocol == TunnelProtocol::Hbone || workload.native_tunnel;
        workload.node == self.node && in_mesh
    }

    fn set(&mut self, uid: &Arc<str>, now: Option<Identity>) {
        if self.by_uid.get(uid) == now.as_ref() {
            return;
        }
        let old = match now.clone() {
            Some(identity) => self.by_uid.insert(uid.clone(), identity),
            None => self.by_uid.remove(uid),
        };
        for identity in old.iter().chain(&now) {
            let was = self.workloads.contains_key(identity);
            self.before.entry(identity.clone()).or_insert(was);
        }
        if let Some(Entry::Occupied(mut count)) = old.map(|old| self.workloads.entry(old)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
        if let Some(identity) = now {
            *self.workloads.entry(identity).or_insert(0) += 1;
        }
    }
}

#[cfg(test)]
mod tests;
