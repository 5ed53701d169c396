//! The loop between a decision and what it lacks: ask, fetch, ask again.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::view::{Answers, Coverage, Fetched, Need, Step, View};

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
pub async fn decide<T>(node: &Node, mut decision: impl FnMut(&View<'_>) -> Step<T>) -> T {
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
                let addresses = resolve(&hostname).await;
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
async fn resolve(hostname: &Arc<str>) -> Vec<IpAddr> {
    let target = (hostname.as_ref(), 0);
    match tokio::time::timeout(DNS_LIMIT, tokio::net::lookup_host(target)).await {
        Ok(Ok(found)) => found.map(|addr| addr.ip().to_canonical()).collect(),
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
