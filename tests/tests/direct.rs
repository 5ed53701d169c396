//! Connections within a node that the kernel carries: who may, at what cost, and for how long.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_tests::direct::{
    Lateness, Stream, Verdict, closed, opened, straight_again, verdict, warm, with,
};
use culvert_tests::expect::{answer, counted, edit, is_refused, is_reset, logged, rule};
use culvert_tests::hunt::{Hunt, answer_one};
use culvert_tests::load::Load;
use culvert_tests::upgrade::{patient, upgrade, wait_ended};
use culvert_tests::{LIMIT, binary, call, connect, echo, serve, who};

const PORT: u16 = 8080;

fn one_node() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("other", "web", "other")
        .pod("near", "shop", "near")
}

fn started() -> Running {
    let mesh = one_node().start().unwrap();
    serve(&mesh, "near", PORT, echo).unwrap();
    mesh
}

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

/// Only what comes with an identity of the mesh is let in.
fn strict() -> PolicySpec {
    let plaintext = Match::any().with("notPrincipals", "[!Presence []]");
    PolicySpec::deny("strict", "shop", vec![rule(plaintext)])
}

fn no_client() -> PolicySpec {
    PolicySpec::deny("no-client", "shop", vec![rule(Match::any().service_account("web", "client"))])
}

/// Processor time that the agent has used.
fn processor_time(agent: &Agent) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", agent.pid())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    // `USER_HZ` is 100 on every architecture that Linux still builds for.
    Duration::from_millis(ticks * 10)
}

fn kill(agent: &mut Agent) {
    agent.process().kill().unwrap();
}

#[test]
fn second_connection_goes_straight_and_shows_the_client_as_it_is() {
    let mesh = one_node()
        .service(ServiceSpec::new("near", "shop").port(80, PORT).endpoint("near"))
        .policy(strict())
        .start()
        .unwrap();
    serve(&mesh, "near", PORT, who).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let destinations = [both(&mesh, "near"), mesh.service("near").map(|ip| (ip, 80))].concat();
    for to in destinations {
        warm(&mesh, &a, "client", to).unwrap();
        let before = opened(&a).unwrap();
        let own = mesh.pod("client").addresses();
        let own = own.into_iter().find(|ip| ip.is_ipv4() == to.0.is_ipv4()).unwrap();
        let mut stream = connect(&mesh, "client", to).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), SocketAddr::from(to));
        let mut seen = String::new();
        stream.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, own.to_string());
        assert_eq!(opened(&a).unwrap(), before + 1.0, "{to:?}");
    }
}

#[test]
fn what_the_kernel_carries_costs_the_agent_nothing_and_is_told_all_the_same() {
    const TOTAL: usize = 256 << 20;
    let mesh = one_node().start().unwrap();
    serve(&mesh, "near", PORT, |mut stream, _| {
        let mut buffer = vec![0; 1 << 20];
        while let Ok(1..) = stream.read(&mut buffer) {}
        // The client counts what has arrived.
        let _ = stream.write_all(b"done");
    })
    .unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near")[0];
    let send = |bytes: usize| {
        let mut stream = connect(&mesh, "client", to).unwrap();
        stream.set_read_timeout(Some(LIMIT * 12)).unwrap();
        let block = vec![7; 1 << 20];
        for _ in 0..bytes >> 20 {
            stream.write_all(&block).unwrap();
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "done");
    };
    let given = || {
        send(1 << 20);
        verdict(&a, "web/client", to).unwrap() == Verdict::Given
    };
    wait::until("a verdict", wait::SOON, given).unwrap();
    let received =
        |a: &Agent| a.metric("istio_tcp_received_bytes_total", &["reporter=\"source\""]).unwrap();
    let told = received(&a);
    let before = processor_time(&a);
    send(TOTAL);
    let cost = processor_time(&a).saturating_sub(before);
    assert!(cost <= Duration::from_millis(60), "{cost:?} for {TOTAL} bytes");
    wait::until("the bytes to be told", wait::SOON, || received(&a) >= told + TOTAL as f64)
        .unwrap();
    let labels = ["source_principal=\"spiffe://cluster.local/ns/web/sa/client\""];
    assert!(a.metric("culvert_direct_connect_seconds_count", &labels).unwrap() >= 1.0);
    assert!(a.metric("culvert_direct_round_trip_seconds_count", &labels).unwrap() >= 1.0);
    let line = logged(&a, &["connection complete", "inbound", &format!("bytes_recv={TOTAL}")]);
    assert!(line.unwrap().contains("src.identity"));
}

