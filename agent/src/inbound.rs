//! The corridor of connections to an enrolled pod: admission, authorization, delivery.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpListener;

use crate::accept::{accept_until, ended};
use crate::drain::DrainWatch;
use crate::node::Node;
use crate::pods::Pod;

mod hbone;
mod plaintext;

/// Serves the HBONE listener of `pod` until it leaves or the agent drains.
pub async fn serve_hbone(node: Arc<Node>, pod: Arc<Pod>, listener: TcpListener, drain: DrainWatch) {
    let end = ended(&pod, drain.clone());
    accept_until(&listener, end, |tcp, peer| {
        let (node, pod, drain) = (node.clone(), node.successor(&pod), drain.clone());
        tokio::spawn(hbone::serve(node, pod, tcp, peer, drain));
    })
    .await;
}

/// Serves the plaintext listener of `pod` until it leaves or the agent drains.
pub async fn serve_plaintext(
    node: Arc<Node>,
    pod: Arc<Pod>,
    listener: TcpListener,
    drain: DrainWatch,
) {
    let end = ended(&pod, drain.clone());
    accept_until(&listener, end, |tcp, peer: SocketAddr| {
        let (node, pod, drain) = (node.clone(), node.successor(&pod), drain.clone());
        tokio::spawn(async move { plaintext::carry(&node, &pod, tcp, peer, drain).await });
    })
    .await;
}
