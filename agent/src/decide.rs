//! The loop between a decision and what it lacks: ask, fetch, ask again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::view::{Answers, Need, Step, View};
use culvert_core::workload::Workload;

use crate::node::Node;

/// How long one DNS look-up may take before it counts as unanswered.
const DNS_LIMIT: Duration = Duration::from_secs(5);

/// Runs `decision` until it needs nothing more.
///
/// Each round sees one snapshot whole. A need is answered once, also by "absent", so the loop ends
/// after as many rounds as the decision has distinct needs.
pub async fn decide<T>(node: &Node, decision: impl FnMut(&View<'_>) -> Step<T>) -> T {
    answer(node, |_| {}, decision).await
}

/// The same, for a connection of `source`: look-ups count as its own.
pub async fn decide_for<T>(
    node: &Node,
    source: &Workload,
    decision: impl FnMut(&View<'_>) -> Step<T>,
) -> T {
    answer(node, |hostname| node.telemetry.on_demand_dns(source, hostname), decision).await
}

async fn answer<T>(
    node: &Node,
    looked_up: impl Fn(&Arc<str>),
    mut decision: impl FnMut(&View<'_>) -> Step<T>,
) -> T {
    let mut answers = Answers::default();
    loop {
        let need = {
            let (snapshot, enrolled) = (node.mesh.snapshot(), node.mesh.enrolled());
            let view = View {
                snapshot: &snapshot,
                network: &node.network,
                node: &node.name,
                enrolled: &enrolled,
                answers: &answers,
            };
            match decision(&view) {
                Step::Done(decided) => return decided,
                Step::Need(need) => need,
            }
        };
        match need {
            Need::Dns(hostname) => {
                looked_up(&hostname);
                let addresses = resolve(node, &hostname).await;
                answers.note_dns(hostname, addresses);
            }
        }
    }
}

/// The addresses of `hostname`, none when the resolver has no answer in time.
async fn resolve(node: &Node, hostname: &Arc<str>) -> Vec<IpAddr> {
    let Some(resolver) = &node.resolver else { return Vec::new() };
    match tokio::time::timeout(DNS_LIMIT, resolver.addresses(hostname)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => {
            tracing::debug!(%hostname, %error, "no address for workload hostname");
            Vec::new()
        }
        Err(_elapsed) => {
            tracing::debug!(%hostname, "dns look-up of workload hostname timed out");
            Vec::new()
        }
    }
}
