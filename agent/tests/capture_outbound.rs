//! Outbound capture on the real kernel. These tests make network namespaces and attach programs to
//! the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;

use culvert_agent::capture::{Capture, Listeners, PodSpec};
use lab::*;
use socket2::{Domain, Protocol, Socket, Type};

/// Addresses that no one has.
const FOREIGN_V4: &str = "192.0.2.1:80";
const FOREIGN_V6: &str = "[2001:db8::1]:80";
const FOREIGN_MAPPED: &str = "[::ffff:192.0.2.1]:80";

/// One enrolled pod.
struct Enrolled {
    capture: Capture,
    listeners: Listeners,
    pod: Pod,
    _node: Node,
}

impl Enrolled {
    fn new() -> Enrolled {
        Enrolled::with(|_| {})
    }

    fn with(adapt: impl FnOnce(&mut PodSpec)) -> Enrolled {
        let node = Node::new();
        let pod = node.pod();
        let capture = node.capture();
        let mut spec = pod.spec();
        adapt(&mut spec);
        let listeners = pod.enrol_with(&capture, &spec);
        Enrolled { capture, listeners, pod, _node: node }
    }

    fn socket(&self, domain: Domain, protocol: Protocol) -> Socket {
        self.pod.inside(|| Socket::new(domain, Type::STREAM, Some(protocol)).unwrap())
    }

    fn tcp4(&self) -> Socket {
        self.socket(Domain::IPV4, Protocol::TCP)
    }

    fn tcp6(&self) -> Socket {
        self.socket(Domain::IPV6, Protocol::TCP)
    }

    /// Connects a socket, and expects that it was led to the agent without noticing.
    fn expect_captured(&self, socket: Socket, to: &str, pod_address: IpAddr) {
        let to = addr(to);
        socket.connect_timeout(&to.into(), LIMIT).unwrap();
        self.expect_connected(socket, to, pod_address);
    }

    fn expect_connected(&self, socket: Socket, to: SocketAddr, pod_address: IpAddr) {
        assert_eq!(peer(&socket), to, "getpeername");
        assert_eq!(local(&socket).ip().to_canonical(), pod_address, "getsockname");
        let (mut accepted, original) = accept_captured(&self.capture, &self.listeners);
        let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
        assert_eq!(original, canonical, "original destination");
        let mut client = TcpStream::from(socket);
        talk(&mut client, &mut accepted);
        talk(&mut accepted, &mut client);
        assert_eq!(self.capture.counts().flows, 0);
    }

    /// Expects that an application of the same pod is reached without the agent.
    fn expect_direct(&self, to: SocketAddr) {
        let application = self.pod.application(to.port());
        let mut client = self.pod.connect(to).unwrap();
        assert_eq!(client.peer_addr().unwrap(), to);
        talk(&mut client, &mut accept(&application));
        assert!(is_idle(&self.listeners.outbound));
        assert!(is_idle(&self.listeners.plaintext));
    }
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

#[test]
fn ipv4_is_captured() {
    let mesh = Enrolled::new();
    mesh.expect_captured(mesh.tcp4(), FOREIGN_V4, mesh.pod.v4);
    assert_eq!(mesh.capture.events().unwrap().captured, 1);
}

#[test]
fn ipv6_is_captured() {
    let mesh = Enrolled::new();
    mesh.expect_captured(mesh.tcp6(), FOREIGN_V6, mesh.pod.v6);
}

#[test]
fn mapped_ipv4_is_captured_as_ipv4() {
    let mesh = Enrolled::new();
    mesh.expect_captured(mesh.tcp6(), FOREIGN_MAPPED, mesh.pod.v4);
}

#[test]
fn socket_bound_to_a_device_is_captured() {
    let mesh = Enrolled::new();
    for (socket, to, own) in [
        (mesh.tcp4(), FOREIGN_V4, mesh.pod.v4),
        (mesh.tcp6(), FOREIGN_V6, mesh.pod.v6),
        (mesh.tcp6(), FOREIGN_MAPPED, mesh.pod.v4),
    ] {
        socket.bind_device(Some(b"eth0")).unwrap();
        mesh.expect_captured(socket, to, own);
    }
}

#[test]
fn socket_bound_to_the_pods_address_is_captured() {
    let mesh = Enrolled::new();
    for (socket, to, own) in
        [(mesh.tcp4(), FOREIGN_V4, mesh.pod.v4), (mesh.tcp6(), FOREIGN_V6, mesh.pod.v6)]
    {
        socket.bind(&SocketAddr::new(own, 0).into()).unwrap();
        mesh.expect_captured(socket, to, own);
    }
}

#[test]
fn socket_bound_to_a_port_keeps_it() {
    let mesh = Enrolled::new();
    for (socket, any, to, own) in [
        (mesh.tcp4(), "0.0.0.0:40001", FOREIGN_V4, mesh.pod.v4),
        (mesh.tcp6(), "[::]:40002", FOREIGN_V6, mesh.pod.v6),
    ] {
        let any = addr(any);
        socket.bind(&any.into()).unwrap();
        socket.connect_timeout(&addr(to).into(), LIMIT).unwrap();
        assert_eq!(local(&socket).port(), any.port());
        mesh.expect_connected(socket, addr(to), own);
    }
}

#[test]
fn fast_open_client_is_captured() {
    let mesh = Enrolled::new();
    let socket = mesh.tcp4();
    let to = addr(FOREIGN_V4);
    socket.send_to_with_flags(b"early", &to.into(), libc::MSG_FASTOPEN).unwrap();
    assert_eq!(peer(&socket), to);
    let (mut accepted, original) = accept_captured(&mesh.capture, &mesh.listeners);
    assert_eq!(original, to);
    let mut received = [0; 5];
    accepted.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"early");
}

