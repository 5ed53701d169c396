//! The corridor of connections to an enrolled pod: admission, authorization, delivery.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, TcpStream};

use crate::accept::{accept_until, ended, prepare, tune};
use crate::drain::DrainWatch;
use crate::node::Node;
use crate::pods::Pod;

mod hbone;
mod plaintext;

/// Serves the HBONE listener of `pod` until it leaves or the agent drains.
pub async fn serve_hbone(node: Arc<Node>, pod: Arc<Pod>, listener: TcpListener, drain: DrainWatch) {
    tune(&listener, None);
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
    prepare(&listener, node.keepalive);
    let end = ended(&pod, drain.clone());
    accept_until(&listener, end, |tcp, peer: SocketAddr| {
        let (node, pod, drain) = (node.clone(), node.successor(&pod), drain.clone());
        let from = (plaintext::From::Anyone, peer);
        tokio::spawn(async move { plaintext::carry(&node, &pod, tcp, from, drain).await });
    })
    .await;
}

/// Serves a direct connection to `pod` whose verdict was taken back while it was on its way.
pub async fn serve_retracted(
    node: Arc<Node>,
    pod: Arc<Pod>,
    tcp: TcpStream,
    peer: SocketAddr,
    drain: DrainWatch,
) {
    plaintext::carry(&node, &pod, tcp, (plaintext::From::Neighbour, peer), drain).await;
}
