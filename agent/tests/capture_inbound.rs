//! Inbound capture on the real kernel. These tests make network namespaces and attach programs to
//! the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpStream};

use culvert_agent::capture::{Capture, Listeners, PodSpec};
use lab::*;
use socket2::{Domain, Protocol, Socket, Type};

/// A client pod that is not enrolled, and a server pod that is.
struct Mesh {
    capture: Capture,
    listeners: Listeners,
    client: Pod,
    server: Pod,
    node: Node,
}

impl Mesh {
    fn new() -> Mesh {
        Mesh::with(|_| {})
    }

    fn with(adapt: impl FnOnce(&mut PodSpec)) -> Mesh {
        let node = Node::new();
        let client = node.pod();
        let server = node.pod();
        let capture = node.capture();
        let mut spec = server.spec();
        adapt(&mut spec);
        let listeners = server.enrol_with(&capture, &spec);
        Mesh { capture, listeners, client, server, node }
    }

    fn addresses(&self, port: u16) -> [SocketAddr; 2] {
        [SocketAddr::new(self.server.v4, port), SocketAddr::new(self.server.v6, port)]
    }

    fn node_connects(&self, to: SocketAddr) -> std::io::Result<TcpStream> {
        self.node.netns.run(|| TcpStream::connect_timeout(&to, LIMIT)).unwrap()
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[test]
fn every_port_leads_to_the_plaintext_listener() {
    let mesh = Mesh::new();
    let application = mesh.server.application(8080);
    for port in [8080, 22, 65535] {
        for to in mesh.addresses(port) {
            let mut client = mesh.client.connect(to).unwrap();
            let mut accepted = accept(&mesh.listeners.plaintext);
            assert_eq!(canonical(accepted.local_addr().unwrap()), to);
            let peer = canonical(accepted.peer_addr().unwrap());
            assert_eq!(peer, client.local_addr().unwrap());
            talk(&mut client, &mut accepted);
        }
    }
    assert!(is_idle(&application));
    assert_eq!(mesh.capture.events().unwrap().inbound_plaintext, 6);
}

#[test]
fn hbone_port_leads_to_the_hbone_listener() {
    let mesh = Mesh::new();
    for to in mesh.addresses(15008) {
        let mut client = mesh.client.connect(to).unwrap();
        talk(&mut client, &mut accept(&mesh.listeners.hbone));
    }
    assert!(is_idle(&mesh.listeners.plaintext));
}

#[test]
fn agents_other_ports_are_refused_from_outside() {
    let mesh = Mesh::new();
    for to in mesh.addresses(15001).into_iter().chain(mesh.addresses(15006)) {
        let error = mesh.client.connect(to).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
    }
    assert_eq!(mesh.capture.events().unwrap().inbound_refused, 4);
}

#[test]
fn excluded_port_reaches_the_application() {
    let mesh = Mesh::with(|spec| spec.exclude_inbound_ports = vec![9090]);
    let application = mesh.server.application(9090);
    for to in mesh.addresses(9090) {
        let mut client = mesh.client.connect(to).unwrap();
        talk(&mut client, &mut accept(&application));
    }
    assert!(is_idle(&mesh.listeners.plaintext));
}

#[test]
fn without_listeners_everything_is_refused() {
    let Mesh { node: _node, server, client, capture, listeners } = Mesh::new();
    let _application = server.application(8080);
    close(listeners);
    for port in [8080, 15001, 15006, 15008] {
        for to in [SocketAddr::new(server.v4, port), SocketAddr::new(server.v6, port)] {
            let error = client.connect(to).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
    }
    assert_eq!(capture.events().unwrap().inbound_refused, 8);
    assert_eq!(capture.counts().listeners, 0);
}

#[test]
fn another_process_cannot_take_the_place_of_a_listener() {
    let Mesh { node: _node, server, client, capture: _capture, listeners } = Mesh::new();
    close(listeners);
    let squatters = server.netns.listen().unwrap();
    for port in [8080, 15006, 15008] {
        let error = client.connect(SocketAddr::new(server.v4, port)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{port}");
    }
    let error = server.connect("192.0.2.1:80".parse().unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    for squatter in [&squatters.outbound, &squatters.plaintext, &squatters.hbone] {
        assert!(is_idle(squatter));
    }
}

#[test]
fn nodes_own_connections_reach_the_application() {
    let mesh = Mesh::new();
    let application = mesh.server.application(8080);
    for to in mesh.addresses(8080).into_iter().cycle().take(20) {
        let mut client = mesh.node_connects(to).unwrap();
        talk(&mut client, &mut accept(&application));
    }
    assert!(is_idle(&mesh.listeners.plaintext));
    let events = mesh.capture.events().unwrap();
    assert_eq!((events.inbound_node, events.inbound_plaintext), (20, 0));
    assert_eq!(mesh.capture.counts().probes, 0);
}

#[test]
fn nodes_failed_connections_leave_no_record() {
    let mesh = Mesh::new();
    for to in mesh.addresses(8080).into_iter().cycle().take(20) {
        let error = mesh.node_connects(to).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(mesh.capture.counts().probes, 0);
}

#[test]
fn nodes_connection_to_the_hbone_port_leads_to_its_listener() {
    let mesh = Mesh::new();
    for to in mesh.addresses(15008) {
        let mut client = mesh.node_connects(to).unwrap();
        talk(&mut client, &mut accept(&mesh.listeners.hbone));
    }
}

#[test]
fn pod_with_the_nodes_address_does_not_pass_for_the_node() {
    let mesh = Mesh::new();
    let application = mesh.server.application(8080);
    // The node's address, and the client takes it too. (A router drops such an IPv4 source itself.)
    ip(&format!("-n {} -6 addr add fd78::1/128 dev lo nodad", mesh.node.name()));
    ip(&format!("-n {} -6 addr add fd78::1/128 dev lo nodad", mesh.client.name()));
    let socket = mesh
        .client
        .inside(|| Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP)).unwrap());
    socket.bind(&"[fd78::1]:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&SocketAddr::new(mesh.server.v6, 8080).into());
    eventually("the forged SYN arrives", || mesh.capture.events().unwrap().inbound_plaintext > 0);
    assert_eq!(mesh.capture.events().unwrap().inbound_node, 0);
    assert!(is_idle(&application));
}
