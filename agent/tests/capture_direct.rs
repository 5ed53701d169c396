//! Connections that the kernel carries from pod to pod by a verdict, on the real kernel. These tests
//! make network namespaces and attach programs to the cgroup's root: they need root on Linux.

#![allow(clippy::unwrap_used)]

#[path = "capture/lab.rs"]
mod lab;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use aya::programs::loaded_programs;
use culvert_abi::{CGROUP_PROGRAMS, SK_LOOKUP_PROGRAM};
use culvert_agent::capture::direct::{self, DirectFlow, Ended, FlowEvent, FlowEvents};
use culvert_agent::capture::{
    Acceleration, Capture, CaptureError, Direct, Listeners, PodSpec, VerdictId, plaintext_dst,
};
use culvert_core::tables::{Backend, Verdict, VerdictKey};
use lab::*;
use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// An address that no one has.
const VIP: &str = "192.0.2.1:80";
const VIP_V6: &str = "[2001:db8::1]:80";
const PORT: u16 = 8080;
/// Long enough for any test.
const HOUR: Duration = Duration::from_secs(3600);

/// Two enrolled pods, and an agent that admits.
struct Mesh {
    capture: Capture,
    outgoing: Listeners,
    incoming: Listeners,
    application: TcpListener,
    client: Pod,
    server: Pod,
    node: Node,
}

impl Mesh {
    fn new() -> Mesh {
        Mesh::on(Node::new())
    }

    fn on(node: Node) -> Mesh {
        let client = node.pod();
        let server = node.pod();
        let capture = node.capture();
        let outgoing = client.enrol(&capture);
        let incoming = server.enrol(&capture);
        let application = server.application(PORT);
        capture.direct().admit_until(direct::since_boot() + HOUR).unwrap();
        Mesh { capture, outgoing, incoming, application, client, server, node }
    }

    fn direct(&self) -> &Direct {
        self.capture.direct()
    }

    fn v4(&self) -> SocketAddr {
        SocketAddr::new(self.server.v4, PORT)
    }

    fn v6(&self) -> SocketAddr {
        SocketAddr::new(self.server.v6, PORT)
    }

    fn key(&self, destination: SocketAddr) -> VerdictKey {
        VerdictKey { source: self.client.netns.cookie(), destination }
    }

    fn backend(&self, to: SocketAddr, weight: u32) -> Backend {
        Backend { to, netns: self.server.netns.cookie(), weight, accelerated: false }
    }

    /// Allows the client's connections to an address, of which these backends are the pods.
    fn allow(&self, destination: SocketAddr, id: u64, backends: Vec<Backend>, elsewhere: u32) {
        let expires = direct::since_boot() + HOUR;
        let verdict = Verdict { id: VerdictId(id), expires, backends, elsewhere };
        self.direct().set_verdict(&self.key(destination), &verdict).unwrap();
    }

    /// The same for the address of the server itself.
    fn allow_server(&self, id: u64) {
        for to in [self.v4(), self.v6()] {
            self.allow(to, id, vec![self.backend(to, 1)], 0);
        }
    }

    fn flows(&self) -> Vec<DirectFlow> {
        self.direct().flows(self.client.netns.cookie()).unwrap()
    }

    /// Connects, and expects to meet the server's application without the agent.
    fn expect_direct(&self, to: SocketAddr) -> (TcpStream, TcpStream) {
        let mut client = self.client.connect(to).unwrap();
        let mut server = accept(&self.application);
        assert_eq!(client.peer_addr().unwrap(), to, "getpeername");
        let own = canonical(client.local_addr().unwrap());
        assert_eq!(canonical(server.peer_addr().unwrap()), own, "the client's own address");
        talk(&mut client, &mut server);
        talk(&mut server, &mut client);
        (client, server)
    }

