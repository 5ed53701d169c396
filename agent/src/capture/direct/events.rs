//! What the kernel programs tell of direct connections.

use std::fmt;
use std::io;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use culvert_abi::direct::{EVENTS_MAP, FlowEvent as Event};
use tokio::io::unix::AsyncFd;
use tokio::time::{self, MissedTickBehavior};

use super::{DirectFlow, layout};
use crate::capture::CaptureError;
use crate::capture::maps::take;

/// How late an event may be told. The programs wake the agent only when much is unread: to wake it
/// for each connection would cost more than the connection.
const DELAY: Duration = Duration::from_millis(100);

/// How many events are read in one go.
const AT_ONCE: usize = 1024;

/// States of a TCP socket (`BPF_TCP_…`).
const SYN_SENT: u32 = 2;
const SYN_RECV: u32 = 3;
const FIN_WAIT2: u32 = 5;
const LAST_ACK: u32 = 9;
const CLOSING: u32 = 11;
const TIME_WAIT: u32 = 6;

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
pub struct FlowEvents {
    ring: Ring,
    tick: Option<time::Interval>,
    /// More was unread than was taken in one go.
    more: bool,
}

enum Ring {
    /// Not yet read from, and so not yet of a runtime.
    Fresh(Option<RingBuf<MapData>>),
    Read(AsyncFd<RingBuf<MapData>>),
}

impl fmt::Debug for FlowEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowEvents").finish_non_exhaustive()
    }
}

impl FlowEvents {
    pub(super) fn take(object: &mut Ebpf) -> Result<FlowEvents, CaptureError> {
        Ok(FlowEvents {
            ring: Ring::Fresh(Some(take(object, EVENTS_MAP)?)),
            tick: None,
            more: false,
        })
    }

    /// The next events, at least one, in their order; they may be told up to some 100 ms late, so that
    /// many are read in one go, and of a short connection both the beginning and the end. Always called
    /// in the same runtime. Safe to cancel.
    pub async fn next(&mut self) -> io::Result<Vec<FlowEvent>> {
        if let Ring::Fresh(ring) = &mut self.ring
            && let Some(ring) = ring.take()
        {
            // SAFETY: the ring owns its descriptor, always names the same one, and is moved in here.
            self.ring = Ring::Read(unsafe { AsyncFd::register(ring) }?);
        }
        let Ring::Read(ring) = &mut self.ring else {
            return Err(io::Error::other("the events could not be watched"));
        };
        let tick = self.tick.get_or_insert_with(|| {
            let mut tick = time::interval(DELAY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            tick
        });
        loop {
            // Never at once after the last ones: the more often it is looked, the fewer there are.
            if !std::mem::take(&mut self.more) {
                tokio::select! {
                    ready = ring.readable_mut() => {
                        ready?.clear_ready();
                        tick.reset();
                    }
                    _ = tick.tick() => {}
                }
            }
            let mut events = Vec::new();
            while events.len() < AT_ONCE
                && let Some(item) = ring.get_mut().next()
            {
                events.extend(parse(&item));
            }
            self.more = events.len() == AT_ONCE;
            if !events.is_empty() {
                return Ok(events);
            }
        }
    }
}

fn parse(bytes: &[u8]) -> Option<FlowEvent> {
    if bytes.len() < size_of::<Event>() {
        return None;
    }
    // SAFETY: there are enough bytes, and any are a valid value of this plain structure.
    let event = unsafe { bytes.as_ptr().cast::<Event>().read_unaligned() };
    let flow = layout::flow_of(&event.key, &event.flow);
    match event.kind {
        Event::OPENED => Some(FlowEvent::Opened(flow)),
        Event::CLOSED => Some(FlowEvent::Closed(flow, facts(&event))),
        _ => None,
    }
}

fn facts(event: &Event) -> TcpFacts {
    let ended = match event.state {
        SYN_SENT | SYN_RECV => Ended::Refused,
        FIN_WAIT2 | LAST_ACK | CLOSING | TIME_WAIT => Ended::Finished,
        _ => Ended::Aborted,
    };
    let microseconds = |time: u32| Duration::from_micros(time.into());
    TcpFacts {
        ended,
        at: Duration::from_nanos(event.at),
        sent: event.sent,
        received: event.received,
        srtt: (event.srtt != 0).then(|| Duration::from_nanos(u64::from(event.srtt) * 125)),
        min_rtt: (event.min_rtt != u32::MAX).then(|| microseconds(event.min_rtt)),
        retransmits: event.retransmits,
    }
}
