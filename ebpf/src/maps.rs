//! The maps, and the constants that the agent sets when it loads the programs.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::btf_maps::{
    Array, HashMap, HashOfMaps, LpmTrie, PerCpuArray, RingBuf, SkStorage, SockHash,
};
use aya_ebpf::macros::btf_map;
use culvert_abi::direct::{
    Agent, DirectCounts, DirectFlow, DirectKey, EVENTS_SIZE, FlowEvent, Joint, JointEnd, JointKey,
    Live, MAX_JOINED, Offsets, Verdict, VerdictKey,
};
use culvert_abi::{
    Abi, Address, Counts, ExcludedNet, ExcludedPort, Flow, FlowKey, ListenerKey, MAX_FLOWS_PER_POD,
    MAX_PROBES, Pod, Probe, SocketState,
};

/// A table that takes memory only for what it holds.
type SparseMap<K, V, const MAX: usize> = HashMap<K, V, MAX, { BPF_F_NO_PREALLOC as usize }>;
/// One pod's flows; see [`FLOWS`].
type Flows = SparseMap<FlowKey, Flow, MAX_FLOWS_PER_POD>;
/// One pod's direct connections; see [`DIRECT`].
pub type DirectFlows = SparseMap<DirectKey, DirectFlow, 1>;

// The sizes that depend on the number of pods are set by the agent; those here are for one pod.

/// Tells a later agent whether it may keep these maps; no program reads it.
#[btf_map(name = "cv_abi")]
static ABI: Array<Abi, 1> = Array::new();

#[btf_map(name = "cv_pods")]
pub static PODS: HashMap<u64, Pod, 1> = HashMap::new();

#[btf_map(name = "cv_addresses")]
pub static ADDRESSES: SparseMap<Address, u64, 1> = HashMap::new();

#[btf_map(name = "cv_excl_ports")]
pub static EXCLUDED_PORTS: SparseMap<ExcludedPort, u32, 1> = HashMap::new();

#[btf_map(name = "cv_excl_nets")]
pub static EXCLUDED_NETS: LpmTrie<ExcludedNet, u32, 1> = LpmTrie::new();

#[btf_map(name = "cv_sockets")]
pub static SOCKETS: SkStorage<SocketState> = SkStorage::new();

/// Each pod has a table of its own, so that none can fill another's.
#[btf_map(name = "cv_pod_flows")]
pub static POD_FLOWS: HashOfMaps<u64, Flows, 1> = HashOfMaps::new();

/// The table that the agent puts into [`POD_FLOWS`]: loading the programs for one pod makes it.
#[btf_map(name = "cv_flows")]
static FLOWS: Flows = HashMap::new();

#[btf_map(name = "cv_probes")]
pub static PROBES: SparseMap<Probe, u32, MAX_PROBES> = HashMap::new();

#[btf_map(name = "cv_listeners")]
pub static LISTENERS: SockHash<ListenerKey, 3> = SockHash::new();

#[btf_map(name = "cv_counts")]
pub static COUNTS: PerCpuArray<Counts, 1> = PerCpuArray::new();

#[btf_map(name = "cv_verdicts")]
pub static VERDICTS: SparseMap<VerdictKey, Verdict, 1> = HashMap::new();

/// Each pod has a table of its own, as with [`POD_FLOWS`].
#[btf_map(name = "cv_pod_direct")]
pub static POD_DIRECT: HashOfMaps<u64, DirectFlows, 1> = HashOfMaps::new();

#[btf_map(name = "cv_direct")]
static DIRECT: DirectFlows = HashMap::new();

#[btf_map(name = "cv_direct_live")]
pub static LIVE: SparseMap<u64, Live, 1> = HashMap::new();

#[btf_map(name = "cv_agent")]
pub static AGENT: Array<Agent, 1> = Array::new();

#[btf_map(name = "cv_events")]
pub static EVENTS: RingBuf<FlowEvent, EVENTS_SIZE> = RingBuf::new();

#[btf_map(name = "cv_direct_count")]
pub static DIRECT_COUNTS: PerCpuArray<DirectCounts, 1> = PerCpuArray::new();

#[btf_map(name = "cv_joined")]
pub static JOINED: SockHash<JointKey, { 2 * MAX_JOINED }> = SockHash::new();

#[btf_map(name = "cv_joint_ends")]
pub static JOINT_ENDS: SkStorage<JointKey> = SkStorage::new();

#[btf_map(name = "cv_joints")]
pub static JOINTS: SparseMap<u64, Joint, MAX_JOINED> = HashMap::new();

/// What a new entry of [`JOINTS`] is: too large for a program's stack.
#[unsafe(no_mangle)]
pub static NO_JOINT: Global<Joint> = Global::new(Joint { client: NO_END, server: NO_END });

#[unsafe(no_mangle)]
pub static ACCELERATES: Global<u8> = Global::new(0);

#[unsafe(no_mangle)]
pub static OFFSETS: Global<Offsets> = Global::new(NO_OFFSETS);

#[unsafe(no_mangle)]
pub static NODE_NETNS: Global<u64> = Global::new(0);

#[unsafe(no_mangle)]
pub static POD_NETNS: Global<u64> = Global::new(0);

#[unsafe(no_mangle)]
pub static HAVE_SET_RETVAL: Global<u8> = Global::new(0);

#[unsafe(no_mangle)]
pub static HAVE_MPTCP: Global<u8> = Global::new(0);

#[unsafe(no_mangle)]
pub static DIRECT_ROOM: Global<u32> = Global::new(0);

const NO_END: JointEnd = JointEnd {
    socket: 0,
    settled: 0,
    redirected: 0,
    sends: 0,
    receives: 0,
    has_sent: 0,
    reserved: 0,
};

const NO_OFFSETS: Offsets = Offsets {
    state: 0,
    rmem_alloc: 0,
    rcvbuf: 0,
    rcvlowat: 0,
    owned: 0,
    wq: 0,
    user_data: 0,
    ulp_ops: 0,
    write_seq: 0,
    copied_seq: 0,
    waiting: 0,
    entry: 0,
    private: 0,
    users: 0,
};
