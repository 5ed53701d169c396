//! What the kernel programs tell of direct connections.

use std::io;
use std::time::Duration;

use super::DirectFlow;

/// What happened to a direct connection, told from its client's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowEvent {
    /// It is established.
    Opened(DirectFlow),
    /// It has ended; without having been established when it was refused.
    Closed(DirectFlow, TcpFacts),
}

/// What the kernel knows of a connection that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpFacts {
    pub ended: Ended,
    /// When, in time since the machine was started (`CLOCK_BOOTTIME`).
    pub at: Duration,
    /// Bytes that the client sent and the server's kernel acknowledged.
    pub sent: u64,
    /// Bytes that the client's kernel received.
    pub received: u64,
    /// Smoothed round-trip time (RFC 6298), `None` if none was measured.
    pub srtt: Option<Duration>,
    pub min_rtt: Option<Duration>,
    /// Segments sent again.
    pub retransmits: u32,
}

/// How a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Both ends are done.
    Finished,
    /// One end has reset or given up.
    Aborted,
    /// It was never established: refused, unreachable, or given up.
    Refused,
}

/// Unread events. Those of the time without an agent are among them, as far as there was room.
#[derive(Debug)]
pub struct FlowEvents {}

impl FlowEvents {
    /// The next event; it may be told up to some 100 ms late, so that many are read in one go. Safe
    /// to cancel.
    pub async fn next(&mut self) -> io::Result<FlowEvent> {
        std::future::pending().await
    }
}
