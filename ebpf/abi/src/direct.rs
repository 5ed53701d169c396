//! What lets the kernel carry connections between pods of a node without the agent.

use crate::Address;

/// `HashMap` from [`VerdictKey`] to [`Verdict`]. Only the agent writes it.
pub const VERDICTS_MAP: &str = "cv_verdicts";
/// `HashOfMaps` from namespace cookie to that pod's [`DIRECT_MAP`].
pub const POD_DIRECT_MAP: &str = "cv_pod_direct";
/// `HashMap` from [`DirectKey`] to [`DirectFlow`]: the live direct connections that one pod opened.
pub const DIRECT_MAP: &str = "cv_direct";
/// `HashMap` from namespace cookie to [`Live`]. A pod without an entry opens no direct connections.
pub const LIVE_MAP: &str = "cv_direct_live";
/// `Array` of one [`Agent`].
pub const AGENT_MAP: &str = "cv_agent";
/// `RingBuf` of [`FlowEvent`] (Linux 5.8).
pub const EVENTS_MAP: &str = "cv_events";
/// `PerCpuArray` of one [`DirectCounts`].
pub const DIRECT_COUNTS_MAP: &str = "cv_direct_count";

/// `SockHash` from [`JointKey`] to the two sockets of each accelerated connection.
pub const JOINED_MAP: &str = "cv_joined";
/// `SkStorage` of [`JointKey`]: which end of which connection a socket in [`JOINED_MAP`] is.
pub const JOINT_ENDS_MAP: &str = "cv_joint_ends";
/// `HashMap` from [`DirectFlow::socket`] to [`Joint`]: the accelerated connections.
pub const JOINTS_MAP: &str = "cv_joints";
/// The program that [`JOINED_MAP`] has, while the agent accelerates or connections that it has
/// accelerated live.
pub const SK_MSG_PROGRAM: &str = "cv_sk_msg";

/// Global: whether any connection may be accelerated, `u8`. Otherwise the programs have no code for it.
pub const ACCELERATES: &str = "ACCELERATES";
/// Global: where this kernel keeps what the gate looks at, [`Offsets`].
pub const OFFSETS: &str = "OFFSETS";
/// Global: how many direct connections one pod may have, `u32`.
pub const DIRECT_ROOM: &str = "DIRECT_ROOM";

/// Most backends of one verdict.
pub const MAX_BACKENDS: usize = 32;
/// How many entries [`DIRECT_MAP`] has beyond what a pod may have: connections that were let go
/// while another one took the last place.
pub const DIRECT_MARGIN: u32 = 512;
/// How many connections can be accelerated at a time, over all pods.
pub const MAX_JOINED: usize = 16384;
/// How many of one pod, so that none can take all the room.
pub const MAX_JOINED_PER_POD: u32 = 4096;
/// Size of [`EVENTS_MAP`] in bytes.
pub const EVENTS_SIZE: usize = 1 << 20;

/// The TCP option by which istio-cni's rules in the destination's pod are kept from translating a
/// direct connection: kind 254, for experiments, with an identifier (RFC 6994). It opens no door:
/// what it lets past those rules meets [`crate::SK_LOOKUP_PROGRAM`].
pub const DIRECT_OPTION: [u8; 4] = [254, 4, 0x43, 0x56];

/// Whose connections to where a [`Verdict`] is for.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerdictKey {
    pub netns: u64,
    pub destination: Address,
    /// In host byte order.
    pub port: u32,
    pub reserved: u32,
}

/// What the agent allows the kernel to admit.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Never given twice, and never zero.
    pub id: u64,
    /// Nanoseconds of `CLOCK_BOOTTIME`.
    pub expires: u64,
    /// Sum of all weights, those of endpoints elsewhere included.
    pub total: u32,
    /// How many of the backends count.
    pub count: u32,
    pub backends: [Backend; MAX_BACKENDS],
}

/// A pod of this node that may be connected to.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backend {
    pub ip: Address,
    /// In host byte order.
    pub port: u16,
    /// A set of `Backend::…`.
    pub flags: u16,
    pub weight: u32,
    pub netns: u64,
}

impl Backend {
    /// Connections to it are accelerated. The lowest bit: the programs multiply with it.
    pub const ACCELERATED: u16 = 1;
}

