//! A pod of this node while it is enrolled: its namespace, its tunnels, its listeners.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::capture::netns::Netns;
use crate::hbone::Pool;

/// One enrolled pod. Connections keep it alive after it is withdrawn.
pub struct Pod {
    /// The uid of its workload.
    pub uid: Arc<str>,
    pub netns: Arc<Netns>,
    /// As configured for its workload.
    pub addresses: Vec<IpAddr>,
    /// Its tunnels to other nodes and to waypoints.
    pub pool: Pool,
    leaving: CancellationToken,
    closed: CancellationToken,
    gone: CancellationToken,
}

impl Pod {
    pub fn new(uid: Arc<str>, netns: Arc<Netns>, addresses: Vec<IpAddr>, pool: Pool) -> Self {
        let (leaving, closed, gone) = Default::default();
        Self { uid, netns, addresses, pool, leaving, closed, gone }
    }

    /// The address that a captured connection really comes from: on its way to the agent the kernel
    /// programs may have led it over loopback, where it keeps its port.
    pub fn client_addr(&self, peer: SocketAddr, destination: IpAddr) -> SocketAddr {
        if !peer.ip().is_loopback() {
            return peer;
        }
        let family = |ip: &&IpAddr| ip.is_ipv4() == destination.is_ipv4();
        let own = self.addresses.iter().find(family).copied();
        SocketAddr::new(own.unwrap_or(peer.ip()), peer.port())
    }

    /// It takes no new streams on its tunnels; peers are told to go elsewhere.
    pub fn leave(&self) {
        self.leaving.cancel();
        self.pool.drain();
    }

    /// Its listeners close once their queues are empty.
    pub fn close(&self) {
        self.closed.cancel();
    }

    /// Its namespace is gone: everything of it ends at once.
    pub fn end(&self) {
        self.gone.cancel();
        self.leave();
        self.close();
    }

    /// Ready when [`Pod::leave`] was called.
    pub async fn left(&self) {
        self.leaving.cancelled().await;
    }

    /// Ready when [`Pod::close`] was called.
    pub async fn is_closed(&self) {
        self.closed.cancelled().await;
    }

    /// Ready when [`Pod::end`] was called.
    pub async fn is_gone(&self) {
        self.gone.cancelled().await;
    }
}
