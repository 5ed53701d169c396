//! The kernel object and how it is loaded.

use std::fmt;

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported, is_program_supported};
use aya::{Ebpf, EbpfError, EbpfLoader};
use culvert_abi::direct::{
    ACCELERATES, AGENT_MAP, DIRECT_COUNTS_MAP, DIRECT_MAP, DIRECT_MARGIN, DIRECT_ROOM, EVENTS_MAP,
    JOINED_MAP, JOINT_ENDS_MAP, JOINTS_MAP, LIVE_MAP, OFFSETS, Offsets, POD_DIRECT_MAP,
    VERDICTS_MAP,
};
use culvert_abi::{
    ABI_MAP, ADDRESSES_MAP, COUNTS_MAP, EXCLUDED_NETS_MAP, EXCLUDED_PORTS_MAP, HAVE_MPTCP,
    HAVE_SET_RETVAL, LISTENERS_MAP, NODE_NETNS, POD_FLOWS_MAP, POD_NETNS, PODS_MAP, PROBES_MAP,
    SOCKETS_MAP,
};
use culvert_core::tables::NetnsCookie;
use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;

use super::pins::Pins;
use super::{CaptureError, CaptureOptions};

/// Built by the build script.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/culvert.bpf.o"));

/// The ring buffer of aya-log.
pub const LOGS_MAP: &str = "AYA_LOGS";
/// Maps that outlive the agent. The constants are not among them: they differ from pod to pod.
pub const PINNED_MAPS: [&str; 20] = [
    ABI_MAP,
    PODS_MAP,
    ADDRESSES_MAP,
    EXCLUDED_PORTS_MAP,
    EXCLUDED_NETS_MAP,
    SOCKETS_MAP,
    POD_FLOWS_MAP,
    PROBES_MAP,
    LISTENERS_MAP,
    COUNTS_MAP,
    VERDICTS_MAP,
    POD_DIRECT_MAP,
    LIVE_MAP,
    AGENT_MAP,
    EVENTS_MAP,
    DIRECT_COUNTS_MAP,
    JOINED_MAP,
    JOINT_ENDS_MAP,
    JOINTS_MAP,
    LOGS_MAP,
];

/// Loads the object any number of times onto the same pinned maps.
pub struct Loader {
    /// One for all: the library reads all type information of the kernel for each that it makes, some
    /// 15 ms and 10 MB, and our programs use none of it.
    loader: Mutex<EbpfLoader<'static>>,
    node: NetnsCookie,
}

/// What the programs take for constant, but for the pod.
struct Constants {
    node: NetnsCookie,
    max_direct: u32,
    log_level: u8,
    have_set_retval: u8,
    have_mptcp: u8,
    accelerates: u8,
    offsets: Offsets,
}

/// What programs have that are not a pod's.
static NO_POD: u64 = 0;

impl fmt::Debug for Loader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loader").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Loader {
    pub fn new(options: &CaptureOptions, pins: &Pins) -> Result<Loader, CaptureError> {
        let helper = |helper| {
            is_helper_supported(ProgramType::CgroupSockAddr, helper)
                .map_err(|error| CaptureError::Object(Box::new(error.into())))
        };
        let CaptureOptions { node, max_pods, max_verdicts, max_direct, .. } = *options;
        // Once for the agent, and for as long.
        let constants: &'static Constants = Box::leak(Box::new(Constants {
            node,
            max_direct,
            log_level: log_level(options.log_level),
            have_set_retval: helper(BpfHelper::BPF_FUNC_set_retval)?.into(),
            have_mptcp: helper(BpfHelper::BPF_FUNC_skc_to_mptcp_sock)?.into(),
            accelerates: options.acceleration.is_some().into(),
            offsets: options.acceleration.map(|found| found.offsets()).unwrap_or_default(),
        }));
        let mut loader = EbpfLoader::new();
        loader.btf(None);
        for map in PINNED_MAPS {
            loader.map_pin_path(map, pins.map(map));
        }
        loader
            .map_max_entries(PODS_MAP, max_pods)
            .map_max_entries(POD_FLOWS_MAP, max_pods)
            .map_max_entries(ADDRESSES_MAP, max_pods.saturating_mul(4))
            .map_max_entries(EXCLUDED_PORTS_MAP, max_pods.saturating_mul(64))
            .map_max_entries(EXCLUDED_NETS_MAP, max_pods.saturating_mul(64))
            .map_max_entries(LISTENERS_MAP, max_pods.saturating_mul(3))
            .map_max_entries(VERDICTS_MAP, max_verdicts)
            // Twice, for pods that were withdrawn while connections of theirs live on.
            .map_max_entries(POD_DIRECT_MAP, max_pods.saturating_mul(2))
            .map_max_entries(DIRECT_MAP, max_direct.saturating_add(DIRECT_MARGIN))
            .map_max_entries(LIVE_MAP, max_pods)
            .override_global(DIRECT_ROOM, &constants.max_direct, true)
            .override_global(NODE_NETNS, &constants.node.0, true)
            .override_global(POD_NETNS, &NO_POD, true)
            .override_global(HAVE_SET_RETVAL, &constants.have_set_retval, true)
            .override_global(HAVE_MPTCP, &constants.have_mptcp, true)
            .override_global(ACCELERATES, &constants.accelerates, true)
            .override_global(OFFSETS, &constants.offsets, true)
            .override_global(aya_log::LEVEL, &constants.log_level, true);
        Ok(Loader { loader: Mutex::new(loader), node })
    }

    /// Creates the maps that are not pinned yet and prepares the programs; with the cookie of a pod
    /// for its own program.
    pub fn load(&self, pod: Option<NetnsCookie>) -> Result<Ebpf, CaptureError> {
        let mut loader = self.loader.lock();
        let loaded = match pod {
            Some(NetnsCookie(cookie)) => load_for(&mut loader, cookie),
            None => loader.load(OBJECT),
        };
        loaded.map_err(|error| CaptureError::Object(Box::new(error)))
    }
}

