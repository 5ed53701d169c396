//! Handles of the maps, and carrying changes of the tables into them.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{
    Array, HashMap, HashOfMaps, LpmTrie, Map, MapData, MapError, PerCpuArray, SockHash,
};
use culvert_abi::{
    ABI_MAP, ADDRESSES_MAP, Abi, Address, COUNTS_MAP, Counts, EXCLUDED_NETS_MAP,
    EXCLUDED_PORTS_MAP, ExcludedNet, ExcludedPort, FLOWS_MAP, Flow, FlowKey, LISTENERS_MAP,
    Listener, ListenerKey, POD_FLOWS_MAP, PODS_MAP, PROBES_MAP, Pod, Probe,
};
use culvert_core::tables::{Direction, NetnsCookie, PodEntry, TableChange, Tables, diff};
use ipnet::IpNet;

use super::{CaptureError, CaptureOptions};

type Flows = HashMap<MapData, FlowKey, Flow>;

/// How many entries the maps hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MapCounts {
    pub pods: usize,
    pub addresses: usize,
    pub excluded_ports: usize,
    pub excluded_cidrs: usize,
    pub listeners: usize,
    /// Captured connections that are on their way to the agent, over all pods.
    pub flows: usize,
    /// Connections of the node itself that are on their way to pods.
    pub probes: usize,
}

/// The maps, with a copy of the tables in them.
pub struct Maps {
    tables: Tables,
    max_pods: u32,
    pods: HashMap<MapData, u64, Pod>,
    addresses: HashMap<MapData, Address, u64>,
    excluded_ports: HashMap<MapData, ExcludedPort, u32>,
    excluded_nets: LpmTrie<MapData, ExcludedNet, u32>,
    flows: HashOfMaps<MapData, u64, Flows>,
    probes: HashMap<MapData, Probe, u32>,
    listeners: SockHash<MapData, ListenerKey>,
    counts: PerCpuArray<MapData, Counts>,
}

impl fmt::Debug for Maps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Maps").field("tables", &self.tables).finish_non_exhaustive()
    }
}

impl Maps {
    /// Takes the maps of a loaded object, with what an earlier agent left in them.
    pub fn take(object: &mut Ebpf, options: &CaptureOptions) -> Result<Maps, CaptureError> {
        let mut abi: Array<MapData, Abi> = take(object, ABI_MAP)?;
        let max_pods = options.max_pods;
        abi.set(0, options.abi(), 0).map_err(|error| failed(ABI_MAP, error))?;
        let mut maps = Maps {
            tables: Tables::default(),
            max_pods,
            pods: take(object, PODS_MAP)?,
            addresses: take(object, ADDRESSES_MAP)?,
            excluded_ports: take(object, EXCLUDED_PORTS_MAP)?,
            excluded_nets: take(object, EXCLUDED_NETS_MAP)?,
            flows: take(object, POD_FLOWS_MAP)?,
            probes: take(object, PROBES_MAP)?,
            listeners: take(object, LISTENERS_MAP)?,
            counts: take(object, COUNTS_MAP)?,
        };
        maps.tables = maps.read()?;
        Ok(maps)
    }

    /// Looks what another agent has written meanwhile.
    pub fn reread(&mut self) -> Result<(), CaptureError> {
        self.tables = self.read()?;
        Ok(())
    }

    pub fn pods(&self) -> Vec<NetnsCookie> {
        self.tables.pods.keys().copied().collect()
    }

    pub fn is_enrolled(&self, cookie: NetnsCookie) -> bool {
        self.tables.pods.contains_key(&cookie)
    }

    /// Carries a change of the tables into the kernel, step by step. After a failure the copy holds
    /// exactly the steps that were made.
    pub fn change(&mut self, change: impl FnOnce(&mut Tables)) -> Result<(), CaptureError> {
        let mut want = self.tables.clone();
        change(&mut want);
        for step in diff(&self.tables, &want) {
            self.carry_out(&step)?;
            self.tables.apply(&step);
        }
        Ok(())
    }