#[test]
fn live_connections_are_listed_as_direct() {
    let mesh = started();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near")[0];
    warm(&mesh, &a, "client", to).unwrap();
    let stream = Stream::start(&mesh, "client", to).unwrap();
    let listed = || {
        let all = answer(&a, "/culvert/connections").unwrap();
        let direct = all.as_array().unwrap().iter().filter(|it| it["protocol"] == "DIRECT");
        let directions: Vec<_> =
            direct.map(|it| it["direction"].as_str().unwrap().to_owned()).collect();
        directions.len() == 2 && directions.contains(&"inbound".to_owned())
    };
    wait::until("both ends in the list", wait::SOON, listed).unwrap();
    // What it has carried is told before it ends, in the client's direction and back, at both ends.
    let carried = || {
        let all = answer(&a, "/culvert/connections").unwrap();
        let bytes = |name: &str| -> Vec<u64> {
            all.as_array().unwrap().iter().filter_map(|it| it[name].as_u64()).collect()
        };
        let all = [bytes("received"), bytes("sent")].concat();
        all.len() == 4 && all.into_iter().all(|bytes| bytes > 100_000)
    };
    wait::until("bytes in the list", wait::SOON, carried).unwrap();
    let pods = answer(&a, "/culvert/pods").unwrap();
    let of = |name: &str| {
        let mut pods = pods.as_array().unwrap().iter();
        pods.find(|pod| pod["name"] == name).unwrap()["verdicts"].as_u64().unwrap()
    };
    assert_eq!((of("client"), of("near")), (1, 0));
    stream.stop().unwrap();
    let gone = || answer(&a, "/culvert/connections").unwrap().as_array().unwrap().is_empty();
    wait::until("an empty list", wait::SOON, gone).unwrap();
}

#[test]
fn closed_port_refuses_at_once_and_is_told_as_a_failure() {
    let mesh = one_node().start().unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near")[0];
    let listener =
        mesh.pod("near").place().run(|| TcpListener::bind(SocketAddr::from(to))).unwrap();
    let accepting = std::thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            if text == "end" {
                return;
            }
            stream.write_all(text.as_bytes()).unwrap();
        }
    });
    warm(&mesh, &a, "client", to).unwrap();
    call(&mesh, "client", to, "end").unwrap();
    accepting.join().unwrap();
    let failed = ["reporter=\"source\"", "response_flags=\"CONNECT\""];
    closed(mesh.pod("near").place(), to.into()).unwrap();
    let error = connect(&mesh, "client", to).expect_err("connected");
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    counted(&a, "istio_tcp_connections_failed_total", &failed, 1.0).unwrap();
}

#[test]
fn denied_connections_end_within_a_moment_and_new_ones_are_refused() {
    let mut mesh = started();
    let a = mesh.agent("a", &binary()).unwrap();
    for to in both(&mesh, "near") {
        for pod in ["client", "other"] {
            warm(&mesh, &a, pod, to).unwrap();
        }
        let denied = connect(&mesh, "client", to).unwrap();
        let stays = Stream::start(&mesh, "other", to).unwrap();
        stays.wait(10).unwrap();
        edit(&mut mesh, &[&a], |mesh| mesh.policies.push(no_client())).unwrap();
        // The agent has taken the edit over: from now on nothing is admitted.
        assert_ne!(verdict(&a, "web/client", to).unwrap(), Verdict::Given);
        is_refused(&mesh, "client", to).unwrap();
        let mut denied = denied;
        match denied.read(&mut [0; 8]) {
            Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "goes on"),
            Ok(count) => panic!("{count} bytes of a connection that is denied"),
        }
        stays.wait(10).unwrap();
        stays.stop().unwrap();
        assert_eq!(verdict(&a, "web/other", to).unwrap(), Verdict::Given);
        edit(&mut mesh, &[&a], |mesh| mesh.policies.clear()).unwrap();
    }
    let closed = a.metric("culvert_authorization_rejudged_closings_total", &[]).unwrap();
    assert!(closed >= 2.0, "{closed}");
    let late = Lateness::of(&a).unwrap();
    assert!(late.count >= 2.0 && late.within_a_second == late.count, "{late:?}");
    logged(&a, &["connection complete", "policy change", "no-client"]).unwrap();
}

