//! What a test's control plane knows, what it was told, and how it behaves.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail};
use culvert_proto::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use culvert_proto::istio::security::Authorization;
use culvert_proto::istio::workload::{Address, Service, Workload, address};
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use prost::Message;
use tokio::sync::{broadcast, mpsc, watch};
use tonic::Status;

use super::ads::{Behaviour, Recorded};
use super::prepared::Prepared;

/// How long the helpers that wait do so.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// One resource as it is served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Served {
    pub version: String,
    pub value: Vec<u8>,
}

/// To every open stream.
#[derive(Clone, Debug)]
pub enum Command {
    /// Sends a response as it stands, whatever it says.
    Send(DeltaDiscoveryResponse),
    /// Ends the stream, in good order without a status.
    End(Option<Status>),
}

/// Resources by type URL and name. Streams follow every change.
#[derive(Debug)]
pub struct World {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
    recorded: watch::Sender<usize>,
    pub(super) commands: broadcast::Sender<Command>,
}

#[derive(Debug, Default)]
struct Inner {
    resources: BTreeMap<(String, String), Served>,
    requests: Vec<Recorded>,
    behaviour: Behaviour,
    token: Option<String>,
    streams: usize,
    /// Of each stream, also of those that have ended.
    listeners: Vec<mpsc::UnboundedSender<Prepared>>,
    accepted: usize,
}

impl Default for World {
    fn default() -> Self {
        Self {
            inner: Mutex::default(),
            changed: watch::Sender::new(0),
            recorded: watch::Sender::new(0),
            commands: broadcast::Sender::new(64),
        }
    }
}

impl World {
    pub fn put_workload(&self, workload: Workload) {
        self.put_all([address::Type::Workload(workload)]);
    }

    pub fn put_service(&self, service: Service) {
        self.put_all([address::Type::Service(service)]);
    }

