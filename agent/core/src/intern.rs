//! Keeps each text of the mesh once, however many workloads repeat it.

use std::hash::Hash;
use std::sync::Arc;

use hashbrown::HashSet;

use crate::addr::NamespacedHostname;
use crate::workload::{GatewayAddress, Locality, Memberships, PortMap};

/// Gives equal values the same memory. What nobody else holds any more is forgotten by itself as
/// new values come, so that it stays in proportion to what is in use.
#[derive(Debug, Default)]
pub struct Interner {
    texts: Pool<Arc<str>>,
    ports: Pool<PortMap>,
    memberships: Pool<Memberships>,
    gateways: Pool<Arc<GatewayAddress>>,
    localities: Pool<Arc<Locality>>,
}

impl Interner {
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if text.is_empty() {
            return Arc::default();
        }
        if let Some(known) = self.texts.known.get(text) {
            return known.clone();
        }
        self.texts.keep(text.into())
    }

    /// The hostname's own texts are kept too.
    pub fn hostname(&mut self, namespace: &str, hostname: &str) -> NamespacedHostname {
        NamespacedHostname { namespace: self.text(namespace), hostname: self.text(hostname) }
    }

    pub fn ports(&mut self, ports: PortMap) -> PortMap {
        match self.ports.known.get(&ports) {
            Some(known) => known.clone(),
            None => self.ports.keep(ports),
        }
    }

    pub fn memberships(&mut self, memberships: Memberships) -> Memberships {
        match self.memberships.known.get(&memberships) {
            Some(known) => known.clone(),
            None => self.memberships.keep(memberships),
        }
    }

    pub fn gateway(&mut self, gateway: GatewayAddress) -> Arc<GatewayAddress> {
        match self.gateways.known.get(&gateway) {
            Some(known) => known.clone(),
            None => self.gateways.keep(gateway.into()),
        }
    }

    pub fn locality(&mut self, locality: Locality) -> Arc<Locality> {
        match self.localities.known.get(&locality) {
            Some(known) => known.clone(),
            None => self.localities.keep(locality.into()),
        }
    }
}

/// Values that know how many share them.
trait Shared: Clone + Eq + Hash {
    fn holders(&self) -> usize;
}

impl<T: Eq + Hash + ?Sized> Shared for Arc<T> {
    fn holders(&self) -> usize {
        Arc::strong_count(self)
    }
}

impl Shared for PortMap {
    fn holders(&self) -> usize {
        self.sharers()
    }
}

impl Shared for Memberships {
    fn holders(&self) -> usize {
        self.sharers()
    }
}

#[derive(Debug)]
struct Pool<T> {
    known: HashSet<T>,
    /// How many it may hold before those that only it holds are forgotten.
    limit: usize,
}

/// Fewer than this are not worth a look.
const FEW: usize = 1024;

impl<T: Shared> Pool<T> {
    fn keep(&mut self, value: T) -> T {
        if self.known.len() >= self.limit {
            self.known.retain(|known| known.holders() > 1);
            self.limit = (self.known.len() * 2).max(FEW);
        }
        self.known.insert(value.clone());
        value
    }
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), limit: FEW }
    }
}

#[cfg(test)]
mod tests;
