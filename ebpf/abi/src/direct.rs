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

/// Global: how many direct connections one pod may have, `u32`.
pub const DIRECT_ROOM: &str = "DIRECT_ROOM";

/// Most backends of one verdict.
pub const MAX_BACKENDS: usize = 32;
/// How many entries [`DIRECT_MAP`] has beyond what a pod may have: connections that were let go
/// while another one took the last place.
pub const DIRECT_MARGIN: u32 = 512;
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
    pub port: u32,
    pub weight: u32,
    pub netns: u64,
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

/// How many direct connections a pod has.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    pub connections: u64,
    /// Not zero: the pod's connections were seen to come from an address that it was not enrolled
    /// with, and can therefore not be direct.
    pub foreign: u32,
    pub reserved: u32,
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
    /// Payload bytes that were acknowledged.
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
}

const _: () = {
    assert!(size_of::<VerdictKey>() == 32);
    assert!(size_of::<Verdict>() == 24 + MAX_BACKENDS * 32);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<DirectKey>() == 40);
    assert!(size_of::<DirectFlow>() == 80);
    assert!(size_of::<Live>() == 16);
    assert!(size_of::<Agent>() == 8);
    assert!(size_of::<FlowEvent>() == 168);
    assert!(size_of::<DirectCounts>() == 11 * 8);
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
    ];
    let mut n = 0;
    while n < maps.len() {
        assert!(maps[n].len() <= 15);
        n += 1;
    }
};
