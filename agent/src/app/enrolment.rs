//! Makes the enrolled pods those that the configuration names, again and again.

use std::collections::HashMap;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use culvert_abi::DNS_PORT;
use culvert_core::workload::Workload;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::time::Instant;

use crate::admin::readiness::{OpenTask, Readiness, WORKLOAD_PROXY_MANAGER};
use crate::capture::{
    CaptureError, DnsSockets, Listeners, Netns, NetnsCookie, NetnsError, PodListeners, PodSpec,
};
use crate::dns::{self, Dns};
use crate::drain::DrainWatch;
use crate::file::{NetnsRef, PodSettings};
use crate::hbone::Pool;
use crate::node::Node;
use crate::pods::Pod;
use crate::{inbound, outbound};

/// How long the listeners of a withdrawn pod still take what peers send who do not know yet.
const LINGER: Duration = Duration::from_secs(5);
/// Time between two attempts to enrol a pod that could not be enrolled.
const RETRY: Duration = Duration::from_secs(3);

/// What is known of a pod that is to be enrolled here, by workload uid.
pub(super) type PodTable = Arc<Mutex<HashMap<Arc<str>, PodRow>>>;

/// One pod as the administrator sees it.
#[derive(Clone, Debug)]
pub(super) struct PodRow {
    pub netns: NetnsRef,
    pub cookie: Option<u64>,
    /// How it is captured; `None` when it is not.
    pub spec: Option<PodSpec>,
    /// Why it is not enrolled.
    pub failed: Option<String>,
}

pub(super) struct Enrolment {
    node: Arc<Node>,
    readiness: Readiness,
    drain: DrainWatch,
    enrolled: HashMap<Arc<str>, EnrolledPod>,
    failed: HashMap<Arc<str>, Instant>,
    /// Namespaces whose name is gone, by workload: refused everything until they have ended.
    ending: HashMap<NetnsCookie, Arc<str>>,
    table: PodTable,
    unready: Option<OpenTask>,
}

struct EnrolledPod {
    pod: Arc<Pod>,
    netns: NetnsRef,
    spec: PodSpec,
    listeners: Listeners,
}

