//! The delta protocol as a state machine without I/O: what to ask, what is held, what to answer.
//!
//! Source: the incremental variant of the xDS transport (Envoy's `xds_protocol`, version 3).

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_proto::envoy::config::core::v3::Node;
use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryRequest as Request;
use culvert_proto::google::rpc::Status;
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use hashbrown::HashMap;
use hashbrown::hash_map::Entry;

/// A resource type that is subscribed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Workloads and services.
    Address,
    Authorization,
}

impl Kind {
    /// In the order in which they are asked for.
    pub const ALL: [Kind; 2] = [Kind::Address, Kind::Authorization];

    pub fn url(self) -> &'static str {
        match self {
            Kind::Address => ADDRESS_TYPE_URL,
            Kind::Authorization => AUTHORIZATION_TYPE_URL,
        }
    }

    pub fn of_url(url: &str) -> Option<Self> {
        Self::of_bytes(url.as_bytes())
    }

    pub fn of_bytes(url: &[u8]) -> Option<Self> {
        Kind::ALL.into_iter().find(|kind| kind.url().as_bytes() == url)
    }
}

/// How addresses are subscribed to; policies are always wildcard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Subscription {
    Wildcard,
    OnDemand,
}

/// The version of a resource. Most are a 64-bit number in hexadecimal, which is kept as such.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Version {
    Hex(u64),
    Text(Box<str>),
}

impl Version {
    pub fn new(text: &str) -> Self {
        let is_digit = |byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        // What would be written differently is kept as it was.
        let is_plain = text.bytes().all(is_digit) && (text == "0" || !text.starts_with('0'));
        match u64::from_str_radix(text, 16) {
            Ok(number) if is_plain => Self::Hex(number),
            Ok(_) | Err(_) => Self::Text(text.into()),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Hex(number) => write!(f, "{number:x}"),
            Self::Text(text) => f.write_str(text),
        }
    }
}

/// What a resource is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Item {
    Workload,
    Service,
    Policy,
}

/// One accepted name.
#[derive(Clone, Debug)]
struct Held {
    version: Version,
    /// A workload and a service can have the same name.
    workload: bool,
    service: bool,
}

/// The accepted names of one type. What was rejected is not among them, so that it is sent again
/// on the next stream.
#[derive(Debug, Default)]
pub(super) struct Names {
    held: HashMap<Arc<str>, Held>,
    /// Whether one response was accepted in full.
    synced: bool,
}

impl Names {
    pub fn contains(&self, name: &str) -> bool {
        self.held.contains_key(name)
    }

    /// Makes room for the first `count` names, so that it need not be found step by step.
    pub fn expect(&mut self, count: usize) {
        if self.held.is_empty() {
            self.held.reserve(count);
        }
    }

    /// Gives the name as it is kept, so that what has it as its key can share the memory.
    pub fn accept(&mut self, name: Arc<str>, version: Version, item: Item) -> Arc<str> {
        let mut entry = match self.held.entry(name) {
            Entry::Occupied(mut entry) => {
                entry.get_mut().version = version;
                entry
            }
            Entry::Vacant(entry) => {
                entry.insert_entry(Held { version, workload: false, service: false })
            }
        };
        let held = entry.get_mut();
        match item {
            Item::Workload => held.workload = true,
            Item::Service => held.service = true,
            Item::Policy => {}
        }
        entry.key().clone()
    }

    /// Gives what went; nothing if the name is not held. A workload goes before a service of the
    /// same name, which then stays.
    pub fn remove(&mut self, name: &str) -> Option<Item> {
        let held = self.held.get_mut(name)?;
        if held.workload && held.service {
            held.workload = false;
            return Some(Item::Workload);
        }
        let item = match (held.workload, held.service) {
            (true, _) => Item::Workload,
            (false, true) => Item::Service,
            (false, false) => Item::Policy,
        };
        self.held.remove(name);
        Some(item)
    }

    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Names and their versions.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, &Version)> {
        self.held.iter().map(|(name, held)| (name, &held.version))
    }
}

/// What is held across streams.
#[derive(Debug)]
pub(super) struct Session {
    node: Node,
    subscription: Subscription,
    addresses: Names,
    authorizations: Names,
}

