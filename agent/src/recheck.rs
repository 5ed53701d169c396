//! Policies changed: are the live connections still permitted?

use std::sync::Arc;

use culvert_core::authorize::{authorize, judges_alike};
use culvert_core::snapshot::Snapshot;

use crate::connections::{CloseReason, Entry};
use crate::node::Node;

/// Judges live inbound connections again after every publication, for as long as it is polled.
///
/// A connection registers before it is authorized. So one that is authorized by an older snapshot is
/// found here when the newer one is published, and one that registers later is authorized by it.
pub async fn recheck(node: Arc<Node>) {
    let mut changes = node.mesh.changes();
    let mut judged = node.mesh.snapshot();
    while changes.changed().await.is_ok() {
        let current = node.mesh.snapshot();
        if Arc::ptr_eq(&judged, &current) {
            continue;
        }
        for pod in node.mesh.pods() {
            if !judges_alike(&judged, &current, &pod.uid) {
                for entry in node.connections.inbound_of(&pod.uid) {
                    judge(&current, &entry);
                }
            }
        }
        judged = current;
    }
}

/// A workload that is no longer known is being withdrawn: its connections run to their own end.
fn judge(snapshot: &Snapshot, entry: &Entry) {
    let live = entry.live();
    let (Some(connection), Some(local)) = (&live.connection, snapshot.workload(&live.workload))
    else {
        return;
    };
    match authorize(snapshot, local, connection).verdict {
        Ok(permit) => entry.permitted(permit.to_string()),
        Err(denied) => {
            tracing::debug!(src = %live.src, %denied, "live connection is no longer permitted");
            let (policy, rule) = (denied.policy().cloned(), denied.rule());
            entry.close(CloseReason::PolicyChange { policy, rule });
        }
    }
}