#[test]
fn non_blocking_client_is_captured() {
    let mesh = Enrolled::new();
    let socket = mesh.tcp4();
    socket.set_nonblocking(true).unwrap();
    let to = addr(FOREIGN_V4);
    let error = socket.connect(&to.into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    eventually("connected", || socket.peer_addr().is_ok());
    socket.set_nonblocking(false).unwrap();
    mesh.expect_connected(socket, to, mesh.pod.v4);
}

#[test]
fn mptcp_client_is_captured() {
    let mesh = Enrolled::new();
    for (domain, to, own) in [
        (Domain::IPV4, FOREIGN_V4, mesh.pod.v4),
        (Domain::IPV6, FOREIGN_V6, mesh.pod.v6),
        (Domain::IPV6, FOREIGN_MAPPED, mesh.pod.v4),
    ] {
        mesh.expect_captured(mesh.socket(domain, Protocol::MPTCP), to, own);
    }
}

/// Dissolves a socket's association, as connect(2) describes for AF_UNSPEC.
fn disconnect(socket: &Socket) {
    let address = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the address outlives the call and is as long as said.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &address, length) };
    assert_eq!(result, 0);
}

#[test]
fn reconnecting_socket_is_captured_to_its_new_destination() {
    let mesh = Enrolled::new();
    let socket = mesh.tcp4();
    let first = addr(FOREIGN_V4);
    socket.connect_timeout(&first.into(), LIMIT).unwrap();
    assert_eq!(accept_captured(&mesh.capture, &mesh.listeners).1, first);
    disconnect(&socket);
    mesh.expect_captured(socket, "192.0.2.2:81", mesh.pod.v4);
}

#[test]
fn captured_socket_that_reconnects_to_the_pod_itself_is_plain_again() {
    let mesh = Enrolled::new();
    let application = mesh.pod.application(7000);
    let socket = mesh.tcp4();
    socket.connect_timeout(&addr(FOREIGN_V4).into(), LIMIT).unwrap();
    accept_captured(&mesh.capture, &mesh.listeners);
    disconnect(&socket);
    socket.connect_timeout(&addr("127.0.0.1:7000").into(), LIMIT).unwrap();
    assert_eq!(peer(&socket), addr("127.0.0.1:7000"));
    assert_eq!(local(&socket).ip(), addr("127.0.0.1:0").ip());
    talk(&mut TcpStream::from(socket), &mut accept(&application));
}

#[test]
fn loopback_is_untouched() {
    let mesh = Enrolled::new();
    mesh.expect_direct(addr("127.0.0.1:7001"));
    mesh.expect_direct(addr("127.0.0.5:7002"));
    mesh.expect_direct(addr("[::1]:7003"));
    mesh.expect_direct(addr("[::ffff:127.0.0.1]:7004"));
}

#[test]
fn pods_own_address_is_untouched() {
    let mesh = Enrolled::new();
    mesh.expect_direct(SocketAddr::new(mesh.pod.v4, 7001));
    mesh.expect_direct(SocketAddr::new(mesh.pod.v6, 7002));
}

