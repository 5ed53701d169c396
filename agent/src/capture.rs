//! Capture: the kernel programs that lead the connections of enrolled pods to the agent.
//!
//! Everything that must outlive the agent is pinned under one folder of a BPF file system: the maps,
//! the attachments to the cgroup, and one attachment per pod. When the agent dies, its listeners die
//! with it and the programs refuse what they would have led there. The next agent that starts on
//! the same folder puts its own programs in place of the old ones, one atomic replacement at a time,
//! and takes up the maps as they are. [`detach`] takes all of it away.

mod acceleration;
mod btf;
mod detach;
pub mod direct;
mod inheritance;
mod links;
mod logs;
mod maps;
pub mod netns;
mod object;
mod pins;
mod redirection;
pub(crate) mod sys;
pub mod trial;

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use aya::maps::{MapData, MapError, SkStorage};
use aya::programs::ProgramError;
use culvert_abi::{
    ABI_VERSION, Abi, Address, CGROUP_PROGRAMS, Counts, Listener, SK_LOOKUP_PROGRAM, SOCKETS_MAP,
    SocketRole, SocketState,
};
use culvert_core::addr::OriginalDst;
use parking_lot::Mutex;
use tracing::level_filters::LevelFilter;

pub use acceleration::{Acceleration, NoAcceleration};
pub use culvert_core::tables::{NetnsCookie, PodSpec, VerdictId};
pub use detach::{DetachReport, detach};
pub use direct::Direct;
pub use inheritance::is_unattended;
pub use logs::{KERNEL_LOG, KernelLogs};
pub use maps::MapCounts;
pub use netns::{Carried, DnsSockets, ListenOptions, Listeners, Marks, Netns, NetnsError};
pub use object::{Feature, features, release};
pub use redirection::{NoOriginalDst, Redirection, plaintext_dst};
pub use sys::{can_destroy_sockets, raise_open_files};

use links::Programs;
use maps::Maps;
use object::Loader;
use pins::Pins;

/// How long [`Capture::withdraw`] waits for connections that are on their way to the agent.
const WITHDRAW_LIMIT: Duration = Duration::from_millis(200);
/// How long a connection may at most lie between its `connect` and its entry in the flow table.
const CONNECT_GRACE: Duration = Duration::from_millis(3);

/// Where and how to capture.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// A cgroup (version 2) above all pods, and above the node's own processes.
    pub cgroup: PathBuf,
    /// A folder on a BPF file system, for this agent alone.
    pub pin_path: PathBuf,
    /// The namespace whose connections to pods count as the node's own.
    pub node: NetnsCookie,
    /// How many pods the maps have room for.
    pub max_pods: u32,
    /// How many verdicts they have room for, over all pods.
    pub max_verdicts: u32,
    /// How many direct connections of one pod they have room for, before further ones go by the
    /// agent.
    pub max_direct: u32,
    /// Connections may be accelerated, when their verdict and [`Capture::accelerate`] say so.
    pub acceleration: Option<Acceleration>,
    /// What the kernel programs log; they contain no code for what is not.
    pub log_level: LevelFilter,
}

impl CaptureOptions {
    /// What the maps are made for.
    fn abi(&self) -> Abi {
        Abi {
            version: ABI_VERSION,
            max_pods: self.max_pods,
            max_verdicts: self.max_verdicts,
            max_direct: self.max_direct,
        }
    }
}

/// The mount of cgroup version 2, be it alone or beside version 1.
pub fn find_cgroup() -> Option<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let path = fields.next()?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// The agent's listeners of one pod, opened in its namespace.
#[derive(Clone, Copy, Debug)]
pub struct PodListeners<'a> {
    pub outbound: BorrowedFd<'a>,
    pub plaintext: BorrowedFd<'a>,
    pub hbone: BorrowedFd<'a>,
}

impl<'a> From<&'a Listeners> for PodListeners<'a> {
    fn from(listeners: &'a Listeners) -> Self {
        Self {
            outbound: listeners.outbound.as_fd(),
            plaintext: listeners.plaintext.as_fd(),
            hbone: listeners.hbone.as_fd(),
        }
    }
}

