//! Nodes and pods of a lab, wired the way kind wires them.
//!
//! Each node is a namespace; every two nodes are joined by a veth pair. Each pod is a namespace
//! behind a veth pair of its node, with one /32 and one /128 address and its default route through
//! the node. Service addresses exist nowhere: the mesh itself must resolve them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::cleanup::{self, Registered};
use crate::netns::{self, Netns};
use crate::place::Place;
use crate::wire::Wire;
use crate::{cgroup, sys};

/// At which cgroup the lab's agents attach their programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// At one that holds this process and all its labs, so that a thread of a test, once inside
    /// a pod's namespace, is that pod.
    Process,
    /// At the root, so that any shell in a pod's namespace is that pod.
    Machine,
    /// At the node's own, as on a real machine: no connection meets the programs of another node.
    Node,
}

/// A set of nodes and pods that is gone, with every process in it, when dropped.
#[derive(Debug)]
pub struct Lab {
    name: String,
    state: PathBuf,
    base: PathBuf,
    attach: Attach,
    nodes: Mutex<Vec<Node>>,
    kept: bool,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    name: String,
    number: u8,
    place: Place,
    pods: u8,
}

/// A pod.
#[derive(Clone, Debug)]
pub struct Pod {
    name: String,
    node: String,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    place: Place,
}

impl Lab {
    /// An empty lab. What dead labs left behind is removed first.
    pub fn new(attach: Attach) -> Result<Self> {
        if !sys::is_root() {
            bail!("network namespaces need root: run this as root");
        }
        cleanup::sweep(cleanup::Sweep::Dead).context("removing what earlier labs left")?;
        let Registered { name, state, base } = cleanup::register()?;
        let nodes = Mutex::new(Vec::new());
        let lab = Self { name, state, base, attach, nodes, kept: false };
        let bpffs = lab.state.join(cleanup::BPFFS);
        std::fs::create_dir_all(&bpffs).context("making a mount point")?;
        std::fs::create_dir_all(lab.logs()).context("making a folder for logs")?;
        sys::mount_bpffs(&bpffs).context("mounting a BPF file system")?;
        Ok(lab)
    }

    /// The unique name, with which all its namespaces begin.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder for files of the lab, removed with it.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Where the processes' output goes.
    pub fn logs(&self) -> PathBuf {
        self.state.join("logs")
    }

    /// A folder on a BPF file system that an agent on `node` may make its own.
    pub fn pin_path(&self, node: &str) -> PathBuf {
        self.state.join(cleanup::BPFFS).join(node)
    }

    /// The cgroup at which an agent on `node` is to attach.
    pub fn attach_cgroup(&self, node: &Node) -> Result<PathBuf> {
        match self.attach {
            Attach::Process => Ok(self.base.clone()),
            Attach::Machine => cgroup::mount(),
            Attach::Node => Ok(node.place.cgroup().to_owned()),
        }
    }

    /// Adds a node, joined to all others.
    pub fn node(&self, name: &str) -> Result<Node> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let number = u8::try_from(nodes.len() + 1).context("too many nodes")?;
        let netns = Netns::create(&format!("{}-{name}", self.name))?;
        for (setting, value) in FORWARDING {
            netns.sysctl(setting, value)?;
        }
        let place = Place::new(netns, self.base.join(&self.name).join(name), self.logs())?;
        let node = Node { name: name.to_owned(), number, place, pods: 0 };
        for other in nodes.iter() {
            join(&node, other)?;
        }
        nodes.push(node.clone());
        Ok(node)
    }

    /// Adds a pod to the node called `node`.
    pub fn pod(&self, node: &str, name: &str) -> Result<Pod> {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let node = nodes.iter_mut().find(|other| other.name == node);
        let node = node.with_context(|| format!("no node for pod {name}"))?;
        node.pods = node.pods.checked_add(1).filter(|n| *n < 250).context("too many pods")?;
        let netns = Netns::create(&format!("{}-{name}", self.name))?;
        let place = Place::new(netns, node.place.cgroup().join(name), self.logs())?;
        let (v4, v6) = node.pod_addresses(node.pods + 1);
        let pod = Pod { name: name.to_owned(), node: node.name.clone(), v4, v6, place };
        plug(node, &pod, node.pods)?;
        Ok(pod)
    }

    /// Removes a pod's namespace, as when a pod is deleted. Processes in it are killed.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        cgroup::remove(pod.place.cgroup())?;
        netns::delete(pod.place.netns().name())
    }

    /// Puts another pod into the place of one, with its addresses, as when a pod is deleted and its
    /// addresses are given away.
    pub fn replace_pod(&self, gone: &Pod, name: &str) -> Result<Pod> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let node = nodes.iter().find(|node| node.name == gone.node);
        let node = node.with_context(|| format!("no node for pod {name}"))?;
        let number = gone.v4.octets()[3] - 1;
        // With a namespace its devices go later.
        node.place.netns().ip(&format!("link del pod-{number}\n"))?;
        self.remove_pod(gone)?;
        let netns = Netns::create(&format!("{}-{name}", self.name))?;
        let place = Place::new(netns, node.place.cgroup().join(name), self.logs())?;
        let pod = Pod { name: name.to_owned(), place, ..gone.clone() };
        plug(node, &pod, number)?;
        Ok(pod)
    }

    /// Begins to record the packets between two nodes.
    pub fn wire(&self, one: &Node, other: &Node) -> Result<Wire> {
        Wire::tap(one.place.netns(), &link_name(other))
    }

    /// Leaves everything in place when this process ends, for [`cleanup::sweep`] to remove later.
    pub fn keep(&mut self) -> Result<()> {
        self.kept = true;
        cleanup::keep(&self.name)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if std::thread::panicking() {
            self.rescue_logs();
        }
        if let Err(error) = cleanup::unregister(&self.name) {
            eprintln!("removing lab {}: {error:#}", self.name);
        }
    }
}

