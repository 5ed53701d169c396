//! Applying the difference of two files to the one's snapshot makes the other's.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_core::snapshot::{Change, RequireWaypoint, Snapshot};
use proptest::prelude::*;

use super::EXAMPLE;
use crate::file::{Mesh, diff};

/// All that a snapshot holds, in an order of its own.
fn content(snapshot: &Snapshot) -> impl PartialEq + std::fmt::Debug {
    let workloads: BTreeMap<_, _> =
        snapshot.workloads().map(|it| (it.uid.clone(), Arc::clone(it))).collect();
    let services: BTreeMap<_, _> =
        snapshot.services().map(|it| (it.key(), Arc::clone(it))).collect();
    let policies: BTreeMap<_, _> =
        snapshot.policies().map(|it| (it.key(), Arc::clone(it))).collect();
    (workloads, services, policies, snapshot.require_waypoint().clone())
}

fn snapshot_of(mesh: &Mesh) -> Snapshot {
    Snapshot::default().with(diff(&Mesh::default(), mesh))
}

/// Some of the example's entries, some with one field changed.
fn mesh() -> impl Strategy<Value = Mesh> {
    let keep = prop::collection::vec(0u8..3, 9);
    let require = prop_oneof![
        Just(RequireWaypoint::Nobody),
        Just(RequireWaypoint::EveryBound),
        Just(RequireWaypoint::Workloads(vec!["demo//Pod/shop/api-1".into()])),
    ];
    (keep, require).prop_map(|(keep, require)| {
        let mut mesh = Mesh::parse(EXAMPLE.as_bytes()).unwrap();
        let mut keep = keep.into_iter();
        let mut fate = || keep.next().unwrap_or(1);
        mesh.workloads.retain(|_, workload| {
            let fate = fate();
            workload.capacity += u32::from(fate);
            fate > 0
        });
        mesh.services.retain(|_, service| {
            let fate = fate();
            service.canonical = fate > 1;
            fate > 0
        });
        mesh.policies.retain(|_, policy| {
            let fate = fate();
            policy.dry_run = fate > 1;
            fate > 0
        });
        mesh.culvert.require_waypoint = require;
        mesh
    })
}

proptest! {
    #[test]
    fn applied_difference_is_the_other_file(old in mesh(), new in mesh()) {
        let next = snapshot_of(&old).with(diff(&old, &new));
        prop_assert_eq!(
            format!("{:?}", content(&next)),
            format!("{:?}", content(&snapshot_of(&new)))
        );
        prop_assert!(diff(&new, &new).is_empty());
    }
}

#[test]
fn only_what_changed_is_in_the_difference() {
    let old = Mesh::parse(EXAMPLE.as_bytes()).unwrap();
    let edited = EXAMPLE.replacen("capacity: 2", "capacity: 3", 1);
    let new = Mesh::parse(edited.as_bytes()).unwrap();
    let changes = diff(&old, &new);
    let [Change::Workload(workload)] = changes.as_slice() else { panic!("{changes:?}") };
    assert_eq!(workload.capacity, 3);
}
