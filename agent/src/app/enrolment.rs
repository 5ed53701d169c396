//! Makes the enrolled pods those that the mesh file and istio-cni name, again and again.

mod inherited;
mod leaving;
mod orders;
mod wanted;

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::admin::readiness::{OpenTask, Readiness, WORKLOAD_PROXY_MANAGER};
use crate::capture::{
    CaptureError, DnsSockets, ListenOptions, Listeners, Marks, Netns, NetnsCookie, NetnsError,
    PodListeners, PodSpec, Redirection,
};
use crate::dns::{self, Dns};
use crate::drain::DrainWatch;
use crate::file::PodSettings;
use crate::hbone::Pool;
use crate::node::Node;
use crate::pods::{Claim, Pod};
use crate::{inbound, outbound};

use inherited::Inherited;
use leaving::Leaving;
pub(super) use wanted::Home;
use wanted::{Handed, Wanted};

/// Time between two attempts to enrol a pod that could not be enrolled.
const RETRY: Duration = Duration::from_secs(3);

/// What is known of a pod that is to be enrolled here, by its uid.
pub(super) type PodTable = Arc<Mutex<HashMap<Arc<str>, PodRow>>>;

/// One pod as the administrator sees it.
#[derive(Clone, Debug)]
pub(super) struct PodRow {
    pub claim: Claim,
    pub home: Home,
    pub cookie: Option<u64>,
    /// How it is captured; `None` when it is not.
    pub spec: Option<PodSpec>,
    /// Why it is not enrolled.
    pub failed: Option<String>,
}

/// How pods are enrolled here.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    pub listen: ListenOptions,
    pub marks: Marks,
    /// istio-cni tells of pods, too.
    pub cni: bool,
}

pub(super) struct Enrolment {
    node: Arc<Node>,
    readiness: Readiness,
    drain: DrainWatch,
    terms: Terms,
    /// The pods that the mesh file names.
    named: Vec<PodSettings>,
    /// The pods that istio-cni has handed over.
    handed: HashMap<Arc<str>, Handed>,
    cni: Cni,
    enrolled: HashMap<Arc<str>, EnrolledPod>,
    failed: HashMap<Arc<str>, Instant>,
    /// The listeners of pods that left, for as long as these linger.
    leaving: Leaving,
    /// What another agent gave, until it is used.
    inherited: Inherited,
    /// Cancelled when this agent may accept connections, and let pods go.
    open: CancellationToken,
    /// The tasks that accept connections; each has a listener.
    accepting: TaskTracker,
    /// Namespaces whose name is gone, by pod: refused everything until they have ended.
    ending: HashMap<NetnsCookie, Arc<str>>,
    table: PodTable,
    unready: Option<OpenTask>,
}

/// How far what istio-cni says is known.
#[derive(Debug)]
enum Cni {
    /// It is not asked.
    Unused,
    /// No snapshot was complete so far.
    Never,
    /// The last snapshot is in force. istio-cni may know of pods that it had no namespace for.
    Synced { unplaced: bool },
    /// The same, and it is not known what has changed since.
    Lost { unplaced: bool },
}

struct EnrolledPod {
    pod: Arc<Pod>,
    home: Home,
    spec: PodSpec,
    listeners: Listeners,
    dns: DnsSockets,
}

