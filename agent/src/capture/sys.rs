//! System calls that no library in use offers: parts of `bpf(2)`, namespaces, mounts, locks.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::mem;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use socket2::SockRef;

use super::direct::SocketCookie;
use super::netns::sockets;

/// Commands of `bpf(2)`.
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

/// `SO_NETNS_COOKIE` (Linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;
/// `IPV6_TRANSPARENT` (Linux 2.6.37).
pub const IPV6_TRANSPARENT: libc::c_int = 75;
/// `BPF_FS_MAGIC`.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// Calls `bpf(2)` with one of its attribute structures.
///
/// # Safety
/// `T` is the structure the command expects, and every address in it is valid for the call.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_long> {
    let pointer: *mut T = attributes;
    // SAFETY: by this function's contract.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, pointer, mem::size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sets one element of a map whose kernel type libraries want exclusive access for, although the
/// kernel does not.
///
/// # Safety
/// `K` and `V` have the sizes of the map's keys and values, and no padding.
pub unsafe fn map_update<K: Copy, V: Copy>(map: BorrowedFd, key: &K, value: &V) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        reserved: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    let mut attributes = Attributes {
        map: map.as_raw_fd().cast_unsigned(),
        reserved: 0,
        key: std::ptr::from_ref(key).addr() as u64,
        value: std::ptr::from_ref(value).addr() as u64,
        flags: 0,
    };
    // SAFETY: the structure is that of BPF_MAP_*_ELEM, the references outlive the call, and their
    // sizes are right by this function's contract.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) }.map(drop)
}

/// Tells every entry of a hash map, many by one call (Linux 5.6). What is in the map all the while is
/// told, also when others add and remove entries.
///
/// # Safety
/// `K` and `V` are what the map's keys and values are, and any bytes are a valid value of both.
pub unsafe fn map_entries<K: Copy, V: Copy>(
    map: BorrowedFd,
    mut tell: impl FnMut(&K, &V),
) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        in_batch: u64,
        out_batch: u64,
        keys: u64,
        values: u64,
        count: u32,
        map: u32,
        element_flags: u64,
        flags: u64,
    }
    let mut room = 256;
    let mut from: Option<u32> = None;
    loop {
        let mut keys: Vec<mem::MaybeUninit<K>> = Vec::with_capacity(room);
        let mut values: Vec<mem::MaybeUninit<V>> = Vec::with_capacity(room);
        let mut next = 0u32;
        let mut attributes = Attributes {
            in_batch: from.as_ref().map_or(0, |from| std::ptr::from_ref(from).addr() as u64),
            out_batch: std::ptr::from_mut(&mut next).addr() as u64,
            keys: keys.as_mut_ptr().addr() as u64,
            values: values.as_mut_ptr().addr() as u64,
            count: room as u32,
            map: map.as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the structure is that of BPF_MAP_*_BATCH. The kernel fills at most `count` keys
        // and values of these sizes, and a position, which for this type of map is four bytes.
        let result = unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attributes) };
        let ended = match result {
            Ok(_) => false,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
            // One bucket holds more.
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                room *= 2;
                continue;
            }
            Err(error) => return Err(error),
        };
        let filled = (attributes.count as usize).min(room);
        // SAFETY: the kernel has filled this many of both.
        unsafe {
            keys.set_len(filled);
            values.set_len(filled);
        }
        for (key, value) in keys.iter().zip(&values) {
            // SAFETY: filled, and valid by this function's contract.
            unsafe { tell(key.assume_init_ref(), value.assume_init_ref()) };
        }
        if ended {
            return Ok(());
        }
        from = Some(next);
    }
}

/// The keys of a map whose values are not known. Those that others add or remove meanwhile may be
/// told, also twice.
///
/// # Safety
/// `K` has the size of the map's keys, and any bytes are a valid value of it.
pub unsafe fn map_keys<K: Copy>(map: BorrowedFd) -> io::Result<Vec<K>> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        reserved: u32,
        key: u64,
        next: u64,
        flags: u64,
    }
    let mut keys: Vec<K> = Vec::new();
    loop {
        let mut next = mem::MaybeUninit::<K>::uninit();
        let mut attributes = Attributes {
            map: map.as_raw_fd().cast_unsigned(),
            reserved: 0,
            key: keys.last().map_or(0, |key| std::ptr::from_ref(key).addr() as u64),
            next: next.as_mut_ptr().addr() as u64,
            flags: 0,
        };
        // SAFETY: the structure is that of BPF_MAP_*_ELEM, and the key has the right size.
        match unsafe { bpf(BPF_MAP_GET_NEXT_KEY, &mut attributes) } {
            // SAFETY: the kernel has filled it.
            Ok(_) => keys.push(unsafe { next.assume_init() }),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(keys),
            Err(error) => return Err(error),
        }
        // One that is gone by now leads back to the first; others may add for ever.
        if keys.len() > MAX_KEYS {
            return Ok(keys);
        }
    }
}