/// A service of two pods of the node that policies can tell apart, and its address.
fn service_of_two() -> (Running, (IpAddr, u16)) {
    let service =
        ServiceSpec::new("both", "shop").port(80, PORT).endpoint("near").endpoint("apart");
    let mesh = one_node().pod("apart", "depot", "apart").service(service).start().unwrap();
    for pod in ["near", "apart"] {
        serve(&mesh, pod, PORT, echo).unwrap();
    }
    let to = (mesh.service("both")[0], 80);
    (mesh, to)
}

/// The kernel admits to both pods of a service, and thereby to the service's address.
fn warm_all(mesh: &Running, agent: &Agent, service: (IpAddr, u16)) {
    let pods = ["near", "apart"].map(|pod| both(mesh, pod)[0]);
    for to in pods.into_iter().chain([service]) {
        warm(mesh, agent, "client", to).unwrap();
    }
}

#[test]
fn flows_outlive_fifty_deaths_of_the_agent_and_lose_no_byte() {
    let (mesh, service) = service_of_two();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near");
    for to in to {
        warm(&mesh, &a, "client", to).unwrap();
    }
    warm_all(&mesh, &a, service);
    let streams = to.map(|to| Stream::start(&mesh, "client", to).unwrap());
    let load = Load::start(&mesh, "client", &[to[0], to[1], service], 2);
    for round in 0..50 {
        kill(&mut a);
        // Nobody is there, and connections are made all the same.
        load.wait_answered(20).unwrap();
        streams.iter().for_each(|stream| stream.wait(5).unwrap());
        a = mesh.agent("a", &binary()).unwrap();
        // An agent that is ready has taken up what stands.
        for to in [to[0], service] {
            let found = verdict(&a, "web/client", to).unwrap();
            assert_eq!(found, Verdict::Given, "round {round}, {to:?}");
        }
    }
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    for stream in streams {
        stream.stop().unwrap();
    }
}

#[test]
fn flows_outlive_twenty_upgrades_and_lose_no_byte() {
    let mesh = started();
    let options = patient(&mesh);
    let mut a = mesh.agent_with("a", &options).unwrap();
    let to = both(&mesh, "near");
    for to in to {
        warm(&mesh, &a, "client", to).unwrap();
    }
    let streams = to.map(|to| Stream::start(&mesh, "client", to).unwrap());
    let load = Load::start(&mesh, "client", &to, 2);
    for round in 0..20 {
        let new = upgrade(&mesh, "a", &a, &options).unwrap();
        let mut old = std::mem::replace(&mut a, new);
        load.wait_answered(20).unwrap();
        streams.iter().for_each(|stream| stream.wait(5).unwrap());
        wait_ended(&mut old).unwrap();
        assert_eq!(load.tally().failed(), 0, "round {round}: {}", load.tally());
    }
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    for stream in streams {
        stream.stop().unwrap();
    }
    assert_eq!(verdict(&a, "web/client", to[0]).unwrap(), Verdict::Given);
}

/// What is left when an agent is killed that let two pods go straight to where it says.
fn left_behind() -> (Running, (IpAddr, u16)) {
    let mesh = started();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near")[0];
    for pod in ["client", "other"] {
        warm(&mesh, &a, pod, to).unwrap();
    }
    kill(&mut a);
    (mesh, to)
}

