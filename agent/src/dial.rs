//! Dialling: the agent's own connections, out of a pod and towards an application within one.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

pub use culvert_core::admit::DialFrom;
use rand::RngExt;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::capture::sys::{IPV6_TRANSPARENT, set_option};
use crate::capture::{Netns, Redirection};

/// How long a connection may take to be established.
pub const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// Idle time before the first keep-alive probe, and between probes.
const KEEPALIVE: Duration = Duration::from_secs(180);
const KEEPALIVE_PROBES: u32 = 9;

/// Source ports for kept client addresses. Clients take theirs from `net.ipv4.ip_local_port_range`,
/// which starts at 32768 unless someone changed it. The agent must not take one that the same
/// client uses towards the same application: both connections end in the pod's namespace, the
/// client's at the agent and the agent's at the application, and there they would be the same.
const KEPT_PORTS: std::ops::Range<u16> = 1024..32768;
/// How many ports are tried before the connection fails.
const PORT_ATTEMPTS: usize = 16;

/// Dials out of a pod: the socket lies in the pod's namespace, and so has its addresses and routes,
/// and is exempt from capture. `source` picks one of the pod's addresses.
pub async fn dial_out(
    netns: &Netns,
    redirection: &Redirection,
    source: Option<IpAddr>,
    dst: SocketAddr,
) -> io::Result<TcpStream> {
    let socket = open(netns, dst, netns.marks().outbound)?;
    redirection.exempt(socket.as_fd()).map_err(io::Error::other)?;
    keep_alive(&socket)?;
    if let Some(source) = source {
        set_option(socket.as_fd(), libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
        socket.bind(&SocketAddr::new(source, 0).into())?;
    }
    connect(socket, dst).await
}

/// A UDP socket out of a pod, connected, and like the TCP ones of [`dial_out`] otherwise.
pub fn udp_out(netns: &Netns, redirection: &Redirection, dst: SocketAddr) -> io::Result<UdpSocket> {
    let socket = netns.run(|| open_udp(dst))??;
    redirection.exempt(socket.as_fd()).map_err(io::Error::other)?;
    socket.set_mark(netns.marks().outbound)?;
    connect_udp(socket, dst)
}

/// A UDP socket of the agent's own namespace, connected.
pub fn udp(dst: SocketAddr) -> io::Result<UdpSocket> {
    connect_udp(open_udp(dst)?, dst)
}

fn open_udp(dst: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(dst), Type::DGRAM, Some(Protocol::UDP))
}

/// The kernel picks the port, and lets in what comes from the other end only.
fn connect_udp(socket: Socket, dst: SocketAddr) -> io::Result<UdpSocket> {
    socket.set_nonblocking(true)?;
    socket.connect(&dst.into())?;
    UdpSocket::from_std(socket.into())
}

/// Dials an application within its pod, over `lo`. Such a connection is the pod's own business to
/// the kernel programs and needs no exemption.
pub async fn dial_application(
    netns: &Netns,
    dst: SocketAddr,
    from: DialFrom,
) -> io::Result<TcpStream> {
    match from {
        DialFrom::Client(client) if can_keep(client, dst.ip()) => {
            dial_keeping(netns, dst, client).await
        }
        DialFrom::Loopback if !dst.ip().is_loopback() => {
            let loopback = match dst.ip() {
                IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
            };
            let socket = open_resetting(netns, dst, netns.marks().outbound)?;
            socket.bind(&SocketAddr::new(loopback, 0).into())?;
            connect(socket, dst).await
        }
        DialFrom::Client(_) | DialFrom::Own | DialFrom::Loopback => {
            connect(open_resetting(netns, dst, netns.marks().outbound)?, dst).await
        }
    }
}

/// Whether a client's address can stand as the source of a connection to this destination.
fn can_keep(client: IpAddr, dst: IpAddr) -> bool {
    let needs_scope = match client {
        IpAddr::V4(_) => false,
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    };
    client.is_ipv4() == dst.is_ipv4()
        && client != dst
        && !dst.is_loopback()
        && !client.is_loopback()
        && !client.is_unspecified()
        && !client.is_multicast()
        && !needs_scope
}

