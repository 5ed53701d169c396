//! Network namespaces: entering them, listening in them, and their route back for kept addresses.

mod nftables;
mod passing;
mod routes;
pub(super) mod sockets;
mod tracking;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_abi::{
    APPLICATION_BIT, APPLICATION_MARK, HBONE_PORT, OUTBOUND_MARK, OUTBOUND_MARK_MASK,
    OUTBOUND_PORT, PLAINTEXT_PORT,
};
use culvert_core::tables::NetnsCookie;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::direct::SocketCookie;
use super::sys;

pub(super) use routes::{in_namespace, into_io};
pub use sockets::Carried;

/// Wanted room for questions that wait to be read, in bytes.
const QUERY_BUFFER: usize = 1 << 20;

/// The calling thread's namespace.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// A network namespace, kept alive by this.
///
/// It remembers the namespace it was opened from. [`Netns::run`] takes a thread back there: looking
/// up each time where the thread is would cost more than entering and leaving together.
#[derive(Debug)]
pub struct Netns {
    file: File,
    home: File,
    cookie: NetnsCookie,
    marks: Marks,
}

/// The marks of the sockets that the agent opens in a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marks {
    /// Of those that connect out of it.
    pub outbound: u32,
    /// Of those that connect to its application from a client's address.
    pub application: u32,
}

impl Default for Marks {
    fn default() -> Self {
        Self { outbound: OUTBOUND_MARK, application: APPLICATION_MARK }
    }
}

impl Marks {
    /// From the mark that istio-cni's rules let pass (`PACKET_MARK`).
    pub fn of(packet: u32) -> Self {
        let application = (packet & OUTBOUND_MARK_MASK) | APPLICATION_BIT;
        Self { outbound: packet, application }
    }
}

/// How the agent listens in a pod.
#[derive(Clone, Copy, Debug)]
pub struct ListenOptions {
    /// Other agents may listen on the same ports: the one before this, or the next
    /// (`INPOD_PORT_REUSE`).
    pub share_ports: bool,
    /// Rules of the pod bring the connections, and not `sk_lookup`: the listeners carry the mark, and
    /// take what is delivered to addresses that are not the pod's.
    pub by_rules: bool,
}

impl Default for ListenOptions {
    fn default() -> Self {
        Self { share_ports: true, by_rules: false }
    }
}

/// What went wrong with a network namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("network namespace {path:?}: {error}")]
    Open { path: PathBuf, error: io::Error },
    #[error("cookie of network namespace {path:?} (needs Linux 5.14): {error}")]
    Cookie { path: PathBuf, error: io::Error },
    #[error("the descriptor is not a network namespace")]
    NotOne,
    #[error("the descriptor is the agent's own network namespace")]
    Own,
}

impl Netns {
    /// From a path such as `/run/netns/name` or `/proc/1234/ns/net`.
    pub fn open(path: impl AsRef<Path>) -> Result<Netns, NetnsError> {
        let path = path.as_ref();
        let failed = |error| NetnsError::Open { path: path.to_owned(), error };
        let file = File::open(path).map_err(failed)?;
        Netns::of(file, path)
    }

    /// One that another process has handed over.
    pub fn received(file: OwnedFd) -> Result<Netns, NetnsError> {
        if !sys::is_netns(file.as_fd()) {
            return Err(NetnsError::NotOne);
        }
        let netns = Netns::of(file.into(), Path::new("received"))?;
        let home = netns.home.metadata().map(|home| (home.dev(), home.ino()));
        let own = netns.metadata().map(|own| (own.dev(), own.ino()));
        match (home, own) {
            (Ok(home), Ok(own)) if home != own => Ok(netns),
            _ => Err(NetnsError::Own),
        }
    }