    /// Connects, and expects to meet the agent.
    fn expect_captured(&self, to: SocketAddr) -> Option<VerdictId> {
        let mut client = self.client.connect(to).unwrap();
        let mut agent = accept(&self.outgoing.outbound);
        let original = self.capture.original_dst(&agent).unwrap().unwrap();
        assert_eq!(original.to.addr(), to);
        talk(&mut client, &mut agent);
        assert!(is_idle(&self.application));
        original.elsewhere
    }
}

/// What the kernel programs tell, one after the other.
struct Events {
    told: FlowEvents,
    unread: VecDeque<FlowEvent>,
    /// What is waited on belongs to it.
    runtime: tokio::runtime::Runtime,
}

impl Events {
    fn of(direct: &Direct) -> Events {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Events { told: direct.events().unwrap(), unread: VecDeque::new(), runtime }
    }

    fn next(&mut self) -> FlowEvent {
        while self.unread.is_empty() {
            let next = async { tokio::time::timeout(LIMIT, self.told.next()).await };
            self.unread.extend(self.runtime.block_on(next).expect("an event comes").unwrap());
        }
        self.unread.pop_front().unwrap()
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The same socket as the agent's own code wants it.
fn tokio_stream(stream: &TcpStream) -> tokio::net::TcpStream {
    let stream = stream.try_clone().unwrap();
    stream.set_nonblocking(true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    tokio::net::TcpStream::from_std(stream).unwrap()
}

fn addr(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn verdict_lets_connections_go_straight() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    for to in [mesh.v4(), mesh.v6()] {
        let (client, server) = mesh.expect_direct(to);
        assert_eq!(mesh.flows().len(), 1);
        let flow = mesh.flows()[0];
        assert_eq!(flow.client, client.local_addr().unwrap());
        assert_eq!((flow.server, flow.original), (to, to));
        assert_eq!(flow.destination, mesh.server.netns.cookie());
        assert_eq!(flow.verdict, VerdictId(1));
        assert!(flow.established_at >= Some(flow.connected_at));
        assert_eq!(mesh.direct().flow(flow.client, flow.server).unwrap(), Some(flow));
        drop((client, server));
        eventually("the record goes with the connection", || mesh.flows().is_empty());
    }
    assert!(is_idle(&mesh.outgoing.outbound));
    assert!(is_idle(&mesh.incoming.plaintext));
    let counts = mesh.direct().counts().unwrap();
    assert_eq!((counts.opened, counts.admitted), (2, 2));
}

#[test]
fn mapped_address_goes_straight() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let IpAddr::V4(ip) = mesh.server.v4 else { panic!("an IPv4 address") };
    let mapped = SocketAddr::new(ip.to_ipv6_mapped().into(), PORT);
    mesh.expect_direct(mapped);
}

#[test]
fn without_a_verdict_the_agent_carries() {
    let mesh = Mesh::new();
    let other = SocketAddr::new(mesh.server.v4, PORT + 1);
    mesh.allow(other, 1, vec![mesh.backend(other, 1)], 0);
    assert_eq!(mesh.expect_captured(mesh.v4()), None);
    assert_eq!(mesh.direct().counts().unwrap().opened, 0);
}

#[test]
fn closed_port_refuses() {
    let mesh = Mesh::new();
    let closed = SocketAddr::new(mesh.server.v4, PORT + 1);
    mesh.allow(closed, 1, vec![mesh.backend(closed, 1)], 0);
    let error = mesh.client.connect(closed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    assert!(mesh.flows().is_empty());
    let mut events = Events::of(mesh.direct());
    let FlowEvent::Closed(flow, facts) = events.next() else { panic!("not closed") };
    assert_eq!((flow.server, facts.ended), (closed, Ended::Refused));
    assert_eq!((flow.established_at, facts.sent, facts.received), (None, 0, 0));
}

#[test]
fn service_address_leads_to_a_backend() {
    let mesh = Mesh::new();
    for (vip, backend) in [(addr(VIP), mesh.v4()), (addr(VIP_V6), mesh.v6())] {
        mesh.allow(vip, 3, vec![mesh.backend(backend, 7)], 0);
        let _open = mesh.expect_direct(vip);
        let flow = mesh.flows()[0];
        assert_eq!((flow.original, flow.server), (vip, backend));
        drop(_open);
        eventually("the record goes", || mesh.flows().is_empty());
    }
}

#[test]
fn draws_follow_the_weights() {
    let mesh = Mesh::new();
    let vip = addr(VIP);
    let nobody = SocketAddr::new(mesh.server.v4, PORT + 1);
    let backends = vec![mesh.backend(mesh.v4(), 3), mesh.backend(nobody, 2)];
    mesh.allow(vip, 4, backends, 5);
    let total = 400;
    let (mut direct, mut refused, mut elsewhere) = (0, 0, 0);
    for _ in 0..total {
        match mesh.client.connect(vip) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => refused += 1,
            Err(error) => panic!("{error}"),
            Ok(client) if mesh.flows().iter().any(|flow| flow.server == mesh.v4()) => {
                direct += 1;
                let server = accept(&mesh.application);
                SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
                drop((client, server));
                eventually("the record goes", || mesh.flows().is_empty());
            }
            Ok(_client) => {
                elsewhere += 1;
                let agent = accept(&mesh.outgoing.outbound);
                let original = mesh.capture.original_dst(&agent).unwrap().unwrap();
                assert_eq!(original.to.addr(), vip);
                assert_eq!(original.elsewhere, Some(VerdictId(4)));
            }
        }
    }
    // Six standard deviations.
    for (count, share) in [(direct, 0.3), (refused, 0.2), (elsewhere, 0.5)] {
        let mean = f64::from(total) * share;
        let deviation = 6.0 * (mean * (1.0 - share)).sqrt();
        assert!((f64::from(count) - mean).abs() < deviation, "{direct} {refused} {elsewhere}");
    }
    assert_eq!(mesh.direct().counts().unwrap().elsewhere, elsewhere as u64);
}

#[test]
fn all_backends_of_a_verdict_can_be_drawn() {
    let mesh = Mesh::new();
    let vip = addr(VIP);
    let listeners: Vec<_> = (0..32).map(|n| mesh.server.application(9000 + n)).collect();
    let backend = |n: u16| mesh.backend(SocketAddr::new(mesh.server.v4, 9000 + n), 1);
    mesh.allow(vip, 4, (0..32).map(backend).collect(), 0);
    let mut reached = [false; 32];
    let mut open = Vec::new();
    while reached.contains(&false) {
        assert!(open.len() < 2000, "{reached:?}");
        open.push(mesh.client.connect(vip).unwrap());
        for (listener, reached) in listeners.iter().zip(&mut reached) {
            *reached |= !is_idle(listener);
        }
    }
}

#[test]
fn agent_that_does_not_admit_any_more_stops_verdicts() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let _open = mesh.expect_direct(mesh.v4());
    mesh.direct().admit_until(direct::since_boot()).unwrap();
    assert_eq!(mesh.expect_captured(mesh.v4()), None);
    assert_eq!(mesh.direct().counts().unwrap().expired, 1);
    mesh.direct().admit_until(direct::since_boot() + HOUR).unwrap();
    mesh.expect_direct(mesh.v4());
}

#[test]
fn verdict_that_has_expired_does_not_count() {
    let mesh = Mesh::new();
    let (to, expires) = (mesh.v4(), direct::since_boot());
    let verdict =
        Verdict { id: VerdictId(1), expires, backends: vec![mesh.backend(to, 1)], elsewhere: 0 };
    mesh.direct().set_verdict(&mesh.key(to), &verdict).unwrap();
    assert_eq!(mesh.direct().verdicts().unwrap(), [(mesh.key(to), verdict)]);
    mesh.expect_captured(to);
}

#[test]
fn special_sockets_go_by_the_agent() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    ip(&format!("-n {} addr add 198.51.100.7/32 dev lo", mesh.client.name()));
    let socket = |protocol: Protocol| {
        mesh.client.inside(|| Socket::new(Domain::IPV4, Type::STREAM, Some(protocol)).unwrap())
    };
    let marked = socket(Protocol::TCP);
    marked.set_mark(7).unwrap();
    let bound = socket(Protocol::TCP);
    bound.bind(&addr("198.51.100.7:0").into()).unwrap();
    let on_device = socket(Protocol::TCP);
    on_device.bind_device(Some(b"eth0")).unwrap();
    let multipath = socket(Protocol::MPTCP);
    for socket in [marked, bound, on_device, multipath] {
        socket.connect_timeout(&mesh.v4().into(), LIMIT).unwrap();
        let (_agent, original) = accept_captured(&mesh.capture, &mesh.outgoing);
        assert_eq!(original, mesh.v4());
    }
    assert_eq!(mesh.direct().counts().unwrap().special, 4);
    let own = socket(Protocol::TCP);
    own.bind(&SocketAddr::new(mesh.client.v4, 0).into()).unwrap();
    own.connect_timeout(&mesh.v4().into(), LIMIT).unwrap();
    accept(&mesh.application);
    assert_eq!(mesh.direct().counts().unwrap().opened, 1);
}