/// The ends of a direct connection, as its client sees them. An agent of any version ends by this
/// key the connections that it cannot look after: its layout and that of [`POD_DIRECT_MAP`] stay.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectKey {
    pub source: Address,
    pub destination: Address,
    /// In host byte order, as is the next.
    pub source_port: u32,
    pub destination_port: u32,
}

/// A direct connection, from before its SYN leaves until the client's socket has closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectFlow {
    /// Cookie of the client's socket (`bpf_get_socket_cookie`).
    pub socket: u64,
    /// [`Verdict::id`]
    pub verdict: u64,
    /// Namespace cookies of the ends.
    pub source: u64,
    pub destination: u64,
    /// What the application connected to.
    pub original: Address,
    /// Port of that, in host byte order.
    pub port: u32,
    /// What the destination's end made of it: nothing yet, [`DirectFlow::ADMITTED`] or
    /// [`DirectFlow::RETRACTED`].
    pub arrived: u32,
    /// Nanoseconds of `CLOCK_BOOTTIME`, as is the next; zero while it waits for an answer.
    pub connected_at: u64,
    pub established_at: u64,
    /// Bytes that had been received when the client's FIN was acknowledged.
    pub half_received: u64,
}

impl DirectFlow {
    /// The application has it.
    pub const ADMITTED: u32 = 1;
    /// The agent has it: its verdict was gone.
    pub const RETRACTED: u32 = 2;
}

/// An accelerated connection, from when its client is established until the client's socket has closed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Joint {
    pub client: JointEnd,
    pub server: JointEnd,
}

/// One end of an accelerated connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct JointEnd {
    /// Where the kernel has the socket; zero until it is in [`JOINED_MAP`]. It is only read from, by a
    /// helper that may, and what is read counts only if the socket is found in the map afterwards.
    pub socket: u64,
    /// [`JointEnd::SETTLED`] with the sequence number up to which the end has read the ordinary
    /// path, when it was seen that nobody there is still reading from it; else zero.
    pub settled: u64,
    /// Bytes that this end has sent past the ordinary path.
    pub redirected: u64,
    /// Its next sequence numbers when it was established: of what it sends, and of what it receives.
    pub sends: u32,
    pub receives: u32,
    /// Not zero once its application has sent anything.
    pub has_sent: u32,
    pub reserved: u32,
}

impl JointEnd {
    pub const SETTLED: u64 = 1 << 32;
}

/// Names one socket in [`JOINED_MAP`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JointKey {
    /// [`DirectFlow::socket`], of both ends.
    pub socket: u64,
    /// [`JointKey::CLIENT`] or [`JointKey::SERVER`].
    pub end: u32,
    pub reserved: u32,
}

impl JointKey {
    pub const CLIENT: u32 = 0;
    pub const SERVER: u32 = 1;
}

/// Where this kernel keeps what the gate looks at: bytes from the beginning of the structure that is
/// named, by the kernel's own description of its types (`/sys/kernel/btf/vmlinux`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    /// `sock.__sk_common.skc_state`
    pub state: u32,
    /// `sock.sk_backlog.rmem_alloc`
    pub rmem_alloc: u32,
    /// `sock.sk_rcvbuf`
    pub rcvbuf: u32,
    /// `sock.sk_rcvlowat`
    pub rcvlowat: u32,
    /// `sock.sk_lock.owned`
    pub owned: u32,
    /// `sock.sk_wq`
    pub wq: u32,
    /// `sock.sk_user_data`
    pub user_data: u32,
    /// `inet_connection_sock.icsk_ulp_ops`
    pub ulp_ops: u32,
    /// `tcp_sock.write_seq`
    pub write_seq: u32,
    /// `tcp_sock.copied_seq`
    pub copied_seq: u32,
    /// `socket_wq.wait.head`
    pub waiting: u32,
    /// `wait_queue_entry.entry`
    pub entry: u32,
    /// `wait_queue_entry.private`
    pub private: u32,
    /// `sk_psock.refcnt`
    pub users: u32,
}

/// How many direct connections a pod has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    pub connections: u64,
    /// Not zero: the pod's connections were seen to come from an address that it was not enrolled
    /// with, and can therefore not be direct.
    pub foreign: u32,
    pub reserved: u32,
    /// How many of the connections are accelerated.
    pub joined: u64,
}

