//! Types and names that the agent and its kernel programs share.
//!
//! Every type here lies in a kernel map or in a socket's storage, and stays there while the agent
//! is replaced by a newer one. A change of any layout, or of what a field means, therefore raises
//! [`ABI_VERSION`]: the agent reuses pinned maps only when it equals the version they carry.
//! No type has implicit padding, because the kernel compares and copies keys byte by byte.

#![no_std]

use core::net::{Ipv4Addr, Ipv6Addr};

mod address;
mod counts;
pub mod direct;

pub use address::Address;
pub use counts::Counts;

/// Version of the layouts in this crate; kept in [`ABI_MAP`].
pub const ABI_VERSION: u32 = 4;

/// Socket mark of the agent's connections out of a pod (`PACKET_MARK`). The rules that istio-cni puts
/// into a pod let pass what carries it in its low 12 bits. Our own programs do not look at it: what
/// exempts a socket from capture there is [`SocketRole::Exempt`], which a pod cannot set.
pub const OUTBOUND_MARK: u32 = 0x539;
/// Bits of a mark that istio-cni's rules compare.
pub const OUTBOUND_MARK_MASK: u32 = 0xfff;
/// What a mark towards an application over `lo` has beside the bits of [`OUTBOUND_MARK`]: a routing
/// rule of the pod sends what carries it to the local table, so that replies to a kept client
/// address come back.
pub const APPLICATION_BIT: u32 = 0x1000;
/// Socket mark of the agent's connections towards an application over `lo`.
pub const APPLICATION_MARK: u32 = OUTBOUND_MARK | APPLICATION_BIT;
/// Bits of the mark that our routing rule compares.
pub const APPLICATION_MARK_MASK: u32 = 0xffff;
/// The routing table of a pod that makes every address local to `lo`. It is not istio-cni's table
/// 100, which goes when that takes the pod out of the mesh while connections still need the way.
pub const LOCAL_TABLE: u32 = 15008;

/// The addresses from which processes of the node reach a pod that istio-cni enrolled
/// (`HOST_PROBE_SNAT_IP`, `HOST_PROBE_SNAT_IPV6`).
pub const NODE_PROBE_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
pub const NODE_PROBE_V6: Ipv6Addr =
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff);

/// Port of the agent's listener for captured outbound connections, in each pod.
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of the agent's listener for inbound plaintext, in each pod.
pub const PLAINTEXT_PORT: u16 = 15006;
/// Port of the agent's HBONE listener, in each pod.
pub const HBONE_PORT: u16 = 15008;
/// Port of the agent's DNS listeners, UDP and TCP, in each pod.
pub const DNS_PORT: u16 = 15053;
/// The port of DNS servers (RFC 1035 section 4.2), which are asked through the agent.
pub const RESOLVER_PORT: u16 = 53;

/// Most connections that one pod may have between SYN and accept; further ones are refused.
pub const MAX_FLOWS_PER_POD: usize = 4096;
/// Most connections of the node itself that may be between SYN and their answer.
pub const MAX_PROBES: usize = 16384;

/// `Array` of one [`Abi`].
pub const ABI_MAP: &str = "cv_abi";
/// `HashMap` from network namespace cookie to [`Pod`]: the pods that are enrolled.
pub const PODS_MAP: &str = "cv_pods";
/// `HashMap` from [`Address`] to the namespace cookie of the enrolled pod that owns it.
pub const ADDRESSES_MAP: &str = "cv_addresses";
/// `HashMap` of [`ExcludedPort`].
pub const EXCLUDED_PORTS_MAP: &str = "cv_excl_ports";
/// `LpmTrie` of [`ExcludedNet`].
pub const EXCLUDED_NETS_MAP: &str = "cv_excl_nets";
/// `SkStorage` of [`SocketState`].
pub const SOCKETS_MAP: &str = "cv_sockets";
/// `HashOfMaps` from namespace cookie to that pod's [`FLOWS_MAP`].
pub const POD_FLOWS_MAP: &str = "cv_pod_flows";
/// `HashMap` from [`FlowKey`] to [`Flow`]; one per pod, made when the pod is enrolled.
pub const FLOWS_MAP: &str = "cv_flows";
/// `HashMap` of [`Probe`]: connections of the node to enrolled pods that wait for an answer.
pub const PROBES_MAP: &str = "cv_probes";
/// `SockHash` from [`ListenerKey`] to the agent's listening sockets.
pub const LISTENERS_MAP: &str = "cv_listeners";
/// `PerCpuArray` of one [`Counts`].
pub const COUNTS_MAP: &str = "cv_counts";

/// The attachments to the cgroup, by program name.
pub const CGROUP_PROGRAMS: [&str; 11] = [
    "cv_connect4",
    "cv_connect6",
    "cv_sendmsg4",
    "cv_sendmsg6",
    "cv_getpeername4",
    "cv_getpeername6",
    "cv_getsockname4",
    "cv_getsockname6",
    "cv_recvmsg4",
    "cv_recvmsg6",
    "cv_sockops",
];
/// The program attached to each pod's network namespace.
pub const SK_LOOKUP_PROGRAM: &str = "cv_sk_lookup";

