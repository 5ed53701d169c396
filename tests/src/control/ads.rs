//! The workload API of a test's control plane: delta xDS as istiod was seen to speak it.
//!
//! Equal versions are left out of the first answer, names that are gone come back as removed, and
//! policies have no version. Every subscribing request is answered; a change is pushed to the types
//! that it concerns. On demand, the workloads of the asking node come unasked, an address that is
//! asked for by another name comes with that name as alias, and what is not known is removed.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::Arc;

use culvert_proto::ADDRESS_TYPE_URL;
use culvert_proto::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use culvert_proto::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource,
};
use culvert_proto::istio::workload::{Address, address};
use prost::Message;
use prost_types::Any;
use prost_types::value::Kind;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::prepared::Preparing;
use super::world::{Command, Served, World};

/// How new streams are dealt with.
#[derive(Clone, Debug, Default)]
pub enum Behaviour {
    #[default]
    Serve,
    /// Accepts streams, reads, and says nothing.
    Silent,
    /// Accepts calls and gives not even headers.
    Hang,
    /// Ends every call at once.
    Refuse(Status),
}

/// A request that arrived.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The place of its stream among all, from 0.
    pub stream: usize,
    pub request: DeltaDiscoveryRequest,
    /// Of the stream: `authorization`, `clusterid` and what else was sent.
    pub metadata: BTreeMap<String, String>,
}

/// A service to add to a server's routes.
pub fn service(world: Arc<World>) -> Preparing<AggregatedDiscoveryServiceServer<Ads>> {
    let ads = Ads { world: world.clone(), streams: Default::default() };
    let service = AggregatedDiscoveryServiceServer::new(ads)
        .max_decoding_message_size(usize::MAX)
        .max_encoding_message_size(usize::MAX);
    Preparing { service, world }
}

pub struct Ads {
    world: Arc<World>,
    streams: std::sync::atomic::AtomicUsize,
}

