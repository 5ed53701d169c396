//! Keeps each text of the mesh once, however many workloads repeat it.

use std::borrow::Borrow;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use hashbrown::HashSet;

use crate::addr::NamespacedHostname;
use crate::workload::{GatewayAddress, Locality, Memberships, PortMap};

/// Gives equal values the same memory. What nobody else holds any more is forgotten by itself as
/// new values come, so that it stays in proportion to what is in use.
#[derive(Debug)]
pub struct Interner {
    /// Its own: threads that count the holders of one value wait for each other.
    empty: Arc<str>,
    texts: Pool<Arc<str>>,
    ports: Pool<PortMap>,
    memberships: Pool<Memberships>,
    made: Pool<Made>,
    gateways: Pool<Arc<GatewayAddress>>,
    localities: Pool<Arc<Locality>>,
}

impl Interner {
    pub fn text(&mut self, text: &str) -> Arc<str> {
        if text.is_empty() {
            return self.empty.clone();
        }
        if let Some(known) = self.texts.known.get(text) {
            return known.clone();
        }
        self.texts.keep(text.into())
    }

    /// The same as [`Self::text`], for what is often the same as `last`.
    pub fn text_like(&mut self, last: &mut Last, text: &str) -> Arc<str> {
        if *last.0 != *text {
            last.0 = self.text(text);
        }
        last.0.clone()
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

    /// What `make` made of `source` before, or makes of it now.
    pub fn memberships_of<E>(
        &mut self,
        source: &[u8],
        make: impl FnOnce(&mut Self) -> Result<Memberships, E>,
    ) -> Result<Memberships, E> {
        if let Some(known) = self.made.known.get(source) {
            return Ok(known.value.clone());
        }
        let value = make(self)?;
        Ok(self.made.keep(Made { source: source.into(), value }).value)
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

impl Default for Interner {
    fn default() -> Self {
        Self {
            empty: "".into(),
            texts: Pool::default(),
            ports: Pool::default(),
            memberships: Pool::default(),
            made: Pool::default(),
            gateways: Pool::default(),
            localities: Pool::default(),
        }
    }
}

/// The text that a field had last.
#[derive(Debug)]
pub struct Last(Arc<str>);

impl Default for Last {
    fn default() -> Self {
        // Its own as well.
        Self("".into())
    }
}

/// Memberships, found by what they were made of.
#[derive(Clone, Debug)]
struct Made {
    source: Arc<[u8]>,
    value: Memberships,
}

impl Borrow<[u8]> for Made {
    fn borrow(&self) -> &[u8] {
        &self.source
    }
}

impl PartialEq for Made {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Made {}

impl Hash for Made {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
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

impl Shared for Made {
    fn holders(&self) -> usize {
        self.value.sharers()
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
