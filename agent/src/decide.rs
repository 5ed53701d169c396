//! The loop between a decision and what it lacks: ask, fetch, ask again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::view::{Answers, Coverage, Fetched, Need, Step, View};
use culvert_core::workload::Workload;

use crate::node::Node;

/// How long one DNS look-up may take before it counts as unanswered.
const DNS_LIMIT: Duration = Duration::from_secs(5);

/// How many things of the mesh are fetched for one decision: more than any chain of references has,
/// so that nobody who changes the mesh meanwhile can keep a connection waiting.
const MOST_FETCHED: usize = 16;

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
    let mut fetched = 0;
    let coverage = match node.fetch {
        Some(_) => Coverage::OnDemand,
        None => Coverage::Whole,
    };
    loop {
        let need = {
            let (snapshot, enrolled) = (node.mesh.snapshot(), node.mesh.enrolled());
            let view = View {
                snapshot: &snapshot,
                network: &node.network,
                node: &node.name,
                enrolled: &enrolled,
                answers: &answers,
                coverage,
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
            Need::Resource(key) => {
                fetched += 1;
                let answer = match &node.fetch {
                    Some(fetch) if fetched <= MOST_FETCHED => fetch.fetch(key.clone()).await,
                    Some(_) | None => Fetched::Unanswered,
                };
                answers.note_resource(key, answer);
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
