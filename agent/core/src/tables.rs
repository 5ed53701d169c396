//! What the kernel's tables should hold, and the steps from what they hold to that.
//!
//! The agent sets these tables in the kernel and takes them up again after a restart. A step is one
//! entry of one map, which the kernel changes atomically; [`diff`] orders the steps so that after
//! each of them an enrolled pod is captured no less than it should be, and that nothing is captured
//! that both `have` and `want` leave alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::addr::canonical_range;

mod verdict;

pub use verdict::{Backend, MAX_BACKENDS, Verdict, VerdictId, VerdictKey};

/// Names a network namespace for as long as the machine is up (`SO_NETNS_COOKIE`, Linux 5.14).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetnsCookie(pub u64);

impl fmt::Display for NetnsCookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What is captured of one pod.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodSpec {
    /// The pod's own addresses: connections between them stay in the pod. A pod without an address
    /// of one family cannot connect to destinations of that family.
    pub addresses: Vec<IpAddr>,
    /// Connections to these ports leave the pod as if it were not enrolled.
    pub exclude_outbound_ports: Vec<u16>,
    /// Connections to these destinations leave the pod as if it were not enrolled.
    pub exclude_outbound_cidrs: Vec<IpNet>,
    /// Connections to these ports reach the pod as if it were not enrolled.
    pub exclude_inbound_ports: Vec<u16>,
    /// What the pod asks DNS servers outside of it is led to the agent.
    pub capture_dns: bool,
    /// istio-cni has put its rules into the pod: what they lead to the agent's ports is captured, and
    /// what comes from their address for the node's own connections is not.
    pub beside_cni: bool,
    /// The kernel leads no connection straight to it.
    pub by_agent: bool,
}

/// Which way an excluded port counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Outbound,
    Inbound,
}

/// One enrolled pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PodEntry {
    /// What `getsockname` tells, and where sockets that are bound to a device are led.
    pub ipv4: Option<Ipv4Addr>,
    /// The same for IPv6.
    pub ipv6: Option<Ipv6Addr>,
    pub excludes_outbound_ports: bool,
    pub excludes_inbound_ports: bool,
    pub excludes_cidrs: bool,
    pub captures_dns: bool,
    /// Its new connections go their plain way already.
    pub leaving: bool,
    /// istio-cni's rules are in the pod too.
    pub beside_cni: bool,
    /// All connections to it go through the agent.
    pub by_agent: bool,
}

/// The contents of the kernel's tables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tables {
    pub pods: BTreeMap<NetnsCookie, PodEntry>,
    /// Each address belongs to one pod: the one enrolled last.
    pub addresses: BTreeMap<IpAddr, NetnsCookie>,
    pub excluded_ports: BTreeSet<(NetnsCookie, Direction, u16)>,
    pub excluded_cidrs: BTreeSet<(NetnsCookie, IpNet)>,
}

/// One entry of one table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableChange {
    SetPod(NetnsCookie, PodEntry),
    RemovePod(NetnsCookie),
    SetAddress(IpAddr, NetnsCookie),
    RemoveAddress(IpAddr),
    ExcludePort(NetnsCookie, Direction, u16),
    IncludePort(NetnsCookie, Direction, u16),
    ExcludeCidr(NetnsCookie, IpNet),
    IncludeCidr(NetnsCookie, IpNet),
}

impl Tables {
    /// Enrols a pod, or changes what is captured of one that is enrolled.
    pub fn enrol(&mut self, cookie: NetnsCookie, spec: &PodSpec) {
        self.withdraw(cookie);
        let addresses: Vec<IpAddr> = spec.addresses.iter().map(IpAddr::to_canonical).collect();
        let ipv4 = addresses.iter().find_map(|ip| match ip {
            IpAddr::V4(ip) => Some(*ip),
            IpAddr::V6(_) => None,
        });
        let ipv6 = addresses.iter().find_map(|ip| match ip {
            IpAddr::V6(ip) => Some(*ip),
            IpAddr::V4(_) => None,
        });
        let entry = PodEntry {
            ipv4,
            ipv6,
            excludes_outbound_ports: !spec.exclude_outbound_ports.is_empty(),
            excludes_inbound_ports: !spec.exclude_inbound_ports.is_empty(),
            excludes_cidrs: !spec.exclude_outbound_cidrs.is_empty(),
            captures_dns: spec.capture_dns,
            leaving: false,
            beside_cni: spec.beside_cni,
            by_agent: spec.by_agent,
        };
        self.pods.insert(cookie, entry);
        self.addresses.extend(addresses.into_iter().map(|ip| (ip, cookie)));
        for port in &spec.exclude_outbound_ports {
            self.excluded_ports.insert((cookie, Direction::Outbound, *port));
        }
        for port in &spec.exclude_inbound_ports {
            self.excluded_ports.insert((cookie, Direction::Inbound, *port));
        }
        for cidr in &spec.exclude_outbound_cidrs {
            self.excluded_cidrs.insert((cookie, canonical(*cidr)));
        }
    }

