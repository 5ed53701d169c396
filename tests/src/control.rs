//! A control plane for tests: gRPC over TLS with a PKI of its own, on loopback or in a network
//! namespace.
//!
//! [`ControlPlane`] serves the workload API from a [`World`] that the test holds, as istiod does; see
//! [`ads`]. Further services join it through [`ControlPlane::start_with`], or stand by themselves on a
//! [`Serving`].

pub mod ads;
pub mod ca;
pub mod pki;
pub mod prepared;
pub mod serving;
pub mod world;

use std::sync::Arc;

use tonic::service::Routes;

pub use ads::{Behaviour, Recorded};
pub use pki::Pki;
pub use prepared::Prepared;
pub use serving::{Listen, Serving};
pub use world::World;

/// A control plane, which can be stopped and started again at the same address.
pub struct ControlPlane {
    /// What it serves, and how it behaves.
    pub world: Arc<World>,
    pub pki: Pki,
    serving: Serving,
}

impl ControlPlane {
    /// Serves the workload API.
    pub fn start(listen: Listen) -> anyhow::Result<Self> {
        Self::start_with(listen, |routes, _| routes)
    }

    /// Serves the workload API and what `add` adds to it.
    pub fn start_with(
        listen: Listen,
        add: impl FnOnce(Routes, &Pki) -> Routes,
    ) -> anyhow::Result<Self> {
        let (world, pki) = (Arc::new(World::default()), Pki::new()?);
        let routes = add(Routes::new(ads::service(world.clone())), &pki);
        let serving = Serving::start(listen, &pki, routes)?;
        Ok(Self { world, pki, serving })
    }

    /// As an agent's setting names it.
    pub fn address(&self) -> String {
        self.serving.address()
    }

    /// Ends all connections and listens no more.
    pub fn stop(&mut self) {
        self.serving.stop();
        self.world.stopped();
    }

    /// Listens again, with the world as it is now.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop();
        self.serving.restart()
    }
}
