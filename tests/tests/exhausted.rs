//! Things run out: half-open handshakes, descriptors, room in the kernel's tables; then they recover.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Mesh, PodSpec, Running};
use culvert_lab::{sys, wait};
use culvert_tests::figures::{self, Figures};
use culvert_tests::load::TEXT;
use culvert_tests::peer::{Forge, HBONE, Leaf, Peer};
use culvert_tests::{LIMIT, binary, call, connect, echo, serve};

const PORT: u16 = 8080;

fn mesh() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod_with(PodSpec::unknown("outsider"))
        .node("b")
        .pod("server", "shop", "server")
        .start()
        .unwrap();
    serve(&mesh, "server", PORT, echo).unwrap();
    mesh
}

fn server(mesh: &Running) -> IpAddr {
    mesh.pod("server").v4().into()
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(TEXT)?;
    stream.read_exact(&mut vec![0; TEXT.len()])
}

/// The slowest of some good calls, each with its own connection.
fn slowest(mesh: &Running, calls: usize) -> Duration {
    let once = |_| {
        let begun = Instant::now();
        assert_eq!(call(mesh, "client", (server(mesh), PORT), "hello").unwrap(), "hello");
        begun.elapsed()
    };
    (0..calls).map(once).max().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_open_handshakes_hold_up_nobody_and_end_by_themselves() {
    let mesh = mesh();
    let _a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    tokio::task::block_in_place(|| slowest(&mesh, 2));
    let start = Figures::of(&b).unwrap();
    let to = SocketAddr::new(server(&mesh), HBONE);
    let mut half_open: Vec<TcpStream> = mesh
        .pod("outsider")
        .place()
        .run(|| (0..300).map(|_| TcpStream::connect_timeout(&to, LIMIT).unwrap()).collect());
    for (number, stream) in half_open.iter_mut().enumerate() {
        match number % 3 {
            // Nothing at all, the beginning of a handshake record, and what is none.
            0 => {}
            1 => stream.write_all(&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]).unwrap(),
            _ => stream.write_all(&[22, 3, 1, 0x40, 0]).unwrap(),
        }
    }
    // Handshakes that ended, without a word of HTTP/2 after them.
    let leaf = Leaf::uris(&["spiffe://cluster.local/ns/web/sa/client"]);
    let peer = Peer::with(&mesh, "outsider", &Forge::of_mesh(&mesh).unwrap(), &leaf).unwrap();
    let mut silent = Vec::new();
    for _ in 0..20 {
        silent.push(peer.tls(server(&mesh)).await.unwrap());
    }
    wait::until("all to be accepted", wait::SOON, || {
        figures::descriptors(&b).unwrap() >= start.descriptors + 300
    })
    .unwrap();
    let slowest = tokio::task::block_in_place(|| slowest(&mesh, 50));
    assert!(slowest < Duration::from_secs(5), "{slowest:?}, and a handshake has ten seconds");
    // Each has ten seconds; the peers never close.
    tokio::task::block_in_place(|| start.wait_back(&b)).unwrap();
    let log = b.log();
    for reason in ["not finished within 10s", "no http2 preface within 10s"] {
        assert!(log.contains(reason), "no {reason:?} in the log");
    }
    drop((half_open, silent));
}

/// Changes the agent's limit of open descriptors.
fn limit_descriptors(agent: &Agent, limit: usize) {
    let (pid, limit) = (agent.pid().to_string(), format!("--nofile={limit}:"));
    let status = Command::new("prlimit").args(["--pid", &pid, &limit]).status().unwrap();
    assert!(status.success());
}

#[test]
fn agents_without_descriptors_recover_when_connections_end() {
    for node in ["a", "b"] {
        let mesh = mesh();
        let agents = ["a", "b"].map(|node| mesh.agent(node, &binary()).unwrap());
        let to = (server(&mesh), PORT);
        slowest(&mesh, 5);
        let mut live = connect(&mesh, "client", to).unwrap();
        exchange(&mut live).unwrap();
        let poor = &agents[usize::from(node == "b")];
        let start = Figures::of(poor).unwrap();
        limit_descriptors(poor, figures::descriptors(poor).unwrap() + 12);
        let mut many: Vec<TcpStream> =
            (0..60).filter_map(|_| connect(&mesh, "client", to).ok()).collect();
        many.iter_mut().for_each(|stream| {
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        });
        let failed = many.iter_mut().filter_map(|stream| exchange(stream).err()).count();
        assert!(failed > 0, "the limit was never reached at {node}");
        wait::until_some(format!("{node} to say so"), wait::SOON, || {
            let log = poor.log();
            if log.contains("Too many open files") { Ok(()) } else { Err(log) }
        })
        .unwrap();
        exchange(&mut live).unwrap();
        drop(many);
        wait::until_some("good calls again", wait::SOON, || {
            call(&mesh, "client", to, "hello").map(|answer| assert_eq!(answer, "hello"))
        })
        .unwrap();
        start.wait_back(poor).unwrap();
        exchange(&mut live).unwrap();
    }
}

/// More than a pod's flow table has room for.
const FLOWS: usize = culvert_abi::MAX_FLOWS_PER_POD + 500;

#[test]
fn full_flow_table_refuses_and_recovers() {
    sys::raise_open_files_limit().unwrap();
    let mesh = mesh();
    // A short queue: what the agent does not accept waits where its entry in the table stays.
    mesh.pod("client").place().netns().sysctl("net/core/somaxconn", "8").unwrap();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let to = (server(&mesh), PORT);
    slowest(&mesh, 5);
    let start = Figures::of(&a).unwrap();
    let refused =
        |a: &Agent| a.metric("culvert_kernel_connections_total", &["result=\"refused\""]).unwrap();
    let before = refused(&a);
    let wire = mesh.wire("a", "b").unwrap();
    a.process().signal(libc::SIGSTOP).unwrap();
    let begun: Vec<TcpStream> = mesh.pod("client").place().run(|| {
        let begun = (0..FLOWS).map(|_| sys::connect_without_waiting(to.into()));
        begun.filter_map(Result::ok).collect()
    });
    a.process().signal(libc::SIGCONT).unwrap();
    wait::until("refusals for want of room", wait::SOON, || refused(&a) > before).unwrap();
    drop(begun);
    start.wait_back(&a).unwrap();
    slowest(&mesh, 5);
    let ledger = wire.finish().unwrap();
    assert!(ledger.clear.is_empty() && !ledger.attempts.contains_key(&PORT), "{ledger}");
}
