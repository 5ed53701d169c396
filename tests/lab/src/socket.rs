//! What applications do with sockets beyond the standard library, each behind a safe function.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use crate::sys::check;

/// Flags of send(2) and recv(2).
pub const MSG_OOB: i32 = libc::MSG_OOB;
/// More is to follow at once.
pub const MSG_MORE: i32 = libc::MSG_MORE;
/// Wait for all that was asked for.
pub const MSG_WAITALL: i32 = libc::MSG_WAITALL;
/// Data with the SYN (RFC 7413).
pub const MSG_FASTOPEN: i32 = libc::MSG_FASTOPEN;

/// Whether a non-blocking connect has only begun.
pub fn is_in_progress(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINPROGRESS)
}

/// Dissolves a socket's association, as connect(2) describes for `AF_UNSPEC`.
pub fn disconnect(socket: impl AsFd) -> io::Result<()> {
    let address = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address outlives the call and is as long as said.
    check(unsafe { libc::connect(socket.as_fd().as_raw_fd(), &raw const address, length) })
        .map(drop)
}

/// Sets `TCP_FASTOPEN_CONNECT`: `connect` returns at once, the first write carries the SYN.
pub fn connect_by_first_write(socket: impl AsFd) -> io::Result<()> {
    set_int(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)
}

/// Sets `SO_RCVLOWAT`: the socket is not readable before so many bytes have come.
pub fn set_receive_low_water(socket: impl AsFd, bytes: i32) -> io::Result<()> {
    set_int(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// What `TCP_INFO` tells of a socket's own connection.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo {
    /// Segments sent and not acknowledged.
    pub unacknowledged: u32,
    /// Time since the last acknowledgement came.
    pub since_acknowledgement: Duration,
}

/// Asks for `TCP_INFO`.
pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    // SAFETY: a structure of plain numbers may be all zero.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&info) as libc::socklen_t;
    let (fd, value) = (socket.as_fd().as_raw_fd(), (&raw mut info).cast());
    // SAFETY: value and length point to live memory of matching size.
    check(unsafe {
        libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut length)
    })?;
    let since = Duration::from_millis(info.tcpi_last_ack_recv.into());
    Ok(TcpInfo { unacknowledged: info.tcpi_unacked, since_acknowledgement: since })
}

/// Waits until there is something to read, an end or an error; `false` when the time is over.
pub fn readable_within(socket: impl AsFd, limit: Duration) -> io::Result<bool> {
    poll(socket, libc::POLLIN, limit)
}

/// Waits until there is room to write, or an error; `false` when the time is over.
pub fn writable_within(socket: impl AsFd, limit: Duration) -> io::Result<bool> {
    poll(socket, libc::POLLOUT, limit)
}

/// Waits for urgent data.
pub fn urgent_within(socket: impl AsFd, limit: Duration) -> io::Result<bool> {
    poll(socket, libc::POLLPRI, limit)
}

fn poll(socket: impl AsFd, events: i16, limit: Duration) -> io::Result<bool> {
    let mut watched = libc::pollfd { fd: socket.as_fd().as_raw_fd(), events, revents: 0 };
    let limit = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one live structure, as the count says.
    Ok(check(unsafe { libc::poll(&raw mut watched, 1, limit) })? > 0)
}

/// Sends `count` bytes of a file with sendfile(2), from the file's position on.
pub fn send_file(socket: impl AsFd, file: &File, count: usize) -> io::Result<()> {
    let (to, from) = (socket.as_fd().as_raw_fd(), file.as_raw_fd());
    let mut left = count;
    while left > 0 {
        // SAFETY: both descriptors are open; a null offset uses the file's own position.
        let sent = unsafe { libc::sendfile(to, from, std::ptr::null_mut(), left) };
        left -= moved(sent)?;
    }
    Ok(())
}

/// Moves `count` bytes between two sockets with splice(2), through a pipe.
pub fn splice(from: impl AsFd, to: impl AsFd, count: usize) -> io::Result<()> {
    let (read, write) = pipe()?;
    let mut left = count;
    while left > 0 {
        let mut held = splice_once(&from, &write, left)?;
        left -= held;
        while held > 0 {
            held -= splice_once(&read, &to, held)?;
        }
    }
    Ok(())
}

fn splice_once(from: &impl AsFd, to: &impl AsFd, count: usize) -> io::Result<usize> {
    let (from, to) = (from.as_fd().as_raw_fd(), to.as_fd().as_raw_fd());
    let nowhere = std::ptr::null_mut();
    // SAFETY: both descriptors are open; sockets and pipes have no offsets.
    moved(unsafe { libc::splice(from, nowhere, to, nowhere, count, libc::SPLICE_F_MOVE) })
}

fn moved(count: isize) -> io::Result<usize> {
    match usize::try_from(count) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => Ok(count),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: the kernel writes two descriptors into live memory.
    check(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: both descriptors are new and owned by nobody else.
    Ok(unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) })
}

fn set_int(socket: impl AsFd, level: i32, name: i32, value: i32) -> io::Result<()> {
    let (fd, length) = (socket.as_fd().as_raw_fd(), size_of_val(&value) as libc::socklen_t);
    // SAFETY: the pointer is to a live value of the length given.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const value).cast(), length) }).map(drop)
}