type Responses = Pin<Box<dyn Stream<Item = Result<DeltaDiscoveryResponse, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type DeltaAggregatedResourcesStream = Responses;

    async fn delta_aggregated_resources(
        &self,
        request: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Responses>, Status> {
        self.world.authenticate(request.metadata())?;
        let serve = match self.world.behaviour() {
            Behaviour::Serve => true,
            Behaviour::Silent => false,
            Behaviour::Hang => std::future::pending().await,
            Behaviour::Refuse(status) => return Err(status),
        };
        let text =
            |value: &tonic::metadata::AsciiMetadataValue| value.to_str().ok().map(str::to_owned);
        let metadata = request.metadata().iter().filter_map(|entry| match entry {
            tonic::metadata::KeyAndValueRef::Ascii(key, value) => {
                Some((key.to_string(), text(value)?))
            }
            tonic::metadata::KeyAndValueRef::Binary(..) => None,
        });
        let (responses, outgoing) = mpsc::channel(16);
        let session = Session {
            stream: self.streams.fetch_add(1, std::sync::atomic::Ordering::Relaxed),
            metadata: metadata.collect(),
            world: self.world.clone(),
            node: String::new(),
            types: BTreeMap::new(),
            nonce: 0,
            responses,
        };
        self.world.stream_opened();
        let (world, requests) = (self.world.clone(), request.into_inner());
        tokio::spawn(async move {
            session.run(requests, serve).await;
            world.stream_closed();
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }
}

/// One stream.
struct Session {
    stream: usize,
    metadata: BTreeMap<String, String>,
    world: Arc<World>,
    /// The Kubernetes node of the client.
    node: String,
    types: BTreeMap<String, Subscription>,
    nonce: u64,
    responses: mpsc::Sender<Result<DeltaDiscoveryResponse, Status>>,
}

/// What a stream has of one type.
#[derive(Default)]
struct Subscription {
    on_demand: bool,
    /// Keys asked for, on demand.
    keys: BTreeSet<String>,
    /// What the client has, with the content when it was sent on this stream.
    sent: BTreeMap<String, (String, Option<Vec<u8>>)>,
}

impl Subscription {
    fn has(&self, name: &str, served: &Served) -> bool {
        self.sent.get(name).is_some_and(|(version, value)| match value {
            Some(value) => *value == served.value,
            None => !version.is_empty() && *version == served.version,
        })
    }
}

impl Session {
    async fn run(mut self, mut requests: Streaming<DeltaDiscoveryRequest>, serve: bool) {
        let mut changes = self.world.changes();
        let mut commands = self.world.commands.subscribe();
        loop {
            let alive = tokio::select! {
                request = requests.message() => match request {
                    Ok(Some(request)) => self.hear(request, serve).await,
                    Ok(None) | Err(_) => false,
                },
                changed = changes.changed(), if serve => changed.is_ok() && self.push().await,
                command = commands.recv() => match command {
                    Ok(Command::Send(response)) => self.responses.send(Ok(response)).await.is_ok(),
                    Ok(Command::End(status)) => {
                        if let Some(status) = status {
                            let _ = self.responses.send(Err(status)).await;
                        }
                        false
                    }
                    Err(_) => false,
                },
            };
            if !alive {
                return;
            }
        }
    }

    async fn hear(&mut self, request: DeltaDiscoveryRequest, serve: bool) -> bool {
        self.world.record(Recorded {
            stream: self.stream,
            request: request.clone(),
            metadata: self.metadata.clone(),
        });
        if let Some(node) = &request.node {
            let fields = node.metadata.as_ref().map(|metadata| &metadata.fields);
            let name = fields.and_then(|fields| fields.get("NODE_NAME")?.kind.clone());
            if let Some(Kind::StringValue(name)) = name {
                self.node = name;
            }
        }
        if !serve || !request.response_nonce.is_empty() {
            return true;
        }
        match self.types.contains_key(&request.type_url) {
            false => self.subscribe(request).await,
            true => self.add(request).await,
        }
    }

    /// The first request of a type.
    async fn subscribe(&mut self, request: DeltaDiscoveryRequest) -> bool {
        let star = |names: &[String]| names.iter().any(|name| name == "*");
        let on_demand = star(&request.resource_names_unsubscribe);
        let versions = request.initial_resource_versions.into_iter();
        let mut subscription = Subscription {
            on_demand,
            sent: versions.map(|(name, version)| (name, (version, None))).collect(),
            ..Subscription::default()
        };
        subscription.keys = subscription.sent.keys().cloned().collect();
        let all = self.world.resources(&request.type_url);
        let names = match on_demand {
            false => all.keys().cloned().collect(),
            true => subscription.keys.union(&self.of_node(&all)).cloned().collect(),
        };
        self.types.insert(request.type_url.clone(), subscription);
        self.respond(&request.type_url, names, BTreeMap::new(), Vec::new(), true).await
    }

    /// A later request that subscribes or unsubscribes.
    async fn add(&mut self, request: DeltaDiscoveryRequest) -> bool {
        let (mut names, mut aliases, mut unknown) = (BTreeSet::new(), BTreeMap::new(), Vec::new());
        for key in &request.resource_names_subscribe {
            let resolved = self.world.resolve(key);
            if resolved.is_empty() {
                unknown.push(key.clone());
            }
            for name in &resolved {
                if name != key {
                    aliases.entry(name.clone()).or_insert_with(Vec::new).push(key.clone());
                }
            }
            names.extend(resolved);
        }
        if let Some(subscription) = self.types.get_mut(&request.type_url) {
            subscription.keys.extend(request.resource_names_subscribe);
            for name in &request.resource_names_unsubscribe {
                subscription.keys.remove(name);
            }
            // What is asked for is sent, whether or not it was before.
            for name in &names {
                subscription.sent.remove(name);
            }
        }
        self.respond(&request.type_url, names, aliases, unknown, true).await
    }

    /// The world changed.
    async fn push(&mut self) -> bool {
        let urls: Vec<String> = self.types.keys().cloned().collect();
        for url in urls {
            let all = self.world.resources(&url);
            let names = match self.types.get(&url) {
                Some(subscription) if subscription.on_demand => {
                    let keys = subscription.keys.iter();
                    let asked = keys.flat_map(|key| self.world.resolve(key));
                    asked.chain(self.of_node(&all)).collect()
                }
                _ => all.into_keys().collect(),
            };
            if !self.respond(&url, names, BTreeMap::new(), Vec::new(), false).await {
                return false;
            }
        }
        true
    }

    /// Sends what of `names` the client does not have, and takes away what is gone.
    async fn respond(
        &mut self,
        url: &str,
        names: BTreeSet<String>,
        mut aliases: BTreeMap<String, Vec<String>>,
        mut removed: Vec<String>,
        even_empty: bool,
    ) -> bool {
        let all = self.world.resources(url);
        let Some(subscription) = self.types.get_mut(url) else { return true };
        let mut resources = Vec::new();
        for name in names {
            let Some(served) = all.get(&name) else { continue };
            if subscription.has(&name, served) {
                continue;
            }
            let any = Any { type_url: url.to_owned(), value: served.value.clone() };
            resources.push(Resource {
                version: served.version.clone(),
                resource: Some(any),
                aliases: aliases.remove(&name).unwrap_or_default(),
                name: name.clone(),
            });
            let sent = (served.version.clone(), Some(served.value.clone()));
            subscription.sent.insert(name, sent);
        }
        let gone = subscription.sent.keys().filter(|name| !all.contains_key(*name));
        let gone: Vec<String> = gone.cloned().collect();
        for name in &gone {
            subscription.sent.remove(name);
        }
        removed.extend(gone);
        if resources.is_empty() && removed.is_empty() && !even_empty {
            return true;
        }
        self.nonce += 1;
        let response = DeltaDiscoveryResponse {
            resources,
            type_url: url.to_owned(),
            nonce: format!("{}-{}", self.stream, self.nonce),
            removed_resources: removed,
            ..DeltaDiscoveryResponse::default()
        };
        self.responses.send(Ok(response)).await.is_ok()
    }

    /// The workloads of the client's node.
    fn of_node(&self, all: &BTreeMap<String, Served>) -> BTreeSet<String> {
        let here = all.iter().filter(|(_, served)| {
            let address = Address::decode(&*served.value).ok().and_then(|it| it.r#type);
            matches!(address, Some(address::Type::Workload(it)) if it.node == self.node)
        });
        here.map(|(name, _)| name.clone()).collect()
    }
}

/// The type URL of workloads and services, for requests of tests.
pub const ADDRESSES: &str = ADDRESS_TYPE_URL;