impl Lab {
    /// Copies the logs to where they outlive the lab, for whoever reads about the failure.
    fn rescue_logs(&self) {
        let to = std::env::temp_dir().join(format!("{}-logs", self.name));
        let copied = std::fs::create_dir_all(&to).and_then(|()| {
            for entry in std::fs::read_dir(self.logs())?.flatten() {
                std::fs::copy(entry.path(), to.join(entry.file_name()))?;
            }
            Ok(())
        });
        match copied {
            Ok(()) => eprintln!("the logs of lab {} are in {}", self.name, to.display()),
            Err(error) => eprintln!("keeping the logs of lab {}: {error}", self.name),
        }
    }
}

impl Node {
    /// Its name in the mesh.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its own processes run.
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its IPv4 address on the links to other nodes.
    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 18, 0, self.number)
    }

    /// Its IPv6 address on the links to other nodes.
    pub fn v6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x172, 0x18, 0, 0, 0, 0, u16::from(self.number))
    }

    fn pod_addresses(&self, last: u8) -> (Ipv4Addr, Ipv6Addr) {
        let v4 = Ipv4Addr::new(10, 244, self.number, last);
        let number = u16::from(self.number);
        (v4, Ipv6Addr::new(0xfd00, 0x10, 0x244, number, 0, 0, 0, u16::from(last)))
    }
}

impl Pod {
    /// Its name in the mesh.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The node it lives on.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Its IPv4 address.
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Where its processes run.
    pub fn place(&self) -> &Place {
        &self.place
    }
}

/// What makes a namespace a router, and lets asymmetric paths through.
const FORWARDING: [(&str, &str); 4] = [
    ("net/ipv4/ip_forward", "1"),
    ("net/ipv6/conf/all/forwarding", "1"),
    ("net/ipv4/conf/all/rp_filter", "0"),
    ("net/ipv4/conf/default/rp_filter", "0"),
];

fn link_name(to: &Node) -> String {
    format!("to-{}", to.number)
}

/// Joins two nodes by a veth pair, with routes to each other's pods.
fn join(one: &Node, other: &Node) -> Result<()> {
    let (here, there) = (link_name(other), link_name(one));
    let (one_ns, other_ns) = (one.place.netns().name(), other.place.netns().name());
    netns::ip(&[
        "link", "add", &here, "netns", one_ns, "type", "veth", "peer", "name", &there, "netns",
        other_ns,
    ])?;
    // Routes are taken only by a link that is up at both ends.
    let ends = [(one.place.netns(), &here), (other.place.netns(), &there)];
    for (netns, device) in ends {
        netns.ip(&format!("link set {device} up\n"))?;
    }
    for (netns, device) in ends {
        netns::wait_for_link(netns, device)?;
    }
    for (node, peer) in [(one, other), (other, one)] {
        let device = link_name(peer);
        let (own4, peer4, own6, peer6) = (node.v4(), peer.v4(), node.v6(), peer.v6());
        let (pods4, pods6) = peer.pod_addresses(0);
        node.place.netns().ip(&format!(
            "addr add {own4} peer {peer4} dev {device}\n\
             addr add {own6} peer {peer6} dev {device} nodad\n\
             route add {pods4}/24 via {peer4} dev {device}\n\
             route add {pods6}/64 via {peer6} dev {device} onlink\n"
        ))?;
    }
    Ok(())
}

/// Puts a pod behind a veth pair of its node.
fn plug(node: &Node, pod: &Pod, number: u8) -> Result<()> {
    let (node_ns, pod_ns) = (node.place.netns(), pod.place.netns());
    let device = format!("pod-{number}");
    netns::ip(&[
        "link",
        "add",
        "eth0",
        "netns",
        pod_ns.name(),
        "type",
        "veth",
        "peer",
        "name",
        &device,
        "netns",
        node_ns.name(),
    ])?;
    let (v4, v6) = (pod.v4, pod.v6);
    let (gateway4, gateway6) = node.pod_addresses(1);
    pod_ns.ip("link set eth0 up\n")?;
    node_ns.ip(&format!("link set {device} up\n"))?;
    netns::wait_for_link(pod_ns, "eth0")?;
    netns::wait_for_link(node_ns, &device)?;
    node_ns.ip(&format!(
        "addr add {gateway4}/32 dev {device}\n\
         addr add {gateway6}/128 dev {device} nodad\n\
         route add {v4}/32 dev {device}\n\
         route add {v6}/128 dev {device}\n"
    ))?;
    pod_ns.ip(&format!(
        "addr add {v4}/32 dev eth0\n\
         addr add {v6}/128 dev eth0 nodad\n\
         route add {gateway4} dev eth0 scope link\n\
         route add default via {gateway4} dev eth0\n\
         route add {gateway6} dev eth0\n\
         route add ::/0 via {gateway6} dev eth0 onlink\n"
    ))
}

#[cfg(test)]
mod tests;
