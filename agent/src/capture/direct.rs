//! Connections that the kernel carries from pod to pod without the agent: the verdicts that allow
//! them, the connections that live, and what the programs tell of them.

mod events;
mod layout;
mod orphans;

use std::fmt;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{Array, HashMap, HashOfMaps, Map, MapData, MapError, PerCpuArray};
use culvert_abi::direct::{
    AGENT_MAP, Agent, DIRECT_COUNTS_MAP, DIRECT_MAP, LIVE_MAP, Live, POD_DIRECT_MAP, VERDICTS_MAP,
};
use culvert_abi::{ADDRESSES_MAP, Address, direct as abi};
use culvert_core::tables::{NetnsCookie, Verdict, VerdictId, VerdictKey};
use parking_lot::Mutex;

use super::maps::{absent_is_fine, failed, is_full, take};
use super::pins::Pins;
use super::{CaptureError, CaptureOptions, Netns, sys};

pub use culvert_abi::direct::DirectCounts;
pub use events::{Ended, FlowEvent, FlowEvents, TcpFacts};
pub(super) use orphans::end_all;

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
    /// What became of it at the destination's pod. One that is established and did not come there is
    /// somebody else's, and no byte of it leaves.
    pub arrival: Option<Arrival>,
    /// When its SYN left, in time since the machine was started (`CLOCK_BOOTTIME`), as is the next.
    pub connected_at: Duration,
    /// `None` while it waits for an answer.
    pub established_at: Option<Duration>,
}

/// Who has the destination's end of a direct connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// The application.
    Admitted,
    /// The agent: the verdict was taken back while the connection was on its way.
    Retracted,
}

impl DirectFlow {
    /// The verdict's key.
    pub fn key(&self) -> VerdictKey {
        VerdictKey { source: self.source, destination: self.original }
    }
}

/// The kernel's admission of direct connections. Its calls wait for each other only, and none of
/// them for other processors.
pub struct Direct {
    verdicts: Mutex<HashMap<MapData, abi::VerdictKey, abi::Verdict>>,
    pods: Mutex<PodTables>,
    addresses: HashMap<MapData, Address, u64>,
    agent: Mutex<Array<MapData, Agent>>,
    counts: PerCpuArray<MapData, DirectCounts>,
    events: Mutex<Option<FlowEvents>>,
    max_verdicts: u32,
    max_pods: u32,
    can_destroy: bool,
}

/// What each pod has of its own.
struct PodTables {
    flows: HashOfMaps<MapData, u64, MapData>,
    live: HashMap<MapData, u64, Live>,
}

impl fmt::Debug for Direct {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Direct").field("can_destroy", &self.can_destroy).finish_non_exhaustive()
    }
}

impl Direct {
    /// Takes the maps of a loaded object, with what an earlier agent left in them.
    pub(super) fn take(
        object: &mut Ebpf,
        options: &CaptureOptions,
        pins: &Pins,
    ) -> Result<Direct, CaptureError> {
        // The object's own handle belongs to the tables.
        let addresses = MapData::from_pin(pins.map(ADDRESSES_MAP));
        let addresses = addresses.and_then(|map| Map::HashMap(map).try_into());
        let can_destroy = sys::can_destroy_sockets().unwrap_or_else(|error| {
            tracing::warn!(%error, "whether sockets can be destroyed here is not known");
            false
        });
        Ok(Direct {
            verdicts: Mutex::new(take(object, VERDICTS_MAP)?),
            pods: Mutex::new(PodTables {
                flows: take(object, POD_DIRECT_MAP)?,
                live: take(object, LIVE_MAP)?,
            }),
            addresses: addresses.map_err(|error| failed(ADDRESSES_MAP, error))?,
            agent: Mutex::new(take(object, AGENT_MAP)?),
            counts: take(object, DIRECT_COUNTS_MAP)?,
            events: Mutex::new(Some(FlowEvents::take(object)?)),
            max_verdicts: options.max_verdicts,
            max_pods: options.max_pods,
            can_destroy,
        })
    }

    /// Whether the kernel can end a connection on the agent's word (`CONFIG_INET_DIAG_DESTROY`).
    /// Without, a live direct connection cannot be revoked.
    pub fn can_destroy(&self) -> bool {
        self.can_destroy
    }

    /// Lets the kernel admit connections, or replaces what it was told of them. The replacement is
    /// atomic. New connections only: see [`Direct::flows`] for those that live.
    ///
    /// [`CaptureError::VerdictsFull`]: they go on by the agent.
    pub fn set_verdict(&self, key: &VerdictKey, verdict: &Verdict) -> Result<(), CaptureError> {
        let value = layout::verdict_value(verdict);
        let result = self.verdicts.lock().insert(layout::verdict_key(key), value, 0);
        result.map_err(|error| match is_full(&error) {
            true => {
                CaptureError::VerdictsFull { map: VERDICTS_MAP, max_verdicts: self.max_verdicts }
            }
            false => failed(VERDICTS_MAP, error),
        })
    }

