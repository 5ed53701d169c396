//! Carries out what istio-cni orders.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::wanted::Handed;
use super::{Cni, Enrolment, Netns};
use crate::pods::PodName;
use crate::zds::{Order, PodInfo, Request};

impl Enrolment {
    /// Carries out one order, and answers it.
    pub async fn obey(&mut self, request: Request) {
        let Request { order, answer } = request;
        let done = match order {
            Order::Add { uid, info, netns } => self.add(uid, info, netns).await,
            Order::Del { uid } => {
                self.forget(&uid).await;
                Ok(())
            }
            Order::Snapshot { uids } => {
                self.complete(&uids).await;
                Ok(())
            }
            Order::Lost(loss) => {
                self.node.telemetry.pods().lost(loss.reason());
                self.lose();
                Ok(())
            }
        };
        if done.is_err() {
            self.node.telemetry.pods().refused.inc();
        }
        self.tell();
        // Who asked may have given up.
        let _ = answer.send(done);
    }

    async fn add(&mut self, uid: Arc<str>, info: PodInfo, netns: OwnedFd) -> Result<(), String> {
        let netns = Netns::received(netns).map_err(|error| {
            let PodInfo { namespace, name, .. } = &info;
            tracing::error!(pod = %format_args!("{namespace}/{name}"), %uid, %error, "cannot enrol pod");
            error.to_string()
        })?;
        let netns = Arc::new(netns.marked(self.terms.marks));
        if let Some(enrolled) = self.enrolled.get(&uid) {
            if enrolled.pod.netns.is_same(&netns) {
                return Ok(());
            }
            // Its network was made anew. Whatever still runs in the old one goes on to its end.
            tracing::info!(pod = %enrolled.pod.claim, %uid, "pod has another network namespace");
            self.forget(&uid).await;
        }
        let PodInfo { name, namespace, service_account } = info;
        let node = self.node.name.clone();
        let name = PodName { name, namespace, service_account, node };
        self.handed.insert(uid.clone(), Handed { name, netns, addresses: Vec::new() });
        match self.wanted_of_handed(&uid).await {
            Some(want) => self.attempt(&uid, &want).await,
            None => Ok(()),
        }
    }

    async fn forget(&mut self, uid: &str) {
        self.handed.remove(uid);
        self.failed.remove(uid);
        self.table.lock().remove(uid);
        if let Some(enrolled) = self.enrolled.remove(uid) {
            self.publish();
            self.withdraw(enrolled, false).await;
        }
    }

    /// All pods of istio-cni have been told: those that are not among them go.
    async fn complete(&mut self, uids: &HashSet<Arc<str>>) {
        for uid in self.uids_of_handed().difference(uids) {
            self.forget(uid).await;
        }
        let unplaced = uids.iter().any(|uid| !self.handed.contains_key(uid));
        self.cni = Cni::Synced { unplaced };
        tracing::info!(pods = uids.len(), "istio-cni has told of all its pods");
        self.let_go_of_strangers().await;
    }

    /// Pods go on being served; what could not be enrolled will be told again.
    fn lose(&mut self) {
        self.cni = match self.cni {
            Cni::Synced { unplaced } | Cni::Lost { unplaced } => Cni::Lost { unplaced },
            Cni::Unused | Cni::Never => Cni::Never,
        };
        for uid in self.uids_of_handed() {
            if !self.enrolled.contains_key(&uid) {
                self.handed.remove(&uid);
                self.failed.remove(&uid);
                self.table.lock().remove(&uid);
            }
        }
    }
}
