//! The agent's own pod as one of the mesh: what the mesh may ask of it, such as its metrics.
//!
//! Peers do the same: a scraper of the mesh reaches the agent through a tunnel, known by its identity,
//! and policies for the agent's workload hold.

use std::sync::Arc;

use tokio::net::TcpListener;

use crate::capture::{ListenOptions, Netns};
use crate::config::AgentPod;
use crate::drain::DrainWatch;
use crate::hbone::Pool;
use crate::inbound;
use crate::node::Node;
use crate::pods::{Claim, Pod, PodName};

/// Serves tunnels to the agent itself, if it is told which pod it is. Without them it still serves
/// the pods of the node, so what fails is told and no more.
pub(super) fn serve(node: &Arc<Node>, own: &AgentPod, listen: ListenOptions, drain: DrainWatch) {
    let AgentPod { name, namespace, service_account, .. } = own;
    if name.is_empty() || namespace.is_empty() || service_account.is_empty() {
        return;
    }
    let claim = Claim::Named(PodName {
        name: name.clone(),
        namespace: namespace.clone(),
        service_account: service_account.clone(),
        node: node.name.clone(),
    });
    match start(node, claim, listen, drain) {
        Ok(()) => tracing::info!(%namespace, pod = %name, "the agent is a pod of the mesh"),
        Err(error) => tracing::error!(%error, "no tunnels to the agent itself"),
    }
}

fn start(
    node: &Arc<Node>,
    claim: Claim,
    listen: ListenOptions,
    drain: DrainWatch,
) -> anyhow::Result<()> {
    let netns = Arc::new(Netns::current()?);
    let listener = TcpListener::from_std(netns.listen_for_tunnels(listen)?)?;
    let pod = Arc::new(Pod::of_agent(claim, netns, Pool::new(node.tunnels.clone()), &drain));
    let _first = node.own.set(pod.clone());
    tokio::spawn(inbound::serve_hbone(node.clone(), pod, listener, drain));
    Ok(())
}
