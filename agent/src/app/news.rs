//! News of the mesh: what both sources say becomes the next snapshot, and what follows from it.

use std::sync::Arc;

use culvert_core::snapshot::Change;
use parking_lot::Mutex;

use crate::ca::{Certificates, LocalIdentities};
use crate::config::Config;
use crate::node::Mesh;
use crate::telemetry::Telemetry;
use crate::xds::{self, NodeFacts, Xds};

/// Where changes of the mesh go in.
pub(super) struct News {
    mesh: Arc<Mesh>,
    certificates: Arc<Certificates>,
    /// Held from taking changes to settling what they need, so that this is done in their order.
    local: Mutex<LocalIdentities>,
}

impl News {
    pub fn new(mesh: Arc<Mesh>, certificates: Arc<Certificates>, node: Arc<str>) -> Self {
        Self { mesh, certificates, local: Mutex::new(LocalIdentities::new(node)) }
    }

    /// Makes the next snapshot, and fetches and forgets certificates as it asks for.
    pub fn apply(&self, changes: impl IntoIterator<Item = Change>) {
        let mut local = self.local.lock();
        let changes = changes.into_iter().inspect(|change| local.note(change));
        self.mesh.apply(changes);
        // The authority asks the mesh whether the node has the identity.
        self.certificates.settle(&local.due());
    }
}

/// Begins to follow the control plane, if there is one.
pub(super) async fn follow_control_plane(
    config: &Config,
    news: &Arc<News>,
    telemetry: &Telemetry,
) -> Option<Arc<Xds>> {
    let settings = config.xds.as_ref()?;
    let facts = NodeFacts { pod: config.pod.clone(), node: config.node.clone() };
    let news = news.clone();
    let publish = move |changes: &mut dyn Iterator<Item = Change>| news.apply(changes);
    Some(Arc::new(xds::start(settings, &facts, publish, telemetry).await))
}