    pub fn set_listener(
        &mut self,
        cookie: NetnsCookie,
        listener: Listener,
        socket: BorrowedFd,
    ) -> Result<(), CaptureError> {
        let key = ListenerKey::new(cookie.0, listener);
        let result = self.listeners.insert(key, socket.as_raw_fd(), 0);
        result.map_err(|error| self.full_or_failed(LISTENERS_MAP, error))
    }

    pub fn remove_listeners(&mut self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        for listener in Listener::ALL {
            let removed = self.listeners.remove(&ListenerKey::new(cookie.0, listener));
            absent_is_fine(removed).map_err(|error| failed(LISTENERS_MAP, error))?;
        }
        Ok(())
    }

    /// Gives a pod the flow table of an object that was loaded for it, unless it has one.
    pub fn ensure_flows(
        &mut self,
        object: &mut Ebpf,
        cookie: NetnsCookie,
    ) -> Result<(), CaptureError> {
        match self.flows.get(&cookie.0, 0) {
            Ok(_) => return Ok(()),
            Err(MapError::KeyNotFound) => {}
            Err(error) => return Err(failed(POD_FLOWS_MAP, error)),
        }
        let flows: Flows = take(object, FLOWS_MAP)?;
        let result = self.flows.insert(cookie.0, &flows, 0);
        result.map_err(|error| self.full_or_failed(POD_FLOWS_MAP, error))
    }

    pub fn remove_flows(&mut self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        absent_is_fine(self.flows.remove(&cookie.0)).map_err(|error| failed(POD_FLOWS_MAP, error))
    }

    /// How many of a pod's connections are on their way to the agent.
    pub fn flows_of(&self, cookie: NetnsCookie) -> Result<usize, CaptureError> {
        match self.flows.get(&cookie.0, 0) {
            Ok(flows) => Ok(flows.keys().count()),
            Err(MapError::KeyNotFound) => Ok(0),
            Err(error) => Err(failed(POD_FLOWS_MAP, error)),
        }
    }

    pub fn entries(&self) -> MapCounts {
        let flows = self.flows.keys().flatten().filter_map(|pod| self.flows.get(&pod, 0).ok());
        MapCounts {
            pods: self.pods.keys().count(),
            addresses: self.addresses.keys().count(),
            excluded_ports: self.excluded_ports.keys().count(),
            excluded_cidrs: self.excluded_nets.keys().count(),
            listeners: self.listeners.keys().count(),
            flows: flows.map(|flows| flows.keys().count()).sum(),
            probes: self.probes.keys().count(),
        }
    }

    pub fn events(&self) -> Result<Counts, CaptureError> {
        let per_cpu = self.counts.get(&0, 0).map_err(|error| failed(COUNTS_MAP, error))?;
        Ok(per_cpu.iter().fold(Counts::default(), add))
    }

    fn carry_out(&mut self, step: &TableChange) -> Result<(), CaptureError> {
        let (map, result) = match *step {
            TableChange::SetPod(cookie, pod) => {
                (PODS_MAP, self.pods.insert(cookie.0, pod_value(pod), 0))
            }
            TableChange::RemovePod(cookie) => {
                (PODS_MAP, absent_is_fine(self.pods.remove(&cookie.0)))
            }
            TableChange::SetAddress(ip, cookie) => {
                (ADDRESSES_MAP, self.addresses.insert(Address::from(ip), cookie.0, 0))
            }
            TableChange::RemoveAddress(ip) => {
                (ADDRESSES_MAP, absent_is_fine(self.addresses.remove(&Address::from(ip))))
            }
            TableChange::ExcludePort(cookie, direction, port) => {
                let key = excluded_port(cookie, direction, port);
                (EXCLUDED_PORTS_MAP, self.excluded_ports.insert(key, 1, 0))
            }
            TableChange::IncludePort(cookie, direction, port) => {
                let key = excluded_port(cookie, direction, port);
                (EXCLUDED_PORTS_MAP, absent_is_fine(self.excluded_ports.remove(&key)))
            }
            TableChange::ExcludeCidr(cookie, cidr) => {
                (EXCLUDED_NETS_MAP, self.excluded_nets.insert(&excluded_net(cookie, cidr), 1, 0))
            }
            TableChange::IncludeCidr(cookie, cidr) => {
                let removed = self.excluded_nets.remove(&excluded_net(cookie, cidr));
                (EXCLUDED_NETS_MAP, absent_is_fine(removed))
            }
        };
        result.map_err(|error| self.full_or_failed(map, error))
    }