/// How many rejected resources of a response are told of one by one, in the NACK and in the log.
const TOLD: usize = 100;

/// What of a response was not taken over: how many resources, and of the first of them name and
/// reason. A control plane that sends a million of them gets no answer of that size.
#[derive(Clone, Debug, Default)]
pub(super) struct Rejections {
    told: Vec<(String, String)>,
    count: usize,
}

impl Rejections {
    /// Says whether it is one of those that are told.
    pub fn add(&mut self, name: String, why: String) -> bool {
        self.count += 1;
        let is_told = self.told.len() < TOLD;
        if is_told {
            self.told.push((name, why));
        }
        is_told
    }

    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Name and reason of the last that is told.
    pub fn last(&self) -> Option<&(String, String)> {
        self.told.last()
    }

    fn message(&self) -> String {
        let told = self.told.iter().map(|(name, why)| format!("{name}: {why}"));
        let mut message = told.collect::<Vec<_>>().join("; ");
        if self.count > self.told.len() {
            message.push_str(&format!("; and {} more", self.count - self.told.len()));
        }
        message
    }
}

impl Session {
    pub fn new(node: Node, subscription: Subscription) -> Self {
        let (addresses, authorizations) = (Names::default(), Names::default());
        Self { node, subscription, addresses, authorizations }
    }

    pub fn names(&self, kind: Kind) -> &Names {
        match kind {
            Kind::Address => &self.addresses,
            Kind::Authorization => &self.authorizations,
        }
    }

    pub fn names_mut(&mut self, kind: Kind) -> &mut Names {
        match kind {
            Kind::Address => &mut self.addresses,
            Kind::Authorization => &mut self.authorizations,
        }
    }

    /// The first request of each type on a new stream; names what is held, so that only the rest
    /// is sent.
    pub fn open(&self) -> [Request; 2] {
        Kind::ALL.map(|kind| {
            let on_demand = kind == Kind::Address && self.subscription == Subscription::OnDemand;
            // Subscribing to everything and to nothing in one request: to nothing yet.
            let names = if on_demand { vec!["*".to_owned()] } else { Vec::new() };
            let held = self.names(kind).iter();
            let versions: BTreeMap<_, _> =
                held.map(|(name, version)| (name.to_string(), version.to_string())).collect();
            Request {
                node: Some(self.node.clone()),
                type_url: kind.url().to_owned(),
                resource_names_subscribe: names.clone(),
                resource_names_unsubscribe: names,
                initial_resource_versions: versions,
                ..Request::default()
            }
        })
    }

    /// Notes that a response was dealt with, and answers it.
    ///
    /// With anything rejected the answer is a NACK of the whole, though the rest was taken over.
    pub fn answer(&mut self, url: &str, nonce: &str, rejected: &Rejections) -> Request {
        if rejected.is_empty()
            && let Some(kind) = Kind::of_url(url)
        {
            self.names_mut(kind).synced = true;
        }
        let error_detail = (!rejected.is_empty())
            .then(|| Status { message: rejected.message(), ..Status::default() });
        Request {
            type_url: url.to_owned(),
            response_nonce: nonce.to_owned(),
            error_detail,
            ..Request::default()
        }
    }

    /// Whether each type that is subscribed to as a whole was once accepted in full.
    pub fn is_ready(&self) -> bool {
        let whole = Kind::ALL.into_iter().filter(|kind| match (kind, self.subscription) {
            (Kind::Address, Subscription::OnDemand) => false,
            (Kind::Address, Subscription::Wildcard) | (Kind::Authorization, _) => true,
        });
        whole.into_iter().all(|kind| self.names(kind).synced)
    }
}

/// Asks for addresses on demand, and gives up others.
pub(super) fn subscribe(wanted: &[Arc<str>], given_up: &[Arc<str>]) -> Request {
    let names = |names: &[Arc<str>]| names.iter().map(ToString::to_string).collect();
    Request {
        type_url: Kind::Address.url().to_owned(),
        resource_names_subscribe: names(wanted),
        resource_names_unsubscribe: names(given_up),
        ..Request::default()
    }
}

#[cfg(test)]
mod tests;
