//! Capture of questions to DNS servers on the real kernel. These tests make network namespaces and
//! attach programs to the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::io::ErrorKind;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use culvert_abi::DNS_PORT;
use culvert_agent::capture::{Capture, ListenOptions, Listeners, PodSpec};
use lab::*;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

/// Servers that no one has the address of.
const SERVER_V4: &str = "192.0.2.53:53";
const SERVER_V6: &str = "[2001:db8::53]:53";
const SERVER_MAPPED: &str = "[::ffff:192.0.2.53]:53";

/// One enrolled pod, with what stands for the agent's DNS listeners.
struct Enrolled {
    agents: Vec<UdpSocket>,
    capture: Capture,
    listeners: Listeners,
    pod: Pod,
    node: Node,
}

impl Enrolled {
    fn new() -> Enrolled {
        Enrolled::with(|_| {})
    }

    fn with(adapt: impl FnOnce(&mut PodSpec)) -> Enrolled {
        let mut mesh = Enrolled::without_agent(adapt);
        let own = [mesh.pod.v4, mesh.pod.v6];
        let loopback = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        for ip in loopback.into_iter().chain(own) {
            mesh.agents.push(mesh.pod.inside(|| UdpSocket::bind((ip, DNS_PORT)).unwrap()));
        }
        mesh
    }

    fn without_agent(adapt: impl FnOnce(&mut PodSpec)) -> Enrolled {
        let node = Node::new();
        let pod = node.pod();
        let capture = node.capture();
        let mut spec = PodSpec { capture_dns: true, ..pod.spec() };
        adapt(&mut spec);
        let listeners = pod.enrol_with(&capture, &spec);
        Enrolled { agents: Vec::new(), capture, listeners, pod, node }
    }

    fn udp(&self, domain: Domain) -> Socket {
        let socket =
            self.pod.inside(|| Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap());
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket
    }

    fn udp4(&self) -> Socket {
        self.udp(Domain::IPV4)
    }

    fn udp6(&self) -> Socket {
        self.udp(Domain::IPV6)
    }

    /// Takes the question that waits at one of the agent's sockets, and answers it.
    fn answer(&self, question: &[u8]) {
        eventually("a question", || {
            self.agents.iter().any(|agent| {
                agent.set_nonblocking(true).unwrap();
                let mut buffer = [0; 64];
                let Ok((length, from)) = agent.recv_from(&mut buffer) else { return false };
                assert_eq!(&buffer[..length], question);
                agent.send_to(b"answer", from).unwrap();
                true
            })
        });
    }

    /// A socket that is not connected asks, is answered, and sees the server as the one who answers.
    fn expect_answer_unconnected(&self, socket: &Socket, server: &str) {
        let server = addr(server);
        socket.send_to(b"question", &server.into()).unwrap();
        self.answer(b"question");
        assert_eq!(receive(socket), (b"answer".to_vec(), server));
    }

    /// The same for one that is connected, which sees nothing of the agent otherwise either.
    fn expect_answer_connected(&self, socket: &Socket, server: &str, own: IpAddr) {
        let server = addr(server);
        socket.connect(&server.into()).unwrap();
        assert_eq!(peer(socket), server, "getpeername");
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        assert_eq!(local.ip().to_canonical(), own, "getsockname");
        socket.send(b"question").unwrap();
        self.answer(b"question");
        assert_eq!(receive(socket), (b"answer".to_vec(), server));
    }