#[test]
fn connection_from_a_foreign_address_does_not_leave() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let (name, host) = (mesh.client.name(), mesh.node.link_of(&mesh.client));
    ip(&format!("-n {name} addr add 198.51.100.7/32 dev lo"));
    ip(&format!("-n {name} route replace default via 169.254.1.1 dev eth0 src 198.51.100.7"));
    let socket = mesh.client.inside(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    let quickly = Duration::from_millis(300);
    socket.connect_timeout(&mesh.v4().into(), quickly).unwrap_err();
    assert!(is_idle(&mesh.application) && is_idle(&mesh.incoming.plaintext));
    assert_eq!(mesh.direct().counts().unwrap().unrecorded, 1);
    // From then on the agent carries them.
    let _client = mesh.client.connect(mesh.v4()).unwrap();
    accept(&mesh.outgoing.outbound);
    // Until it learns of the address.
    let mut spec = mesh.client.spec();
    spec.addresses.push("198.51.100.7".parse().unwrap());
    let (netns, cookie) = (mesh.client.netns.as_fd(), mesh.client.netns.cookie());
    mesh.capture.enrol(netns, cookie, &spec, &(&mesh.outgoing).into()).unwrap();
    ip(&format!("-n {} route add 198.51.100.7 dev {}", mesh.node.name(), host));
    let _client = mesh.client.connect(mesh.v4()).unwrap();
    let server = accept(&mesh.application);
    assert_eq!(canonical(server.peer_addr().unwrap()).ip(), addr("198.51.100.7:0").ip());
}

