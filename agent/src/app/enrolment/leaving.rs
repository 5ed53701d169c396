//! Pods that leave the mesh: their open connections go on to their own end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::wanted::read_addresses;
use super::{Cni, EnrolledPod, Enrolment, Listeners, NetnsCookie, Pod};
use crate::capture::Capture;

/// How long the listeners of a withdrawn pod still take what peers send who do not know yet.
const LINGER: Duration = Duration::from_secs(5);

/// The listeners of pods that left. A pod that comes back takes up its own: whoever listened anew
/// beside them would share connections with a pod that is no more. Cloning copies a pointer.
#[derive(Clone, Default)]
pub(super) struct Leaving(Arc<Mutex<LeftPods>>);

/// By namespace, the pod that left it last.
type LeftPods = HashMap<NetnsCookie, (Arc<Pod>, Listeners)>;

impl Leaving {
    fn put(&self, pod: Arc<Pod>, listeners: Listeners) {
        self.0.lock().insert(pod.netns.cookie(), (pod, listeners));
    }

    pub fn take(&self, cookie: NetnsCookie) -> Option<Listeners> {
        self.0.lock().remove(&cookie).map(|(_, listeners)| listeners)
    }

    fn forget(&self, pod: &Arc<Pod>) {
        let mut left = self.0.lock();
        let cookie = pod.netns.cookie();
        if left.get(&cookie).is_some_and(|(other, _)| Arc::ptr_eq(other, pod)) {
            left.remove(&cookie);
        }
    }
}

impl Enrolment {
    pub(super) async fn withdraw(&self, enrolled: EnrolledPod, gone: bool) {
        let EnrolledPod { pod, listeners, spec, .. } = enrolled;
        let beside_cni = spec.beside_cni;
        let (capture, netns) = (self.node.capture.clone(), pod.netns.clone());
        let withdrawn = tokio::task::spawn_blocking(move || {
            // While the programs still judge what it lets past.
            if beside_cni && let Err(error) = netns.stop_direct_passing() {
                tracing::debug!(netns = %netns.cookie(), %error, "direct connections pass on");
            }
            capture.withdraw(netns.cookie())
        })
        .await;
        match withdrawn {
            Ok(Ok(())) => tracing::info!(pod = %pod.claim, uid = %pod.uid, gone, "pod withdrawn"),
            Ok(Err(error)) => tracing::error!(pod = %pod.claim, %error, "cannot withdraw pod"),
            Err(error) => tracing::error!(pod = %pod.claim, %error, "cannot withdraw pod"),
        }
        self.node.telemetry.pods().stopped.inc();
        if gone {
            pod.end();
            return;
        }
        pod.leave();
        self.leaving.put(pod.clone(), listeners);
        let (node, leaving) = (self.node.clone(), self.leaving.clone());
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            pod.close();
            leaving.forget(&pod);
            // Its connections to the application need the way back until the last one has ended.
            while !node.connections.of(&pod.uid).is_empty() {
                // A pod that was deleted has no interface left that leads anywhere, and nothing will
                // end its connections from outside: while they hold the namespace, the kernel keeps it.
                if read_addresses(&pod.netns).await.is_some_and(|addresses| addresses.is_empty()) {
                    pod.end();
                }
                tokio::time::sleep(LINGER).await;
            }
            let again = node.mesh.pods();
            let stays = again.iter().any(|(other, _)| other.netns.cookie() == pod.netns.cookie());
            // Another agent may have taken it up again.
            let is_ours = node.capture.kernel().is_none_or(Capture::is_ours);
            if stays || !is_ours {
                return;
            }
            if let Err(error) = pod.netns.remove_return_route() {
                tracing::debug!(pod = %pod.claim, %error, "the return route stays");
            }
            if beside_cni && let Err(error) = pod.netns.release_translations() {
                tracing::debug!(pod = %pod.claim, %error, "connection tracking stays");
            }
        });
    }

    /// Pods that an earlier agent enrolled and that nobody wants any more. As long as a wanted one
    /// cannot be enrolled, or is not known yet, it may be among them: then all stay, and are refused
    /// everything.
    pub(super) async fn let_go_of_strangers(&mut self) {
        let all_known = match self.cni {
            Cni::Unused => true,
            Cni::Synced { unplaced } | Cni::Lost { unplaced } => !unplaced,
            Cni::Never => false,
        };
        if !all_known || !self.failed.is_empty() || !self.open.is_cancelled() {
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
        self.inherited.clear();
    }
}
