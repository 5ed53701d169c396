//! The workloads of each service.

use std::sync::{Arc, OnceLock};

use hashbrown::HashTable;

use super::trie::{Kind, Step, Trie};
use crate::addr::NamespacedHostname;
use crate::workload::Workload;

/// By service, whether or not that is known.
#[derive(Clone, Debug, Default)]
pub(super) struct MemberIndex(Trie<Members>);

/// The workloads that name one service as theirs.
#[derive(Debug)]
struct Members {
    service: NamespacedHostname,
    /// By uid.
    workloads: Trie<Workload>,
    /// The same to draw from, made when first needed.
    roster: OnceLock<Roster>,
}

/// The workloads that name a service as theirs, healthy or not, in no particular order.
#[derive(Debug)]
pub struct Roster {
    pub workloads: Box<[Arc<Workload>]>,
    /// The largest of their capacities.
    pub heaviest: u32,
}

/// What happens to the members of services, by service.
pub(super) struct Joins<'a> {
    index: &'a MemberIndex,
    changes: Vec<MembersChange>,
    /// Places in `changes`.
    by_service: HashTable<u32>,
}

/// What happens to the members of one service.
struct MembersChange {
    hash: u64,
    service: NamespacedHostname,
    /// With the hashes of uids.
    steps: Vec<Step<Workload>>,
}

impl<'a> Joins<'a> {
    pub fn of(index: &'a MemberIndex) -> Self {
        Self { index, changes: Vec::new(), by_service: HashTable::new() }
    }

    /// `step` has the hash of the workload's uid.
    pub fn add(&mut self, service: &NamespacedHostname, step: Step<Workload>) {
        let hash = self.index.0.hash(service);
        let changes = &mut self.changes;
        let is_it = |place: &u32| {
            let change = changes.get(*place as usize);
            change.is_some_and(|it| it.hash == hash && it.service == *service)
        };
        let known = self.by_service.find(hash, is_it).map(|place| *place as usize);
        match known.and_then(|place| changes.get_mut(place)) {
            Some(change) => change.steps.push(step),
            None => {
                let place = changes.len() as u32;
                changes.push(MembersChange { hash, service: service.clone(), steps: vec![step] });
                let hash_of = |place: &u32| changes.get(*place as usize).map_or(0, |it| it.hash);
                self.by_service.insert_unique(hash, place, hash_of);
            }
        }
    }
}

impl MemberIndex {
    /// `alike` hashes uids as `joins` did.
    pub fn apply(&mut self, joins: Joins<'_>, alike: &Trie<Workload>) {
        let mut steps = Vec::with_capacity(joins.changes.len());
        for MembersChange { hash, service, steps: joining } in joins.changes {
            let old = self.members_of(&service).cloned();
            let mut workloads = match &old {
                Some(members) => members.workloads.clone(),
                None => Trie::empty_like(alike),
            };
            workloads.apply(joining);
            let old = old.map(|value| Step { hash, value, kind: Kind::Remove });
            steps.extend(old);
            if workloads.len() > 0 {
                let value = Arc::new(Members { service, workloads, roster: OnceLock::new() });
                steps.push(Step { hash, value, kind: Kind::Insert });
            }
        }
        self.0.apply(steps);
    }

    pub fn of<'a>(
        &'a self,
        service: &NamespacedHostname,
    ) -> impl Iterator<Item = &'a Arc<Workload>> + use<'a> {
        self.members_of(service).into_iter().flat_map(|members| members.workloads.values())
    }

    pub fn roster(&self, service: &NamespacedHostname) -> Option<&Roster> {
        let members = self.members_of(service)?;
        Some(members.roster.get_or_init(|| {
            let workloads: Box<[_]> = members.workloads.values().cloned().collect();
            let heaviest = workloads.iter().map(|workload| workload.capacity).max();
            Roster { workloads, heaviest: heaviest.unwrap_or_default() }
        }))
    }

    /// How many workloads name the service as theirs.
    pub fn count(&self, service: &NamespacedHostname) -> usize {
        self.members_of(service).map_or(0, |members| members.workloads.len())
    }

    /// Whether no workload of the service came, went or changed between the two.
    pub fn shares_with(&self, other: &Self, service: &NamespacedHostname) -> bool {
        match (self.members_of(service), other.members_of(service)) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        }
    }

    fn members_of(&self, service: &NamespacedHostname) -> Option<&Arc<Members>> {
        self.0.find(self.0.hash(service), |members| members.service == *service)
    }
}
