//! Pods on their way from one agent to another.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::wanted::Handed;
use super::{DnsSockets, Enrolment, Listeners, NetnsCookie};
use crate::handover::{GivenPod, Heirloom, PodNames};
use crate::pods::{Claim, PodName};

/// The sockets of pods that another agent gave, until their pod is enrolled.
#[derive(Default)]
pub(super) struct Inherited {
    sockets: HashMap<NetnsCookie, (Listeners, DnsSockets)>,
    uids: HashSet<Arc<str>>,
}

impl Inherited {
    pub fn take(&mut self, cookie: NetnsCookie) -> Option<(Listeners, DnsSockets)> {
        self.sockets.remove(&cookie)
    }

    pub fn clear(&mut self) {
        *self = Inherited::default();
    }
}

impl Enrolment {
    /// Takes what another agent gives. Its pods that are wanted here are enrolled with the sockets
    /// that they have; those of istio-cni are wanted until it says otherwise.
    pub fn inherit(&mut self, pods: Vec<GivenPod>) {
        for pod in pods {
            let GivenPod { uid, names, addresses, netns, listeners, dns } = pod;
            let uid: Arc<str> = uid.into();
            self.inherited.sockets.insert(netns.cookie(), (listeners, dns));
            self.inherited.uids.insert(uid.clone());
            let Some(names) = names.filter(|_| self.terms.cni) else { continue };
            let name = PodName {
                name: names.name.into(),
                namespace: names.namespace.into(),
                service_account: names.service_account.into(),
                node: self.node.name.clone(),
            };
            let netns = Arc::new(netns.marked(self.terms.marks));
            self.handed.insert(uid, Handed { name, netns, addresses });
        }
    }

    /// Why a pod that another agent gave, and that is wanted, cannot be served here.
    pub fn lacks(&self) -> Option<String> {
        let uid = self.failed.keys().find(|uid| self.inherited.uids.contains(*uid))?;
        let why = self.table.lock().get(uid).and_then(|row| row.failed.clone());
        Some(format!("pod {uid}: {}", why.unwrap_or_default()))
    }

    /// From here on connections are accepted, and pods that nobody wants are let go.
    pub fn open(&self) {
        self.open.cancel();
    }

    /// What another agent would take over.
    pub fn heirlooms(&self) -> Vec<Heirloom<'_>> {
        let pods = self.enrolled.values().map(|enrolled| {
            let pod = &enrolled.pod;
            let names = match &pod.claim {
                Claim::Uid(_) => None,
                Claim::Named(PodName { name, namespace, service_account, node: _ }) => {
                    Some(PodNames {
                        name: name.to_string(),
                        namespace: namespace.to_string(),
                        service_account: service_account.to_string(),
                    })
                }
            };
            let addresses = enrolled.spec.addresses.clone();
            let (listeners, dns) = (&enrolled.listeners, &enrolled.dns);
            Heirloom::new(pod.uid.to_string(), names, addresses, &pod.netns, listeners, dns)
        });
        pods.collect()
    }

    /// After a hand-over that failed: puts into the kernel again what this agent has.
    pub async fn reclaim(&mut self) {
        if let Some(kernel) = self.node.capture.kernel()
            && let Err(error) = kernel.reread()
        {
            tracing::error!(%error, "cannot read what is in the kernel");
        }
        for (uid, enrolled) in &self.enrolled {
            if let Err(error) = self.capture(uid, &enrolled.pod.netns).await {
                tracing::error!(pod = %enrolled.pod.claim, %error, "cannot take the pod back");
            }
        }
    }
}