/// Starts an agent that gets no certificates, and waits until it has its pods.
fn unproven(mesh: &Running) -> Agent {
    // Nobody listens there.
    let options = with(mesh, &[("CA_ADDRESS", "https://127.0.0.1:1")]);
    let a = Agent::start(mesh.lab(), mesh.node("a"), &options).unwrap();
    // The log is that of both agents.
    let up = || a.log().matches("culvert is up").count() == 2;
    wait::until("the pods to be enrolled", wait::SOON, up).unwrap();
    a
}

#[test]
fn agent_that_comes_back_takes_back_what_changed_meanwhile() {
    let (mut mesh, to) = left_behind();
    let mut denied = connect(&mesh, "client", to).unwrap();
    let stays = Stream::start(&mesh, "other", to).unwrap();
    mesh.change(|mesh| mesh.policies.push(no_client())).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    // From when it is ready, nothing goes by what the one before it decided.
    is_refused(&mesh, "client", to).unwrap();
    assert_eq!(verdict(&a, "web/other", to).unwrap(), Verdict::Given);
    match denied.read(&mut [0; 8]) {
        Err(error) => assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "goes on"),
        Ok(count) => panic!("{count} bytes of a connection that is denied"),
    }
    stays.wait(10).unwrap();
    stays.stop().unwrap();
}

#[test]
fn agent_without_certificates_lets_stand_what_is_permitted_and_takes_back_what_is_denied() {
    let (mut mesh, to) = left_behind();
    let denied = connect(&mesh, "client", to).unwrap();
    let a = unproven(&mesh);
    for pod in ["client", "other"] {
        assert_eq!(call(&mesh, pod, to, "still").unwrap(), "still");
    }
    edit(&mut mesh, &[&a], |mesh| mesh.policies.push(no_client())).unwrap();
    is_refused(&mesh, "client", to).unwrap();
    is_reset(&denied).unwrap();
    assert_eq!(call(&mesh, "other", to, "still").unwrap(), "still");
    let pending = || answer(&a, "/culvert/status").unwrap()["pending"].clone();
    assert_eq!(pending(), serde_json::json!(["verdicts of an earlier agent"]));
    // What it cannot prove is taken back at last.
    logged(&a, &["not all pods", "certificate"]).unwrap();
    wait::until("it to be ready", wait::SOON, || pending() == serde_json::json!([])).unwrap();
    is_refused(&mesh, "other", to).unwrap();
}

#[test]
fn agent_without_certificates_takes_back_what_is_denied_at_one_of_two_backends() {
    let (mut mesh, service) = service_of_two();
    let mut a = mesh.agent("a", &binary()).unwrap();
    warm_all(&mesh, &a, service);
    kill(&mut a);
    let a = unproven(&mesh);
    let apart = both(&mesh, "apart")[0];
    for to in [service, apart] {
        assert_eq!(call(&mesh, "client", to, "still").unwrap(), "still");
    }
    // At the other one only.
    edit(&mut mesh, &[&a], |mesh| mesh.policies.push(no_client())).unwrap();
    for _ in 0..20 {
        is_refused(&mesh, "client", service).unwrap();
    }
    assert_eq!(call(&mesh, "client", apart, "still").unwrap(), "still");
}

#[test]
fn without_an_agent_verdicts_end_after_the_time_that_was_set() {
    let mesh = started();
    let time = Duration::from_secs(3);
    let options = with(&mesh, &[("CULVERT_SAME_NODE_ADMIT_TIME", "3s")]);
    let mut a = mesh.agent_with("a", &options).unwrap();
    let to = both(&mesh, "near")[0];
    warm(&mesh, &a, "client", to).unwrap();
    let stream = Stream::start(&mesh, "client", to).unwrap();
    // It is extended for as long as there is an agent.
    let begun = Instant::now();
    wait::until("two times the time", wait::SOON, || begun.elapsed() > time * 2).unwrap();
    assert_eq!(call(&mesh, "client", to, "still").unwrap(), "still");
    kill(&mut a);
    assert_eq!(call(&mesh, "client", to, "again").unwrap(), "again");
    let ended = || connect(&mesh, "client", to).is_err();
    wait::until("connections to be refused", wait::SOON, ended).unwrap();
    stream.wait(10).unwrap();
    stream.stop().unwrap();
    let _a = mesh.agent_with("a", &options).unwrap();
    assert_eq!(call(&mesh, "client", to, "back").unwrap(), "back");
}

