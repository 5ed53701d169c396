//! Whether an inbound connection is permitted, and by which policy.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::authorization::{Action, Authorization, Connection};
use crate::identity::Identity;
use crate::resolve::{self, Destination};
use crate::snapshot::{RequireWaypoint, Snapshot};
use crate::workload::{GatewayAddress, GatewayDestination, PolicyKey, Workload};

/// What is to be done with one connection, and what is to be logged about it.
#[derive(Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Result<Permit, Denied>,
    /// What policies that are not enforced would have done.
    pub dry_run: Vec<DryRun>,
    /// Policies that the workload names and that are not known. They are skipped, so that
    /// connections they would deny are let in until they arrive: worth a warning.
    pub missing: Vec<PolicyKey>,
}

/// Proof that a connection was authorized; only [`authorize`] makes one.
#[derive(Debug, PartialEq, Eq)]
pub struct Permit {
    by: PermittedBy,
}

/// Why a connection is permitted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PermittedBy {
    /// No enforced policy of action ALLOW applies.
    NoPolicy,
    Rule {
        policy: PolicyKey,
        rule: usize,
    },
}

impl Permit {
    pub fn by(&self) -> &PermittedBy {
        &self.by
    }

    /// The `namespace/name` of the policy that allowed it; `None` when none applies.
    pub fn policy(&self) -> Option<&PolicyKey> {
        match &self.by {
            PermittedBy::NoPolicy => None,
            PermittedBy::Rule { policy, .. } => Some(policy),
        }
    }

    /// The place of the rule in that policy.
    pub fn rule(&self) -> Option<usize> {
        match &self.by {
            PermittedBy::NoPolicy => None,
            PermittedBy::Rule { rule, .. } => Some(*rule),
        }
    }
}

impl fmt::Display for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.by.fmt(f)
    }
}

impl fmt::Display for PermittedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PermittedBy::NoPolicy => f.write_str("no policy"),
            PermittedBy::Rule { policy, rule } => write!(f, "allowed by: {policy}, rule {rule}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    #[error("explicitly denied by: {policy}")]
    Explicit { policy: PolicyKey, rule: usize },
    #[error("allow policies exist, but none allowed")]
    NoneAllowed,
    /// The workload must be reached through its waypoint.
    #[error("not from waypoint: {waypoint}")]
    NotFromWaypoint { waypoint: String },
}

impl Denied {
    /// The `namespace/name` of the policy that denied it.
    pub fn policy(&self) -> Option<&PolicyKey> {
        match self {
            Denied::Explicit { policy, .. } => Some(policy),
            Denied::NoneAllowed | Denied::NotFromWaypoint { .. } => None,
        }
    }

    /// The place of the rule in that policy.
    pub fn rule(&self) -> Option<usize> {
        match self {
            Denied::Explicit { rule, .. } => Some(*rule),
            Denied::NoneAllowed | Denied::NotFromWaypoint { .. } => None,
        }
    }
}

/// What a policy that is evaluated without being enforced says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DryRun {
    WouldDeny {
        policy: PolicyKey,
        rule: usize,
    },
    WouldAllow {
        policy: PolicyKey,
        rule: usize,
    },
    /// There are policies of action ALLOW, all of them dry-run, and none matches.
    WouldNotAllow {
        policies: Vec<PolicyKey>,
    },
}

impl fmt::Display for DryRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DryRun::WouldDeny { policy, .. } => write!(f, "would be denied by: {policy}"),
            DryRun::WouldAllow { policy, .. } => write!(f, "would be allowed by: {policy}"),
            DryRun::WouldNotAllow { policies } => {
                write!(f, "would be denied: none allowed of {}", policies.join(", "))
            }
        }
    }
}

/// Judges one connection to a local workload by the policies of this snapshot.
pub fn authorize(snapshot: &Snapshot, local: &Workload, connection: &Connection) -> Judgement {
    let (policies, missing) = applicable(snapshot, local);
    let mut dry_run = Vec::new();
    let verdict =
        judge(&policies, connection, &mut dry_run).and_then(|permit| {
            match waypoint_demand(snapshot, local) {
                Some(demand) => demand.check(snapshot, connection).map(|()| permit),
                None => Ok(permit),
            }
        });
    Judgement { verdict, dry_run, missing }
}

/// Whether every connection to a workload is judged alike by both snapshots, as far as can be
/// told without looking at connections. False when the workload came, went or changed.
pub fn judges_alike(before: &Snapshot, after: &Snapshot, uid: &str) -> bool {
    let (Some(earlier), Some(later)) = (before.workload(uid), after.workload(uid)) else {
        return false;
    };
    let demand =
        |snapshot, local| waypoint_demand(snapshot, local).map(|demand| demand.accepted(snapshot));
    Arc::ptr_eq(earlier, later)
        && before.shares_policies_with(after)
        && demand(before, earlier) == demand(after, later)
}

