//! The raw system calls of the lab, each behind a safe function.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::{ffi::CString, os::unix::ffi::OsStrExt};

/// Whether this process may make namespaces and mounts.
pub fn is_root() -> bool {
    // SAFETY: geteuid has no preconditions and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// Moves the calling thread into the network namespace `netns`.
pub fn enter_netns(netns: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: setns only reads the descriptor number, which `netns` keeps open.
    check(unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Makes `command` start in a network namespace and a cgroup, in a process group of its own.
///
/// `procs` is the opened `cgroup.procs` of the cgroup. The group keeps a terminal's Ctrl-C with
/// the process that owns the lab, which then takes everything down in order.
pub fn start_inside(command: &mut Command, netns: Arc<File>, procs: Arc<File>) {
    command.process_group(0);
    let join = move || {
        enter_netns(netns.as_fd())?;
        // SAFETY: the buffer is one byte long and lives across the call.
        let wrote = unsafe { libc::write(procs.as_raw_fd(), b"0".as_ptr().cast(), 1) };
        if wrote == 1 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes two system calls and allocates nothing, so that it may run
    // between fork and exec.
    unsafe { command.pre_exec(join) };
}

/// Sends `signal` to one process.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: kill takes plain numbers.
    check(unsafe { libc::kill(pid, signal) }).map(drop)
}

/// Mounts a BPF file system of its own at `path`.
pub fn mount_bpffs(path: &Path) -> io::Result<()> {
    let target = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all strings are terminated and live across the call; the data pointer may be null.
    check(unsafe {
        libc::mount(c"bpf".as_ptr(), target.as_ptr(), c"bpf".as_ptr(), 0, std::ptr::null())
    })
    .map(drop)
}

/// Unmounts `path`, at once from the tree and for good when its last user closes.
pub fn unmount(path: &Path) -> io::Result<()> {
    let target = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the string is terminated and lives across the call.
    check(unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) }).map(drop)
}

/// Lets this process and its children open as many files as the machine's hard limit allows.
pub fn raise_open_files_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a live structure of the right type.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: as above, and the structure is only read.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) })?;
    Ok(limit.rlim_cur)
}

/// Clock ticks per second, the unit of processor time in `/proc`.
pub fn ticks_per_second() -> f64 {
    // SAFETY: sysconf takes a plain number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

static INTERRUPT_PIPE: AtomicI32 = AtomicI32::new(-1);

extern "C" fn tell_pipe(signal: libc::c_int) {
    let byte = signal as u8;
    // SAFETY: write is async-signal-safe and the buffer is one live byte.
    unsafe { libc::write(INTERRUPT_PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

/// Runs `clean` on a thread of its own when the process is asked to stop (SIGINT, SIGTERM,
/// SIGHUP), and then lets the signal end the process. Call it once.
pub fn on_interrupt(clean: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let (read, write) = pipe()?;
    INTERRUPT_PIPE.store(write.as_raw_fd(), Ordering::Relaxed);
    // The handler writes to this descriptor for as long as the process lives.
    std::mem::forget(write);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        set_handler(signal, tell_pipe as *const () as libc::sighandler_t)?;
    }
    std::thread::Builder::new().name("interrupt".to_owned()).spawn(move || {
        let mut byte = 0u8;
        // SAFETY: the buffer is one live byte and the descriptor is owned by this thread.
        let got = unsafe { libc::read(read.as_raw_fd(), (&raw mut byte).cast(), 1) };
        if got == 1 {
            clean();
            die_by(i32::from(byte));
        }
    })?;
    Ok(())
}

fn die_by(signal: i32) {
    // A failure leaves the process running, to be stopped by the next signal.
    let _ = set_handler(signal, libc::SIG_DFL);
    let _ = kill(std::process::id(), signal);
}

fn set_handler(signal: i32, handler: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: an all-zero sigaction is a valid one with an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: `action` lives across the call and the old action is not asked for.
    check(unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) }).map(drop)
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [0; 2];
    // SAFETY: the array has room for the two descriptors that the call writes.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both descriptors are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

/// Begins a TCP connection without waiting for its end; the socket is non-blocking.
pub fn connect_without_waiting(to: SocketAddr) -> io::Result<std::net::TcpStream> {
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: socket takes plain numbers.
    let fd = check(unsafe { libc::socket(family, kind, 0) })?;
    // SAFETY: the descriptor is new and owned by nobody else.
    let stream = unsafe { std::net::TcpStream::from_raw_fd(fd) };
    let begun = match to {
        SocketAddr::V4(to) => {
            let name = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: to.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(to.ip().octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: the address is a live structure of the length given.
            unsafe { libc::connect(fd, (&raw const name).cast(), length_of(&name)) }
        }
        SocketAddr::V6(to) => {
            let name = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: to.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: to.ip().octets() },
                sin6_scope_id: to.scope_id(),
            };
            // SAFETY: the address is a live structure of the length given.
            unsafe { libc::connect(fd, (&raw const name).cast(), length_of(&name)) }
        }
    };
    match check(begun) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(stream),
    }
}

/// A raw socket that sees every packet of one interface, both ways, from the network header on.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens it in the calling thread's network namespace.
    pub fn open(interface: &str) -> io::Result<Self> {
        let every_protocol = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: socket takes plain numbers. Protocol 0 keeps it silent until it is bound.
        let fd = check(unsafe { libc::socket(libc::AF_PACKET, kind, 0) })?;
        // SAFETY: the descriptor is new and owned by nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &(64 << 20))?;
        let wait = libc::timeval { tv_sec: 0, tv_usec: 50_000 };
        set_option(&socket, libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait)?;
        let name = CString::new(interface)?;
        // SAFETY: the string is terminated and lives across the call.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        if index == 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: an all-zero sockaddr_ll is valid; the fields that matter are set below.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every_protocol;
        address.sll_ifindex = index as i32;
        // SAFETY: the address is a live structure of the length given.
        check(unsafe { libc::bind(fd, (&raw const address).cast(), length_of(&address)) })?;
        Ok(Self(socket))
    }

    /// Waits up to 50 ms for a packet; `None` when none came.
    pub fn receive<'b>(&self, buffer: &'b mut [u8]) -> io::Result<Option<&'b [u8]>> {
        // SAFETY: the buffer is writable for the length given.
        let got =
            unsafe { libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        match usize::try_from(got) {
            Ok(length) => Ok(buffer.get(..length)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error if error.kind() == io::ErrorKind::Interrupted => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Packets lost for want of buffer since the last call.
    pub fn dropped(&self) -> io::Result<u32> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = length_of(&stats);
        let (fd, level, name) = (self.0.as_raw_fd(), libc::SOL_PACKET, libc::PACKET_STATISTICS);
        let value = (&raw mut stats).cast();
        // SAFETY: value and length point to live memory of matching size.
        check(unsafe { libc::getsockopt(fd, level, name, value, &raw mut length) })?;
        Ok(stats.tp_drops)
    }
}

fn set_option<T>(socket: &OwnedFd, level: i32, name: i32, value: &T) -> io::Result<()> {
    let pointer = std::ptr::from_ref(value).cast();
    // SAFETY: the pointer is to a live value of the length given.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer, length_of(value)) })
        .map(drop)
}

fn length_of<T>(_: &T) -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

pub(crate) fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
