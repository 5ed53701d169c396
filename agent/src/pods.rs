//! A pod of this node while it is enrolled: its namespace, its tunnels, its listeners.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::capture::netns::Netns;
use crate::hbone::Pool;

/// One enrolled pod. Connections keep it alive after it is withdrawn.
pub struct Pod {
    /// The uid of its workload.
    pub uid: Arc<str>,
    pub netns: Arc<Netns>,
    /// Its tunnels to other nodes and to waypoints.
    pub pool: Pool,
    leaving: CancellationToken,
    closed: CancellationToken,
    gone: CancellationToken,
}

impl Pod {
    pub fn new(uid: Arc<str>, netns: Arc<Netns>, pool: Pool) -> Self {
        let (leaving, closed, gone) = Default::default();
        Self { uid, netns, pool, leaving, closed, gone }
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
