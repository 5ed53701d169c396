//! Fail closed: without an agent, or an agent without a certificate, nothing leaves in clear.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{PodSpec, Running};
use culvert_lab::wait;
use culvert_lab::wire::Ledger;
use culvert_tests::direct::through_agent;
use culvert_tests::expect::logged;
use culvert_tests::figures::{self, Figures};
use culvert_tests::load::{Load, TEXT};
use culvert_tests::{LIMIT, binary, call, connect, echo, serve};

const PORT: u16 = 8080;

/// What is refused is refused without waiting for anything.
const AT_ONCE: Duration = Duration::from_secs(5);

fn two_nodes() -> Running {
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .pod_with(PodSpec::unknown("outsider"))
        .node("b")
        .pod("server", "shop", "server")
        .start()
        .unwrap();
    serve(&mesh, "server", PORT, echo).unwrap();
    serve(&mesh, "near", PORT, echo).unwrap();
    mesh
}

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

/// A connection that has carried something.
fn open(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> TcpStream {
    let mut stream = connect(mesh, pod, to).unwrap();
    exchange(&mut stream).unwrap();
    stream
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(TEXT)?;
    let mut answer = vec![0; TEXT.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, TEXT);
    Ok(())
}

fn assert_refused(mesh: &Running, pod: &str, to: (IpAddr, u16)) {
    let begun = Instant::now();
    let error = connect(mesh, pod, to).expect_err("connected");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{pod} to {to:?}");
    assert!(begun.elapsed() < AT_ONCE, "refused after {:?}", begun.elapsed());
}

/// An abnormal end, never a clean one.
fn assert_reset(stream: &mut TcpStream) {
    let error = stream.read(&mut [0; 64]).expect_err("a clean end");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

fn assert_nothing_in_clear(ledger: &Ledger) {
    assert!(ledger.only_tls(), "{ledger}");
    assert_eq!(ledger.dropped, 0, "{ledger}");
    assert_eq!(ledger.attempts.get(&PORT), None, "an attempt to connect in clear: {ledger}");
}

/// Every connection that reached a server of `agent` came with an identity.
fn assert_all_by_mutual_tls(agent: &Agent) {
    let opened = |labels: &[&str]| {
        let labels: Vec<&str> = [&["reporter=\"destination\""], labels].concat();
        agent.metric("istio_tcp_connections_opened_total", &labels).unwrap()
    };
    let mutual = opened(&["connection_security_policy=\"mutual_tls\""]);
    assert!(mutual > 0.0);
    assert_eq!(mutual, opened(&[]), "{}", agent.metrics().unwrap());
}

#[test]
fn killed_agent_of_the_client_refuses_and_sends_nothing_in_clear() {
    let mesh = two_nodes();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let load = Load::start(&mesh, "client", &both(&mesh, "server"), 3);
    load.wait_answered(100).unwrap();
    let mut live = open(&mesh, "client", both(&mesh, "server")[0]);

    a.process().kill().unwrap();
    assert_reset(&mut live);
    for to in both(&mesh, "server").into_iter().chain(both(&mesh, "near")) {
        assert_refused(&mesh, "client", to);
    }
    load.wait("refusals", |tally| tally.refused >= 100).unwrap();
    let before = load.tally().answered;

    let a = mesh.agent("a", &binary()).unwrap();
    assert_eq!(figures::enrolled(&a).unwrap().len(), 2);
    load.wait_answered(100).unwrap();
    let tally = load.stop();
    assert!(before < tally.answered, "{tally}");
    assert_eq!((tally.cut, tally.others.as_slice()), (0, [].as_slice()), "{tally}");
    assert_nothing_in_clear(&wire.finish().unwrap());
    assert_all_by_mutual_tls(&b);
}

#[test]
fn killed_agent_of_the_server_refuses_and_lets_nothing_in() {
    let mesh = two_nodes();
    let a = mesh.agent("a", &binary()).unwrap();
    let mut b = mesh.agent("b", &binary()).unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let load = Load::start(&mesh, "client", &both(&mesh, "server"), 3);
    load.wait_answered(100).unwrap();
    let mut live = open(&mesh, "client", both(&mesh, "server")[1]);

    b.process().kill().unwrap();
    assert_reset(&mut live);
    load.wait("resets", |tally| tally.reset >= 50).unwrap();
    for ip in mesh.pod("server").addresses() {
        // A node's own probe is not the mesh's business, with or without an agent.
        let probe = mesh
            .node("b")
            .place()
            .run(|| TcpStream::connect_timeout(&(ip, PORT).into(), LIMIT).map(drop));
        probe.unwrap();
    }
    // The wire sees these attempts, and no payload of theirs.
    let before_outsider = wire.finish().unwrap();
    for ip in mesh.pod("server").addresses() {
        for port in [PORT, 15008, 15006, 15001] {
            assert_refused(&mesh, "outsider", (ip, port));
        }
    }
    let wire = mesh.wire("a", "b").unwrap();

    let b = mesh.agent("b", &binary()).unwrap();
    load.wait_answered(100).unwrap();
    let tally = load.stop();
    assert_eq!((tally.cut, tally.others.as_slice()), (0, [].as_slice()), "{tally}");
    assert_eq!(tally.refused, 0, "the client's own agent takes what it can refuse: {tally}");
    assert_nothing_in_clear(&before_outsider);
    let after = wire.finish().unwrap();
    assert!(after.clear.is_empty() && !after.attempts.contains_key(&PORT), "{after}");
    assert_all_by_mutual_tls(&b);
    drop(a);
}

#[test]
fn killed_agent_refuses_between_pods_of_its_node_and_carries_on_afterwards() {
    let mesh = two_nodes();
    // What the kernel carries goes on without an agent, for a while.
    let options = through_agent(&mesh);
    let mut a = mesh.agent_with("a", &options).unwrap();
    let load = Load::start(&mesh, "client", &both(&mesh, "near"), 2);
    load.wait_answered(100).unwrap();
    let start = Figures::of(&a).unwrap();
    let mut live = open(&mesh, "client", both(&mesh, "near")[0]);

    a.process().kill().unwrap();
    assert_reset(&mut live);
    for to in both(&mesh, "near") {
        assert_refused(&mesh, "client", to);
        assert_refused(&mesh, "outsider", to);
    }
    load.wait("refusals", |tally| tally.refused >= 50).unwrap();

    let a = mesh.agent_with("a", &options).unwrap();
    load.wait_answered(100).unwrap();
    let tally = load.stop();
    assert_eq!((tally.cut, tally.others.as_slice()), (0, [].as_slice()), "{tally}");
    // The adopted pods are those of before, not twice as many.
    let entries = |figures: &Figures| figures.entries.get("cv_pods").copied();
    assert_eq!(entries(&Figures::of(&a).unwrap()), entries(&start));
}

/// The mesh's file with one text replaced by another, as a file of its own.
fn edited(mesh: &Running, from: &str, to: &str) -> PathBuf {
    let text = std::fs::read_to_string(mesh.config()).unwrap();
    assert!(text.contains(from), "no {from:?} in:\n{text}");
    let path = mesh.lab().state().join("edited.yaml");
    std::fs::write(&path, text.replacen(from, to, 1)).unwrap();
    path
}

/// A call that is taken by the agent and then reset.
fn assert_taken_and_reset(mesh: &Running, pod: &str, to: (IpAddr, u16)) {
    let error = connect(mesh, pod, to).and_then(|mut stream| exchange(&mut stream));
    let error = error.expect_err("an answer").kind();
    assert!(matches!(error, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error}");
}

#[test]
fn starting_agent_refuses_what_an_earlier_one_captured() {
    let mesh = two_nodes();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    a.process().kill().unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let options = AgentOptions::new(&binary(), &mesh.config());
    for _ in 0..3 {
        let mut a = mesh.start_agent("a", &options).unwrap();
        a.process().signal(libc::SIGSTOP).unwrap();
        for to in both(&mesh, "server") {
            assert_refused(&mesh, "client", to);
        }
        a.process().kill().unwrap();
    }
    let _a = mesh.agent("a", &binary()).unwrap();
    for to in both(&mesh, "server") {
        assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello");
    }
    assert_nothing_in_clear(&wire.finish().unwrap());
}

#[test]
fn agent_that_cannot_start_says_why_and_leaves_its_pods_refused() {
    let mesh = two_nodes();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    assert_eq!(call(&mesh, "client", both(&mesh, "server")[0], "hello").unwrap(), "hello");
    a.process().kill().unwrap();
    let key = mesh.ca().join("root.key");
    let mode = |mode| std::fs::set_permissions(&key, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o644);
    let broken = edited(&mesh, "serviceAccount:", "serviceAcount:");
    for (config, reason) in [(mesh.config(), "root.key"), (broken, "serviceAcount")] {
        let options = AgentOptions::new(&binary(), &config);
        let mut a = mesh.start_agent("a", &options).unwrap();
        let ended = wait::until_some("the agent's end", wait::SOON, || {
            a.process().ended().ok_or("it runs")
        });
        assert!(!ended.unwrap().success());
        let told = a.process().log_tail(2);
        assert!(told.contains(reason), "{told}");
        assert_refused(&mesh, "client", both(&mesh, "server")[0]);
        assert_refused(&mesh, "outsider", both(&mesh, "near")[1]);
    }
    mode(0o600);
    let _a = mesh.agent("a", &binary()).unwrap();
    for name in ["server", "near"] {
        for to in both(&mesh, name) {
            assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello");
        }
    }
}

/// The mesh's file with one pod in a trust domain for which the authority signs nothing.
fn with_foreign(mesh: &Running, pod: &str) -> PathBuf {
    let uid = mesh.spec(pod).uid();
    let text = std::fs::read_to_string(mesh.config()).unwrap();
    let (before, own) = text.split_once(&uid).unwrap();
    let own = own.replacen("trustDomain: cluster.local", "trustDomain: elsewhere.example", 1);
    let path = mesh.lab().state().join("foreign.yaml");
    std::fs::write(&path, format!("{before}{uid}{own}")).unwrap();
    path
}

#[test]
fn server_without_a_certificate_takes_no_tunnel() {
    let mesh = two_nodes();
    let config = with_foreign(&mesh, "server");
    let agents = ["a", "b"]
        .map(|node| mesh.agent_with(node, &AgentOptions::new(&binary(), &config)).unwrap());
    let wire = mesh.wire("a", "b").unwrap();
    for to in both(&mesh, "server") {
        assert_taken_and_reset(&mesh, "client", to);
    }
    for to in both(&mesh, "near") {
        assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello");
    }
    let log = agents[1].log();
    assert!(log.contains("identity error") && log.contains("elsewhere.example"), "{log}");
    let ledger = wire.finish().unwrap();
    assert!(ledger.clear.is_empty() && !ledger.attempts.contains_key(&PORT), "{ledger}");
}

#[test]
fn client_without_a_certificate_is_refused_as_an_identity_error() {
    let mesh = two_nodes();
    let config = with_foreign(&mesh, "client");
    let a = mesh.agent_with("a", &AgentOptions::new(&binary(), &config)).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    for to in both(&mesh, "server").into_iter().chain(both(&mesh, "near")) {
        assert_taken_and_reset(&mesh, "client", to);
    }
    let closed = |labels: &[&str]| a.metric("istio_tcp_connections_closed_total", labels).unwrap();
    wait::until("the metrics", wait::SOON, || {
        closed(&["response_flags=\"IDENTITY_ERROR\"", "reporter=\"source\""]) >= 4.0
    })
    .unwrap();
    logged(&a, &["identity error", "elsewhere.example"]).unwrap();
    let ledger = wire.finish().unwrap();
    assert!(ledger.clear.is_empty() && ledger.attempts.is_empty(), "{ledger}");
}

#[test]
fn certificate_that_cannot_be_renewed_refuses_new_connections_and_says_so() {
    let mesh = two_nodes();
    let life = time::Duration::seconds(16);
    short_root(&mesh.ca(), life);
    let mut a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let mut live = open(&mesh, "client", both(&mesh, "server")[0]);
    // Not even the tunnel that is open already is used without a valid certificate.
    let wire = mesh.wire("a", "b").unwrap();
    for name in ["server", "near"] {
        wait::until_some("the certificate's end", wait::SOON * 2, || {
            let answer = call(&mesh, "client", both(&mesh, name)[0], "hello");
            answer.map_or(Ok(()), Err)
        })
        .unwrap();
        assert_taken_and_reset(&mesh, "client", both(&mesh, name)[1]);
    }
    let flagged = a.metric("istio_tcp_connections_closed_total", &["IDENTITY_ERROR"]).unwrap();
    assert!(flagged >= 2.0, "{}", a.metrics().unwrap());
    let log = a.log();
    assert!(log.contains("root certificate expired"), "{log}");
    let shown = a.cli(&["certificates"]).unwrap();
    assert!(shown.contains("Unavailable"), "{shown}");
    exchange(&mut live).unwrap();
    let ledger = wire.finish().unwrap();
    assert!(ledger.clear.is_empty() && !ledger.attempts.contains_key(&PORT), "{ledger}");
    a.process().kill().unwrap();
    drop(b);
}

/// A root that ends soon, in the place of the one that agents make for themselves.
fn short_root(directory: &std::path::Path, life: time::Duration) {
    std::fs::create_dir_all(directory).unwrap();
    std::fs::set_permissions(directory, PermissionsExt::from_mode(0o700)).unwrap();
    let key = rcgen::KeyPair::generate().unwrap();
    let mut root = rcgen::CertificateParams::default();
    root.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    root.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let now = time::OffsetDateTime::now_utc();
    (root.not_before, root.not_after) = (now - time::Duration::minutes(1), now + life);
    let path = directory.join("root.key");
    std::fs::write(&path, key.serialize_pem()).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(directory.join("root.pem"), root.self_signed(&key).unwrap().pem()).unwrap();
}

#[test]
fn certificates_are_renewed_at_half_life_under_connections_that_live_on() {
    let mut mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .pod("late", "web", "late")
        .node("b")
        .pod("server", "shop", "server");
    let life = Duration::from_secs(20);
    mesh.certificate_ttl = life;
    let mesh = mesh.start().unwrap();
    serve(&mesh, "server", PORT, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let mut live = open(&mesh, "client", both(&mesh, "server")[0]);
    let load = Load::start(&mesh, "client", &both(&mesh, "server"), 1);
    let begun = Instant::now();
    for (agent, pod) in [(&a, "client"), (&b, "server")] {
        let identity = mesh.spec(pod).identity();
        let first = figures::serial(agent, &identity).unwrap().unwrap();
        wait::until(format!("another certificate of {pod}"), wait::SOON, || {
            exchange(&mut live).unwrap();
            let now = figures::serial(agent, &identity).unwrap().unwrap();
            now != first
        })
        .unwrap();
    }
    assert!(begun.elapsed() < life, "later than the first certificate's end");
    // A pool of its own: the handshake is between the new certificates.
    assert_eq!(call(&mesh, "late", both(&mesh, "server")[1], "hello").unwrap(), "hello");
    exchange(&mut live).unwrap();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
}
