//! Dialling beside capture on the real kernel. These tests make network namespaces and attach
//! programs to the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use culvert_agent::capture::{Capture, Listeners, Netns, Redirection};
use culvert_agent::dial::{DialFrom, dial_application, dial_out};
use culvert_agent::relay::{Counters, RelayError, tcp_tcp};
use lab::*;

/// An enrolled pod with the route back, and one that is not enrolled.
struct Mesh {
    capture: Arc<Capture>,
    listeners: Listeners,
    pod: Pod,
    neighbour: Pod,
    _node: Node,
}

impl Mesh {
    fn new() -> Mesh {
        let node = Node::new();
        let (pod, neighbour) = (node.pod(), node.pod());
        let capture = Arc::new(node.capture());
        let listeners = pod.enrol(&capture);
        pod.netns.add_return_route().unwrap();
        Mesh { capture, listeners, pod, neighbour, _node: node }
    }
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn peer_ip(stream: &TcpStream) -> IpAddr {
    stream.peer_addr().unwrap().ip().to_canonical()
}

/// Dials an application of the pod, and tells whom the application sees.
fn seen_by_application(mesh: &Mesh, dst: SocketAddr, from: DialFrom) -> SocketAddr {
    let application = mesh.pod.application(dst.port());
    let dialled = run(async {
        dial_application(&mesh.pod.netns, dst, from).await.unwrap().into_std().unwrap()
    });
    let mut dialled = dialled;
    dialled.set_nonblocking(false).unwrap();
    let mut accepted = accept(&application);
    talk(&mut dialled, &mut accepted);
    talk(&mut accepted, &mut dialled);
    assert!(is_idle(&mesh.listeners.plaintext));
    accepted.peer_addr().unwrap()
}

#[test]
fn application_sees_the_clients_address() {
    let mesh = Mesh::new();
    for (client, own) in [
        ("10.99.1.2", mesh.pod.v4),
        ("fd99::12", mesh.pod.v6),
        (&mesh.neighbour.v4.to_string(), mesh.pod.v4),
    ] {
        let client: IpAddr = client.parse().unwrap();
        let seen = seen_by_application(&mesh, SocketAddr::new(own, 8080), DialFrom::Client(client));
        assert_eq!(seen.ip().to_canonical(), client);
        assert!(seen.port() < 32768, "{seen}: clients take their ports from there on");
    }
}

#[test]
fn application_on_the_clients_own_connections_port_is_dialled_all_the_same() {
    let mesh = Mesh::new();
    let to = SocketAddr::new(mesh.pod.v4, 8080);
    let application = mesh.pod.application(8080);
    // Many connections of one client, each relayed under the client's address.
    let mut held = Vec::new();
    for _ in 0..300 {
        held.push(mesh.neighbour.connect(to).unwrap());
        let inbound = accept(&mesh.listeners.plaintext);
        let from = DialFrom::Client(peer_ip(&inbound));
        let mut dialled = run(async {
            dial_application(&mesh.pod.netns, to, from).await.unwrap().into_std().unwrap()
        });
        dialled.set_nonblocking(false).unwrap();
        let mut accepted = accept(&application);
        talk(&mut dialled, &mut accepted);
        held.extend([inbound, dialled, accepted]);
    }
}

#[test]
fn application_sees_its_own_pod_when_no_client_is_kept() {
    let mesh = Mesh::new();
    for own in [mesh.pod.v4, mesh.pod.v6] {
        let seen = seen_by_application(&mesh, SocketAddr::new(own, 8080), DialFrom::Own);
        assert_eq!(seen.ip().to_canonical(), own);
    }
    // The other family's address cannot be kept.
    let from = DialFrom::Client("fd99::12".parse().unwrap());
    let seen = seen_by_application(&mesh, SocketAddr::new(mesh.pod.v4, 8080), from);
    assert_eq!(seen.ip().to_canonical(), mesh.pod.v4);
}

#[test]
fn application_on_loopback_is_dialled_from_loopback() {
    let mesh = Mesh::new();
    for dst in ["127.0.0.1:8080", "[::1]:8080"] {
        let dst: SocketAddr = dst.parse().unwrap();
        let seen = seen_by_application(&mesh, dst, DialFrom::Loopback);
        assert_eq!(seen.ip().to_canonical(), dst.ip());
    }
}

#[test]
fn absent_application_refuses() {
    let mesh = Mesh::new();
    let client = |ip: &str| DialFrom::Client(ip.parse().unwrap());
    for (own, from) in [
        (mesh.pod.v4, DialFrom::Own),
        (mesh.pod.v4, client("10.99.1.2")),
        (mesh.pod.v6, client("fd99::12")),
    ] {
        let dst = SocketAddr::new(own, 8080);
        let error = run(dial_application(&mesh.pod.netns, dst, from)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    }
}

#[derive(Default)]
struct Received(AtomicU64);

impl Counters for Received {
    fn received(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
    fn sent(&self, _: u64) {}
}

const LOST: &[u8] = &[7; 200];

/// What an application reads of a relayed connection that its client resets after saying `LOST`.
/// Before that, `lose` may disturb the pod.
async fn read_to_reset(pod: &Pod, own: IpAddr, from: &str, lose: impl Fn(&Pod)) -> Vec<u8> {
    let application = pod.application(8080);
    let from = DialFrom::Client(from.parse().unwrap());
    let dialled = dial_application(&pod.netns, SocketAddr::new(own, 8080), from);
    let server = dialled.await.unwrap();
    let mut accepted = accept(&application);
    let near = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = TcpStream::connect(near.local_addr().unwrap()).unwrap();
    let downstream = accept(&near);
    downstream.set_nonblocking(true).unwrap();
    let downstream = tokio::net::TcpStream::from_std(downstream).unwrap();
    let received = Arc::<Received>::default();
    let (counts, closing) = (received.clone(), std::future::pending::<&str>());
    let relay = tokio::spawn(async move { tcp_tcp(downstream, server, &*counts, closing).await });
    talk(&mut client, &mut accepted);
    lose(pod);
    client.write_all(LOST).unwrap();
    eventually("the bytes are passed on", || {
        received.0.load(Ordering::Relaxed) == (5 + LOST.len()) as u64
    });
    socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    let mut got = Vec::new();
    let end = accepted.read_to_end(&mut got).unwrap_err();
    assert_eq!(end.kind(), ErrorKind::ConnectionReset, "{own}");
    assert!(matches!(relay.await.unwrap(), Err(RelayError::Client(_))));
    got
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reset_does_not_overtake_what_was_lost_on_the_way_to_the_application() {
    let Mesh { pod, .. } = &Mesh::new();
    for (own, from) in [(pod.v4, "10.99.1.2"), (pod.v6, "fd99::12")] {
        let got = read_to_reset(pod, own, from, |pod| pod.lose_one_segment(8080, LOST.len())).await;
        assert_eq!(got, LOST, "{own}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reset_arrives_where_what_was_said_before_it_never_does() {
    let Mesh { pod, .. } = &Mesh::new();
    for (own, from) in [(pod.v4, "10.99.1.2"), (pod.v6, "fd99::12")] {
        let got =
            read_to_reset(pod, own, from, |pod| pod.lose_all_segments(8080, LOST.len())).await;
        assert_eq!(got, b"", "{own}");
    }
}

#[test]
fn dialling_out_is_not_captured_and_comes_from_the_pod() {
    let mesh = Mesh::new();
    let application = mesh.neighbour.application(7000);
    for (dst, own) in [(mesh.neighbour.v4, mesh.pod.v4), (mesh.neighbour.v6, mesh.pod.v6)] {
        for source in [None, Some(own)] {
            let dst = SocketAddr::new(dst, 7000);
            let redirection = Redirection::Ebpf(mesh.capture.clone());
            let _dialled = run(dial_out(&mesh.pod.netns, &redirection, source, dst)).unwrap();
            assert_eq!(peer_ip(&accept(&application)), own);
        }
    }
    assert!(is_idle(&mesh.listeners.outbound));
    assert_eq!(mesh.capture.events().unwrap().passed_agent, 4);
}

#[test]
fn return_route_can_be_added_twice_and_removed_twice() {
    let mesh = Mesh::new();
    mesh.pod.netns.add_return_route().unwrap();
    mesh.pod.netns.remove_return_route().unwrap();
    mesh.pod.netns.remove_return_route().unwrap();
}

#[test]
fn thread_is_back_in_its_namespace_even_after_a_panic() {
    let node = Node::new();
    let before = Netns::current().unwrap().cookie();
    assert_ne!(before, node.netns.cookie());
    let inside = node.netns.run(|| Netns::current().unwrap().cookie()).unwrap();
    assert_eq!(inside, node.netns.cookie());
    let panicked = catch_unwind(AssertUnwindSafe(|| node.netns.run(|| panic!("inside"))));
    assert!(panicked.is_err());
    assert_eq!(Netns::current().unwrap().cookie(), before);
}
