//! Finding, reading and ending connections of a namespace through sock_diag(7).
//!
//! The kernel looks a connection up as if a segment of it had arrived, and so finds a listener where
//! there is no connection. Therefore nothing is ended but by the cookie of its socket.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};

use socket2::{Domain, Protocol, Socket, Type};

use super::Netns;
use crate::capture::direct::SocketCookie;

/// `NETLINK_SOCK_DIAG`.
const SOCK_DIAG: libc::c_int = 4;
/// Message types.
const BY_FAMILY: u16 = 20;
const DESTROY: u16 = 21;
/// State of a listener (`TCP_LISTEN`).
const LISTEN: u8 = 10;
/// `INET_DIAG_NOCOOKIE`, twice.
const NO_COOKIE: SocketCookie = SocketCookie(u64::MAX);
/// Lengths of `nlmsghdr`, of what stands before the cookie in `inet_diag_msg`, and of all of that.
const HEADER: usize = 16;
const BEFORE_COOKIE: usize = 44;
const MESSAGE: usize = 72;
/// `INET_DIAG_INFO`: the attribute that holds a `tcp_info`, and the bit that asks for it.
const INFO: u16 = 2;
const WITH_INFO: u8 = 1 << (INFO - 1);
/// Where `tcp_info` has `tcpi_bytes_acked` and `tcpi_bytes_received` (Linux 4.1).
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;
/// States of a socket that has sent its end and knows that it arrived, and of those that have the
/// other's (`TCP_FIN_WAIT2`, `TCP_CLOSE_WAIT`, `TCP_LAST_ACK`, `TCP_CLOSING`).
const SENT_END: [u8; 1] = [5];
const HAVE_END: [u8; 3] = [8, 9, 11];

/// The interface that a socket is bound to: none, or `lo`, whose index is the same everywhere.
const ANY: u32 = 0;
const LOOPBACK: u32 = 1;

/// How much a connection has carried so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Bytes that the other end's kernel acknowledged.
    pub sent: u64,
    pub received: u64,
}