/// Global: namespace cookie of the node, `u64`.
pub const NODE_NETNS: &str = "NODE_NETNS";
/// Global: namespace cookie of the pod that a [`SK_LOOKUP_PROGRAM`] is for, `u64`.
pub const POD_NETNS: &str = "POD_NETNS";
/// Global: whether `bpf_set_retval` exists here (Linux 5.18), `u8`.
pub const HAVE_SET_RETVAL: &str = "HAVE_SET_RETVAL";
/// Global: whether `bpf_skc_to_mptcp_sock` exists here (Linux 5.19), `u8`.
pub const HAVE_MPTCP: &str = "HAVE_MPTCP";

/// What made the pinned maps.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abi {
    /// [`ABI_VERSION`] of the agent that made them.
    pub version: u32,
    /// How many pods they were made for.
    pub max_pods: u32,
    /// How many verdicts they were made for.
    pub max_verdicts: u32,
    /// How many direct connections of one pod they were made for.
    pub max_direct: u32,
}

/// An enrolled pod. An address that is unspecified (`::`) means: the pod has none of that family.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Pod {
    pub ipv4: Address,
    pub ipv6: Address,
    /// A set of `Pod::HAS_…`, to spare look-ups that cannot find anything.
    pub flags: u32,
}

impl Pod {
    pub const HAS_EXCLUDED_OUTBOUND_PORTS: u32 = 1;
    pub const HAS_EXCLUDED_INBOUND_PORTS: u32 = 2;
    pub const HAS_EXCLUDED_NETS: u32 = 4;
    /// The pod is being withdrawn: its new connections go their plain way, and those already on
    /// their way to the agent still arrive.
    pub const LEAVING: u32 = 8;
    /// What the pod asks DNS servers is led to the agent.
    pub const CAPTURES_DNS: u32 = 16;
    /// istio-cni has put its rules into the pod: they may lead connections to the agent's ports, and
    /// the node's own arrive from [`NODE_PROBE_V4`] and [`NODE_PROBE_V6`].
    pub const BESIDE_CNI: u32 = 32;
    /// No connection goes straight to the pod.
    pub const BY_AGENT: u32 = 64;
}

/// A port whose connections one pod keeps to itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ExcludedPort {
    pub netns: u64,
    pub port: u16,
    /// [`ExcludedPort::OUTBOUND`] or [`ExcludedPort::INBOUND`].
    pub direction: u16,
    pub reserved: u32,
}

impl ExcludedPort {
    pub const OUTBOUND: u16 = 0;
    pub const INBOUND: u16 = 1;

    pub const fn new(netns: u64, port: u16, direction: u16) -> Self {
        Self { netns, port, direction, reserved: 0 }
    }
}

/// The data of an LPM key: a range of destinations that one pod keeps to itself. The prefix counts
/// the bits before the address too, and an IPv4 range is that of the mapped addresses.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExcludedNet {
    pub netns: u64,
    /// [`ExcludedNet::IPV4`] or [`ExcludedNet::IPV6`], lest `::/0` should cover IPv4 too.
    pub family: u32,
    pub ip: [u8; 16],
}

impl ExcludedNet {
    pub const IPV4: u32 = 4;
    pub const IPV6: u32 = 6;
    /// Length of the part before the address, in bits.
    pub const HEAD_BITS: u32 = 96;
    /// Length of the whole data, in bits.
    pub const BITS: u32 = 224;

    #[inline(always)]
    pub const fn new(netns: u64, address: Address) -> Self {
        let family = if address.is_v4() { Self::IPV4 } else { Self::IPV6 };
        Self { netns, family, ip: address.ip }
    }
}

/// What the programs know of one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketState {
    /// One of [`SocketRole`], as a number.
    pub role: u32,
    /// Port of the original destination, in host byte order.
    pub port: u32,
    /// The original destination.
    pub original: Address,
    /// The pod's own address of that family, which `getsockname` tells instead of loopback.
    pub own: Address,
    /// [`direct::Verdict::id`] that let a direct connection go, or whose draw led a captured one to
    /// the agent; otherwise zero.
    pub verdict: u64,
    /// Namespace cookie of the pod that a direct connection goes to.
    pub netns: u64,
    /// What a direct connection is connected to.
    pub backend: Address,
    /// Port of that, in host byte order.
    pub backend_port: u32,
    /// A set of `SocketState::…`.
    pub flags: u32,
}

impl SocketState {
    /// The SYN of a direct connection carries [`direct::DIRECT_OPTION`].
    pub const ANNOUNCED: u32 = 1;
    /// The direct connection is to be accelerated.
    pub const ACCELERATED: u32 = 2;
    /// One that is not about a direct connection.
    #[inline(always)]
    pub const fn new(role: SocketRole, original: Address, port: u32, own: Address) -> Self {
        Self {
            role: role as u32,
            port,
            original,
            own,
            verdict: 0,
            netns: 0,
            backend: Address::UNSPECIFIED,
            backend_port: 0,
            flags: 0,
        }
    }
}