/// What the agent tells the programs from time to time.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agent {
    /// Verdicts count until then: nanoseconds of `CLOCK_BOOTTIME`.
    pub admit_until: u64,
}

/// What happened to a direct connection.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowEvent {
    /// [`FlowEvent::OPENED`] or [`FlowEvent::CLOSED`].
    pub kind: u32,
    /// The client's state when it closed (`BPF_TCP_…`).
    pub state: u32,
    pub key: DirectKey,
    pub flow: DirectFlow,
    /// When: nanoseconds of `CLOCK_BOOTTIME`.
    pub at: u64,
    /// Payload bytes that were acknowledged, or went past TCP.
    pub sent: u64,
    /// Payload bytes that were received.
    pub received: u64,
    /// Smoothed round-trip time in eighths of a microsecond (`tcp_sock.srtt_us`).
    pub srtt: u32,
    /// Least round-trip time in microseconds; all ones when none was measured.
    pub min_rtt: u32,
    pub retransmits: u32,
    pub reserved: u32,
}

impl FlowEvent {
    pub const OPENED: u32 = 0;
    pub const CLOSED: u32 = 1;
}

/// What the programs did with direct connections, since their maps were made; one per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectCounts {
    /// Connections that went straight.
    pub opened: u64,
    /// Connections to a service whose draw fell on an endpoint elsewhere.
    pub elsewhere: u64,
    /// Connections that went by the agent because their verdict has expired, or because no agent
    /// extended the time in which verdicts count.
    pub expired: u64,
    /// Connections that went by the agent because the pod's table is nearly full.
    pub full: u64,
    /// Connections that went by the agent because their socket is special: bound to a foreign
    /// address or a device, marked, or of MPTCP.
    pub special: u64,
    /// Connections that went by the agent because the chosen backend's pod has gone, or goes.
    pub backend_gone: u64,
    /// Direct connections that were let in at the destination's end.
    pub admitted: u64,
    /// Direct connections that the destination's end led to the agent: their verdict was taken back
    /// while they were on their way.
    pub retracted: u64,
    /// Direct connections that failed because there could be no record of them.
    pub unrecorded: u64,
    /// Direct connections that were answered, but not by a pod of ours: no byte of theirs leaves.
    pub astray: u64,
    /// Events that found no room.
    pub events_lost: u64,
    /// Direct connections whose two sockets are joined.
    pub joined: u64,
    /// Direct connections that were to be accelerated and are not: there is no room.
    pub joint_full: u64,
    /// The same: their ends do not count their bytes alike, or were not established one after the
    /// other, as with TCP Fast Open.
    pub joint_unequal: u64,
    /// How often a direction left the short way for the ordinary one: the receiver's buffer is full.
    pub left_full: u64,
    /// The same: the receiver waits for more than one byte (`SO_RCVLOWAT`).
    pub left_low_water: u64,
    /// The same: another protocol lies between an application and its socket, as kernel TLS.
    pub left_layered: u64,
    /// The same: one end closes, or is gone.
    pub left_closing: u64,
}

const _: () = {
    assert!(size_of::<VerdictKey>() == 32);
    assert!(size_of::<Verdict>() == 24 + MAX_BACKENDS * 32);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<DirectKey>() == 40);
    assert!(size_of::<DirectFlow>() == 80);
    assert!(size_of::<JointEnd>() == 40);
    assert!(size_of::<Joint>() == 80);
    assert!(size_of::<JointKey>() == 16);
    assert!(size_of::<Offsets>() == 14 * 4);
    assert!(size_of::<Live>() == 24);
    assert!(size_of::<Agent>() == 8);
    assert!(size_of::<FlowEvent>() == 168);
    assert!(size_of::<DirectCounts>() == 18 * 8);
};

/// Longer names would be cut off in the kernel.
const _: () = {
    let maps = [
        VERDICTS_MAP,
        POD_DIRECT_MAP,
        DIRECT_MAP,
        LIVE_MAP,
        AGENT_MAP,
        EVENTS_MAP,
        DIRECT_COUNTS_MAP,
        JOINED_MAP,
        JOINT_ENDS_MAP,
        JOINTS_MAP,
        SK_MSG_PROGRAM,
    ];
    let mut n = 0;
    while n < maps.len() {
        assert!(maps[n].len() <= 15);
        n += 1;
    }
};