#[test]
fn while_policies_flip_nothing_is_admitted_that_is_denied() {
    const FLIPS: usize = 300;
    let mut mesh = started();
    let a = mesh.agent("a", &binary()).unwrap();
    let [ip, _] = mesh.pod("near").addresses();
    let to = (ip, 8081);
    serve(&mesh, "near", to.1, answer_one).unwrap();
    warm(&mesh, &a, "client", to).unwrap();
    let hunt = Hunt::start(&mesh, "client", &[to; 3]);
    // What flips beside it touches nobody's verdict.
    let unrelated = PolicySpec::deny("unrelated", "web", vec![rule(Match::any().port(1))]);
    for flip in 0..FLIPS {
        mesh.change(|mesh| {
            mesh.policies.clear();
            if flip % 2 == 0 {
                mesh.policies.push(unrelated.clone());
            }
        })
        .unwrap();
        wait::pass(Duration::from_millis(5));
    }
    for _ in 0..20 {
        edit(&mut mesh, &[&a], |mesh| mesh.policies.push(no_client())).unwrap();
        hunt.denied();
        wait::pass(Duration::from_millis(100));
        hunt.undone();
        edit(&mut mesh, &[&a], |mesh| mesh.policies.clear()).unwrap();
        straight_again(&a, 20).unwrap();
    }
    let tally = hunt.end();
    assert_eq!(tally.served_though_denied, 0, "{tally:?}");
    assert!(tally.denied >= 20 && tally.served >= 400, "{tally:?}");
}

#[test]
fn with_room_for_one_verdict_in_a_hundred_all_destinations_are_reached() {
    const PORTS: std::ops::Range<u16> = 9000..9100;
    let mesh = one_node().start().unwrap();
    for port in PORTS {
        serve(&mesh, "near", port, echo).unwrap();
    }
    let options = with(&mesh, &[("CULVERT_SAME_NODE_VERDICTS", "1")]);
    let a = mesh.agent_with("a", &options).unwrap();
    for ip in mesh.pod("near").addresses() {
        for port in PORTS.chain(PORTS) {
            let text = port.to_string();
            assert_eq!(call(&mesh, "client", (ip, port), &text).unwrap(), text);
        }
    }
    assert!(a.metric("culvert_direct_verdicts_refused_total", &[]).unwrap() > 0.0);
    assert_eq!(a.metric("culvert_direct_verdicts", &[]).unwrap(), 1.0);
}

/// A server that counts what it accepted, per port.
fn counting(mesh: &Running, pod: &str, port: u16) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    serve(mesh, pod, port, move |stream, peer| {
        counted.fetch_add(1, Ordering::SeqCst);
        echo(stream, peer);
    })
    .unwrap();
    count
}

#[test]
fn pod_that_takes_over_an_address_is_not_reached_by_the_verdict_on_the_old_one() {
    let mut mesh = started();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near");
    for to in to {
        warm(&mesh, &a, "client", to).unwrap();
    }
    let streams = to.map(|to| Stream::start(&mesh, "client", to).unwrap());
    streams.iter().for_each(|stream| stream.wait(5).unwrap());
    // Another namespace and another identity, which does not want the client.
    let deny = Match::any().service_account("web", "client");
    mesh.change(|mesh| mesh.policies.push(PolicySpec::deny("not-here", "vault", vec![rule(deny)])))
        .unwrap();
    mesh.replace_pod("near", PodSpec::new("heir", "vault", "heir")).unwrap();
    let admitted = counting(&mesh, "heir", PORT);
    for stream in &streams {
        wait::until("the stream's end", wait::SOON * 3, || stream.is_finished()).unwrap();
    }
    // The heir serves whom it wants, which shows that it is there.
    for to in to {
        warm(&mesh, &a, "other", to).unwrap();
    }
    let before = admitted.load(Ordering::SeqCst);
    for to in to {
        assert_ne!(verdict(&a, "web/client", to).unwrap(), Verdict::Given);
        is_refused(&mesh, "client", to).unwrap();
    }
    assert_eq!(admitted.load(Ordering::SeqCst), before);
}