#[test]
fn verdict_taken_back_under_way_leads_to_the_agent() {
    let mesh = Mesh::new();
    let vip = addr(VIP);
    mesh.allow(vip, 1, vec![mesh.backend(mesh.v4(), 1)], 0);
    // The SYN is lost at first, and finds the verdict gone when it is sent again.
    let host = mesh.node.link_of(&mesh.client);
    ip(&format!("-n {} link set {host} down", mesh.node.name()));
    let socket = mesh.client.inside(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&vip.into());
    eventually("the record is made", || !mesh.flows().is_empty());
    mesh.direct().remove_verdict(&mesh.key(vip)).unwrap();
    ip(&format!("-n {} link set {host} up", mesh.node.name()));
    mesh.node.route_to(&mesh.client);
    let accepted = accept(&mesh.incoming.outbound);
    let peer = canonical(accepted.peer_addr().unwrap());
    let flow = mesh.direct().flow(peer, canonical(accepted.local_addr().unwrap())).unwrap();
    let flow = flow.expect("whose connection it is");
    assert_eq!((flow.source, flow.original), (mesh.client.netns.cookie(), vip));
    assert!(is_idle(&mesh.application));
    let counts = mesh.direct().counts().unwrap();
    assert_eq!((counts.admitted, counts.retracted), (0, 1));
}