/// More keys than any map of ours has.
const MAX_KEYS: usize = 1 << 20;

/// The time since the machine was started, sleep included (`CLOCK_BOOTTIME`).
pub fn since_boot() -> Duration {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut time: libc::timespec = unsafe { mem::zeroed() };
    // SAFETY: the kernel fills the structure; this clock exists since Linux 2.6.39.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &mut time) };
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or_default())
}

/// Opens what is pinned at a path.
pub fn pinned(path: &Path) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        path: u64,
        fd: u32,
        flags: u32,
    }
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attributes = Attributes { path: path.as_ptr().addr() as u64, fd: 0, flags: 0 };
    // SAFETY: the structure is that of BPF_OBJ_GET; the path outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attributes) }?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Puts another program behind a link, atomically (Linux 5.7; network namespaces 5.8).
pub fn link_update(link: BorrowedFd, program: BorrowedFd) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
        program: u32,
        flags: u32,
        old_program: u32,
    }
    let mut attributes = Attributes {
        link: link.as_raw_fd().cast_unsigned(),
        program: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_program: 0,
    };
    // SAFETY: the structure is that of BPF_LINK_UPDATE and holds no addresses.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attributes) }.map(drop)
}

/// Takes a link off what it is attached to, at once (Linux 5.9). Merely removing its last pin does
/// so some time later.
pub fn link_detach(link: BorrowedFd) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        link: u32,
    }
    let mut attributes = Attributes { link: link.as_raw_fd().cast_unsigned() };
    // SAFETY: the structure is that of BPF_LINK_DETACH and holds no addresses.
    unsafe { bpf(BPF_LINK_DETACH, &mut attributes) }.map(drop)
}

/// Raises the limit of open files as far as it may be (getrlimit(2)); gives the limit then in force.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel fills the structure.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads the structure.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
}

/// Inode number of the network namespace a link is attached to; `None` once that is gone.
pub fn link_netns(link: BorrowedFd) -> io::Result<Option<u64>> {
    // `netns.netns_ino` is the lower half of the first word, on machines of either byte order.
    let [a, b, c, d, ..] = link_target(link)?.to_ne_bytes();
    let inode = u32::from_ne_bytes([a, b, c, d]);
    Ok((inode != 0).then_some(inode.into()))
}

/// Inode number of the cgroup a link is attached to; 0 once that is gone.
pub fn link_cgroup(link: BorrowedFd) -> io::Result<u64> {
    link_target(link)
}

/// The first word of what `struct bpf_link_info` tells about this type of link.
fn link_target(link: BorrowedFd) -> io::Result<u64> {
    #[repr(C)]
    #[derive(Default)]
    struct Information {
        kind: u32,
        id: u32,
        program: u32,
        padding: u32,
        target: u64,
        rest: [u64; 8],
    }
    #[repr(C)]
    struct Attributes {
        fd: u32,
        length: u32,
        information: u64,
    }
    let mut information = Information::default();
    let mut attributes = Attributes {
        fd: link.as_raw_fd().cast_unsigned(),
        length: mem::size_of::<Information>() as u32,
        information: std::ptr::from_mut(&mut information).addr() as u64,
    };
    // SAFETY: the structure is that of BPF_OBJ_GET_INFO_BY_FD. The kernel fills at most `length`
    // bytes, which have the layout of `struct bpf_link_info`.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attributes) }?;
    Ok(information.target)
}

/// The cookie of the network namespace that a socket belongs to (Linux 5.14).
pub fn netns_cookie(socket: BorrowedFd) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut length = mem::size_of::<u64>() as libc::socklen_t;
    let pointer: *mut u64 = &mut cookie;
    // SAFETY: the kernel writes at most `length` bytes to `cookie`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            pointer.cast(),
            &mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
}

/// Whether the kernel ends sockets on request (`CONFIG_INET_DIAG_DESTROY`).
pub fn can_destroy_sockets() -> io::Result<bool> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let cookie = SockRef::from(&listener).cookie()?;
    sockets::can_destroy(&listener, SocketCookie(cookie))
}

/// The destination that a connection had before it was translated (`SO_ORIGINAL_DST`, and
/// `IP6T_SO_ORIGINAL_DST`, which has the same number). An IPv4 connection may be on an IPv6 socket.
pub fn original_dst(socket: BorrowedFd) -> io::Result<SocketAddr> {
    let v4 = original_dst_of(socket, libc::SOL_IP);
    let found = v4.or_else(|_| original_dst_of(socket, libc::SOL_IPV6))?;
    found.as_socket().ok_or_else(|| io::Error::other("not an IP address"))
}

