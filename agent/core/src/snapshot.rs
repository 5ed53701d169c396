//! The mesh as known at one instant: immutable, indexed, cheap to derive from its predecessor.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::NamespacedHostname;
use crate::authorization::Authorization;
use crate::service::Service;
use crate::workload::{PolicyKey, Workload};

/// One step from a snapshot to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Workload(Workload),
    RemoveWorkload(Arc<str>),
    Service(Service),
    RemoveService(NamespacedHostname),
    Authorization(Authorization),
    RemoveAuthorization(PolicyKey),
    /// Replaces the set of workloads that must be reached through their waypoint.
    RequireWaypoint(RequireWaypoint),
}

/// Which local workloads refuse what does not come from their waypoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RequireWaypoint {
    #[default]
    Nobody,
    /// Every workload that is bound to a waypoint, by itself or through a service.
    EveryBound,
    /// The workloads with these uids.
    Workloads(Vec<Arc<str>>),
}

/// Cloning copies a few pointers.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    services: BTreeMap<NamespacedHostname, Arc<Service>>,
    policies: BTreeMap<PolicyKey, Arc<Authorization>>,
    require_waypoint: RequireWaypoint,
}

impl Snapshot {
    /// The snapshot after `changes`, applied in order.
    pub fn with(&self, changes: impl IntoIterator<Item = Change>) -> Snapshot {
        let mut next = self.clone();
        for change in changes {
            match change {
                Change::Workload(workload) => {
                    next.workloads.insert(workload.uid.clone(), Arc::new(workload));
                }
                Change::RemoveWorkload(uid) => {
                    next.workloads.remove(&uid);
                }
                Change::Service(service) => {
                    next.services.insert(service.key(), Arc::new(service));
                }
                Change::RemoveService(key) => {
                    next.services.remove(&key);
                }
                Change::Authorization(policy) => {
                    next.policies.insert(policy.key(), Arc::new(policy));
                }
                Change::RemoveAuthorization(key) => {
                    next.policies.remove(&key);
                }
                Change::RequireWaypoint(require) => next.require_waypoint = require,
            }
        }
        next
    }

    pub fn workloads(&self) -> impl Iterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    pub fn workload(&self, uid: &str) -> Option<&Arc<Workload>> {
        self.workloads.get(uid)
    }

    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }

    pub fn service(&self, key: &NamespacedHostname) -> Option<&Arc<Service>> {
        self.services.get(key)
    }

    pub fn policies(&self) -> impl Iterator<Item = &Arc<Authorization>> {
        self.policies.values()
    }

    pub fn policy(&self, key: &str) -> Option<&Arc<Authorization>> {
        self.policies.get(key)
    }

    pub fn require_waypoint(&self) -> &RequireWaypoint {
        &self.require_waypoint
    }
}