    /// From when this answers on, no connection is let in by this verdict any more; those that live
    /// are in [`Direct::flows`]. One that is not there is fine.
    pub fn remove_verdict(&self, key: &VerdictKey) -> Result<(), CaptureError> {
        let removed = self.verdicts.lock().remove(&layout::verdict_key(key));
        absent_is_fine(removed).map_err(|error| failed(VERDICTS_MAP, error))
    }

    /// The verdicts that the kernel holds, also those of an earlier agent.
    pub fn verdicts(&self) -> Result<Vec<(VerdictKey, Verdict)>, CaptureError> {
        let verdicts = self.verdicts.lock();
        let read = verdicts.iter().map(|entry| {
            let (key, verdict) = entry?;
            Ok((layout::key_of(&key), layout::verdict_of(&verdict)))
        });
        read.collect::<Result<_, MapError>>().map_err(|error| failed(VERDICTS_MAP, error))
    }

    /// Until when verdicts count, in time since the machine was started (`CLOCK_BOOTTIME`). Zero, as
    /// at first: they do not.
    pub fn admit_until(&self, until: Duration) -> Result<(), CaptureError> {
        let agent = Agent { admit_until: layout::nanoseconds(until) };
        self.agent.lock().set(0, agent, 0).map_err(|error| failed(AGENT_MAP, error))
    }

    /// The live connections of one pod, whose verdicts may be gone. A connection that was let in
    /// before [`Direct::remove_verdict`] answered is among them, until it has ended.
    pub fn flows(&self, source: NetnsCookie) -> Result<Vec<DirectFlow>, CaptureError> {
        let Some(flows) = self.table(source)? else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        // SAFETY: the map's keys and values are these types.
        unsafe {
            sys::map_entries(flows.fd().as_fd(), |key: &abi::DirectKey, flow: &abi::DirectFlow| {
                found.push(layout::flow_of(key, flow));
            })
        }
        .map_err(|error| failed(DIRECT_MAP, MapError::IoError(error)))?;
        Ok(found)
    }

    /// The pods that have direct connections, or may have them; also pods that were withdrawn while
    /// connections of theirs live on.
    pub fn sources(&self) -> Vec<NetnsCookie> {
        self.pods.lock().flows.keys().flatten().map(NetnsCookie).collect()
    }