fn load_for(loader: &mut EbpfLoader<'static>, pod: u64) -> Result<Ebpf, EbpfError> {
    let pod = Box::into_raw(Box::new(pod));
    // SAFETY: it is freed below, when the loader has no reference to it any more.
    let lent: &'static u64 = unsafe { &*pod };
    let loaded = loader.override_global(POD_NETNS, lent, true).load(OBJECT);
    loader.override_global(POD_NETNS, &NO_POD, true);
    // SAFETY: made above; what was loaded has a copy of its own, and the loader has another constant.
    drop(unsafe { Box::from_raw(pod) });
    loaded
}

/// The levels of aya-log: off is 0, error is 1, trace is 5.
fn log_level(level: LevelFilter) -> u8 {
    level.into_level().map_or(0, |level| match level {
        tracing::Level::ERROR => 1,
        tracing::Level::WARN => 2,
        tracing::Level::INFO => 3,
        tracing::Level::DEBUG => 4,
        tracing::Level::TRACE => 5,
    })
}

/// Something that the programs use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    pub name: &'static str,
    /// The first Linux that has it.
    pub needs: &'static str,
    /// Nothing goes without it.
    pub required: bool,
    pub supported: bool,
}

/// What this kernel has of what the programs use.
pub fn features() -> Result<Vec<Feature>, CaptureError> {
    let program = |kind| {
        is_program_supported(kind).map_err(|error| CaptureError::Object(Box::new(error.into())))
    };
    let helper = |kind, helper| {
        is_helper_supported(kind, helper)
            .map_err(|error| CaptureError::Object(Box::new(error.into())))
    };
    let (connect, sockops) = (ProgramType::CgroupSockAddr, ProgramType::SockOps);
    let feature = |name, needs, supported| Feature { name, needs, required: true, supported };
    let optional = |feature: Feature| Feature { required: false, ..feature };
    let storage = helper(connect, BpfHelper::BPF_FUNC_sk_storage_get)?;
    let cookie = helper(sockops, BpfHelper::BPF_FUNC_get_netns_cookie)?;
    let retval = helper(connect, BpfHelper::BPF_FUNC_set_retval)?;
    let mptcp = helper(connect, BpfHelper::BPF_FUNC_skc_to_mptcp_sock)?;
    let redirect = helper(ProgramType::SkMsg, BpfHelper::BPF_FUNC_sk_storage_get)?;
    Ok(vec![
        feature("connect hooks", "4.17", program(connect)?),
        feature("socket storage in connect hooks", "5.8", storage),
        feature("sk_lookup", "5.9", program(ProgramType::SkLookup)?),
        feature("bpf_get_netns_cookie in sockops", "5.15", cookie),
        optional(feature("bpf_set_retval in connect hooks", "5.18", retval)),
        optional(feature("bpf_skc_to_mptcp_sock in connect hooks", "5.19", mptcp)),
        optional(feature("sk_msg with socket storage", "5.8", redirect)),
    ])
}

/// Tells the first thing that this kernel lacks.
pub fn check_features() -> Result<(), CaptureError> {
    features()?.iter().try_for_each(require)
}

fn require(feature: &Feature) -> Result<(), CaptureError> {
    if feature.supported || !feature.required {
        return Ok(());
    }
    let Feature { name: feature, needs, .. } = *feature;
    Err(CaptureError::Unsupported { feature, needs, running: release() })
}

/// The running kernel's version.
pub fn release() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease");
    release.map_or("unknown".to_owned(), |release| release.trim().to_owned())
}

#[cfg(test)]
mod tests;