    /// What the maps hold.
    fn read(&self) -> Result<Tables, CaptureError> {
        let mut tables = Tables::default();
        for entry in self.pods.iter() {
            let (cookie, pod) = entry.map_err(|error| failed(PODS_MAP, error))?;
            tables.pods.insert(NetnsCookie(cookie), pod_entry(pod));
        }
        for entry in self.addresses.iter() {
            let (address, cookie) = entry.map_err(|error| failed(ADDRESSES_MAP, error))?;
            tables.addresses.insert(address.into(), NetnsCookie(cookie));
        }
        for key in self.excluded_ports.keys() {
            let key = key.map_err(|error| failed(EXCLUDED_PORTS_MAP, error))?;
            let direction = match key.direction {
                ExcludedPort::INBOUND => Direction::Inbound,
                _ => Direction::Outbound,
            };
            tables.excluded_ports.insert((NetnsCookie(key.netns), direction, key.port));
        }
        for key in self.excluded_nets.keys() {
            let key = key.map_err(|error| failed(EXCLUDED_NETS_MAP, error))?;
            tables.excluded_cidrs.extend(cidr_of(&key));
        }
        Ok(tables)
    }

    fn full_or_failed(&self, map: &'static str, error: MapError) -> CaptureError {
        match is_full(&error) {
            true => CaptureError::Full { map, max_pods: self.max_pods },
            false => failed(map, error),
        }
    }
}

/// Whether a map has no room for another entry.
pub fn is_full(error: &MapError) -> bool {
    let full = [libc::E2BIG, libc::ENOSPC];
    let MapError::SyscallError(call) = error else { return false };
    call.io_error.raw_os_error().is_some_and(|code| full.contains(&code))
}

pub fn failed(map: &'static str, error: MapError) -> CaptureError {
    CaptureError::Map { map, error: Box::new(error) }
}

pub fn missing(map: &'static str) -> CaptureError {
    failed(map, MapError::InvalidName { name: map.into() })
}

pub fn take<M: TryFrom<Map, Error = MapError>>(
    object: &mut Ebpf,
    name: &'static str,
) -> Result<M, CaptureError> {
    let map = object.take_map(name).ok_or_else(|| missing(name))?;
    map.try_into().map_err(|error| failed(name, error))
}

pub fn absent_is_fine(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(call))
            if call.io_error.kind() == io::ErrorKind::NotFound
                || call.io_error.raw_os_error() == Some(libc::EINVAL) =>
        {
            Ok(())
        }
        result => result,
    }
}

fn pod_value(pod: PodEntry) -> Pod {
    let flag = |set: bool, flag: u32| if set { flag } else { 0 };
    Pod {
        ipv4: pod.ipv4.map_or(Address::UNSPECIFIED, |ip| IpAddr::V4(ip).into()),
        ipv6: pod.ipv6.map_or(Address::UNSPECIFIED, |ip| IpAddr::V6(ip).into()),
        flags: flag(pod.excludes_outbound_ports, Pod::HAS_EXCLUDED_OUTBOUND_PORTS)
            | flag(pod.excludes_inbound_ports, Pod::HAS_EXCLUDED_INBOUND_PORTS)
            | flag(pod.excludes_cidrs, Pod::HAS_EXCLUDED_NETS)
            | flag(pod.leaving, Pod::LEAVING)
            | flag(pod.captures_dns, Pod::CAPTURES_DNS)
            | flag(pod.beside_cni, Pod::BESIDE_CNI)
            | flag(pod.by_agent, Pod::BY_AGENT),
    }
}