    fn of(file: File, path: &Path) -> Result<Netns, NetnsError> {
        let failed = |error| NetnsError::Open { path: path.to_owned(), error };
        let home = File::open(CURRENT).map_err(failed)?;
        let cookie = run_in(file.as_fd(), home.as_fd(), || {
            let socket = Socket::new(Domain::UNIX, Type::DGRAM, None)?;
            sys::netns_cookie(socket.as_fd())
        });
        match cookie {
            Ok(Ok(cookie)) => {
                let (cookie, marks) = (NetnsCookie(cookie), Marks::default());
                Ok(Netns { file, home, cookie, marks })
            }
            Ok(Err(error)) => Err(NetnsError::Cookie { path: path.to_owned(), error }),
            Err(error) => Err(failed(error)),
        }
    }

    /// That of a process.
    pub fn of_process(pid: u32) -> Result<Netns, NetnsError> {
        Netns::open(format!("/proc/{pid}/ns/net"))
    }

    /// That of a socket.
    pub fn of_socket(socket: impl AsFd) -> Result<Netns, NetnsError> {
        let path = Path::new("of a socket");
        let failed = |error| NetnsError::Open { path: path.to_owned(), error };
        let file = sys::netns_of(socket.as_fd()).map_err(failed)?;
        Netns::of(file.into(), path)
    }

    /// That of the calling thread.
    pub fn current() -> Result<Netns, NetnsError> {
        Netns::open(CURRENT)
    }

    /// Device and inode of the namespace, which tell it apart from others.
    pub fn metadata(&self) -> io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// The same namespace, in which the agent's sockets carry these marks.
    pub fn marked(self, marks: Marks) -> Netns {
        Netns { marks, ..self }
    }

    /// What the agent's sockets in it carry.
    pub fn marks(&self) -> Marks {
        self.marks
    }

    /// Whether both are the same namespace, by device and inode.
    pub fn is_same(&self, other: &Netns) -> bool {
        let Ok((one, other)) = self.metadata().and_then(|one| Ok((one, other.metadata()?))) else {
            return false;
        };
        (one.dev(), one.ino()) == (other.dev(), other.ino())
    }

    /// The addresses of its interfaces, without loopback and link-local ones. Blocks for about a
    /// millisecond.
    pub fn addresses(&self) -> io::Result<Vec<IpAddr>> {
        routes::addresses(self)
    }

    /// What the kernel programs know it by.
    pub fn cookie(&self) -> NetnsCookie {
        self.cookie
    }

    /// Runs `inside` on this thread within the namespace. What it opens stays in the namespace.
    /// When this returns or panics, the thread is back where this namespace was opened from. It has
    /// to come from there too: `run` does not nest, nor may threads move about by themselves.
    pub fn run<T>(&self, inside: impl FnOnce() -> T) -> io::Result<T> {
        run_in(self.file.as_fd(), self.home.as_fd(), inside)
    }

    /// Opens the agent's three listeners of a pod. They bind every address of both families, or of
    /// IPv4 where the machine has no IPv6; `sk_lookup` alone decides what reaches them.
    pub fn listen(&self) -> io::Result<Listeners> {
        self.listen_with(ListenOptions::default())
    }

    /// The same in a given way.
    pub fn listen_with(&self, options: ListenOptions) -> io::Result<Listeners> {
        let mark = options.by_rules.then_some(self.marks.outbound);
        let style = Style { share_ports: options.share_ports, mark };
        self.run(|| {
            Ok(Listeners {
                outbound: listen_for_relays(OUTBOUND_PORT, style)?,
                plaintext: listen_for_relays(PLAINTEXT_PORT, style)?,
                hbone: listen(HBONE_PORT, style)?,
            })
        })?
    }

    /// Opens the one listener that the agent has in a namespace of its own.
    pub fn listen_for_tunnels(&self, options: ListenOptions) -> io::Result<TcpListener> {
        let style = Style { share_ports: options.share_ports, mark: None };
        self.run(|| listen(HBONE_PORT, style))?
    }