#[test]
fn pod_with_anothers_address_is_not_taken_for_it() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let forger = mesh.node.pod();
    let _open = mesh.expect_direct(mesh.v6());
    let IpAddr::V6(stolen) = mesh.client.v6 else { panic!("an IPv6 address") };
    ip(&format!("-n {} -6 addr add {stolen}/128 dev lo nodad", forger.name()));
    let socket = forger.inside(|| Socket::new(Domain::IPV6, Type::STREAM, None).unwrap());
    socket.bind(&SocketAddr::new(stolen.into(), 0).into()).unwrap();
    socket.set_nonblocking(true).unwrap();
    let _ = socket.connect(&mesh.v6().into());
    let plaintext = || mesh.capture.events().unwrap().inbound_plaintext;
    eventually("the forged SYN arrives", || plaintext() > 0);
    assert_eq!(mesh.direct().counts().unwrap().admitted, 1);
    assert!(is_idle(&mesh.application));
}

#[test]
fn full_table_means_the_agent() {
    let mut node = Node::new();
    node.options.max_direct = 3;
    let mesh = Mesh::on(node);
    mesh.allow_server(1);
    let mut open: Vec<_> = (0..3).map(|_| mesh.expect_direct(mesh.v4())).collect();
    assert_eq!(mesh.expect_captured(mesh.v4()), None);
    assert_eq!(mesh.direct().counts().unwrap().full, 1);
    open.pop();
    eventually("a place becomes free", || mesh.flows().len() == 2);
    mesh.expect_direct(mesh.v4());
}

#[test]
fn full_table_of_verdicts_is_told() {
    let mut node = Node::new();
    node.options.max_verdicts = 2;
    let mesh = Mesh::on(node);
    mesh.allow_server(1);
    let (to, expires) = (addr(VIP), direct::since_boot() + HOUR);
    let verdict = Verdict { id: VerdictId(2), expires, backends: Vec::new(), elsewhere: 1 };
    let error = mesh.direct().set_verdict(&mesh.key(to), &verdict).unwrap_err();
    assert!(matches!(error, CaptureError::VerdictsFull { max_verdicts: 2, .. }), "{error}");
    mesh.expect_direct(mesh.v4());
}

#[test]
fn verdict_for_a_pod_is_none_for_its_successor() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    mesh.expect_direct(mesh.v4());
    // Another pod takes over the address.
    let successor = mesh.node.pod();
    let mut spec = successor.spec();
    spec.addresses.extend([mesh.server.v4, mesh.server.v6]);
    let _listeners = successor.enrol_with(&mesh.capture, &spec);
    mesh.expect_captured(mesh.v4());
    assert_eq!(mesh.direct().counts().unwrap().backend_gone, 1);
}

#[test]
fn pods_that_are_the_agents_get_no_direct_connection() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let spec = PodSpec { by_agent: true, ..mesh.server.spec() };
    let (netns, cookie) = (mesh.server.netns.as_fd(), mesh.server.netns.cookie());
    mesh.capture.enrol(netns, cookie, &spec, &(&mesh.incoming).into()).unwrap();
    mesh.expect_captured(mesh.v4());
}

#[test]
fn not_a_byte_goes_to_a_stranger_that_took_a_pods_address() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    // It is not enrolled, and the agent has not heard that the pod is gone.
    let stranger = mesh.node.pod();
    mesh.node.succeed(&stranger, &mesh.server);
    let application = stranger.application(PORT);
    for to in [mesh.v4(), mesh.v6()] {
        let mut client = mesh.client.connect(to).unwrap();
        let _ = client.write_all(b"a secret");
        // Not even its end of the handshake leaves.
        assert!(is_idle(&application));
        let [flow] = mesh.flows()[..] else { panic!("{:?}", mesh.flows()) };
        assert!(flow.arrival.is_none() && flow.established_at.is_some());
        assert!(direct::destroy(&flow, Some(&mesh.client.netns), None).unwrap());
        eventually("the record goes", || mesh.flows().is_empty());
        assert!(is_idle(&application));
    }
    assert_eq!(mesh.direct().counts().unwrap().astray, 2);
}