#[test]
fn pod_reaches_itself_from_another_of_its_addresses() {
    let node = Node::new();
    let pod = node.pod();
    let second: IpAddr = "10.254.0.9".parse().unwrap();
    ip(&format!("-n {} addr add {second}/32 dev eth0", pod.name()));
    let capture = node.capture();
    let mut spec = pod.spec();
    spec.addresses.push(second);
    let listeners = pod.enrol_with(&capture, &spec);
    let application = pod.application(7000);
    let socket =
        pod.inside(|| Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap());
    socket.bind(&SocketAddr::new(second, 0).into()).unwrap();
    socket.connect_timeout(&SocketAddr::new(pod.v4, 7000).into(), LIMIT).unwrap();
    talk(&mut TcpStream::from(socket), &mut accept(&application));
    assert!(is_idle(&listeners.plaintext));
}

#[test]
fn excluded_ports_and_ranges_leave_the_pod_plainly() {
    let mesh = Enrolled::with(|spec| {
        spec.exclude_outbound_ports = vec![9999];
        spec.exclude_outbound_cidrs =
            vec!["10.200.0.0/16".parse().unwrap(), "fd99::/32".parse().unwrap()];
    });
    // The other end answers by refusing, as nobody listens there: a captured one would connect.
    let neighbour = mesh._node.pod();
    let name = neighbour.name();
    for (other, family, at_once) in [("10.200.1.1/32", "", ""), ("fd99::1/128", "-6", "nodad")] {
        ip(&format!("-n {name} addr add {other} dev eth0 {at_once}"));
        ip(&format!("-n {} {family} route add {other} dev h2", mesh._node.name()));
    }
    for to in ["10.200.1.1:80", "[fd99::1]:80", "[::ffff:10.200.1.1]:80"] {
        let error = mesh.pod.connect(addr(to)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    }
    let excluded_port = SocketAddr::new(neighbour.v4, 9999);
    let error = mesh.pod.connect(excluded_port).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(mesh.capture.events().unwrap().passed_excluded, 4);
    mesh.expect_captured(mesh.tcp4(), "10.201.1.1:80", mesh.pod.v4);
    mesh.expect_captured(mesh.tcp6(), "[fd9a::1]:80", mesh.pod.v6);
}

#[test]
fn excluding_all_ipv6_keeps_ipv4_captured() {
    let mesh = Enrolled::with(|spec| spec.exclude_outbound_cidrs = vec!["::/0".parse().unwrap()]);
    mesh.expect_captured(mesh.tcp4(), FOREIGN_V4, mesh.pod.v4);
    mesh.expect_captured(mesh.tcp6(), FOREIGN_MAPPED, mesh.pod.v4);
}

#[test]
fn family_that_the_pod_lacks_is_unreachable() {
    let mesh = Enrolled::with(|spec| spec.addresses.retain(IpAddr::is_ipv4));
    let error = mesh.pod.connect(addr(FOREIGN_V6)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NetworkUnreachable);
    assert_eq!(mesh.capture.events().unwrap().refused_family, 1);
}

#[test]
fn exempt_socket_goes_its_plain_way() {
    let mesh = Enrolled::new();
    let socket = mesh.tcp4();
    mesh.capture.exempt(&socket).unwrap();
    let neighbour = mesh._node.pod();
    let to = SocketAddr::new(neighbour.v4, 7000);
    let error = socket.connect_timeout(&to.into(), LIMIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert_eq!(mesh.capture.events().unwrap().passed_agent, 1);
}

#[test]
fn marking_a_socket_does_not_exempt_it() {
    let mesh = Enrolled::new();
    for mark in [culvert_abi::OUTBOUND_MARK, culvert_abi::APPLICATION_MARK] {
        let socket = mesh.tcp4();
        socket.set_mark(mark).unwrap();
        mesh.expect_captured(socket, FOREIGN_V4, mesh.pod.v4);
    }
}

#[test]
fn connecting_to_the_agents_port_by_hand_has_no_original_destination() {
    let mesh = Enrolled::new();
    for to in ["127.0.0.1:15001", "[::1]:15001"] {
        let _client = mesh.pod.connect(addr(to)).unwrap();
        let accepted = accept(&mesh.listeners.outbound);
        assert_eq!(mesh.capture.original_dst(&accepted).unwrap(), None);
    }
    assert_eq!(mesh.capture.events().unwrap().missing, 2);
}

#[test]
fn early_close_still_delivers_what_was_sent() {
    let mesh = Enrolled::new();
    for _ in 0..50 {
        let mut client = mesh.pod.connect(addr(FOREIGN_V4)).unwrap();
        client.write_all(b"goodbye").unwrap();
        drop(client);
        let (mut accepted, _) = accept_captured(&mesh.capture, &mesh.listeners);
        let mut received = Vec::new();
        accepted.read_to_end(&mut received).unwrap();
        assert_eq!(received, b"goodbye");
    }
    assert_eq!(mesh.capture.counts().flows, 0);
}

#[test]
fn five_thousand_connections_all_find_their_destination() {
    const CLIENTS: u16 = 10;
    const EACH: u16 = 500;
    let mesh = Enrolled::new();
    let pod = &mesh.pod;
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            scope.spawn(move || {
                for n in 0..EACH {
                    let to = SocketAddr::new([192, 0, 2, client as u8].into(), 1000 + n);
                    let mut stream = pod.connect(to).unwrap();
                    let mut told = [0; 6];
                    stream.set_read_timeout(Some(LIMIT)).unwrap();
                    stream.read_exact(&mut told).unwrap();
                    assert_eq!(told[..4], [192, 0, 2, client as u8]);
                    assert_eq!(told[4..], (1000 + n).to_be_bytes());
                }
            });
        }
        for _ in 0..u32::from(CLIENTS) * u32::from(EACH) {
            let (mut accepted, original) = accept_captured(&mesh.capture, &mesh.listeners);
            let IpAddr::V4(ip) = original.ip() else { panic!("{original}") };
            let mut told = ip.octets().to_vec();
            told.extend(original.port().to_be_bytes());
            accepted.write_all(&told).unwrap();
            accepted.shutdown(Shutdown::Both).unwrap();
        }
    });
    let events = mesh.capture.events().unwrap();
    assert_eq!((events.captured, events.missing, events.refused_full), (5000, 0, 0));
    assert_eq!(mesh.capture.counts().flows, 0);
}