/// Ends a connection; `false` when there is none, or its socket is another one by now.
pub fn destroy(
    netns: &Netns,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: SocketCookie,
) -> io::Result<bool> {
    let socket = open(netns)?;
    // The programs bind what must not go on to `lo`.
    for interface in [ANY, LOOPBACK] {
        match ask(&socket, DESTROY, interface, local, remote, cookie) {
            Ok(_) => return Ok(true),
            Err(error) if is_absent(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// What connections, each with its ends and its socket, have carried; `None` of those that are gone.
pub fn carried(
    netns: &Netns,
    connections: impl IntoIterator<Item = (SocketAddr, SocketAddr, SocketCookie)>,
) -> io::Result<Vec<Option<Carried>>> {
    let socket = open(netns)?;
    let read = connections.into_iter().map(|(local, remote, cookie)| {
        match ask(&socket, BY_FAMILY, ANY, local, remote, cookie) {
            Ok(found) => Ok(found.and_then(|found| found.carried)),
            Err(error) if is_absent(&error) => Ok(None),
            Err(error) => Err(error),
        }
    });
    read.collect()
}

/// The socket of a connection.
pub fn find(
    netns: &Netns,
    local: SocketAddr,
    remote: SocketAddr,
) -> io::Result<Option<SocketCookie>> {
    match ask(&open(netns)?, BY_FAMILY, ANY, local, remote, NO_COOKIE) {
        Ok(Some(found)) if found.state != LISTEN => Ok(Some(found.cookie)),
        Ok(_) => Ok(None),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the kernel can end connections, tried on a listener of our own in the calling thread's
/// namespace. A kernel that cannot says so, and so does one without sock_diag for TCP.
pub fn can_destroy(listener: &std::net::TcpListener, cookie: SocketCookie) -> io::Result<bool> {
    let local = listener.local_addr()?;
    let remote = SocketAddr::from(([0, 0, 0, 0], 0));
    match ask(&socket()?, DESTROY, ANY, local, remote, cookie) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(false),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_absent(error: &io::Error) -> bool {
    [libc::ENOENT, libc::ESTALE].map(Some).contains(&error.raw_os_error())
}

fn open(netns: &Netns) -> io::Result<Socket> {
    netns.run(socket)?
}

fn socket() -> io::Result<Socket> {
    let diag = Some(Protocol::from(SOCK_DIAG));
    let socket = Socket::new(Domain::from(libc::AF_NETLINK), Type::RAW, diag)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

struct Found {
    state: u8,
    cookie: SocketCookie,
    /// `None` where the kernel did not tell.
    carried: Option<Carried>,
}

/// The kernel has answered when `send` returns.
fn ask(
    socket: &Socket,
    kind: u16,
    interface: u32,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: SocketCookie,
) -> io::Result<Option<Found>> {
    socket.send(&request(kind, interface, local, remote, cookie))?;
    let mut buffer = [0; 4096];
    let mut found = None;
    loop {
        let length = match (&*socket).read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(found),
            Err(error) => return Err(error),
        };
        let answer = buffer.get(..length).unwrap_or_default();
        if let Some(socket) = parse(answer)? {
            found = Some(socket);
        }
    }
}

/// `nlmsghdr`, then `inet_diag_req_v2` with its `inet_diag_sockid`.
fn request(
    kind: u16,
    interface: u32,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: SocketCookie,
) -> Vec<u8> {
    let (local, remote) = (canonical(local), canonical(remote));
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family as u8, libc::IPPROTO_TCP as u8, WITH_INFO, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    message.extend(words(local.ip()));
    message.extend(words(remote.ip()));
    message.extend(interface.to_ne_bytes());
    message.extend((cookie.0 as u32).to_ne_bytes());
    message.extend(((cookie.0 >> 32) as u32).to_ne_bytes());
    let length = message.len() as u32;
    message[..4].copy_from_slice(&length.to_ne_bytes());
    message
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

fn words(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, c, d] = ip.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

/// What one packet tells: an error, nothing, or a socket.
fn parse(answer: &[u8]) -> io::Result<Option<Found>> {
    let Some((header, rest)) = answer.split_first_chunk::<HEADER>() else { return Ok(None) };
    let [_, _, _, _, low, high, ..] = *header;
    let kind = u16::from_ne_bytes([low, high]);
    if i32::from(kind) == libc::NLMSG_ERROR {
        let error = rest.split_first_chunk().map_or(0, |(error, _)| i32::from_ne_bytes(*error));
        return match error {
            0 => Ok(None),
            error => Err(io::Error::from_raw_os_error(-error)),
        };
    }
    let state = rest.get(1).copied();
    let (Some(state), Some(cookie)) = (state, number(rest, BEFORE_COOKIE)) else {
        return Ok(None);
    };
    // Two halves, the lower one first, on every machine.
    let cookie = if cfg!(target_endian = "big") { cookie.rotate_left(32) } else { cookie };
    let cookie = SocketCookie(cookie);
    let info = rest.get(MESSAGE..).and_then(info);
    let carried = info.and_then(|info| {
        let (acked, received) = (number(info, BYTES_ACKED)?, number(info, BYTES_RECEIVED)?);
        let (ours, theirs) = (SENT_END.contains(&state), HAVE_END.contains(&state));
        // What is sent counts the SYN; both count the FIN.
        let sent = acked.saturating_sub(1).saturating_sub(ours.into());
        Some(Carried { sent, received: received.saturating_sub(theirs.into()) })
    });
    Ok(Some(Found { state, cookie, carried }))
}

/// The `tcp_info` among attributes (`rtattr`).
fn info(mut attributes: &[u8]) -> Option<&[u8]> {
    loop {
        let ([a, b, c, d], _) = attributes.split_first_chunk::<4>()?;
        let (length, kind) = (u16::from_ne_bytes([*a, *b]), u16::from_ne_bytes([*c, *d]));
        let length = usize::from(length);
        if kind == INFO {
            return attributes.get(4..length);
        }
        // Each begins at a multiple of four; none is shorter than its head.
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let (number, _) = bytes.get(at..)?.split_first_chunk::<8>()?;
    Some(u64::from_ne_bytes(*number))
}
