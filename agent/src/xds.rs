//! The workload API: what exists in the mesh and who may connect to whom, from the control plane.
//!
//! One delta xDS stream brings workloads, services and policies. What was received stays in force
//! while the control plane is away, and can be kept on disk for an agent that starts meanwhile.

mod arriving;
mod backoff;
mod client;
mod decode;
mod frames;
mod incoming;
mod intake;
mod keeper;
mod kept;
mod needs;
mod node;
mod read;
mod session;
mod status;
mod wire;

use std::pin::Pin;
use std::sync::Arc;
use std::time::SystemTime;

use culvert_core::snapshot::Change;
use culvert_core::view::{Fetched, ResourceKey};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::config::{AgentPod, Kept, XdsSettings};
use crate::control::Control;
use crate::node::Fetch;
use crate::telemetry::{Telemetry, XdsReading};
use client::Client;
pub use decode::{Address, Decoder, Rejection};
pub use frames::{FrameError, Frames, Part};
use intake::Intake;
use keeper::Keeper;
use kept::{Content, Scope, Store};
use needs::Needs;
use session::{Session, Subscription, Version};
pub use status::{XdsConnection, XdsStatus};
pub use wire::Response;

/// Who takes over what the control plane sends.
///
/// All changes of a call belong together. They must be taken to the end: they are made as they are
/// taken. What they make must be visible when the call returns.
pub trait Publish: Send + Sync + 'static {
    fn publish(&self, changes: &mut dyn Iterator<Item = Change>);
}

impl<F> Publish for F
where
    F: Fn(&mut dyn Iterator<Item = Change>) + Send + Sync + 'static,
{
    fn publish(&self, changes: &mut dyn Iterator<Item = Change>) {
        self(changes);
    }
}

/// What the control plane is told of the agent.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    pub pod: AgentPod,
    /// The Kubernetes node.
    pub node: Arc<str>,
}

/// The running client; it ends when this is dropped.
#[derive(Debug)]
pub struct Xds {
    status: watch::Receiver<XdsStatus>,
    needs: Arc<Needs>,
    task: tokio::task::JoinHandle<()>,
}

/// Starts the client. A state that was kept is published before this returns, if it is young enough.
pub async fn start(
    settings: &XdsSettings,
    facts: &NodeFacts,
    publish: impl Publish,
    telemetry: &Telemetry,
) -> Xds {
    let subscription = match settings.on_demand {
        true => Subscription::OnDemand,
        false => Subscription::Wildcard,
    };
    let session = Session::new(node::describe(settings, facts), subscription);
    let content = settings.kept.as_ref().map(|_| Content::default());
    let mut intake = Intake::new(session, content);
    let reader = intake.reader.alike();
    let mut first = XdsStatus::default();
    let mut keeper = None;
    if let Some(kept) = &settings.kept {
        let scope = Scope {
            cluster_id: settings.control.cluster_id.to_string(),
            on_demand: settings.on_demand,
        };
        let store = Store::new(&kept.path, scope);
        restore(&store, kept, &mut intake, &publish, &mut first).await;
        keeper = Some(Keeper::new(store, kept.max_age));
    }
    let (sender, status) = watch::channel(first);
    let needs = Arc::new(Needs::new(settings.on_demand));
    let client = Client {
        control: Control::new(&settings.control),
        reader,
        intake: Arc::new(Mutex::new(intake)),
        publish: Arc::new(publish),
        needs: needs.clone(),
        status: sender,
        metrics: telemetry.xds().clone(),
        keeper,
        avoid: None,
    };
    let read = status.clone();
    telemetry.watch_xds(move || reading(&read.borrow()));
    Xds { status, needs, task: tokio::spawn(client.run()) }
}

async fn restore(
    store: &Store,
    settings: &Kept,
    intake: &mut Intake,
    publish: &impl Publish,
    status: &mut XdsStatus,
) {
    let (loader, max_age) = (store.clone(), settings.max_age);
    let load = move || loader.load(max_age, SystemTime::now());
    let state = match tokio::task::spawn_blocking(load).await {
        Ok(Ok(Some(state))) => state,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return tracing::warn!(%error, "the kept state is not used"),
        Err(error) => return tracing::warn!(%error, "the kept state could not be read"),
    };
    let current = state.current;
    let mut changes = state
        .filter_map(|it| intake.restore(it.kind()?, &it.name, Version::new(&it.version), it.value));
    publish.publish(&mut changes);
    drop(changes);
    status.restored(current, &intake.session);
    tracing::info!(
        addresses = status.addresses,
        authorizations = status.authorizations,
        "serving the state kept on disk until the control plane answers"
    );
}

fn reading(status: &XdsStatus) -> XdsReading {
    XdsReading {
        connected: matches!(status.connection, XdsConnection::Open { .. }),
        age: status.age(SystemTime::now()),
        last_push: status.last_push,
        addresses: status.addresses as u64,
        authorizations: status.authorizations as u64,
        rejected: status.rejected,
    }
}

impl Xds {
    /// How it stands, now and from now on.
    pub fn status(&self) -> watch::Receiver<XdsStatus> {
        self.status.clone()
    }

    /// Waits until there is a whole state to decide on.
    pub async fn ready(&self) {
        // The sender lives as long as the client, which lives as long as this.
        let _ = self.status.clone().wait_for(|status| status.ready).await;
    }

    /// Whether addresses come only when they are needed.
    pub fn is_on_demand(&self) -> bool {
        self.needs.are_asked()
    }

    /// Who brings single things to decisions; `None` when all addresses come by themselves.
    pub fn fetch(&self) -> Option<Arc<dyn Fetch>> {
        self.needs.are_asked().then(|| Arc::new(OnDemand(self.needs.clone())) as Arc<dyn Fetch>)
    }

    /// Asks the control plane for `<network>/<ip>`, `<namespace>/<hostname>` or a workload's uid,
    /// and waits until what it answered is published, at most 5 seconds from when the key was first
    /// asked for. Whether it answered, be it that there is nothing; true at once unless addresses
    /// are on demand.
    pub fn need(&self, key: &str) -> impl Future<Output = bool> + Send + use<> {
        let (needs, key) = (self.needs.clone(), Arc::<str>::from(key));
        async move { needs.need(&key).await }
    }
}

struct OnDemand(Arc<Needs>);

impl Fetch for OnDemand {
    fn fetch(&self, key: ResourceKey) -> Pin<Box<dyn Future<Output = Fetched> + Send + '_>> {
        Box::pin(async move {
            match self.0.need(&key.to_string()).await {
                true => Fetched::Answered,
                false => Fetched::Unanswered,
            }
        })
    }
}

impl Drop for Xds {
    fn drop(&mut self) {
        self.task.abort();
    }
}