fn pod_entry(pod: Pod) -> PodEntry {
    let ip = |address: Address| (!address.is_unspecified()).then(|| IpAddr::from(address));
    PodEntry {
        ipv4: ip(pod.ipv4).and_then(|ip| match ip {
            IpAddr::V4(ip) => Some(ip),
            IpAddr::V6(_) => None,
        }),
        ipv6: ip(pod.ipv6).and_then(|ip| match ip {
            IpAddr::V6(ip) => Some(ip),
            IpAddr::V4(_) => None,
        }),
        excludes_outbound_ports: pod.flags & Pod::HAS_EXCLUDED_OUTBOUND_PORTS != 0,
        excludes_inbound_ports: pod.flags & Pod::HAS_EXCLUDED_INBOUND_PORTS != 0,
        excludes_cidrs: pod.flags & Pod::HAS_EXCLUDED_NETS != 0,
        captures_dns: pod.flags & Pod::CAPTURES_DNS != 0,
        leaving: pod.flags & Pod::LEAVING != 0,
        beside_cni: pod.flags & Pod::BESIDE_CNI != 0,
        by_agent: pod.flags & Pod::BY_AGENT != 0,
    }
}

fn excluded_port(cookie: NetnsCookie, direction: Direction, port: u16) -> ExcludedPort {
    let direction = match direction {
        Direction::Outbound => ExcludedPort::OUTBOUND,
        Direction::Inbound => ExcludedPort::INBOUND,
    };
    ExcludedPort::new(cookie.0, port, direction)
}

fn excluded_net(cookie: NetnsCookie, cidr: IpNet) -> Key<ExcludedNet> {
    let mapped = Ipv6Addr::BITS - Ipv4Addr::BITS;
    let head = match cidr {
        IpNet::V4(_) => ExcludedNet::HEAD_BITS + mapped,
        IpNet::V6(_) => ExcludedNet::HEAD_BITS,
    };
    let family = match cidr {
        IpNet::V4(_) => ExcludedNet::IPV4,
        IpNet::V6(_) => ExcludedNet::IPV6,
    };
    let ip = Address::from(cidr.addr()).ip;
    Key::new(head + u32::from(cidr.prefix_len()), ExcludedNet { netns: cookie.0, family, ip })
}

fn cidr_of(key: &Key<ExcludedNet>) -> Option<(NetnsCookie, IpNet)> {
    let data = key.data();
    let ip = IpAddr::V6(Ipv6Addr::from(data.ip));
    let length = key.prefix_len().checked_sub(ExcludedNet::HEAD_BITS)?;
    let (ip, length) = if data.family == ExcludedNet::IPV4 {
        (ip.to_canonical(), length.checked_sub(Ipv6Addr::BITS - Ipv4Addr::BITS)?)
    } else {
        (ip, length)
    };
    let cidr = IpNet::new(ip, u8::try_from(length).ok()?).ok()?;
    Some((NetnsCookie(data.netns), cidr))
}

fn add(sum: Counts, one: &Counts) -> Counts {
    Counts {
        captured: sum.captured + one.captured,
        passed_own: sum.passed_own + one.passed_own,
        passed_excluded: sum.passed_excluded + one.passed_excluded,
        passed_agent: sum.passed_agent + one.passed_agent,
        refused_family: sum.refused_family + one.refused_family,
        refused_full: sum.refused_full + one.refused_full,
        refused_outbound: sum.refused_outbound + one.refused_outbound,
        missing: sum.missing + one.missing,
        inbound_plaintext: sum.inbound_plaintext + one.inbound_plaintext,
        inbound_hbone: sum.inbound_hbone + one.inbound_hbone,
        inbound_excluded: sum.inbound_excluded + one.inbound_excluded,
        inbound_node: sum.inbound_node + one.inbound_node,
        inbound_refused: sum.inbound_refused + one.inbound_refused,
        probes_full: sum.probes_full + one.probes_full,
        captured_dns: sum.captured_dns + one.captured_dns,
    }
}

#[cfg(test)]
mod tests;