#[test]
fn withdrawn_pod_keeps_its_connections_and_gets_no_new_ones() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let (mut client, mut server) = mesh.expect_direct(mesh.v4());
    mesh.capture.withdraw(mesh.client.netns.cookie()).unwrap();
    assert!(mesh.direct().verdicts().unwrap().is_empty());
    assert_eq!(mesh.flows().len(), 1);
    talk(&mut client, &mut server);
    // Back again: what lived on counts.
    let again = mesh.client.enrol(&mesh.capture);
    mesh.allow_server(2);
    let other = mesh.expect_direct(mesh.v4());
    assert_eq!(mesh.flows().len(), 2);
    drop((client, server, other));
    eventually("the records go", || mesh.flows().is_empty());
    mesh.expect_direct(mesh.v4());
    eventually("the record goes", || mesh.flows().is_empty());
    close(again);
    for pod in [&mesh.client, &mesh.server] {
        mesh.capture.withdraw(pod.netns.cookie()).unwrap();
    }
    assert!(mesh.direct().sources().is_empty());
}

#[test]
fn agent_that_cannot_keep_the_tables_ends_their_connections() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let (mut client, mut server) = mesh.expect_direct(mesh.v4());
    let Mesh { capture, mut node, client: _client, server: _server, .. } = mesh;
    drop(capture);
    node.options.max_direct += 1;
    let capture = node.capture();
    for end in [&mut client, &mut server] {
        let error = end.read(&mut [0]).unwrap_err();
        let kinds = [ErrorKind::ConnectionAborted, ErrorKind::ConnectionReset];
        assert!(kinds.contains(&error.kind()), "{error}");
    }
    assert!(capture.direct().verdicts().unwrap().is_empty());
}

/// Kernels before 5.2 took 4096 instructions; later ones look at a million before they give up, and
/// that takes seconds.
#[test]
fn programs_are_easy_to_verify() {
    expect_easy(&Mesh::new());
    let mut node = Node::new();
    // The programs have more code then.
    let Ok(acceleration) = Acceleration::find() else { return };
    node.options.acceleration = Some(acceleration);
    let mesh = Mesh::on(node);
    mesh.capture.accelerate().unwrap();
    expect_easy(&mesh);
}

fn expect_easy(mesh: &Mesh) {
    let ids: Vec<u32> = mesh.capture.programs().iter().map(|(_, id)| *id).collect();
    let mut seen = 0;
    for program in loaded_programs().flatten() {
        let name = String::from_utf8_lossy(program.name()).into_owned();
        if !ids.contains(&program.id()) && name != SK_LOOKUP_PROGRAM {
            continue;
        }
        // Known from Linux 5.16.
        let Some(verified) = program.verified_instruction_count() else { return };
        assert!(verified < 100_000, "{name}: {verified}");
        seen += 1;
    }
    assert!(seen > CGROUP_PROGRAMS.len());
}

#[test]
fn next_agent_finds_verdicts_connections_and_events() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let (mut client, mut server) = mesh.expect_direct(mesh.v4());
    let Mesh { capture, outgoing, incoming, application, client: pod, server: other, node } = mesh;
    drop(capture);
    close(outgoing);
    close(incoming);
    // Without an agent.
    let _second = pod.connect(SocketAddr::new(other.v4, PORT)).unwrap();
    accept(&application);
    talk(&mut client, &mut server);
    let capture = node.capture();
    assert_eq!(capture.direct().verdicts().unwrap().len(), 2);
    assert_eq!(capture.direct().flows(pod.netns.cookie()).unwrap().len(), 2);
    let mut events = Events::of(capture.direct());
    assert!(capture.direct().events().is_none());
    for _ in 0..2 {
        let event = events.next();
        assert!(matches!(event, FlowEvent::Opened(_)), "{event:?}");
    }
}