#[test]
fn pod_with_anothers_address_gets_nowhere() {
    let mesh = one_node().policy(PolicySpec::allow(
        "only-client",
        "shop",
        vec![rule(Match::any().service_account("web", "client"))],
    ));
    let mesh = mesh.start().unwrap();
    serve(&mesh, "near", PORT, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near")[0];
    warm(&mesh, &a, "client", to).unwrap();
    let before = opened(&a).unwrap();
    let own = mesh.pod("client").v4();
    let forger = mesh.pod("other").place().netns().clone();
    forger.ip(&format!("addr add {own}/32 dev lo\n")).unwrap();
    let forged = forger.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::from((own, 0)).into())?;
        socket.connect_timeout(&SocketAddr::from(to).into(), LIMIT)?;
        Ok::<_, std::io::Error>(TcpStream::from(socket))
    });
    // Captured and refused, or without a way back: never let in.
    if let Ok(stream) = forged {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        is_reset(&stream).unwrap();
    }
    is_refused(&mesh, "other", to).unwrap();
    assert_eq!(opened(&a).unwrap(), before);
    assert_eq!(call(&mesh, "client", to, "mine").unwrap(), "mine");
}

#[test]
fn service_draws_here_and_elsewhere_by_weight() {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod_with(PodSpec::new("near", "shop", "near").with("capacity", "1"))
        .node("b")
        .pod_with(PodSpec::new("far", "shop", "far").with("capacity", "3"))
        .service(ServiceSpec::new("both", "shop").port(80, PORT).endpoint("near").endpoint("far"))
        .start()
        .unwrap();
    let counts = ["near", "far"].map(|pod| counting(&mesh, pod, PORT));
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let to = (mesh.service("both")[0], 80);
    warm(&mesh, &a, "client", to).unwrap();
    let before = counts.each_ref().map(|count| count.load(Ordering::SeqCst));
    let direct = opened(&a).unwrap();
    const CALLS: u64 = 400;
    for _ in 0..CALLS {
        assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello");
    }
    let near = counts[0].load(Ordering::SeqCst) - before[0];
    let far = counts[1].load(Ordering::SeqCst) - before[1];
    assert_eq!(near + far, CALLS);
    // A quarter of them, give or take more than five standard deviations.
    assert!(near.abs_diff(CALLS / 4) < 45, "{near} near, {far} far");
    assert_eq!(opened(&a).unwrap() - direct, near as f64);
}

#[test]
fn where_tunnels_are_asked_for_nothing_goes_straight() {
    for (settings, straight) in [
        (&[("CULVERT_SAME_NODE", "tunnel")][..], false),
        (&[("CULVERT_SAME_NODE", "agent")], false),
        (&[("CULVERT_SAME_NODE_TUNNELS", "shop/near")], false),
        (&[("CULVERT_SAME_NODE_TUNNELS", "web")], false),
        (&[("CULVERT_SAME_NODE_TUNNELS", "shop/far,pay")], true),
    ] {
        let mesh = started();
        let a = mesh.agent_with("a", &with(&mesh, settings)).unwrap();
        let to = both(&mesh, "near")[0];
        if straight {
            warm(&mesh, &a, "client", to).unwrap();
            continue;
        }
        for _ in 0..5 {
            assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello", "{settings:?}");
        }
        assert_eq!(opened(&a).unwrap(), 0.0);
        let tunnelled = settings != [("CULVERT_SAME_NODE", "agent")];
        let connections = a.metric("culvert_tunnel_connections", &[]).unwrap();
        assert_eq!(connections > 0.0, tunnelled, "{settings:?}");
    }
}