/// Why a socket carries a [`SocketState`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketRole {
    /// It was captured or exempt once, and is not any more.
    Plain = 0,
    /// An application's socket, connected to the agent instead of `original`.
    Captured = 1,
    /// The agent's end of a captured connection.
    Accepted = 2,
    /// A socket of the agent that is never captured. Set through the map by descriptor only.
    Exempt = 3,
    /// An application's unconnected UDP socket, whose questions were sent to the agent instead of
    /// `original`: the server that it asked last.
    Asking = 4,
    /// An application's socket, connected to another pod of this node without the agent.
    Direct = 5,
}

/// A connection that is on its way to the agent. Its other port is always [`OUTBOUND_PORT`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowKey {
    pub source: Address,
    /// Loopback or the pod's own address.
    pub target: Address,
    /// The application's port, in host byte order.
    pub port: u32,
}

/// The original destination of such a connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Cookie of the application's socket (`bpf_get_socket_cookie`).
    pub socket: u64,
    pub original: Address,
    /// In host byte order.
    pub port: u32,
    pub reserved: u32,
    /// [`SocketState::verdict`]
    pub verdict: u64,
}

/// A connection that the node itself opens to an enrolled pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    pub source: Address,
    pub destination: Address,
    /// In host byte order, as is the next.
    pub source_port: u32,
    pub destination_port: u32,
}

/// Which of a pod's listeners.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// Also for direct connections to the pod whose verdict was taken back under way: their port is
    /// not [`OUTBOUND_PORT`].
    Outbound = 0,
    Plaintext = 1,
    Hbone = 2,
}

impl Listener {
    pub const ALL: [Listener; 3] = [Listener::Outbound, Listener::Plaintext, Listener::Hbone];
}

/// Names one listener of one pod.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenerKey {
    pub netns: u64,
    /// One of [`Listener`], as a number.
    pub listener: u32,
    pub reserved: u32,
}

impl ListenerKey {
    pub const fn new(netns: u64, listener: Listener) -> Self {
        Self { netns, listener: listener as u32, reserved: 0 }
    }
}

const _: () = {
    assert!(size_of::<Abi>() == 16);
    assert!(size_of::<Address>() == 16);
    assert!(size_of::<Pod>() == 36);
    assert!(size_of::<ExcludedPort>() == 16);
    assert!(size_of::<ExcludedNet>() == 28);
    assert!(size_of::<SocketState>() == 80);
    assert!(size_of::<FlowKey>() == 36);
    assert!(size_of::<Flow>() == 40);
    assert!(size_of::<Probe>() == 40);
    assert!(size_of::<ListenerKey>() == 16);
};

/// Longer names would be cut off in the kernel.
const _: () = {
    let maps = [
        ABI_MAP,
        PODS_MAP,
        ADDRESSES_MAP,
        EXCLUDED_PORTS_MAP,
        EXCLUDED_NETS_MAP,
        SOCKETS_MAP,
        POD_FLOWS_MAP,
        FLOWS_MAP,
        PROBES_MAP,
        LISTENERS_MAP,
        COUNTS_MAP,
        SK_LOOKUP_PROGRAM,
    ];
    let mut n = 0;
    while n < maps.len() {
        assert!(maps[n].len() <= 15);
        n += 1;
    }
    let mut n = 0;
    while n < CGROUP_PROGRAMS.len() {
        assert!(CGROUP_PROGRAMS[n].len() <= 15);
        n += 1;
    }
};

#[cfg(feature = "user")]
mod user {
    use core::net::{IpAddr, Ipv6Addr};

    use super::direct::{
        Agent, Backend, DirectCounts, DirectFlow, DirectKey, FlowEvent, Joint, JointEnd, JointKey,
        Live, Offsets, Verdict, VerdictKey,
    };
    use super::*;

    macro_rules! pod {
        ($($name:ty),+) => {
            $(
                // SAFETY: `repr(C)`, integers only, without padding (the size assertions above).
                unsafe impl aya::Pod for $name {}
            )+
        };
    }
    pod!(
        Abi,
        Address,
        Pod,
        ExcludedPort,
        ExcludedNet,
        SocketState,
        FlowKey,
        Flow,
        Probe,
        ListenerKey,
        Counts,
        VerdictKey,
        Verdict,
        Backend,
        DirectKey,
        DirectFlow,
        Live,
        Agent,
        FlowEvent,
        DirectCounts,
        Joint,
        JointEnd,
        JointKey,
        Offsets
    );

    impl From<IpAddr> for Address {
        fn from(ip: IpAddr) -> Self {
            let ip = match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            Self { ip: ip.octets() }
        }
    }

    impl From<Address> for IpAddr {
        /// An IPv4-mapped address becomes IPv4.
        fn from(address: Address) -> Self {
            IpAddr::V6(Ipv6Addr::from(address.ip)).to_canonical()
        }
    }
}
