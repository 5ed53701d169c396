//! What the messages mean, one connection at a time; pure.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use culvert_proto::istio::workload::zds;
use prost::Message;

use crate::packet::Packet;

/// The longest reason in an answer: istio-cni reads at most 1024 bytes.
const MAX_REASON: usize = 900;

/// What istio-cni wants of the agent.
#[derive(Debug)]
pub enum Order {
    /// Serve a pod, known by its Kubernetes UID.
    Add { uid: Arc<str>, info: PodInfo, netns: OwnedFd },
    /// Serve a pod no longer.
    Del { uid: Arc<str> },
    /// All pods that there are have been told: only these are to be served.
    Snapshot { uids: HashSet<Arc<str>> },
    /// The connection has ended: nothing is known of changes until the next snapshot.
    Lost(Loss),
}

/// How a connection to istio-cni ended, or did not begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    Unreachable,
    Closed,
    Broken,
    /// By what should not have been sent.
    Fault,
    /// An order took too long to be answered.
    TooSlow,
}

impl Loss {
    /// As the metric names it.
    pub fn reason(self) -> &'static str {
        match self {
            Loss::Unreachable => "unreachable",
            Loss::Closed => "closed",
            Loss::Broken => "broken",
            Loss::Fault => "fault",
            Loss::TooSlow => "too_slow",
        }
    }
}

/// How Kubernetes names a pod (`istio.workload.zds.WorkloadInfo`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodInfo {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub service_account: Arc<str>,
}

/// What istio-cni should not have sent. The text is the answer's.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("failure to read message : truncated")]
    Truncated,
    #[error("failure to read message : {0}")]
    Undecodable(#[from] prost::DecodeError),
    #[error("failure to read message : unknown request")]
    Empty,
    #[error("failure to read message : {found} descriptors, {wanted} expected")]
    Descriptors { found: usize, wanted: usize },
    #[error("failure to process message : pod {0} without workload_info")]
    NoInfo(String),
    #[error("failure to process message : keep of pod {0} after the snapshot")]
    LateKeep(String),
    #[error("failure to process message : the snapshot was already sent")]
    SecondSnapshot,
}

/// What one connection has heard so far.
#[derive(Debug)]
pub struct Conversation {
    /// The pods of the snapshot until it is complete.
    snapshot: Option<HashSet<Arc<str>>>,
}

impl Default for Conversation {
    fn default() -> Self {
        Self { snapshot: Some(HashSet::new()) }
    }
}

impl Conversation {
    /// What to do about a packet; `None` when there is nothing to do but to acknowledge it.
    pub fn hear(&mut self, packet: Packet) -> Result<Option<Order>, Fault> {
        use zds::workload_request::Payload;
        let Packet { bytes, descriptors } = packet;
        let request = zds::WorkloadRequest::decode(bytes.as_slice())?;
        let payload = request.payload.ok_or(Fault::Empty)?;
        let wanted = usize::from(matches!(payload, Payload::Add(_)));
        let found = descriptors.len();
        if found != wanted {
            return Err(Fault::Descriptors { found, wanted });
        }
        match payload {
            Payload::Add(add) => {
                let Some(netns) = descriptors.into_iter().next() else {
                    return Err(Fault::Descriptors { found, wanted });
                };
                self.add(add, netns).map(Some)
            }
            Payload::Keep(keep) => match &mut self.snapshot {
                Some(snapshot) => {
                    snapshot.insert(keep.uid.into());
                    Ok(None)
                }
                None => Err(Fault::LateKeep(shown(&keep.uid))),
            },
            Payload::Del(del) => Ok(self.del(del.uid.into())),
            Payload::SnapshotSent(_) => match self.snapshot.take() {
                Some(uids) => Ok(Some(Order::Snapshot { uids })),
                None => Err(Fault::SecondSnapshot),
            },
        }
    }

    fn add(&mut self, add: zds::AddWorkload, netns: OwnedFd) -> Result<Order, Fault> {
        let Some(info) = add.workload_info else { return Err(Fault::NoInfo(shown(&add.uid))) };
        let uid: Arc<str> = add.uid.into();
        if let Some(snapshot) = &mut self.snapshot {
            snapshot.insert(uid.clone());
        }
        let info = PodInfo {
            name: info.name.into(),
            namespace: info.namespace.into(),
            service_account: info.service_account.into(),
        };
        Ok(Order::Add { uid, info, netns })
    }

    /// Before the snapshot is complete the pod merely does not belong to it: what is served already
    /// goes on until then.
    fn del(&mut self, uid: Arc<str>) -> Option<Order> {
        match &mut self.snapshot {
            Some(snapshot) => {
                snapshot.remove(&uid);
                None
            }
            None => Some(Order::Del { uid }),
        }
    }
}

/// The agent's first message.
pub fn hello() -> Vec<u8> {
    zds::ZdsHello { version: zds::Version::V1.into() }.encode_to_vec()
}

/// The answer that all is well.
pub fn success() -> Vec<u8> {
    answer(String::new())
}

/// The answer that something is not, cut to what istio-cni can read.
pub fn failure(why: &str) -> Vec<u8> {
    let fits = (0..=MAX_REASON).rev().find_map(|end| why.get(..end.min(why.len())));
    answer(fits.unwrap_or_default().to_owned())
}

fn answer(error: String) -> Vec<u8> {
    let payload = Some(zds::workload_response::Payload::Ack(zds::Ack { error }));
    zds::WorkloadResponse { payload }.encode_to_vec()
}

/// A text of the peer's, short enough for a log line.
fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