#[test]
fn events_tell_bytes_and_times() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let mut events = Events::of(mesh.direct());
    // Who closes first, and whether the other has closed before that is noticed.
    for server_first in [false, true] {
        let (mut client, mut server) = mesh.expect_direct(mesh.v4());
        client.write_all(&[7; 1000]).unwrap();
        server.read_exact(&mut [0; 1000]).unwrap();
        server.write_all(&[8; 3000]).unwrap();
        client.read_exact(&mut [0; 3000]).unwrap();
        let (first, second) =
            if server_first { (&mut server, &mut client) } else { (&mut client, &mut server) };
        first.shutdown(Shutdown::Write).unwrap();
        assert_eq!(second.read(&mut [0]).unwrap(), 0);
        second.shutdown(Shutdown::Write).unwrap();
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        let FlowEvent::Opened(opened) = events.next() else { panic!("not opened") };
        let FlowEvent::Closed(flow, facts) = events.next() else { panic!("not closed") };
        assert_eq!(opened, flow);
        assert_eq!((facts.sent, facts.received), (1005, 3005), "{server_first}");
        assert_eq!(facts.ended, Ended::Finished);
        assert_eq!(facts.retransmits, 0);
        assert!(facts.srtt.is_some_and(|rtt| rtt > Duration::ZERO && rtt < LIMIT), "{facts:?}");
        assert!(facts.min_rtt <= facts.srtt.map(|rtt| rtt + LIMIT));
        assert!(Some(facts.at) >= flow.established_at);
    }
    assert_eq!(mesh.direct().counts().unwrap().events_lost, 0);
}

#[test]
fn reset_is_told_as_such() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let mut events = Events::of(mesh.direct());
    let (client, server) = mesh.expect_direct(mesh.v4());
    SockRef::from(&server).set_linger(Some(Duration::ZERO)).unwrap();
    drop(server);
    assert!(matches!(events.next(), FlowEvent::Opened(_)));
    let FlowEvent::Closed(_, facts) = events.next() else { panic!("not closed") };
    assert_eq!((facts.ended, facts.sent, facts.received), (Ended::Aborted, 5, 5));
    drop(client);
}

#[test]
fn connections_are_destroyed_from_either_end() {
    let mesh = Mesh::new();
    assert!(mesh.direct().can_destroy());
    mesh.allow_server(1);
    let (source, destination) = (&mesh.client.netns, &mesh.server.netns);
    for to in [mesh.v4(), mesh.v6()] {
        for ends in
            [(Some(source), Some(destination)), (Some(source), None), (None, Some(destination))]
        {
            let (mut client, mut server) = mesh.expect_direct(to);
            let flow = mesh.flows()[0];
            assert!(direct::destroy(&flow, ends.0, ends.1).unwrap());
            for end in [&mut client, &mut server] {
                let error = end.read(&mut [0]).unwrap_err();
                let kinds = [ErrorKind::ConnectionAborted, ErrorKind::ConnectionReset];
                assert!(kinds.contains(&error.kind()), "{error}");
            }
            eventually("the record goes", || mesh.flows().is_empty());
            assert!(!direct::destroy(&flow, ends.0, ends.1).unwrap());
        }
    }
    // The listeners have come to no harm.
    mesh.expect_direct(mesh.v4());
}

/// The part of istio-cni's rules that redirects. The probes' address and the marks within the pod
/// have no part here.
const CNI_RULES: &str = "
    table inet istio-ambient-nat {
      chain prerouting {
        type nat hook prerouting priority dstnat; policy accept;
        ip daddr != 127.0.0.1/32 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
        ip6 daddr != ::1/128 tcp dport != 15008 meta mark & 0xfff != 0x539 redirect to :15006
      }
      chain output {
        type nat hook output priority -100; policy accept;
        oifname lo accept
        meta l4proto tcp meta mark & 0xfff != 0x539 redirect to :15001
      }
    }";

