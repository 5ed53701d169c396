//! Finding and ending connections of a namespace through sock_diag(7).
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
/// Lengths of `nlmsghdr` and of what stands before the cookie in `inet_diag_msg`.
const HEADER: usize = 16;
const BEFORE_COOKIE: usize = 44;

/// Ends a connection; `false` when there is none, or its socket is another one by now.
pub fn destroy(
    netns: &Netns,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: SocketCookie,
) -> io::Result<bool> {
    match ask(&open(netns)?, DESTROY, local, remote, cookie) {
        Ok(_) => Ok(true),
        Err(error) if is_absent(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The socket of a connection.
pub fn find(
    netns: &Netns,
    local: SocketAddr,
    remote: SocketAddr,
) -> io::Result<Option<SocketCookie>> {
    match ask(&open(netns)?, BY_FAMILY, local, remote, NO_COOKIE) {
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
    match ask(&socket()?, DESTROY, local, remote, cookie) {
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
}

/// The kernel has answered when `send` returns.
fn ask(
    socket: &Socket,
    kind: u16,
    local: SocketAddr,
    remote: SocketAddr,
    cookie: SocketCookie,
) -> io::Result<Option<Found>> {
    socket.send(&request(kind, local, remote, cookie))?;
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
fn request(kind: u16, local: SocketAddr, remote: SocketAddr, cookie: SocketCookie) -> Vec<u8> {
    let (local, remote) = (canonical(local), canonical(remote));
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = vec![0; 4];
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    message.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    message.extend(u32::MAX.to_ne_bytes());
    message.extend(local.port().to_be_bytes());
    message.extend(remote.port().to_be_bytes());
    message.extend(words(local.ip()));
    message.extend(words(remote.ip()));
    message.extend(0u32.to_ne_bytes());
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
    let cookie = rest.get(BEFORE_COOKIE..).and_then(|rest| rest.split_first_chunk::<8>());
    let (Some(state), Some((cookie, _))) = (state, cookie) else { return Ok(None) };
    let [a, b, c, d, e, f, g, h] = *cookie;
    let low = u32::from_ne_bytes([a, b, c, d]);
    let high = u32::from_ne_bytes([e, f, g, h]);
    let cookie = SocketCookie(u64::from(high) << 32 | u64::from(low));
    Ok(Some(Found { state, cookie }))
}
