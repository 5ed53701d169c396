//! The workloads of each service.

use std::sync::{Arc, OnceLock};

use super::batch::Net;
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

impl MemberIndex {
    /// `net` has the hashes of `by_uid`.
    pub fn apply(&mut self, net: &Net<Workload>, by_uid: &Trie<Workload>) {
        let mut joins: Vec<(u64, &NamespacedHostname, Step<'_, Workload>)> = Vec::new();
        for Step { hash, value, kind } in net.all() {
            joins.extend(
                value
                    .services
                    .keys()
                    .map(|service| (self.0.hash(service), service, Step { hash, value, kind })),
            );
        }
        // Stable: what goes is before what comes.
        joins.sort_by_key(|(hash, ..)| *hash);
        let mut changes: Vec<MembersChange<'_>> = Vec::new();
        for (hash, service, step) in joins {
            // Services of one hash may alternate.
            let mut recent = changes.iter_mut().rev().take_while(|change| change.hash == hash);
            match recent.find(|change| change.service == service) {
                Some(change) => change.steps.push(step),
                None => {
                    let old = self.members_of(service).cloned();
                    changes.push(MembersChange { hash, service, old, steps: vec![step] });
                }
            }
        }
        let mut all = Vec::with_capacity(changes.len());
        for MembersChange { hash, service, old, steps } in changes {
            let mut workloads = match &old {
                Some(members) => members.workloads.clone(),
                None => Trie::empty_like(by_uid),
            };
            workloads.apply(steps);
            let service = service.clone();
            let new = (workloads.len() > 0)
                .then(|| Arc::new(Members { service, workloads, roster: OnceLock::new() }));
            all.push((hash, old, new));
        }
        let steps = all.iter().flat_map(|(hash, old, new)| {
            let removed = old.iter().map(|value| Step { hash: *hash, value, kind: Kind::Remove });
            let added = new.iter().map(|value| Step { hash: *hash, value, kind: Kind::Insert });
            removed.chain(added)
        });
        self.0.apply(steps.collect());
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

/// What happens to the members of one service.
struct MembersChange<'a> {
    hash: u64,
    service: &'a NamespacedHostname,
    old: Option<Arc<Members>>,
    steps: Vec<Step<'a, Workload>>,
}
