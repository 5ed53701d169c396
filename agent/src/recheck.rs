//! Policies changed: are the live connections still permitted?

use std::sync::Arc;
use std::time::Instant;

use culvert_core::authorize::{authorize, judges_alike};
use culvert_core::snapshot::Snapshot;

use crate::connections::{CloseReason, Entry};
use crate::node::{LocalPods, Node};
use crate::pods::Pod;

/// Judges live inbound connections again after every publication, for as long as it is polled.
///
/// A connection registers before it is authorized. So one that is authorized by an older snapshot is
/// found here when the newer one is published, and one that registers later is authorized by it.
pub async fn recheck(node: Arc<Node>) {
    let mut changes = node.mesh.changes();
    let mut judged = node.mesh.snapshot();
    let mut known = node.mesh.pods();
    while changes.changed().await.is_ok() {
        let since = node.mesh.judging();
        let (current, pods) = (node.mesh.snapshot(), node.mesh.pods());
        let same_pods = Arc::ptr_eq(&known, &pods);
        if Arc::ptr_eq(&judged, &current) && same_pods {
            continue;
        }
        for pod in pods.iter() {
            let (Pod { uid, .. }, Some(workload)) = (&*pod.0, &pod.1) else { continue };
            let is_same = same_pods || is_among(&known, uid, workload);
            if !is_same || !judges_alike(&judged, &current, workload) {
                for entry in node.connections.inbound_of(uid) {
                    judge(&current, workload, &entry, since);
                }
            }
        }
        if let Some(own) = node.own.get()
            && let Some(local) = own.claim.find(&current)
            && !judges_alike(&judged, &current, &local.uid)
        {
            for entry in node.connections.inbound_of(&own.uid) {
                judge(&current, &local.uid, &entry, since);
            }
        }
        (judged, known) = (current, pods);
    }
}

/// Whether a pod was the same workload before.
fn is_among(known: &LocalPods, uid: &str, workload: &str) -> bool {
    known.iter().any(|(pod, before)| *pod.uid == *uid && before.as_deref() == Some(workload))
}

/// A workload that is no longer known is being withdrawn: its connections run to their own end.
fn judge(snapshot: &Snapshot, workload: &str, entry: &Entry, since: Instant) {
    let live = entry.live();
    let (Some(connection), Some(local)) = (&live.connection, snapshot.workload(workload)) else {
        return;
    };
    match authorize(snapshot, local, connection).verdict {
        Ok(permit) => entry.permitted(permit.by()),
        Err(denied) => {
            tracing::debug!(src = %live.src(), %denied, "live connection is no longer permitted");
            let (policy, rule) = (denied.policy().cloned(), denied.rule());
            entry.close_since(CloseReason::PolicyChange { policy, rule }, since);
        }
    }
}
