//! The verdicts that hold, by what they are asked for.

use std::collections::{HashMap, HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use culvert_core::identity::Identity;
use culvert_core::tables::{NetnsCookie, VerdictId, VerdictKey};
use culvert_core::verdict::Verdict;
use culvert_core::workload::Workload;

/// How many verdicts that were taken back are remembered, for what is still told of their
/// connections.
const RETIRED: usize = 4096;

/// What has not been used for so long makes room for another verdict of the same pod.
const UNUSED: Duration = Duration::from_secs(60);

/// A pod of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalPod {
    pub uid: Arc<str>,
    pub netns: NetnsCookie,
}

/// A verdict that the kernel was given.
#[derive(Debug)]
pub struct Grant {
    pub id: VerdictId,
    pub key: VerdictKey,
    pub source: Arc<Workload>,
    pub source_pod: LocalPod,
    pub verdict: Verdict,
    /// Those of the verdict's backends, in their order.
    pub pods: Vec<LocalPod>,
    /// Somebody whom policy permits is left to the agent for want of this certificate.
    pub lacking: Option<Identity>,
    /// In time since the machine was started.
    pub expires: Duration,
    /// The last time a connection was seen, in seconds since the machine was started.
    pub used: AtomicU64,
}

impl Grant {
    /// Whether both lead to the same pods with the same probabilities.
    pub fn is_like(&self, other: &Grant) -> bool {
        self.verdict.is_like(&other.verdict) && self.pods == other.pods
    }

    /// Whether connections that the other one let go may arrive.
    pub fn covers(&self, other: &Grant) -> bool {
        self.verdict.covers(&other.verdict) && other.pods.iter().all(|pod| self.pods.contains(pod))
    }

    pub fn touch(&self, now: Duration) {
        self.used.store(now.as_secs(), Ordering::Relaxed);
    }

    fn unused_for(&self, now: Duration) -> Duration {
        now.saturating_sub(Duration::from_secs(self.used.load(Ordering::Relaxed)))
    }
}

/// Whether there is room for a pod's next verdict.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Free,
    /// Once this one, which is not used, is taken back.
    Instead(VerdictKey),
    None,
}

#[derive(Debug)]
pub(super) struct Table {
    by_key: HashMap<VerdictKey, Arc<Grant>>,
    by_pod: HashMap<NetnsCookie, HashSet<SocketAddr>>,
    by_id: HashMap<VerdictId, Arc<Grant>>,
    retired: VecDeque<VerdictId>,
    per_pod: usize,
    next: u64,
}

impl Table {
    /// `first` is a number that no verdict of an earlier agent reached.
    pub fn new(per_pod: usize, first: u64) -> Self {
        Self {
            by_key: HashMap::new(),
            by_pod: HashMap::new(),
            by_id: HashMap::new(),
            retired: VecDeque::new(),
            per_pod,
            next: first,
        }
    }

    pub fn len(&self) -> usize {
        self.by_key.len()
    }

    pub fn count_of(&self, pod: NetnsCookie) -> usize {
        self.by_pod.get(&pod).map_or(0, HashSet::len)
    }

    pub fn keys(&self) -> Vec<VerdictKey> {
        self.by_key.keys().copied().collect()
    }

    pub fn get(&self, key: &VerdictKey) -> Option<&Arc<Grant>> {
        self.by_key.get(key)
    }

    /// Also one that was taken back not long ago.
    pub fn find(&self, id: VerdictId) -> Option<&Arc<Grant>> {
        self.by_id.get(&id)
    }

    pub fn next_id(&mut self) -> VerdictId {
        self.next += 1;
        VerdictId(self.next)
    }

    pub fn room(&self, pod: NetnsCookie, now: Duration) -> Room {
        let Some(own) = self.by_pod.get(&pod).filter(|own| own.len() >= self.per_pod) else {
            return Room::Free;
        };
        let keys = own.iter().map(|to| VerdictKey { source: pod, destination: *to });
        let grants = keys.filter_map(|key| self.by_key.get(&key));
        let least = grants.max_by_key(|grant| grant.unused_for(now));
        match least.filter(|grant| grant.unused_for(now) >= UNUSED) {
            Some(grant) => Room::Instead(grant.key),
            None => Room::None,
        }
    }

    pub fn insert(&mut self, grant: Grant) {
        let grant = Arc::new(grant);
        self.by_pod.entry(grant.key.source).or_default().insert(grant.key.destination);
        let (key, id) = (grant.key, grant.id);
        self.by_id.insert(id, grant.clone());
        if let Some(before) = self.by_key.insert(key, grant)
            && before.id != id
        {
            self.retire(before.id);
        }
    }

    pub fn remove(&mut self, key: &VerdictKey) {
        if let Some(grant) = self.by_key.remove(key) {
            self.retire(grant.id);
        }
        if let Some(own) = self.by_pod.get_mut(&key.source) {
            own.remove(&key.destination);
            if own.is_empty() {
                self.by_pod.remove(&key.source);
            }
        }
    }

    fn retire(&mut self, id: VerdictId) {
        self.retired.push_back(id);
        if self.retired.len() > RETIRED
            && let Some(oldest) = self.retired.pop_front()
        {
            self.by_id.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests;