    /// Lets the pod's new connections go their plain way, while its addresses and exclusions stay.
    pub fn leave(&mut self, cookie: NetnsCookie) {
        if let Some(pod) = self.pods.get_mut(&cookie) {
            pod.leaving = true;
        }
    }

    /// Forgets a pod.
    pub fn withdraw(&mut self, cookie: NetnsCookie) {
        self.pods.remove(&cookie);
        self.addresses.retain(|_, owner| *owner != cookie);
        self.excluded_ports.retain(|(owner, _, _)| *owner != cookie);
        self.excluded_cidrs.retain(|(owner, _)| *owner != cookie);
    }

    /// Carries out one step of [`diff`].
    pub fn apply(&mut self, change: &TableChange) {
        match *change {
            TableChange::SetPod(cookie, pod) => {
                self.pods.insert(cookie, pod);
            }
            TableChange::RemovePod(cookie) => {
                self.pods.remove(&cookie);
            }
            TableChange::SetAddress(ip, cookie) => {
                self.addresses.insert(ip, cookie);
            }
            TableChange::RemoveAddress(ip) => {
                self.addresses.remove(&ip);
            }
            TableChange::ExcludePort(cookie, direction, port) => {
                self.excluded_ports.insert((cookie, direction, port));
            }
            TableChange::IncludePort(cookie, direction, port) => {
                self.excluded_ports.remove(&(cookie, direction, port));
            }
            TableChange::ExcludeCidr(cookie, cidr) => {
                self.excluded_cidrs.insert((cookie, cidr));
            }
            TableChange::IncludeCidr(cookie, cidr) => {
                self.excluded_cidrs.remove(&(cookie, cidr));
            }
        }
    }
}

/// The steps that turn `have` into `want`.
///
/// What a pod keeps to itself is noted before the pod, and the pod is removed before that.
pub fn diff(have: &Tables, want: &Tables) -> Vec<TableChange> {
    let mut changes = Vec::new();
    for (ip, cookie) in &want.addresses {
        if have.addresses.get(ip) != Some(cookie) {
            changes.push(TableChange::SetAddress(*ip, *cookie));
        }
    }
    for (cookie, direction, port) in want.excluded_ports.difference(&have.excluded_ports) {
        changes.push(TableChange::ExcludePort(*cookie, *direction, *port));
    }
    for (cookie, cidr) in want.excluded_cidrs.difference(&have.excluded_cidrs) {
        changes.push(TableChange::ExcludeCidr(*cookie, *cidr));
    }
    for (cookie, pod) in &want.pods {
        if have.pods.get(cookie) != Some(pod) {
            changes.push(TableChange::SetPod(*cookie, *pod));
        }
    }
    for cookie in have.pods.keys().filter(|cookie| !want.pods.contains_key(cookie)) {
        changes.push(TableChange::RemovePod(*cookie));
    }
    for ip in have.addresses.keys().filter(|ip| !want.addresses.contains_key(ip)) {
        changes.push(TableChange::RemoveAddress(*ip));
    }
    for (cookie, direction, port) in have.excluded_ports.difference(&want.excluded_ports) {
        changes.push(TableChange::IncludePort(*cookie, *direction, *port));
    }
    for (cookie, cidr) in have.excluded_cidrs.difference(&want.excluded_cidrs) {
        changes.push(TableChange::IncludeCidr(*cookie, *cidr));
    }
    changes
}

/// Without host bits, and as IPv4 when it is a range of IPv4-mapped addresses.
pub fn canonical(cidr: IpNet) -> IpNet {
    canonical_range(cidr).trunc()
}

#[cfg(test)]
mod tests;