fn original_dst_of(socket: BorrowedFd, level: libc::c_int) -> io::Result<socket2::SockAddr> {
    const SO_ORIGINAL_DST: libc::c_int = 80;
    // SAFETY: the kernel writes at most `length` bytes, and tells how many it wrote.
    let ((), address) = unsafe {
        socket2::SockAddr::try_init(|storage, length| {
            let fd = socket.as_raw_fd();
            match libc::getsockopt(fd, level, SO_ORIGINAL_DST, storage.cast(), length) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        })
    }?;
    Ok(address)
}

/// Whether a descriptor is a network namespace (`NS_GET_NSTYPE`, Linux 4.11).
pub fn is_netns(file: BorrowedFd) -> bool {
    /// `_IO(0xb7, 3)`
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    /// `NSFS_MAGIC`.
    const NSFS_MAGIC: i64 = 0x6e73_6673;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut stat: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: `stat` is ours.
    if unsafe { libc::fstatfs(file.as_raw_fd(), &mut stat) } < 0 || stat.f_type as i64 != NSFS_MAGIC
    {
        return false;
    }
    // SAFETY: the request takes no argument, and the file is one of the file system that knows it.
    unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) == libc::CLONE_NEWNET }
}

/// A file of `/proc/sys`, for writing, where that is mounted read-only, as in containers: opened
/// through a mount of `proc` that is nowhere in the tree (fsopen(2), Linux 5.2; needs
/// `CAP_SYS_ADMIN`).
pub fn open_setting(setting: &str) -> io::Result<File> {
    let call = |result: libc::c_long| match i32::try_from(result) {
        // SAFETY: the kernel has just given this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        Ok(_) | Err(_) => Err(io::Error::last_os_error()),
    };
    const FSOPEN_CLOEXEC: libc::c_long = 1;
    const FSCONFIG_CMD_CREATE: libc::c_long = 6;
    const FSMOUNT_CLOEXEC: libc::c_long = 1;
    // SAFETY: the string is terminated and outlives the call.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"proc".as_ptr(), FSOPEN_CLOEXEC) };
    let context = call(context)?;
    // SAFETY: this command takes no further arguments.
    let made = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), FSCONFIG_CMD_CREATE, 0, 0, 0)
    };
    if made < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: takes numbers only.
    let mount =
        unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, 0) };
    let mount = call(mount)?;
    let path = CString::new(format!("sys/{setting}"))?;
    let flags = libc::O_WRONLY | libc::O_CLOEXEC;
    // SAFETY: the path is terminated and outlives the call.
    let file = unsafe { libc::openat(mount.as_raw_fd(), path.as_ptr(), flags) };
    call(file.into()).map(File::from)
}

/// Sets a socket option that is one number.
pub fn set_option(
    socket: BorrowedFd,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let pointer: *const libc::c_int = &value;
    let length = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `length` bytes of `value`.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, pointer.cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The network namespace that a socket lies in. Wants `CAP_NET_ADMIN` (Linux 4.9).
pub fn netns_of(socket: BorrowedFd) -> io::Result<OwnedFd> {
    /// linux/sockios.h
    const SIOCGSKNS: libc::c_ulong = 0x894c;
    // SAFETY: the request takes no argument and answers with a new descriptor.
    let netns = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) };
    if netns < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(netns) })
}

/// Moves the calling thread into a network namespace.
pub fn enter_netns(netns: BorrowedFd) -> io::Result<()> {
    // SAFETY: changes only the calling thread's namespace; nothing in memory depends on it.
    let result = unsafe { libc::setns(netns.as_raw_fd(), libc::CLONE_NEWNET) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The inode number behind a descriptor. That of a cgroup is its identifier.
pub fn inode(file: BorrowedFd) -> io::Result<u64> {
    Ok(File::from(file.try_clone_to_owned()?).metadata()?.ino())
}

/// Whether a path lies on a BPF file system.
pub fn is_bpf_fs(path: &Path) -> io::Result<bool> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut stat: libc::statfs = unsafe { mem::zeroed() };
    // SAFETY: the path is terminated and `stat` is ours.
    let result = unsafe { libc::statfs(path.as_ptr(), &mut stat) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(stat.f_type as i64 == BPF_FS_MAGIC)
    }
}

/// Mounts a BPF file system.
pub fn mount_bpf_fs(path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let data = c"mode=0700";
    // SAFETY: all strings are terminated and outlive the call.
    let result = unsafe {
        libc::mount(c"bpf".as_ptr(), path.as_ptr(), c"bpf".as_ptr(), 0, data.as_ptr().cast())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives back the lock of [`lock`], also for processes that hold a copy of the descriptor.
pub fn unlock(file: &File) {
    // SAFETY: takes a descriptor only. Closing the last descriptor would do the same.
    unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_UN) };
}

/// Takes the lock of a folder or file for as long as it stays open. `WouldBlock`: someone has it.
pub fn lock(file: &File) -> io::Result<()> {
    // SAFETY: takes a descriptor only.
    let result = unsafe { libc::flock(file.as_fd().as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