    /// Opens the agent's DNS listeners of a pod: on loopback of both families, and on these
    /// addresses of the pod, which sockets are led to that are bound to a device. Where there is no
    /// IPv6, its listeners are left out.
    pub fn listen_for_dns(
        &self,
        own: &[IpAddr],
        port: u16,
        options: ListenOptions,
    ) -> io::Result<DnsSockets> {
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let addresses = loopback.iter().chain(own).map(|ip| SocketAddr::new(*ip, port));
        self.run(|| {
            let mut sockets = DnsSockets::default();
            for addr in addresses {
                let opened = listen_for_queries(addr, options.share_ports);
                let failed = |error: io::Error| {
                    io::Error::new(error.kind(), format!("listening on {addr}: {error}"))
                };
                match opened {
                    Ok((udp, tcp)) => {
                        sockets.udp.push(udp);
                        sockets.tcp.push(tcp);
                    }
                    Err(error) if addr.is_ipv6() && lacks_ipv6(&error) => {}
                    Err(error) => return Err(failed(error)),
                }
            }
            Ok(sockets)
        })?
    }

    /// Lets replies to a client's address that the agent kept towards an application come back to
    /// the agent: what carries the mark is local, and accepted sockets take on the mark.
    pub fn add_return_route(&self) -> io::Result<()> {
        routes::add(self)
    }

    /// Undoes [`Netns::add_return_route`]. Open connections that kept a client's address break.
    pub fn remove_return_route(&self) -> io::Result<()> {
        routes::remove(self)
    }

    /// Ends a TCP connection of the namespace by its socket's cookie; `false` when there is none
    /// (`SOCK_DESTROY`, Linux 4.5).
    pub fn destroy(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
        cookie: SocketCookie,
    ) -> io::Result<bool> {
        sockets::destroy(self, local, remote, cookie)
    }

    /// The socket of a TCP connection of the namespace.
    pub fn find_connection(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> io::Result<Option<SocketCookie>> {
        sockets::find(self, local, remote)
    }

    /// What TCP connections of the namespace, each with its ends and its socket, have carried so far;
    /// `None` of those that are gone (`tcp_info`, Linux 4.1).
    pub fn carried(
        &self,
        connections: impl IntoIterator<Item = (SocketAddr, SocketAddr, SocketCookie)>,
    ) -> io::Result<Vec<Option<Carried>>> {
        sockets::carried(self, connections)
    }

    /// Keeps connections that rules of the pod have translated whole when those rules go (nftables,
    /// Linux 5.2 for translation in family `inet`).
    pub fn hold_translations(&self) -> io::Result<()> {
        tracking::hold(self)
    }

    /// Undoes [`Netns::hold_translations`].
    pub fn release_translations(&self) -> io::Result<()> {
        tracking::release(self)
    }

    /// Lets direct connections arrive that rules of istio-cni would lead to the agent (nftables,
    /// Linux 5.2; their option in the SYN, Linux 5.10).
    pub fn let_direct_pass(&self) -> io::Result<()> {
        passing::let_pass(self)
    }

    /// Undoes [`Netns::let_direct_pass`].
    pub fn stop_direct_passing(&self) -> io::Result<()> {
        passing::stop(self)
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The agent's listeners of one pod; non-blocking.
#[derive(Debug)]
pub struct Listeners {
    pub outbound: TcpListener,
    pub plaintext: TcpListener,
    pub hbone: TcpListener,
}

impl Listeners {
    /// Other descriptors of the same sockets.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            outbound: self.outbound.try_clone()?,
            plaintext: self.plaintext.try_clone()?,
            hbone: self.hbone.try_clone()?,
        })
    }
}

/// The agent's DNS listeners of one pod; non-blocking.
#[derive(Debug, Default)]
pub struct DnsSockets {
    pub udp: Vec<UdpSocket>,
    pub tcp: Vec<TcpListener>,
}

impl DnsSockets {
    /// Other descriptors of the same sockets.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            udp: self.udp.iter().map(UdpSocket::try_clone).collect::<io::Result<_>>()?,
            tcp: self.tcp.iter().map(TcpListener::try_clone).collect::<io::Result<_>>()?,
        })
    }
}