/// The policies that apply to a workload, each once, and the names of those it lacks.
fn applicable<'a>(
    snapshot: &'a Snapshot,
    local: &Workload,
) -> (Vec<&'a Authorization>, Vec<PolicyKey>) {
    let global = snapshot.global_policies().iter();
    let of_namespace = snapshot.namespace_policies(&local.namespace);
    let mut policies: Vec<&Authorization> = global.chain(of_namespace).map(|p| &**p).collect();
    let mut missing = Vec::new();
    for key in &local.authorization_policies {
        match snapshot.policy(key) {
            Some(policy) if policies.iter().any(|other| std::ptr::eq(*other, &**policy)) => {}
            Some(policy) => policies.push(policy),
            None => missing.push(key.clone()),
        }
    }
    (policies, missing)
}

fn judge(
    policies: &[&Authorization],
    connection: &Connection,
    dry_run: &mut Vec<DryRun>,
) -> Result<Permit, Denied> {
    let of = |action: Action, dry_run: bool| {
        policies.iter().filter(move |policy| policy.action == action && policy.dry_run == dry_run)
    };
    let matching = |policy: &&&Authorization| {
        policy.matching_rule(connection).map(|rule| (policy.key(), rule))
    };
    for (policy, rule) in of(Action::Deny, true).filter_map(|p| matching(&p)) {
        dry_run.push(DryRun::WouldDeny { policy, rule });
    }
    if let Some((policy, rule)) = of(Action::Deny, false).find_map(|p| matching(&p)) {
        return Err(Denied::Explicit { policy, rule });
    }

    let has_allow = of(Action::Allow, false).next().is_some();
    let before = dry_run.len();
    for (policy, rule) in of(Action::Allow, true).filter_map(|p| matching(&p)) {
        dry_run.push(DryRun::WouldAllow { policy, rule });
    }
    let candidates: Vec<PolicyKey> = of(Action::Allow, true).map(|policy| policy.key()).collect();
    if !has_allow && dry_run.len() == before && !candidates.is_empty() {
        dry_run.push(DryRun::WouldNotAllow { policies: candidates });
    }

    if !has_allow {
        return Ok(Permit { by: PermittedBy::NoPolicy });
    }
    match of(Action::Allow, false).find_map(|p| matching(&p)) {
        Some((policy, rule)) => Ok(Permit { by: PermittedBy::Rule { policy, rule } }),
        None => Err(Denied::NoneAllowed),
    }
}

/// The waypoints of a workload that must be reached through one of them; never empty.
struct WaypointDemand<'a> {
    waypoints: Vec<(&'a Arc<GatewayAddress>, Destination<'a>)>,
}

/// `None`: the workload may be reached by anyone.
fn waypoint_demand<'a>(snapshot: &'a Snapshot, local: &'a Workload) -> Option<WaypointDemand<'a>> {
    let is_demanded = match snapshot.require_waypoint() {
        RequireWaypoint::Nobody => false,
        RequireWaypoint::EveryBound => true,
        RequireWaypoint::Workloads(uids) => uids.contains(&local.uid),
    };
    if !is_demanded {
        return None;
    }
    let of_services = snapshot.services_of(local).flat_map(|service| service.waypoints());
    let waypoints: Vec<_> = of_services
        .chain(&local.waypoint)
        .map(|reference| (reference, behind(snapshot, reference)))
        // A waypoint is not bound to itself.
        .filter(|(_, waypoint)| !waypoint.includes(local))
        .collect();
    (!waypoints.is_empty()).then_some(WaypointDemand { waypoints })
}

/// Where source agents send what is bound to the waypoint.
fn behind<'a>(snapshot: &'a Snapshot, reference: &GatewayAddress) -> Destination<'a> {
    match &reference.destination {
        GatewayDestination::Hostname(name) => resolve::hostname(snapshot, name),
        GatewayDestination::Address(at) => resolve::upstream_at(snapshot, &at.network, at.ip, None),
    }
}

impl WaypointDemand<'_> {
    /// Coming from any of the waypoints suffices; one that is not known lets nobody in.
    fn check(&self, snapshot: &Snapshot, connection: &Connection) -> Result<(), Denied> {
        let from_waypoint = connection.identity.as_ref().is_some_and(|identity| {
            self.waypoints
                .iter()
                .any(|(_, waypoint)| waypoint.identities(snapshot).any(|known| known == *identity))
        });
        if from_waypoint {
            return Ok(());
        }
        let names: BTreeSet<String> =
            self.waypoints.iter().map(|(reference, _)| reference.destination.to_string()).collect();
        let waypoint = names.into_iter().collect::<Vec<_>>().join(", ");
        Err(Denied::NotFromWaypoint { waypoint })
    }

    fn accepted(&self, snapshot: &Snapshot) -> BTreeSet<Identity> {
        self.waypoints.iter().flat_map(|(_, waypoint)| waypoint.identities(snapshot)).collect()
    }
}

#[cfg(test)]
mod tests;