#[test]
fn rules_of_istio_cni_do_not_hold_up_direct_connections() {
    let mesh = Mesh::new();
    for (pod, listeners) in [(&mesh.client, &mesh.outgoing), (&mesh.server, &mesh.incoming)] {
        run("ip", &["netns", "exec", pod.name(), "nft", CNI_RULES]);
        let spec = PodSpec { beside_cni: true, ..pod.spec() };
        let (netns, cookie) = (pod.netns.as_fd(), pod.netns.cookie());
        mesh.capture.enrol(netns, cookie, &spec, &listeners.into()).unwrap();
    }
    mesh.allow_server(1);
    let vip = addr(VIP);
    mesh.allow(vip, 2, vec![mesh.backend(mesh.v4(), 1)], 0);
    // Without leave to pass it cannot be told who answers.
    let _client = mesh.client.connect(mesh.v4()).unwrap();
    assert_eq!(mesh.direct().counts().unwrap().astray, 1);
    assert!(is_idle(&mesh.incoming.plaintext) && is_idle(&mesh.application));
    mesh.server.netns.let_direct_pass().unwrap();
    mesh.server.netns.let_direct_pass().unwrap();
    for to in [mesh.v4(), mesh.v6(), vip] {
        let (client, server) = mesh.expect_direct(to);
        assert_eq!(SockRef::from(&server).mark().unwrap(), 0);
        assert_eq!(SockRef::from(&client).mark().unwrap(), 0x539);
        assert_eq!(canonical(server.local_addr().unwrap()).port(), PORT);
    }
    // What has no verdict is led as before.
    mesh.direct().remove_verdict(&mesh.key(mesh.v4())).unwrap();
    mesh.expect_captured(mesh.v4());
    let stranger = mesh.node.pod();
    let _client = stranger.connect(mesh.v4()).unwrap();
    let agent = accept(&mesh.incoming.plaintext);
    assert_eq!(plaintext_dst(&tokio_stream(&agent)).unwrap(), mesh.v4());
    mesh.server.netns.stop_direct_passing().unwrap();
    mesh.server.netns.stop_direct_passing().unwrap();
    assert!(is_idle(&mesh.application));
}

#[test]
fn socket_that_was_direct_is_captured_without_its_mark() {
    let mesh = Mesh::new();
    let spec = PodSpec { beside_cni: true, ..mesh.client.spec() };
    let (netns, cookie) = (mesh.client.netns.as_fd(), mesh.client.netns.cookie());
    mesh.capture.enrol(netns, cookie, &spec, &(&mesh.outgoing).into()).unwrap();
    let closed = SocketAddr::new(mesh.server.v4, PORT + 1);
    mesh.allow(closed, 1, vec![mesh.backend(closed, 1)], 0);
    mesh.allow_server(2);
    let socket = mesh.client.inside(|| Socket::new(Domain::IPV4, Type::STREAM, None).unwrap());
    socket.connect(&closed.into()).unwrap_err();
    assert_eq!(socket.mark().unwrap(), 0x539);
    // The same socket once more: straight again, then by the agent.
    socket.connect(&closed.into()).unwrap_err();
    assert_eq!(mesh.direct().counts().unwrap().opened, 2);
    socket.connect(&addr(VIP).into()).unwrap();
    accept(&mesh.outgoing.outbound);
    assert_eq!(socket.mark().unwrap(), 0);
}

#[test]
fn connection_of_another_socket_is_not_destroyed() {
    let mesh = Mesh::new();
    mesh.allow_server(1);
    let (mut client, mut server) = mesh.expect_direct(mesh.v4());
    let mut flow = mesh.flows()[0];
    flow.socket.0 += 1;
    assert!(!direct::destroy(&flow, Some(&mesh.client.netns), None).unwrap());
    talk(&mut client, &mut server);
}
