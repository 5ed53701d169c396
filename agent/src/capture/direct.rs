//! Connections that the kernel carries from pod to pod without the agent: the verdicts that allow
//! them, the connections that live, and what the programs tell of them.

mod events;

use std::net::SocketAddr;
use std::time::Duration;

use culvert_core::tables::{NetnsCookie, Verdict, VerdictId, VerdictKey};

use super::{CaptureError, Netns};

pub use events::{Ended, FlowEvent, FlowEvents, TcpFacts};

/// The cookie of a socket (`SO_COOKIE`), which no other socket ever has while the machine is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SocketCookie(pub u64);

/// One connection that the kernel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectFlow {
    /// The end that connected.
    pub client: SocketAddr,
    /// The backend that it is connected to.
    pub server: SocketAddr,
    /// What the application connected to.
    pub original: SocketAddr,
    pub source: NetnsCookie,
    pub destination: NetnsCookie,
    /// The verdict that let it go.
    pub verdict: VerdictId,
    /// The client's socket.
    pub socket: SocketCookie,
    /// When its SYN left, in time since the machine was started (`CLOCK_BOOTTIME`), as is the next.
    pub connected_at: Duration,
    /// `None` while it waits for an answer.
    pub established_at: Option<Duration>,
}

impl DirectFlow {
    /// The verdict's key.
    pub fn key(&self) -> VerdictKey {
        VerdictKey { source: self.source, destination: self.original }
    }
}

/// What the kernel programs did with direct connections, since their maps were made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectCounts {
    /// Connections that went straight.
    pub opened: u64,
    /// Connections to a service whose draw fell on an endpoint that is not in the kernel.
    pub elsewhere: u64,
    /// Connections with a verdict that went by the agent because it has expired, or because no agent
    /// has extended the time of admission.
    pub expired: u64,
    /// Connections with a verdict that went by the agent because the pod's table is nearly full.
    pub full: u64,
    /// Connections with a verdict that went by the agent because their socket is special: bound to
    /// a foreign address or a device, marked, or MPTCP.
    pub special: u64,
    /// Direct connections that the destination's end let in.
    pub admitted: u64,
    /// Direct connections that the destination's end led to the agent, because their verdict was
    /// taken back while they were on their way.
    pub retracted: u64,
    /// Direct connections that failed because their record could not be made.
    pub unrecorded: u64,
    /// Events that found no room.
    pub events_lost: u64,
}

/// The kernel's admission of direct connections.
#[derive(Debug)]
pub struct Direct {}

impl Direct {
    /// Whether the kernel can end a connection on the agent's word (`CONFIG_INET_DIAG_DESTROY`).
    /// Without, a live direct connection cannot be revoked.
    pub fn can_destroy(&self) -> bool {
        false
    }

    /// Lets the kernel admit connections, or replaces what it was told of them. The replacement is
    /// atomic. New connections only: see [`Direct::flows`] for those that live.
    ///
    /// [`CaptureError::VerdictsFull`]: they go on by the agent.
    pub fn set_verdict(&self, _key: &VerdictKey, _verdict: &Verdict) -> Result<(), CaptureError> {
        Ok(())
    }

    /// From when this answers on, no connection is let in by this verdict any more; those that live
    /// are in [`Direct::flows`]. One that is not there is fine.
    pub fn remove_verdict(&self, _key: &VerdictKey) -> Result<(), CaptureError> {
        Ok(())
    }

    /// The verdicts that the kernel holds, also those of an earlier agent.
    pub fn verdicts(&self) -> Result<Vec<(VerdictKey, Verdict)>, CaptureError> {
        Ok(Vec::new())
    }

    /// Until when verdicts count, in time since the machine was started (`CLOCK_BOOTTIME`). Zero, as
    /// at first: they do not.
    pub fn admit_until(&self, _until: Duration) -> Result<(), CaptureError> {
        Ok(())
    }

    /// The live connections of one pod, whose verdicts may be gone. A connection that was let in
    /// before [`Direct::remove_verdict`] answered is among them, until it has ended.
    pub fn flows(&self, _source: NetnsCookie) -> Result<Vec<DirectFlow>, CaptureError> {
        Ok(Vec::new())
    }

    /// The pods that have direct connections, or may have them; also pods that were withdrawn while
    /// connections of theirs live on.
    pub fn sources(&self) -> Vec<NetnsCookie> {
        Vec::new()
    }

    /// The connection that arrives with these addresses, if an enrolled pod of this node opened it
    /// as a direct one. A connection on the plaintext listener that is among these has its identity
    /// proven: its verdict was taken back while it was on its way, and the agent judges it anew.
    pub fn flow(
        &self,
        _client: SocketAddr,
        _server: SocketAddr,
    ) -> Result<Option<DirectFlow>, CaptureError> {
        Ok(None)
    }

    /// What happens to direct connections, to be had once. `None` afterwards.
    pub fn events(&self) -> Option<FlowEvents> {
        None
    }

    pub fn counts(&self) -> Result<DirectCounts, CaptureError> {
        Ok(DirectCounts::default())
    }
}

/// Ends a direct connection at both ends, by those of its namespaces that are given: one is enough
/// (`SOCK_DESTROY`, sock_diag(7)). Whether there was one to end. Its end is told as an event too.
///
/// The applications see `ECONNABORTED` or a reset.
pub fn destroy(
    _flow: &DirectFlow,
    _source: Option<&Netns>,
    _destination: Option<&Netns>,
) -> Result<bool, CaptureError> {
    Ok(false)
}

/// The time since the machine was started, sleep included (`CLOCK_BOOTTIME`).
pub fn since_boot() -> Duration {
    Duration::ZERO
}