    /// The connection that arrives with these addresses, if an enrolled pod of this node opened it
    /// as a direct one, and its client's socket has not closed. The identity of a connection among
    /// these is proven: where its verdict was taken back while it was on its way, the agent accepts it
    /// on the outbound listener and judges it anew.
    pub fn flow(
        &self,
        client: SocketAddr,
        server: SocketAddr,
    ) -> Result<Option<DirectFlow>, CaptureError> {
        let key = layout::direct_key(client, server);
        let source = match self.addresses.get(&key.source, 0) {
            Ok(source) => NetnsCookie(source),
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(failed(ADDRESSES_MAP, error)),
        };
        let Some(flows) = self.table(source)? else { return Ok(None) };
        let flows: Result<HashMap<_, abi::DirectKey, abi::DirectFlow>, _> =
            Map::HashMap(flows).try_into();
        match flows.and_then(|flows| flows.get(&key, 0)) {
            Ok(flow) => Ok(Some(layout::flow_of(&key, &flow))),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(DIRECT_MAP, error)),
        }
    }

    /// What happens to direct connections, to be had once. `None` afterwards.
    pub fn events(&self) -> Option<FlowEvents> {
        self.events.lock().take()
    }

    /// What the programs did since their maps were made, over all processors.
    pub fn counts(&self) -> Result<DirectCounts, CaptureError> {
        let per_cpu = self.counts.get(&0, 0).map_err(|error| failed(DIRECT_COUNTS_MAP, error))?;
        Ok(per_cpu.iter().fold(DirectCounts::default(), layout::add))
    }

    /// Gives a pod the table of an object that was loaded for it, unless it has one.
    pub(super) fn ensure(
        &self,
        object: &mut Ebpf,
        cookie: NetnsCookie,
    ) -> Result<(), CaptureError> {
        self.sweep()?;
        let mut pods = self.pods.lock();
        match pods.flows.get(&cookie.0, 0) {
            Ok(_) => {}
            Err(MapError::KeyNotFound) => {
                let Some(Map::HashMap(flows)) = object.take_map(DIRECT_MAP) else {
                    return Err(super::maps::missing(DIRECT_MAP));
                };
                let result = pods.flows.insert(cookie.0, &flows, 0);
                result.map_err(|error| self.full_or_failed(POD_DIRECT_MAP, error))?;
            }
            Err(error) => return Err(failed(POD_DIRECT_MAP, error)),
        }
        match pods.live.get(&cookie.0, 0) {
            Ok(_) => Ok(()),
            Err(MapError::KeyNotFound) => self.count_anew(&mut pods, cookie),
            Err(error) => Err(failed(LIVE_MAP, error)),
        }
    }

    /// A pod's addresses may have changed: what was learned of them does not count any more.
    pub(super) fn forgive(&self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        let mut pods = self.pods.lock();
        match pods.live.get(&cookie.0, 0) {
            Ok(live) if live.foreign != 0 => self.count_anew(&mut pods, cookie),
            Ok(_) | Err(MapError::KeyNotFound) => Ok(()),
            Err(error) => Err(failed(LIVE_MAP, error)),
        }
    }

    /// Connections that come or go meanwhile may be missed; they are few, and the table has a margin.
    fn count_anew(&self, pods: &mut PodTables, cookie: NetnsCookie) -> Result<(), CaptureError> {
        let flows = pods.flows.get(&cookie.0, 0).map_err(|error| failed(POD_DIRECT_MAP, error))?;
        let live = Live { connections: count(&flows)?, ..Live::default() };
        let result = pods.live.insert(cookie.0, live, 0);
        result.map_err(|error| self.full_or_failed(LIVE_MAP, error))
    }

    /// A pod opens no direct connections any more. Those that it has stay known until they end.
    pub(super) fn close(&self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        let keys: Vec<VerdictKey> = {
            let verdicts = self.verdicts.lock();
            let own = verdicts.keys().flatten().filter(|key| key.netns == cookie.0);
            own.map(|key| layout::key_of(&key)).collect()
        };
        for key in keys {
            self.remove_verdict(&key)?;
        }
        let removed = self.pods.lock().live.remove(&cookie.0);
        absent_is_fine(removed).map_err(|error| failed(LIVE_MAP, error))?;
        self.sweep()
    }

    /// Drops the tables of pods that open no direct connections and have none left.
    fn sweep(&self) -> Result<(), CaptureError> {
        let mut pods = self.pods.lock();
        let cookies: Vec<u64> = pods.flows.keys().flatten().collect();
        for cookie in cookies {
            if !matches!(pods.live.get(&cookie, 0), Err(MapError::KeyNotFound)) {
                continue;
            }
            let Ok(flows) = pods.flows.get(&cookie, 0) else { continue };
            if count(&flows)? == 0 {
                absent_is_fine(pods.flows.remove(&cookie))
                    .map_err(|error| failed(POD_DIRECT_MAP, error))?;
            }
        }
        Ok(())
    }

    fn table(&self, source: NetnsCookie) -> Result<Option<MapData>, CaptureError> {
        match self.pods.lock().flows.get(&source.0, 0) {
            Ok(flows) => Ok(Some(flows)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(failed(POD_DIRECT_MAP, error)),
        }
    }

    fn full_or_failed(&self, map: &'static str, error: MapError) -> CaptureError {
        match is_full(&error) {
            true => CaptureError::Full { map, max_pods: self.max_pods },
            false => failed(map, error),
        }
    }
}

/// How many connections a pod's table holds.
fn count(flows: &MapData) -> Result<u64, CaptureError> {
    let mut number = 0;
    // SAFETY: the map's keys and values are these types.
    unsafe {
        sys::map_entries(flows.fd().as_fd(), |_: &abi::DirectKey, _: &abi::DirectFlow| number += 1)
    }
    .map_err(|error| failed(DIRECT_MAP, MapError::IoError(error)))?;
    Ok(number)
}

/// Ends a direct connection at both ends, by those of its namespaces that are given: one is enough
/// (`SOCK_DESTROY`, sock_diag(7)). Whether there was one to end. Its end is told as an event too.
///
/// The applications see `ECONNABORTED` or a reset.
pub fn destroy(
    flow: &DirectFlow,
    source: Option<&Netns>,
    destination: Option<&Netns>,
) -> Result<bool, CaptureError> {
    let failed = |error| {
        let (client, server) = (flow.client, flow.server);
        CaptureError::Destroy { client, server, error }
    };
    let mut found = false;
    if let Some(source) = source {
        found |= source.destroy(flow.client, flow.server, flow.socket).map_err(failed)?;
    }
    if let Some(destination) = destination {
        // The server's socket has a number of its own, if there is one.
        let (server, client) = (flow.server, flow.client);
        if let Some(cookie) = destination.find_connection(server, client).map_err(failed)? {
            found |= destination.destroy(server, client, cookie).map_err(failed)?;
        }
    }
    Ok(found)
}

/// The time since the machine was started, sleep included (`CLOCK_BOOTTIME`).
pub fn since_boot() -> Duration {
    sys::since_boot()
}

#[cfg(test)]
mod tests;