async fn dial_keeping(netns: &Netns, dst: SocketAddr, client: IpAddr) -> io::Result<TcpStream> {
    let mut attempt = 0;
    loop {
        attempt += 1;
        let port = rand::rng().random_range(KEPT_PORTS);
        let result = match open_keeping(netns, dst, SocketAddr::new(client, port)) {
            Ok(socket) => connect(socket, dst).await,
            Err(error) => Err(error),
        };
        match result {
            Err(error) if is_taken(&error) && attempt < PORT_ATTEMPTS => {}
            result => return result,
        }
    }
}

fn is_taken(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable)
}

fn open_keeping(netns: &Netns, dst: SocketAddr, source: SocketAddr) -> io::Result<Socket> {
    let socket = open_resetting(netns, dst, netns.marks().application)?;
    match source {
        SocketAddr::V4(_) => set_option(socket.as_fd(), libc::SOL_IP, libc::IP_TRANSPARENT, 1)?,
        SocketAddr::V6(_) => {
            set_option(socket.as_fd(), libc::IPPROTO_IPV6, IPV6_TRANSPARENT, 1)?;
        }
    }
    socket.bind_device(Some(b"lo"))?;
    socket.set_reuse_address(true)?;
    socket.bind(&source.into())?;
    Ok(socket)
}

/// A listener at the near end of a connection to an application that [`dial_application`] opened
/// from its client's IPv4 address; otherwise `None`. It answers for the connection once that is gone.
///
/// A reset that arrives out of turn is asked about (RFC 5961, section 3.2). The kernel answers with
/// another reset, but without a transparent socket not from an IPv4 address that is not its own.
pub fn stand_in(stream: &TcpStream) -> io::Result<Option<Socket>> {
    let near = SockRef::from(stream);
    if !near.ip_transparent_v4().unwrap_or_default() {
        return Ok(None);
    }
    let netns = Netns::of_socket(stream).map_err(io::Error::other)?;
    let socket = netns.run(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)))??;
    set_option(socket.as_fd(), libc::SOL_IP, libc::IP_TRANSPARENT, 1)?;
    socket.bind_device(Some(b"lo"))?;
    socket.set_mark(near.mark()?)?;
    socket.set_reuse_address(true)?;
    socket.bind(&near.local_addr()?)?;
    socket.listen(0)?;
    Ok(Some(socket))
}

/// As [`open`]. From its first moment on, the application reads a reset when the agent is killed.
fn open_resetting(netns: &Netns, dst: SocketAddr, mark: u32) -> io::Result<Socket> {
    let socket = open(netns, dst, mark)?;
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(socket)
}

/// A non-blocking socket in a namespace, of the destination's family. It carries a mark by which
/// rules in the pod know the agent's own.
fn open(netns: &Netns, dst: SocketAddr, mark: u32) -> io::Result<Socket> {
    let (domain, kind) = (Domain::for_address(dst), Type::STREAM.nonblocking());
    let socket = netns.run(|| Socket::new(domain, kind, Some(Protocol::TCP)))??;
    socket.set_mark(mark)?;
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

fn keep_alive(socket: &Socket) -> io::Result<()> {
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE)
        .with_interval(KEEPALIVE)
        .with_retries(KEEPALIVE_PROBES);
    socket.set_tcp_keepalive(&keepalive)
}

async fn connect(socket: Socket, dst: SocketAddr) -> io::Result<TcpStream> {
    let socket = TcpSocket::from_std_stream(socket.into());
    match timeout(CONNECT_LIMIT, socket.connect(dst)).await {
        Ok(result) => result,
        Err(_) => {
            let text = format!("no answer from {dst} within {} s", CONNECT_LIMIT.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, text))
        }
    }
}