    /// In one push.
    pub fn put_all(&self, addresses: impl IntoIterator<Item = address::Type>) {
        let entries = addresses.into_iter().map(|kind| {
            let name = match &kind {
                address::Type::Workload(workload) => workload.uid.clone(),
                address::Type::Service(service) => {
                    format!("{}/{}", service.namespace, service.hostname)
                }
            };
            let value = Address { r#type: Some(kind) }.encode_to_vec();
            ((ADDRESS_TYPE_URL.to_owned(), name), Served { version: version(&value), value })
        });
        self.lock().resources.extend(entries);
        self.push();
    }

    /// Policies have no version, as istiod's have none.
    pub fn put_policy(&self, policy: &Authorization) {
        let name = format!("{}/{}", policy.namespace, policy.name);
        self.put_raw(AUTHORIZATION_TYPE_URL, &name, "", policy.encode_to_vec());
    }

    /// Whatever the bytes are.
    pub fn put_raw(&self, url: &str, name: &str, version: &str, value: Vec<u8>) {
        let served = Served { version: version.to_owned(), value };
        self.lock().resources.insert((url.to_owned(), name.to_owned()), served);
        self.push();
    }

    pub fn remove(&self, url: &str, name: &str) {
        self.lock().resources.remove(&(url.to_owned(), name.to_owned()));
        self.push();
    }

    pub fn remove_address(&self, name: &str) {
        self.remove(ADDRESS_TYPE_URL, name);
    }

    pub fn remove_policy(&self, name: &str) {
        self.remove(AUTHORIZATION_TYPE_URL, name);
    }

    /// How new streams are dealt with from now on.
    pub fn behave(&self, behaviour: Behaviour) {
        self.lock().behaviour = behaviour;
    }

    /// Refuses all requests without this token; `None` accepts any.
    pub fn require_token(&self, token: Option<&str>) {
        self.lock().token = token.map(str::to_owned);
    }

    /// Sends a response to every open stream.
    pub fn send(&self, response: DeltaDiscoveryResponse) {
        // Nobody hears it when no stream is open.
        let _ = self.commands.send(Command::Send(response));
    }

    /// The same, of one that is encoded already.
    pub fn send_prepared(&self, response: Prepared) {
        self.lock().listeners.retain(|listener| listener.send(response.clone()).is_ok());
    }

    /// What is sent prepared from now on.
    pub(super) fn listen(&self) -> mpsc::UnboundedReceiver<Prepared> {
        let (listener, prepared) = mpsc::unbounded_channel();
        self.lock().listeners.push(listener);
        prepared
    }

    /// Ends every open stream.
    pub fn end_streams(&self, status: Option<Status>) {
        let _ = self.commands.send(Command::End(status));
    }

    /// All requests so far, of all streams.
    pub fn requests(&self) -> Vec<Recorded> {
        self.lock().requests.clone()
    }

    /// How many responses have been accepted whole.
    pub fn accepted(&self) -> usize {
        self.lock().accepted
    }

    /// How many streams are open.
    pub fn streams(&self) -> usize {
        self.lock().streams
    }

    /// Waits for a request, of those so far or to come, and gives the first that `is_it`.
    pub async fn request(&self, what: &str, is_it: impl Fn(&Recorded) -> bool) -> Result<Recorded> {
        let mut recorded = self.recorded.subscribe();
        let found = async {
            loop {
                recorded.borrow_and_update();
                if let Some(found) = self.lock().requests.iter().find(|one| is_it(one)) {
                    return found.clone();
                }
                if recorded.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(LIMIT, found).await {
            Ok(found) => Ok(found),
            Err(_) => bail!("no request within {LIMIT:?}: {what}; of {:#?}", self.requests()),
        }
    }

    pub(super) fn record(&self, request: Recorded) {
        {
            let mut inner = self.lock();
            inner.accepted += usize::from(is_ack(&request.request));
            inner.requests.push(request);
        }
        self.recorded.send_modify(|count| *count += 1);
    }

    pub(super) fn behaviour(&self) -> Behaviour {
        self.lock().behaviour.clone()
    }

    pub(super) fn authenticate(
        &self,
        metadata: &tonic::metadata::MetadataMap,
    ) -> Result<(), Status> {
        let given = metadata.get("authorization").and_then(|value| value.to_str().ok());
        match &self.lock().token {
            Some(token) if given != Some(&format!("Bearer {token}")) => {
                Err(Status::unauthenticated("authentication failure"))
            }
            Some(_) | None => Ok(()),
        }
    }

    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    pub(super) fn stream_opened(&self) {
        self.lock().streams += 1;
    }

    pub(super) fn stream_closed(&self) {
        let mut inner = self.lock();
        inner.streams = inner.streams.saturating_sub(1);
    }

    pub(super) fn stopped(&self) {
        self.lock().streams = 0;
    }

    /// The resources of a type.
    pub(super) fn resources(&self, url: &str) -> BTreeMap<String, Served> {
        let inner = self.lock();
        let of_type = inner.resources.iter().filter(|((of, _), _)| of == url);
        of_type.map(|((_, name), served)| (name.clone(), served.clone())).collect()
    }

    /// What an on-demand key stands for: names of addresses. A service comes with its endpoints.
    pub(super) fn resolve(&self, key: &str) -> Vec<String> {
        let addresses = self.resources(ADDRESS_TYPE_URL);
        let decoded = |served: &Served| Address::decode(&*served.value).ok()?.r#type;
        let stands_for = |name: &String, served: &Served| {
            if name == key {
                return true;
            }
            let Some((network, ip)) = key.split_once('/') else { return false };
            let Ok(ip) = ip.parse::<IpAddr>() else { return false };
            let octets = match ip {
                IpAddr::V4(ip) => ip.octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            match decoded(served) {
                Some(address::Type::Workload(workload)) => {
                    workload.network == network && workload.addresses.contains(&octets)
                }
                Some(address::Type::Service(service)) => service
                    .addresses
                    .iter()
                    .any(|vip| vip.network == network && vip.address == octets),
                None => false,
            }
        };
        let direct = addresses.iter().filter(|(name, served)| stands_for(name, served));
        let mut names: Vec<String> = direct.map(|(name, _)| name.clone()).collect();
        let endpoints = addresses.iter().filter(|(_, served)| match decoded(served) {
            Some(address::Type::Workload(workload)) => {
                workload.services.keys().any(|service| names.contains(service))
            }
            Some(address::Type::Service(_)) | None => false,
        });
        let endpoints: Vec<String> = endpoints.map(|(name, _)| name.clone()).collect();
        names.extend(endpoints);
        names.dedup();
        names
    }

    fn push(&self) {
        self.changed.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A test that panicked elsewhere is told of by its own panic.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As istiod makes it: a 64-bit hash of the content, in hexadecimal.
fn version(value: &[u8]) -> String {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    format!("{:x}", hasher.finish())
}

/// Whether a request answers a response, and accepts it whole.
pub fn is_ack(request: &DeltaDiscoveryRequest) -> bool {
    !request.response_nonce.is_empty() && request.error_detail.is_none()
}