/// A pod that cannot be enrolled; nothing of it is captured, or it is refused everything.
#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("its network namespace is that of pod {0}")]
    Taken(Arc<str>),
    #[error("cannot listen in the pod: {0}")]
    Listen(std::io::Error),
    #[error("cannot set the pod's return route: {0}")]
    Route(std::io::Error),
    #[error(transparent)]
    Capture(#[from] CaptureError),
    #[error("the task that enrols was lost: {0}")]
    Task(#[from] tokio::task::JoinError),
}

impl Enrolment {
    pub fn new(
        node: Arc<Node>,
        readiness: Readiness,
        drain: DrainWatch,
        terms: Terms,
        named: Vec<PodSettings>,
    ) -> Self {
        let unready = Some(readiness.open(WORKLOAD_PROXY_MANAGER));
        Self {
            node,
            readiness,
            drain,
            terms,
            named,
            handed: HashMap::new(),
            cni: if terms.cni { Cni::Never } else { Cni::Unused },
            enrolled: HashMap::new(),
            failed: HashMap::new(),
            leaving: Leaving::default(),
            inherited: Inherited::default(),
            open: CancellationToken::new(),
            accepting: TaskTracker::new(),
            ending: HashMap::new(),
            table: PodTable::default(),
            unready,
        }
    }

    pub fn table(&self) -> PodTable {
        self.table.clone()
    }

    /// Makes `named` the pods of the mesh file.
    pub async fn follow(&mut self, named: Vec<PodSettings>) {
        self.named = named;
        self.reconcile().await;
    }

    /// Enrols, withdraws and changes pods until they are those that are wanted; what fails is tried
    /// again by later calls.
    pub async fn reconcile(&mut self) {
        let wanted = self.wanted().await;
        self.part(&wanted).await;
        for (uid, want) in &wanted {
            self.settle(uid, want).await;
        }
        self.forget_ended(&wanted);
        self.let_go_of_strangers().await;
        self.table.lock().retain(|uid, _| wanted.contains_key(uid));
        self.tell();
    }

    /// Ends the pods that are no longer wanted, or no longer there.
    async fn part(&mut self, wanted: &HashMap<Arc<str>, Wanted>) {
        let mut parting = Vec::new();
        for (uid, enrolled) in &self.enrolled {
            let gone = !enrolled.home.is_still(&enrolled.pod.netns);
            let stays = wanted.get(uid).is_some_and(|want| want.home.is_same(&enrolled.home));
            if gone || !stays {
                parting.push((uid.clone(), gone));
            }
        }
        for (uid, gone) in parting {
            if let Some(enrolled) = self.enrolled.remove(&uid) {
                self.publish();
                if gone && wanted.contains_key(&uid) {
                    self.end(uid, enrolled);
                } else {
                    self.withdraw(enrolled, gone).await;
                }
            }
        }
        self.failed.retain(|uid, _| wanted.contains_key(uid));
    }

    /// The name of a wanted pod's namespace is gone, and maybe not all of its processes: without
    /// listeners it stays captured and is refused everything.
    fn end(&mut self, uid: Arc<str>, enrolled: EnrolledPod) {
        let cookie = enrolled.pod.netns.cookie();
        tracing::info!(pod = %enrolled.pod.claim, %cookie, "the pod's network namespace is gone");
        self.node.telemetry.pods().stopped.inc();
        enrolled.pod.end();
        self.ending.insert(cookie, uid);
    }

    /// What the file no longer names is not kept refused, but let go with the strangers.
    fn forget_ended(&mut self, wanted: &HashMap<Arc<str>, Wanted>) {
        let enrolled = &self.enrolled;
        let again =
            |cookie| enrolled.values().any(|enrolled| enrolled.pod.netns.cookie() == cookie);
        let capture = &self.node.capture;
        self.ending.retain(|cookie, uid| {
            if !wanted.contains_key(uid) || again(*cookie) {
                return false;
            }
            match capture.forget_ended(*cookie) {
                Ok(ended) => !ended,
                Err(error) => {
                    tracing::error!(%cookie, %error, "cannot forget a pod that has ended");
                    true
                }
            }
        });
    }

    async fn settle(&mut self, uid: &Arc<str>, want: &Wanted) {
        if let Some(enrolled) = self.enrolled.get_mut(uid) {
            if enrolled.spec != want.spec {
                let listeners = PodListeners::from(&enrolled.listeners);
                let netns = &*enrolled.pod.netns;
                let capture = &self.node.capture;
                match capture.enrol(netns.as_fd(), netns.cookie(), &want.spec, &listeners) {
                    Ok(()) => enrolled.spec = want.spec.clone(),
                    Err(error) => {
                        tracing::error!(pod = %want.claim, %error, "cannot change pod's capture");
                    }
                }
            }
            return;
        }
        if self.failed.get(uid).is_some_and(|tried| tried.elapsed() < RETRY) {
            return;
        }
        // The reason is in the log and the table.
        let _ = self.attempt(uid, want).await;
    }

    /// Enrols a pod that is not enrolled, and tells how that went.
    async fn attempt(&mut self, uid: &Arc<str>, want: &Wanted) -> Result<(), String> {
        if let Some(workload) = want.claim.find(&self.node.mesh.snapshot()) {
            self.node.certificates.prefetch(&workload.identity());
        }
        match self.enrol(uid, want).await {
            Ok(()) => {
                self.failed.remove(uid);
                self.node.telemetry.pods().started.inc();
                tracing::info!(pod = %want.claim, %uid, netns = %want.home, "pod enrolled");
                Ok(())
            }
            Err(error) => {
                let told = error.to_string();
                let row = PodRow {
                    claim: want.claim.clone(),
                    home: want.home.clone(),
                    cookie: None,
                    spec: None,
                    failed: Some(told.clone()),
                };
                let before = self.table.lock().insert(uid.clone(), row);
                if before.and_then(|before| before.failed).as_ref() != Some(&told) {
                    tracing::error!(pod = %want.claim, %uid, %error, "cannot enrol pod");
                }
                self.failed.insert(uid.clone(), Instant::now());
                Err(told)
            }
        }
    }

    /// The listeners are served before the first connection is led to them.
    async fn enrol(&mut self, uid: &Arc<str>, want: &Wanted) -> Result<(), EnrolError> {
        let netns = want.home.open(self.terms.marks)?;
        let taken = |other: &&EnrolledPod| other.pod.netns.cookie() == netns.cookie();
        if let Some(other) = self.enrolled.values().find(taken) {
            return Err(EnrolError::Taken(other.pod.uid.clone()));
        }
        let (given, given_dns) = self.inherited.take(netns.cookie()).unzip();
        // A pod that left may come back before all that it was sent has arrived.
        let listeners = match given.or_else(|| self.leaving.take(netns.cookie())) {
            Some(listeners) => listeners,
            None => netns.listen_with(self.terms.listen).map_err(EnrolError::Listen)?,
        };
        let pool = Pool::new(self.node.tunnels.clone());
        let (claim, drain) = (want.claim.clone(), &self.drain);
        let pod = Arc::new(Pod::new(uid.clone(), claim, netns.clone(), pool, drain));
        let dns = self.listen_for_dns(&netns, &want.spec, given_dns)?;
        let mut serving = self.serve(&pod, &listeners).map_err(EnrolError::Listen)?;
        let mut kept = DnsSockets::default();
        if let Some((dns, sockets)) = dns {
            kept = sockets.try_clone().map_err(EnrolError::Listen)?;
            let (node, pod, drain) = (self.node.clone(), pod.clone(), self.drain.clone());
            serving
                .push(self.spawn(&Handle::current(), dns::serve(node, dns, pod, sockets, drain)));
        }
        let (home, spec) = (want.home.clone(), want.spec.clone());
        let enrolled = EnrolledPod { pod: pod.clone(), home, spec, listeners, dns: kept };
        self.enrolled.insert(uid.clone(), enrolled);
        self.publish();
        if let Err(error) = self.capture(uid, &netns).await {
            self.enrolled.remove(uid);
            self.publish();
            pod.end();
            serving.into_iter().for_each(|task| task.abort());
            return Err(error);
        }
        Ok(())
    }

    async fn capture(&self, uid: &str, netns: &Arc<Netns>) -> Result<(), EnrolError> {
        let Some(enrolled) = self.enrolled.get(uid) else { return Ok(()) };
        let (capture, netns) = (self.node.capture.clone(), netns.clone());
        let (mut spec, listeners) = (enrolled.spec.clone(), enrolled.listeners.try_clone());
        let listeners = listeners.map_err(EnrolError::Listen)?;
        let pod = enrolled.pod.claim.to_string();
        let beside_cni = enrolled.spec.beside_cni;
        tokio::task::spawn_blocking(move || {
            match (netns.add_return_route(), &capture) {
                (Ok(()), _) => {}
                // There istio-cni's own route leads back while the pod is in the mesh.
                (Err(error), Redirection::Cni) => tracing::warn!(%pod, %error, "no return route"),
                (Err(error), Redirection::Ebpf(_)) => return Err(EnrolError::Route(error)),
            }
            if beside_cni && let Err(error) = netns.hold_translations() {
                tracing::warn!(%pod, %error, "connections will not outlive istio-cni's rules");
            }
            if beside_cni
                && matches!(capture, Redirection::Ebpf(_))
                && let Err(error) = netns.let_direct_pass()
            {
                tracing::warn!(%pod, %error, "connections from pods of this node go by the agent");
                spec.by_agent = true;
            }
            let listeners = PodListeners::from(&listeners);
            let netns = &*netns;
            capture.enrol(netns.as_fd(), netns.cookie(), &spec, &listeners)?;
            Ok(())
        })
        .await?
    }

    /// The sockets for the pod's questions, if the agent answers them.
    fn listen_for_dns(
        &self,
        netns: &Netns,
        spec: &PodSpec,
        given: Option<DnsSockets>,
    ) -> Result<Option<(Dns, DnsSockets)>, EnrolError> {
        let Some(dns) = self.node.dns.clone() else { return Ok(None) };
        if let Some(given) = given.filter(|given| !given.udp.is_empty()) {
            return Ok(Some((dns, given)));
        }
        // Packet rules lead questions to loopback; on an address of the pod, others could ask too.
        let own = match self.terms.listen.by_rules {
            true => &[],
            false => &*spec.addresses,
        };
        let sockets = netns.listen_for_dns(own, dns.port, self.terms.listen);
        let sockets = sockets.map_err(EnrolError::Listen)?;
        Ok(Some((dns, sockets)))
    }

    fn serve(&self, pod: &Arc<Pod>, listeners: &Listeners) -> std::io::Result<Vec<JoinHandle<()>>> {
        let Listeners { outbound, plaintext, hbone } = listeners.try_clone()?;
        let worker = self.node.workers.next();
        let _sockets_are_its = worker.enter();
        let outbound = TcpListener::from_std(outbound)?;
        let plaintext = TcpListener::from_std(plaintext)?;
        let hbone = TcpListener::from_std(hbone)?;
        let own = || (self.node.clone(), pod.clone());
        let ((a, b), (c, d), (e, f)) = (own(), own(), own());
        let drain = || self.drain.clone();
        let outbound = outbound::serve(a, b, outbound, drain(), inbound::serve_retracted);
        let plaintext = inbound::serve_plaintext(c, d, plaintext, drain());
        let hbone = inbound::serve_hbone(e, f, hbone, drain());
        Ok(vec![
            self.spawn(&worker, self.accepting.track_future(outbound)),
            self.spawn(&worker, self.accepting.track_future(plaintext)),
            self.spawn(&worker, self.accepting.track_future(hbone)),
        ])
    }

    /// The tasks that accept connections, and so have listeners.
    pub fn accepting(&self) -> TaskTracker {
        self.accepting.clone()
    }

    /// Serves once this agent may.
    fn spawn(
        &self,
        worker: &Handle,
        serving: impl Future<Output = ()> + Send + 'static,
    ) -> JoinHandle<()> {
        let open = self.open.clone();
        worker.spawn(async move {
            open.cancelled().await;
            serving.await;
        })
    }

    fn publish(&self) {
        self.node.mesh.set_pods(self.enrolled.values().map(|enrolled| enrolled.pod.clone()));
    }

    fn tell(&mut self) {
        let mut table = self.table.lock();
        for (uid, enrolled) in &self.enrolled {
            let row = PodRow {
                claim: enrolled.pod.claim.clone(),
                home: enrolled.home.clone(),
                cookie: Some(enrolled.pod.netns.cookie().0),
                spec: Some(enrolled.spec.clone()),
                failed: None,
            };
            table.insert(uid.clone(), row);
        }
        drop(table);
        let pods = self.node.telemetry.pods();
        pods.active.set(i64::try_from(self.enrolled.len()).unwrap_or(i64::MAX));
        pods.pending.set(i64::try_from(self.failed.len()).unwrap_or(i64::MAX));
        let told = matches!(self.cni, Cni::Unused | Cni::Synced { .. });
        if told && self.failed.is_empty() {
            self.unready = None;
        } else if self.unready.is_none() {
            self.unready = Some(self.readiness.open(WORKLOAD_PROXY_MANAGER));
        }
    }

    fn uids_of_handed(&self) -> HashSet<Arc<str>> {
        self.handed.keys().cloned().collect()
    }
}