/// Where a captured connection was going.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Original {
    pub to: OriginalDst,
    /// The kernel drew among the endpoints of this verdict, and the draw fell on
    /// [`Verdict::elsewhere`](culvert_core::tables::Verdict::elsewhere): the agent draws among the
    /// endpoints that the verdict does not name.
    pub elsewhere: Option<VerdictId>,
}

/// What went wrong with the kernel.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error("{feature} needs Linux {needs}, this is {running}")]
    Unsupported { feature: &'static str, needs: &'static str, running: String },
    #[error("{what} {path:?}: {error}")]
    Path { what: &'static str, path: PathBuf, error: io::Error },
    #[error("{0:?} is in use by another agent")]
    Busy(PathBuf),
    #[error("kernel programs: {0}")]
    Object(#[from] Box<aya::EbpfError>),
    #[error("kernel program {program}: {error}")]
    Program { program: &'static str, error: Box<ProgramError> },
    #[error("kernel map {map}: {error}")]
    Map { map: &'static str, error: Box<MapError> },
    #[error("kernel map {map} is full, it has room for {max_pods} pods")]
    Full { map: &'static str, max_pods: u32 },
    #[error("kernel map {map} is full, it has room for {max_verdicts} verdicts")]
    VerdictsFull { map: &'static str, max_verdicts: u32 },
    #[error("direct connection {client} to {server}: {error}")]
    Destroy { client: SocketAddr, server: SocketAddr, error: io::Error },
    #[error("pod with namespace cookie {cookie}: {error}")]
    Pod { cookie: NetnsCookie, error: io::Error },
}

/// The attached kernel programs and their maps. Dropping it leaves them attached.
#[derive(Debug)]
pub struct Capture {
    loader: Loader,
    pins: Pins,
    /// Read without the lock: the kernel needs none.
    sockets: SkStorage<MapData, SocketState>,
    sockets_fd: std::os::fd::OwnedFd,
    maps: Mutex<Maps>,
    direct: Direct,
    logs: Mutex<Option<KernelLogs>>,
    programs: Mutex<Vec<(String, u32)>>,
}

impl Capture {
    /// Loads and attaches the programs, or puts them in place of those that an earlier agent left.
    /// Pods that it enrolled stay enrolled, and refuse connections until [`Capture::enrol`] gives
    /// them listeners again.
    pub fn start(options: &CaptureOptions) -> Result<Capture, CaptureError> {
        Capture::start_on(Pins::open(&options.pin_path)?, options)
    }

    fn start_on(pins: Pins, options: &CaptureOptions) -> Result<Capture, CaptureError> {
        object::check_features()?;
        let adopted = pins.pods()?;
        let fresh_maps = pins.discard_foreign_maps(options.abi())?;
        let loader = Loader::new(options, &pins)?;
        let mut object = loader.load(None)?;
        let sockets =
            object.take_map(SOCKETS_MAP).ok_or_else(|| maps::missing(SOCKETS_MAP)).and_then(
                |map| SkStorage::try_from(map).map_err(|error| maps::failed(SOCKETS_MAP, error)),
            )?;
        let sockets_fd = pins.open_map(SOCKETS_MAP)?;
        let mut maps = Maps::take(&mut object, options)?;
        let direct = Direct::take(&mut object, options, &pins)?;
        if fresh_maps {
            // Nothing is known of these pods but that they are to be captured. They have no address
            // and no listener, so they are refused everything until they are enrolled again.
            for cookie in &adopted {
                let spec = PodSpec { capture_dns: true, ..PodSpec::default() };
                maps.change(|tables| tables.enrol(*cookie, &spec))?;
            }
        }
        let cgroup = File::open(&options.cgroup).map_err(|error| CaptureError::Path {
            what: "cgroup",
            path: options.cgroup.clone(),
            error,
        })?;
        let mut programs = Programs::new(&mut object);
        // The connect programs come last: what they lead away, the others must recognise.
        for program in CGROUP_PROGRAMS.iter().rev() {
            programs.attach_to_cgroup(program, cgroup.as_fd(), &pins.link(program))?;
        }
        let programs = programs.ids();
        // What is never written to needs nobody who reads it.
        let logs = match options.log_level {
            LevelFilter::OFF => None,
            _ => KernelLogs::new(&mut object),
        };
        let capture = Capture {
            loader,
            pins,
            sockets,
            sockets_fd,
            maps: Mutex::new(maps),
            direct,
            logs: Mutex::new(logs),
            programs: Mutex::new(programs),
        };
        capture.adopt(adopted)?;
        Ok(capture)
    }

    /// Pods that are enrolled, also those that an earlier agent enrolled.
    pub fn pods(&self) -> Vec<NetnsCookie> {
        self.maps.lock().pods()
    }

    /// Where an accepted connection was going. `None` when it was not captured: someone connected
    /// to the agent's port by hand, or the kernel could not note it; it must be refused.
    pub fn original_dst(&self, accepted: impl AsFd) -> Result<Option<Original>, CaptureError> {
        let state = match self.sockets.get(&accepted.as_fd().as_raw_fd(), 0) {
            Ok(state) => state,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(maps::failed(SOCKETS_MAP, error)),
        };
        let Ok(port) = u16::try_from(state.port) else { return Ok(None) };
        let is_accepted = state.role == SocketRole::Accepted as u32;
        let to = OriginalDst::new((std::net::IpAddr::from(state.original), port).into());
        let elsewhere = (state.verdict != 0).then_some(VerdictId(state.verdict));
        Ok(is_accepted.then_some(Original { to, elsewhere }))
    }

    /// The kernel's admission of direct connections.
    pub fn direct(&self) -> &Direct {
        &self.direct
    }

    /// Captures a pod. From when this answers on, every new connection of the pod is captured;
    /// those that exist stay as they are. For an enrolled pod it changes what is captured and which
    /// listeners receive it, without a gap.
    ///
    /// It blocks for some ten milliseconds: the kernel waits for programs on other processors.
    pub fn enrol(
        &self,
        netns: BorrowedFd,
        cookie: NetnsCookie,
        spec: &PodSpec,
        listeners: &PodListeners,
    ) -> Result<(), CaptureError> {
        let mut maps = self.maps.lock();
        let known = maps.is_enrolled(cookie);
        let result = self.try_enrol(&mut maps, netns, cookie, spec, listeners);
        if result.is_err() && !known {
            // What failed is told; a half of it must not stay.
            let _ = self.forget(&mut maps, cookie);
        }
        result
    }

    /// Lets a pod go. Its new connections go their plain way when this answers; open ones go on, as
    /// do those that the agent has not accepted yet, for as long as it keeps its listeners open.
    ///
    /// It blocks until no connection is on its way to the agent, 200 ms at most.
    pub fn withdraw(&self, cookie: NetnsCookie) -> Result<(), CaptureError> {
        let mut maps = self.maps.lock();
        if !maps.is_enrolled(cookie) {
            return Ok(());
        }
        maps.change(|tables| tables.leave(cookie))?;
        self.direct.close(cookie)?;
        self.pins.unlink_pod(cookie)?;
        let started = Instant::now();
        loop {
            let waited = started.elapsed();
            let under_way = maps.flows_of(cookie)?;
            if waited > WITHDRAW_LIMIT || (under_way == 0 && waited > CONNECT_GRACE) {
                break;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        self.forget(&mut maps, cookie)
    }

    /// Forgets a pod once its namespace has ended; says whether it has. Until then the pod stays
    /// captured, and refused when it has no listeners: a name that is gone does not mean that no
    /// process is left inside.
    pub fn forget_ended(&self, cookie: NetnsCookie) -> Result<bool, CaptureError> {
        let mut maps = self.maps.lock();
        if !maps.is_enrolled(cookie) {
            return Ok(true);
        }
        let link = self.pins.open_pod(cookie)?;
        let inode =
            sys::link_netns(link.as_fd()).map_err(|error| CaptureError::Pod { cookie, error })?;
        if inode.is_some() {
            return Ok(false);
        }
        self.forget(&mut maps, cookie)?;
        Ok(true)
    }

    /// Keeps a socket of the agent from being captured. A pod cannot do this to its own sockets: it
    /// takes access to the map, not a mark.
    pub fn exempt(&self, socket: impl AsFd) -> Result<(), CaptureError> {
        let none = Address::UNSPECIFIED;
        let state = SocketState::new(SocketRole::Exempt, none, 0, none);
        // SAFETY: the map's keys are descriptors and its values are `SocketState`.
        unsafe { sys::map_update(self.sockets_fd.as_fd(), &socket.as_fd().as_raw_fd(), &state) }
            .map_err(|error| maps::failed(SOCKETS_MAP, MapError::IoError(error)))
    }

    /// The attached programs of this agent: name and kernel id.
    pub fn programs(&self) -> Vec<(String, u32)> {
        self.programs.lock().clone()
    }

    /// Entries in the maps at this moment.
    pub fn counts(&self) -> MapCounts {
        self.maps.lock().entries()
    }

    /// What the programs did since their maps were made, over all processors.
    pub fn events(&self) -> Result<Counts, CaptureError> {
        self.maps.lock().events()
    }

    /// What the programs log, to be had once. `None` afterwards, or when there is nothing to read.
    pub fn logs(&self) -> Option<KernelLogs> {
        self.logs.lock().take()
    }

    /// Replaces the programs of adopted pods, and drops those whose namespace is gone.
    fn adopt(&self, pods: Vec<NetnsCookie>) -> Result<(), CaptureError> {
        let mut maps = self.maps.lock();
        let mut attached = Vec::with_capacity(pods.len());
        for cookie in pods {
            if self.replace_in_pod(&mut maps, cookie)? {
                attached.push(cookie);
            } else {
                tracing::info!(%cookie, "the network namespace of an adopted pod is gone");
                self.pins.unlink_pod(cookie)?;
                self.forget(&mut maps, cookie)?;
            }
        }
        // An agent may have died between two steps of enrolling or withdrawing.
        for cookie in maps.pods() {
            if !attached.contains(&cookie) {
                self.forget(&mut maps, cookie)?;
            }
        }
        Ok(())
    }

    /// False when the pod's namespace is gone, or goes while its program is being replaced.
    fn replace_in_pod(&self, maps: &mut Maps, cookie: NetnsCookie) -> Result<bool, CaptureError> {
        let link = self.pins.open_pod(cookie)?;
        let inode =
            sys::link_netns(link.as_fd()).map_err(|error| CaptureError::Pod { cookie, error })?;
        if inode.is_none() {
            return Ok(false);
        }
        let mut object = self.loader.load(Some(cookie))?;
        maps.ensure_flows(&mut object, cookie)?;
        self.direct.ensure(&mut object, cookie)?;
        let replaced = Programs::new(&mut object).replace_in_netns(SK_LOOKUP_PROGRAM, link.as_fd());
        match replaced {
            Err(CaptureError::Program { error, .. }) if is_severed(&error) => Ok(false),
            replaced => replaced.map(|()| true),
        }
    }

    fn try_enrol(
        &self,
        maps: &mut Maps,
        netns: BorrowedFd,
        cookie: NetnsCookie,
        spec: &PodSpec,
        listeners: &PodListeners,
    ) -> Result<(), CaptureError> {
        maps.set_listener(cookie, Listener::Outbound, listeners.outbound)?;
        maps.set_listener(cookie, Listener::Plaintext, listeners.plaintext)?;
        maps.set_listener(cookie, Listener::Hbone, listeners.hbone)?;
        if !self.pins.has_pod(cookie) {
            let mut object = self.loader.load(Some(cookie))?;
            maps.ensure_flows(&mut object, cookie)?;
            self.direct.ensure(&mut object, cookie)?;
            // Addresses and exclusions first: the program looks at them from its first packet.
            maps.change(|tables| {
                tables.enrol(cookie, spec);
                tables.leave(cookie);
            })?;
            let pin = self.pins.pod(cookie);
            Programs::new(&mut object).attach_to_netns(SK_LOOKUP_PROGRAM, netns, &pin)?;
        }
        maps.change(|tables| tables.enrol(cookie, spec))?;
        self.direct.forgive(cookie)
    }

    fn forget(&self, maps: &mut Maps, cookie: NetnsCookie) -> Result<(), CaptureError> {
        self.pins.unlink_pod(cookie)?;
        maps.change(|tables| tables.withdraw(cookie))?;
        maps.remove_listeners(cookie)?;
        maps.remove_flows(cookie)?;
        self.direct.close(cookie)
    }
}

/// What the kernel answers about a link whose namespace is gone (`bpf_netns_link_update_prog`).
fn is_severed(error: &ProgramError) -> bool {
    match error {
        ProgramError::IOError(error) => error.raw_os_error() == Some(libc::ENOLINK),
        ProgramError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOLINK),
        _ => false,
    }
}
