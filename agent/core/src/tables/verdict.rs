//! What the kernel may admit by itself: the verdicts that it holds.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use super::NetnsCookie;

/// Most backends that one verdict can name.
pub const MAX_BACKENDS: usize = 32;

/// Names one decision. A number is never given again, also not by a later agent: a connection on its
/// way shows by it which decision let it go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictId(pub u64);

impl fmt::Display for VerdictId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose connections to where a verdict is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VerdictKey {
    /// The pod that connects.
    pub source: NetnsCookie,
    /// What its application connects to: an address of a service or of a pod.
    pub destination: SocketAddr,
}

/// One pod of this node that connections may go to without the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Backend {
    /// Of the same family as the destination.
    pub to: SocketAddr,
    pub netns: NetnsCookie,
    /// Share of the connections, of the sum over all backends and [`Verdict::elsewhere`].
    pub weight: u32,
    /// What the two applications send goes past TCP where it may (`sk_msg`).
    pub accelerated: bool,
}

/// Connections that the kernel may carry without asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub id: VerdictId,
    /// When it ends by itself, in time since the machine was started (`CLOCK_BOOTTIME`).
    pub expires: Duration,
    /// At most [`MAX_BACKENDS`]. For the address of a pod that pod alone.
    pub backends: Vec<Backend>,
    /// Share of the connections that go by the agent, which then draws among the other endpoints.
    pub elsewhere: u32,
}