#[test]
fn failed_connections_leave_no_flows() {
    let Enrolled { _node, pod, capture, listeners } = Enrolled::new();
    close(listeners);
    for to in [FOREIGN_V4, FOREIGN_V6, FOREIGN_MAPPED].repeat(20) {
        let error = pod.connect(addr(to)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(capture.counts().flows, 0);
    assert_eq!(capture.events().unwrap().refused_outbound, 60);
}

#[test]
fn abandoned_connections_leave_no_flows() {
    let mesh = Enrolled::new();
    let to = addr(FOREIGN_V4);
    // The listener's queue fills up, so that the clients behind it stay in SYN_SENT.
    mesh.pod.inside(|| std::fs::write("/proc/sys/net/core/somaxconn", "4").unwrap());
    let listeners = mesh.pod.enrol(&mesh.capture);
    let clients: Vec<Socket> = (0..20)
        .map(|_| {
            let socket = mesh.tcp4();
            socket.set_nonblocking(true).unwrap();
            let _ = socket.connect(&to.into());
            socket
        })
        .collect();
    assert!(mesh.capture.counts().flows > 0);
    drop(clients);
    eventually("no flows", || mesh.capture.counts().flows == 0);
    close(listeners);
}

#[test]
fn full_flow_table_refuses_and_spares_other_pods() {
    let mesh = Enrolled::new();
    let other = mesh._node.pod();
    let others = other.enrol(&mesh.capture);
    // Nothing reaches the listener: its queue is kept full, as above.
    mesh.pod.inside(|| std::fs::write("/proc/sys/net/core/somaxconn", "1").unwrap());
    let listeners = mesh.pod.enrol(&mesh.capture);
    let room = culvert_abi::MAX_FLOWS_PER_POD;
    raise_open_files(room as u64 + 4000);
    let mut clients = Vec::with_capacity(room + 100);
    while mesh.capture.events().unwrap().refused_full == 0 {
        assert!(clients.len() < room + 3000, "the table does not fill up");
        for _ in 0..200 {
            let socket = mesh.tcp4();
            socket.set_nonblocking(true).unwrap();
            let n = clients.len();
            let to = SocketAddr::new([192, 0, (n >> 8) as u8, n as u8].into(), 80);
            let _ = socket.connect(&to.into());
            clients.push(socket);
        }
    }
    // Another pod does not notice.
    let _client = other.connect(addr(FOREIGN_V4)).unwrap();
    assert_eq!(accept_captured(&mesh.capture, &others).1, addr(FOREIGN_V4));
    drop(clients);
    eventually("no flows", || mesh.capture.counts().flows == 0);
    close(listeners);
}

fn raise_open_files(count: u64) {
    let limit = libc::rlimit { rlim_cur: count, rlim_max: count };
    // SAFETY: the structure outlives the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }, 0);
}