    fn questions(&self) -> u64 {
        self.capture.events().unwrap().captured_dns
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

fn receive(socket: &Socket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = [MaybeUninit::uninit(); 64];
    let (length, from): (usize, SockAddr) = socket.recv_from(&mut buffer).unwrap();
    // SAFETY: the kernel has written that many bytes.
    let bytes = buffer[..length].iter().map(|byte| unsafe { byte.assume_init() });
    (bytes.collect(), from.as_socket().unwrap())
}

#[test]
fn unconnected_sockets_ask_the_agent() {
    let mesh = Enrolled::new();
    mesh.expect_answer_unconnected(&mesh.udp4(), SERVER_V4);
    mesh.expect_answer_unconnected(&mesh.udp6(), SERVER_V6);
    mesh.expect_answer_unconnected(&mesh.udp6(), SERVER_MAPPED);
    assert_eq!(mesh.questions(), 3);
    assert!(is_idle(&mesh.listeners.outbound));
}

#[test]
fn connected_sockets_ask_the_agent() {
    let mesh = Enrolled::new();
    mesh.expect_answer_connected(&mesh.udp4(), SERVER_V4, mesh.pod.v4);
    mesh.expect_answer_connected(&mesh.udp6(), SERVER_V6, mesh.pod.v6);
    mesh.expect_answer_connected(&mesh.udp6(), SERVER_MAPPED, mesh.pod.v4);
    assert_eq!(mesh.questions(), 3);
}

#[test]
fn sockets_bound_to_the_pods_address_ask_the_agent() {
    let mesh = Enrolled::new();
    for (server, own) in [(SERVER_V4, mesh.pod.v4), (SERVER_V6, mesh.pod.v6)] {
        let bound = || {
            let socket = if own.is_ipv4() { mesh.udp4() } else { mesh.udp6() };
            socket.bind(&SocketAddr::new(own, 0).into()).unwrap();
            socket
        };
        mesh.expect_answer_unconnected(&bound(), server);
        mesh.expect_answer_connected(&bound(), server, own);
    }
}

#[test]
fn sockets_bound_to_a_device_ask_the_agent() {
    let mesh = Enrolled::new();
    for (domain, server, own) in [
        (Domain::IPV4, SERVER_V4, mesh.pod.v4),
        (Domain::IPV6, SERVER_V6, mesh.pod.v6),
        (Domain::IPV6, SERVER_MAPPED, mesh.pod.v4),
    ] {
        let bound = || {
            let socket = mesh.udp(domain);
            socket.bind_device(Some(b"eth0")).unwrap();
            socket
        };
        mesh.expect_answer_unconnected(&bound(), server);
        mesh.expect_answer_connected(&bound(), server, own);
    }
}

#[test]
fn a_link_local_server_is_asked_through_the_agent() {
    let mesh = Enrolled::new();
    let index = mesh.pod.inside(|| {
        let name = std::ffi::CString::new("eth0").unwrap();
        // SAFETY: the name outlives the call.
        unsafe { libc::if_nametoindex(name.as_ptr()) }
    });
    let server = std::net::SocketAddrV6::new("fe80::1".parse().unwrap(), 53, 0, index);
    let socket = mesh.udp6();
    socket.send_to(b"question", &SocketAddr::V6(server).into()).unwrap();
    mesh.answer(b"question");
    let (_, from) = receive(&socket);
    assert_eq!((from.ip(), from.port()), ((*server.ip()).into(), 53));
}

#[test]
fn one_socket_asks_several_servers() {
    let mesh = Enrolled::new();
    let socket = mesh.udp4();
    for server in [SERVER_V4, "192.0.2.54:53", SERVER_V4] {
        mesh.expect_answer_unconnected(&socket, server);
    }
    // Asked at once, as some resolvers do, it is told one of them for all answers.
    for server in [SERVER_V4, "192.0.2.54:53"] {
        socket.send_to(b"question", &addr(server).into()).unwrap();
    }
    for _ in 0..2 {
        mesh.answer(b"question");
        assert_eq!(receive(&socket).1, addr("192.0.2.54:53"));
    }
}

#[test]
fn a_connected_socket_keeps_its_peer_whatever_else_it_sends() {
    let mesh = Enrolled::new();
    let socket = mesh.udp4();
    mesh.expect_answer_connected(&socket, SERVER_V4, mesh.pod.v4);
    socket.send_to(b"question", &addr("192.0.2.54:53").into()).unwrap();
    mesh.answer(b"question");
    assert_eq!(receive(&socket).1, addr(SERVER_V4));
    assert_eq!(peer(&socket), addr(SERVER_V4));
}

#[test]
fn a_socket_that_asked_is_an_ordinary_one_towards_others() {
    let mesh = Enrolled::new();
    let socket = mesh.udp4();
    mesh.expect_answer_unconnected(&socket, SERVER_V4);
    let neighbour = mesh.node.pod();
    let other = neighbour.inside(|| UdpSocket::bind((neighbour.v4, DNS_PORT)).unwrap());
    let to = SocketAddr::new(neighbour.v4, DNS_PORT);
    socket.send_to(b"hello", &to.into()).unwrap();
    other.set_read_timeout(Some(LIMIT)).unwrap();
    let (_, from) = other.recv_from(&mut [0; 64]).unwrap();
    assert_eq!(from.ip(), mesh.pod.v4);
    other.send_to(b"welcome", from).unwrap();
    assert_eq!(receive(&socket), (b"welcome".to_vec(), to));
    // Connected elsewhere, it has never asked.
    socket.connect(&to.into()).unwrap();
    assert_eq!(peer(&socket), to);
}

#[test]
fn tcp_to_a_server_goes_to_the_dns_listener() {
    let mesh = Enrolled::new();
    let listeners = ["127.0.0.1", "::1"].map(|ip| {
        let ip: IpAddr = ip.parse().unwrap();
        mesh.pod.inside(|| TcpListener::bind((ip, DNS_PORT)).unwrap())
    });
    for (server, listener) in
        [(SERVER_V4, &listeners[0]), (SERVER_V6, &listeners[1]), (SERVER_MAPPED, &listeners[0])]
    {
        let mut client = mesh.pod.connect(addr(server)).unwrap();
        assert_eq!(client.peer_addr().unwrap(), addr(server));
        talk(&mut client, &mut accept(listener));
    }
    assert_eq!(mesh.questions(), 3);
    assert!(is_idle(&mesh.listeners.outbound));
    assert_eq!(mesh.capture.counts().flows, 0);
}

/// A server of this pod or of the given one, which answers `plain`.
fn plain_server(pod: &Pod, at: SocketAddr) -> UdpSocket {
    let server = pod.inside(|| UdpSocket::bind(at).unwrap());
    server.set_read_timeout(Some(LIMIT)).unwrap();
    server
}

fn expect_plain(mesh: &Enrolled, server: &UdpSocket, to: SocketAddr) {
    for connect in [true, false] {
        let socket = mesh.udp(Domain::for_address(to));
        if connect {
            socket.connect(&to.into()).unwrap();
            socket.send(b"question").unwrap();
        } else {
            socket.send_to(b"question", &to.into()).unwrap();
        }
        let (_, from) = server.recv_from(&mut [0; 64]).unwrap();
        server.send_to(b"plain", from).unwrap();
        assert_eq!(receive(&socket), (b"plain".to_vec(), to));
    }
    assert_eq!(mesh.questions(), 0);
}

#[test]
fn a_resolver_of_the_pod_itself_is_asked_directly() {
    let mesh = Enrolled::new();
    for at in ["127.0.0.53:53", "127.0.0.11:53", "[::1]:53"] {
        expect_plain(&mesh, &plain_server(&mesh.pod, addr(at)), addr(at));
    }
    for own in [mesh.pod.v4, mesh.pod.v6] {
        let at = SocketAddr::new(own, 53);
        expect_plain(&mesh, &plain_server(&mesh.pod, at), at);
    }
}

#[test]
fn without_dns_capture_servers_are_asked_directly() {
    let mesh = Enrolled::with(|spec| spec.capture_dns = false);
    let neighbour = mesh.node.pod();
    let at = SocketAddr::new(neighbour.v4, 53);
    expect_plain(&mesh, &plain_server(&neighbour, at), at);
    // TCP is a connection like any other.
    let _client = mesh.pod.connect(at).unwrap();
    assert_eq!(accept_captured(&mesh.capture, &mesh.listeners).1, at);
}

#[test]
fn other_ports_and_exclusions_are_left_alone() {
    let mesh =
        Enrolled::with(|spec| spec.exclude_outbound_cidrs = vec!["fd00::/8".parse().unwrap()]);
    let neighbour = mesh.node.pod();
    let ntp = SocketAddr::new(neighbour.v4, 123);
    expect_plain(&mesh, &plain_server(&neighbour, ntp), ntp);
    let excluded = SocketAddr::new(neighbour.v6, 53);
    expect_plain(&mesh, &plain_server(&neighbour, excluded), excluded);
    assert_eq!(mesh.capture.events().unwrap().passed_excluded, 2);
}

#[test]
fn excluded_port_is_left_alone() {
    let mesh = Enrolled::with(|spec| spec.exclude_outbound_ports = vec![53]);
    let neighbour = mesh.node.pod();
    let at = SocketAddr::new(neighbour.v4, 53);
    expect_plain(&mesh, &plain_server(&neighbour, at), at);
}

#[test]
fn exempt_sockets_ask_servers_directly_and_marked_ones_do_not() {
    let mesh = Enrolled::new();
    let neighbour = mesh.node.pod();
    let at = SocketAddr::new(neighbour.v4, 53);
    let server = plain_server(&neighbour, at);
    for connect in [true, false] {
        let socket = mesh.udp4();
        mesh.capture.exempt(&socket).unwrap();
        if connect {
            socket.connect(&at.into()).unwrap();
            socket.send(b"question").unwrap();
        } else {
            socket.send_to(b"question", &at.into()).unwrap();
        }
        let (_, from) = server.recv_from(&mut [0; 64]).unwrap();
        server.send_to(b"plain", from).unwrap();
        assert_eq!(receive(&socket), (b"plain".to_vec(), at));
    }
    assert_eq!(mesh.capture.events().unwrap().passed_agent, 2);
    let marked = mesh.udp4();
    marked.set_mark(culvert_abi::OUTBOUND_MARK).unwrap();
    mesh.expect_answer_unconnected(&marked, SERVER_V4);
}

#[test]
fn without_the_agent_no_question_leaves_the_pod() {
    let mesh = Enrolled::without_agent(|_| {});
    let neighbour = mesh.node.pod();
    let at = SocketAddr::new(neighbour.v4, 53);
    let server = plain_server(&neighbour, at);
    let connected = mesh.udp4();
    connected.connect(&at.into()).unwrap();
    connected.send(b"question").unwrap();
    let mut buffer = [MaybeUninit::uninit(); 64];
    let refused = connected.recv(&mut buffer).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    mesh.udp4().send_to(b"question", &at.into()).unwrap();
    let refused = mesh.pod.connect(at).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    server.set_nonblocking(true).unwrap();
    let nothing = server.recv_from(&mut [0; 64]).unwrap_err();
    assert_eq!(nothing.kind(), ErrorKind::WouldBlock);
}

#[test]
fn a_server_of_a_family_that_the_pod_lacks_is_unreachable() {
    let mesh = Enrolled::with(|spec| spec.addresses.retain(IpAddr::is_ipv4));
    let server = addr(SERVER_V6).into();
    let failed = mesh.udp6().connect(&server).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NetworkUnreachable);
    let failed = mesh.udp6().send_to(b"question", &server).unwrap_err();
    assert_eq!(failed.kind(), ErrorKind::NetworkUnreachable);
}

#[test]
fn nobody_else_asks_a_pods_agent() {
    let mesh = Enrolled::new();
    let neighbour = mesh.node.pod();
    for (ip, own) in [(mesh.pod.v4, neighbour.v4), (mesh.pod.v6, neighbour.v6)] {
        let stranger = neighbour.inside(|| UdpSocket::bind((own, 0)).unwrap());
        stranger.send_to(b"question", (ip, DNS_PORT)).unwrap();
        let refused = neighbour.connect((ip, DNS_PORT).into()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    eventually("refusals", || mesh.capture.events().unwrap().inbound_refused == 4);
    for agent in &mesh.agents {
        agent.set_nonblocking(true).unwrap();
        assert!(agent.recv_from(&mut [0; 64]).is_err());
    }
}

#[test]
fn a_withdrawn_pod_asks_servers_directly() {
    let mesh = Enrolled::new();
    let neighbour = mesh.node.pod();
    let at = SocketAddr::new(neighbour.v4, 53);
    let server = plain_server(&neighbour, at);
    let socket = mesh.udp4();
    mesh.expect_answer_unconnected(&socket, SERVER_V4);
    mesh.capture.withdraw(mesh.pod.netns.cookie()).unwrap();
    socket.send_to(b"question", &at.into()).unwrap();
    let (_, from) = server.recv_from(&mut [0; 64]).unwrap();
    server.send_to(b"plain", from).unwrap();
    assert_eq!(receive(&socket), (b"plain".to_vec(), at));
}

#[test]
fn a_disconnected_socket_asks_anew() {
    let mesh = Enrolled::new();
    let socket = mesh.udp4();
    mesh.expect_answer_connected(&socket, SERVER_V4, mesh.pod.v4);
    // SAFETY: all zeros is a valid address structure.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let length = size_of_val(&nowhere) as libc::socklen_t;
    // SAFETY: the address outlives the call and is as long as said.
    assert_eq!(unsafe { libc::connect(socket.as_raw_fd(), &nowhere, length) }, 0);
    mesh.expect_answer_unconnected(&socket, "192.0.2.54:53");
}

/// Another test's starting process may still hold sockets that were closed here.
fn again<T>(listen: impl Fn() -> std::io::Result<T>) -> T {
    let started = Instant::now();
    loop {
        match listen() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && started.elapsed() < LIMIT => {
                std::thread::park_timeout(Duration::from_millis(2));
            }
            listening => return listening.unwrap(),
        }
    }
}

#[test]
fn listeners_are_shared_only_where_that_is_allowed() {
    let node = Node::new();
    let pod = node.pod();
    let listen = |share_ports| {
        let options = ListenOptions { share_ports, ..ListenOptions::default() };
        pod.netns.listen_for_dns(&[pod.v4, pod.v6], DNS_PORT, options)
    };
    let shared = [listen(true).unwrap(), listen(true).unwrap()];
    let error = listen(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AddrInUse);
    assert!(error.to_string().contains("127.0.0.1:15053"), "{error}");
    drop(shared);
    let alone = again(|| listen(false));
    assert_eq!((alone.udp.len(), alone.tcp.len()), (4, 4));
    listen(true).unwrap_err();
    listen(false).unwrap_err();
    drop(alone);
    again(|| listen(false));
}