/// A pod that cannot be enrolled; nothing of it is captured, or it is refused everything.
#[derive(Debug, thiserror::Error)]
enum EnrolError {
    #[error(transparent)]
    Netns(#[from] NetnsError),
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
    pub fn new(node: Arc<Node>, readiness: Readiness, drain: DrainWatch) -> Self {
        let unready = Some(readiness.open(WORKLOAD_PROXY_MANAGER));
        Self {
            node,
            readiness,
            drain,
            enrolled: HashMap::new(),
            failed: HashMap::new(),
            ending: HashMap::new(),
            table: PodTable::default(),
            unready,
        }
    }

    pub fn table(&self) -> PodTable {
        self.table.clone()
    }

    /// Enrols, withdraws and changes pods until they are `wanted`; what fails is tried again by
    /// later calls.
    pub async fn reconcile(&mut self, wanted: &[PodSettings]) {
        let snapshot = self.node.mesh.snapshot();
        let mut ours = HashMap::new();
        for settings in wanted {
            if let Some(workload) = snapshot.workload(&settings.workload)
                && workload.node == self.node.name
            {
                ours.insert(settings.workload.clone(), (settings, workload.clone()));
            }
        }
        self.part(&ours).await;
        for (uid, (settings, workload)) in &ours {
            self.settle(uid, settings, workload).await;
        }
        self.forget_ended(&ours);
        self.let_go_of_strangers().await;
        self.tell(&ours);
    }

    /// Ends the pods that are no longer wanted, or no longer there.
    async fn part(&mut self, ours: &HashMap<Arc<str>, (&PodSettings, Arc<Workload>)>) {
        let mut parting = Vec::new();
        for (uid, enrolled) in &self.enrolled {
            let gone = !is_still(&enrolled.netns, &enrolled.pod.netns);
            let wanted = ours.get(uid).is_some_and(|(want, _)| want.netns == enrolled.netns);
            if gone || !wanted {
                parting.push((uid.clone(), gone));
            }
        }
        for (uid, gone) in parting {
            if let Some(enrolled) = self.enrolled.remove(&uid) {
                self.publish();
                if gone && ours.contains_key(&uid) {
                    self.end(uid, enrolled);
                } else {
                    self.withdraw(enrolled, gone).await;
                }
            }
        }
        self.failed.retain(|uid, _| ours.contains_key(uid));
    }

    /// The name of a wanted pod's namespace is gone, and maybe not all of its processes: without
    /// listeners it stays captured and is refused everything.
    fn end(&mut self, uid: Arc<str>, enrolled: EnrolledPod) {
        let cookie = enrolled.pod.netns.cookie();
        tracing::info!(workload = %uid, %cookie, "the pod's network namespace is gone");
        self.node.telemetry.pods().stopped.inc();
        enrolled.pod.end();
        self.ending.insert(cookie, uid);
    }

    /// What the file no longer names is not kept refused, but let go with the strangers.
    fn forget_ended(&mut self, ours: &HashMap<Arc<str>, (&PodSettings, Arc<Workload>)>) {
        let enrolled = &self.enrolled;
        let again =
            |cookie| enrolled.values().any(|enrolled| enrolled.pod.netns.cookie() == cookie);
        let capture = &self.node.capture;
        self.ending.retain(|cookie, uid| {
            if !ours.contains_key(uid) || again(*cookie) {
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

    async fn withdraw(&self, enrolled: EnrolledPod, gone: bool) {
        let EnrolledPod { pod, listeners, .. } = enrolled;
        let (capture, cookie) = (self.node.capture.clone(), pod.netns.cookie());
        let withdrawn = tokio::task::spawn_blocking(move || capture.withdraw(cookie)).await;
        match withdrawn {
            Ok(Ok(())) => tracing::info!(workload = %pod.uid, gone, "pod withdrawn"),
            Ok(Err(error)) => tracing::error!(workload = %pod.uid, %error, "cannot withdraw pod"),
            Err(error) => tracing::error!(workload = %pod.uid, %error, "cannot withdraw pod"),
        }
        self.node.telemetry.pods().stopped.inc();
        if gone {
            pod.end();
            return;
        }
        pod.leave();
        let node = self.node.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            pod.close();
            drop(listeners);
            // Its connections to the application need the way back until the last one has ended.
            while !node.connections.of(&pod.uid).is_empty() {
                tokio::time::sleep(LINGER).await;
            }
            let again = node.mesh.pods();
            let stays = again.iter().any(|other| other.netns.cookie() == pod.netns.cookie());
            if !stays && let Err(error) = pod.netns.remove_return_route() {
                tracing::debug!(workload = %pod.uid, %error, "the return route stays");
            }
        });
    }

    async fn settle(&mut self, uid: &Arc<str>, settings: &PodSettings, workload: &Workload) {
        let spec = PodSpec {
            addresses: workload.addresses.clone(),
            exclude_outbound_ports: settings.exclude_outbound_ports.clone(),
            exclude_outbound_cidrs: settings.exclude_outbound_cidrs.clone(),
            exclude_inbound_ports: settings.exclude_inbound_ports.clone(),
            capture_dns: self.node.dns.is_some(),
        };
        if let Some(enrolled) = self.enrolled.get_mut(uid) {
            if enrolled.spec != spec {
                let listeners = PodListeners::from(&enrolled.listeners);
                let netns = &*enrolled.pod.netns;
                let capture = &self.node.capture;
                match capture.enrol(netns.as_fd(), netns.cookie(), &spec, &listeners) {
                    Ok(()) => enrolled.spec = spec,
                    Err(error) => {
                        tracing::error!(workload = %uid, %error, "cannot change pod's capture");
                    }
                }
            }
            return;
        }
        if self.failed.get(uid).is_some_and(|tried| tried.elapsed() < RETRY) {
            return;
        }
        self.node.certificates.prefetch(&workload.identity());
        match self.enrol(uid, settings, spec).await {
            Ok(()) => {
                self.failed.remove(uid);
                self.node.telemetry.pods().started.inc();
                tracing::info!(workload = %uid, netns = %settings.netns, "pod enrolled");
            }
            Err(error) => {
                let told = error.to_string();
                let netns = settings.netns.clone();
                let row = PodRow { netns, cookie: None, spec: None, failed: Some(told) };
                let before = self.table.lock().insert(uid.clone(), row.clone());
                if before.is_none_or(|before| before.failed != row.failed) {
                    tracing::error!(workload = %uid, %error, "cannot enrol pod");
                }
                self.failed.insert(uid.clone(), Instant::now());
            }
        }
    }

    /// The listeners are served before the first connection is led to them.
    async fn enrol(
        &mut self,
        uid: &Arc<str>,
        settings: &PodSettings,
        spec: PodSpec,
    ) -> Result<(), EnrolError> {
        let netns = Arc::new(Netns::open(settings.netns.path())?);
        let listeners = netns.listen().map_err(EnrolError::Listen)?;
        let dns = self.listen_for_dns(&netns, &spec)?;
        let pool = Pool::new(self.node.tunnels.clone());
        let pod = Pod::new(uid.clone(), netns.clone(), pool);
        let pod = Arc::new(pod);
        let mut serving = self.serve(&pod, &listeners).map_err(EnrolError::Listen)?;
        serving.extend(dns.map(|(dns, sockets)| {
            tokio::spawn(dns::serve(
                self.node.clone(),
                dns,
                pod.clone(),
                sockets,
                self.drain.clone(),
            ))
        }));
        let enrolled =
            EnrolledPod { pod: pod.clone(), netns: settings.netns.clone(), spec, listeners };
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
        let (spec, listeners) = (enrolled.spec.clone(), enrolled.listeners.try_clone());
        let listeners = listeners.map_err(EnrolError::Listen)?;
        tokio::task::spawn_blocking(move || {
            netns.add_return_route().map_err(EnrolError::Route)?;
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
    ) -> Result<Option<(Dns, DnsSockets)>, EnrolError> {
        let Some(dns) = self.node.dns.clone() else { return Ok(None) };
        let sockets =
            netns.listen_for_dns(&spec.addresses, DNS_PORT).map_err(EnrolError::Listen)?;
        Ok(Some((dns, sockets)))
    }

    fn serve(
        &self,
        pod: &Arc<Pod>,
        listeners: &Listeners,
    ) -> std::io::Result<Vec<tokio::task::JoinHandle<()>>> {
        let Listeners { outbound, plaintext, hbone } = listeners.try_clone()?;
        let outbound = TcpListener::from_std(outbound)?;
        let plaintext = TcpListener::from_std(plaintext)?;
        let hbone = TcpListener::from_std(hbone)?;
        let own = || (self.node.clone(), pod.clone());
        let ((a, b), (c, d), (e, f)) = (own(), own(), own());
        Ok(vec![
            tokio::spawn(outbound::serve(a, b, outbound, self.drain.clone())),
            tokio::spawn(inbound::serve_plaintext(c, d, plaintext, self.drain.clone())),
            tokio::spawn(inbound::serve_hbone(e, f, hbone, self.drain.clone())),
        ])
    }

    fn publish(&self) {
        self.node.mesh.set_pods(self.enrolled.values().map(|enrolled| enrolled.pod.clone()));
    }

    /// Pods that an earlier agent enrolled and that nobody wants any more. As long as a wanted one
    /// cannot be enrolled, it may be among them: then all stay, and are refused everything.
    async fn let_go_of_strangers(&self) {
        if !self.failed.is_empty() {
            return;
        }
        let known: Vec<_> =
            self.enrolled.values().map(|enrolled| enrolled.pod.netns.cookie()).collect();
        let capture = self.node.capture.clone();
        let strangers = capture
            .pods()
            .into_iter()
            .filter(|cookie| !known.contains(cookie) && !self.ending.contains_key(cookie));
        for cookie in strangers.collect::<Vec<_>>() {
            let capture = capture.clone();
            match tokio::task::spawn_blocking(move || capture.withdraw(cookie)).await {
                Ok(Ok(())) => tracing::info!(%cookie, "pod of an earlier agent withdrawn"),
                Ok(Err(error)) => tracing::error!(%cookie, %error, "cannot withdraw pod"),
                Err(error) => tracing::error!(%cookie, %error, "cannot withdraw pod"),
            }
        }
    }

    fn tell(&mut self, ours: &HashMap<Arc<str>, (&PodSettings, Arc<Workload>)>) {
        let mut table = self.table.lock();
        table.retain(|uid, _| ours.contains_key(uid));
        for (uid, enrolled) in &self.enrolled {
            let cookie = Some(enrolled.pod.netns.cookie().0);
            let (netns, spec) = (enrolled.netns.clone(), Some(enrolled.spec.clone()));
            let row = PodRow { netns, cookie, spec, failed: None };
            table.insert(uid.clone(), row);
        }
        drop(table);
        let pods = self.node.telemetry.pods();
        pods.active.set(i64::try_from(self.enrolled.len()).unwrap_or(i64::MAX));
        pods.pending.set(i64::try_from(self.failed.len()).unwrap_or(i64::MAX));
        if self.failed.is_empty() {
            self.unready = None;
        } else if self.unready.is_none() {
            self.unready = Some(self.readiness.open(WORKLOAD_PROXY_MANAGER));
        }
    }
}

/// Whether the name still leads to the namespace that was opened.
fn is_still(name: &NetnsRef, opened: &Netns) -> bool {
    let Ok(own) = opened.metadata() else { return false };
    fs::metadata(name.path())
        .is_ok_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino()))
}
