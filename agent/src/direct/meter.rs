//! How much a live direct connection has carried: the kernel knows, and is asked from time to time.

use std::collections::HashMap;
use std::sync::Arc;

use culvert_core::tables::NetnsCookie;
use parking_lot::Mutex;

use crate::capture::direct::{DirectFlow, SocketCookie};
use crate::capture::{self, Carried};
use crate::node::LocalPods;
use crate::telemetry::ByteCounters;

/// The counters of one connection, which only ever grow.
#[derive(Debug)]
pub(super) struct Meter {
    flow: DirectFlow,
    counters: Vec<Arc<ByteCounters>>,
    told: Mutex<Carried>,
}

impl Meter {
    pub fn new(flow: DirectFlow, counters: Vec<Arc<ByteCounters>>) -> Self {
        Self { flow, counters, told: Mutex::default() }
    }

    /// Counts what was carried since the last time. Old news count nothing.
    pub fn advance(&self, carried: Carried) {
        let mut told = self.told.lock();
        let (sent, received) = (
            carried.sent.saturating_sub(told.sent),
            carried.received.saturating_sub(told.received),
        );
        for counters in &self.counters {
            counters.add_received(sent);
            counters.add_sent(received);
        }
        told.sent += sent;
        told.received += received;
    }
}

/// Asks the kernel about these. Blocks for microseconds for each of them.
pub(super) fn read(kernel: &capture::Direct, meters: &[Arc<Meter>], pods: &LocalPods) {
    let mut by_source: HashMap<NetnsCookie, Vec<&Arc<Meter>>> = HashMap::new();
    for meter in meters {
        by_source.entry(meter.flow.source).or_default().push(meter);
    }
    for (source, meters) in by_source {
        let Some((pod, _)) = pods.iter().find(|(pod, _)| pod.netns.cookie() == source) else {
            continue;
        };
        let ends = |meter: &&Arc<Meter>| -> (_, _, SocketCookie) {
            let DirectFlow { client, server, socket, .. } = meter.flow;
            (client, server, socket)
        };
        match pod.netns.carried(meters.iter().map(ends)) {
            Ok(read) => {
                for (meter, carried) in meters.iter().zip(read) {
                    let Some(carried) = carried else { continue };
                    let short = short(kernel, meter.flow.socket);
                    meter.advance(Carried {
                        sent: carried.sent + short.sent,
                        received: carried.received + short.received,
                    });
                }
            }
            Err(error) => tracing::warn!(%source, %error, "cannot read what connections carried"),
        }
    }
}

/// What a connection has carried past TCP.
fn short(kernel: &capture::Direct, client: SocketCookie) -> Carried {
    if !kernel.accelerates() {
        return Carried::default();
    }
    match kernel.short(client) {
        Ok(short) => short.unwrap_or_default(),
        Err(error) => {
            tracing::warn!(%error, "cannot read what an accelerated connection carried");
            Carried::default()
        }
    }
}

#[cfg(test)]
mod tests;