/// Puts the thread back, whatever happens.
struct Return<'a>(BorrowedFd<'a>);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        if let Err(error) = sys::enter_netns(self.0) {
            // Everything this thread opened from now on would be in the wrong pod.
            tracing::error!(%error, "cannot return from a network namespace");
            std::process::abort();
        }
    }
}

fn run_in<T>(netns: BorrowedFd, home: BorrowedFd, inside: impl FnOnce() -> T) -> io::Result<T> {
    let back = Return(home);
    sys::enter_netns(netns)?;
    let result = inside();
    drop(back);
    Ok(result)
}

#[derive(Clone, Copy)]
struct Style {
    share_ports: bool,
    /// Set where rules, and not `sk_lookup`, bring the connections.
    mark: Option<u32>,
}

/// What is accepted before its destination is known ends with a reset, also when the agent is killed.
fn listen_for_relays(port: u16, style: Style) -> io::Result<TcpListener> {
    let listener = listen(port, style)?;
    SockRef::from(&listener).set_linger(Some(Duration::ZERO))?;
    Ok(listener)
}

fn listen(port: u16, style: Style) -> io::Result<TcpListener> {
    try_listen(port, style)
        .map_err(|error| io::Error::new(error.kind(), format!("listening on port {port}: {error}")))
}

fn try_listen(port: u16, style: Style) -> io::Result<TcpListener> {
    let v6 = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_only_v6(false)?;
        prepare(&socket, style)?;
        if style.mark.is_some() {
            // A refinement: what is redirected, and not merely led here, arrives without.
            let _ = sys::set_option(socket.as_fd(), libc::IPPROTO_IPV6, sys::IPV6_TRANSPARENT, 1);
        }
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
        Ok(socket)
    };
    let v4 = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        prepare(&socket, style)?;
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)).into())?;
        Ok(socket)
    };
    let socket = match v6() {
        Ok(socket) => socket,
        Err(error) if lacks_ipv6(&error) => v4()?,
        Err(error) => return Err(error),
    };
    // The namespace's net.core.somaxconn bounds it.
    socket.listen(libc::c_int::MAX)?;
    Ok(socket.into())
}

/// Both transports of one address, which the pod may be about to get only.
fn listen_for_queries(addr: SocketAddr, share: bool) -> io::Result<(UdpSocket, TcpListener)> {
    let open = |kind, protocol| -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
        socket.set_nonblocking(true)?;
        // To a UDP socket this would mean sharing; to a TCP one it is about what has ended.
        socket.set_reuse_address(share || kind == Type::STREAM)?;
        socket.set_reuse_port(share)?;
        match addr {
            SocketAddr::V4(_) => socket.set_freebind_v4(true)?,
            SocketAddr::V6(_) => {
                socket.set_only_v6(true)?;
                socket.set_freebind_v6(true)?;
            }
        }
        Ok(socket)
    };
    let udp = open(Type::DGRAM, Protocol::UDP)?;
    // As much as the namespace lets it have.
    let _ = udp.set_recv_buffer_size(QUERY_BUFFER);
    let tcp = open(Type::STREAM, Protocol::TCP)?;
    tcp.set_tcp_nodelay(true)?;
    for socket in [&udp, &tcp] {
        socket.bind(&addr.into())?;
    }
    tcp.listen(libc::c_int::MAX)?;
    Ok((udp.into(), tcp.into()))
}

/// Accepted sockets inherit what is set here: a mark on them must be one that no route looks at.
fn prepare(socket: &Socket, style: Style) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(style.share_ports)?;
    if let Some(mark) = style.mark {
        socket.set_mark(mark)?;
        let _ = sys::set_option(socket.as_fd(), libc::SOL_IP, libc::IP_TRANSPARENT, 1);
    }
    socket.set_tcp_nodelay(true)
}

/// Whether a failure says that IPv6 is absent or switched off.
fn lacks_ipv6(error: &io::Error) -> bool {
    let codes = [libc::EAFNOSUPPORT, libc::EADDRNOTAVAIL, libc::EOPNOTSUPP, libc::EACCES];
    error.raw_os_error().is_some_and(|code| codes.contains(&code))
}
