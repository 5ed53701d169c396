//! The same life in all three arrangements: pods told by the mesh file or by istio-cni, connections
//! brought by the kernel programs, by istio-cni's rules, or by the programs beside those rules.

#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_tests::cni::{self, Add, Arrangement, Listening, PodRules, Town};
use culvert_tests::expect::{counted, is_refused, logged, rule};
use culvert_tests::load::{Load, TEXT};
use culvert_tests::{LIMIT, call, connect, echo, exchange, figures, serve, who};

const PORT: u16 = 8080;

macro_rules! in_each_arrangement {
    ($($scenario:ident),+ $(,)?) => {
        mod told_by_file { $(#[test] fn $scenario() { super::$scenario(super::Arrangement::File); })+ }
        mod brought_by_rules { $(#[test] fn $scenario() { super::$scenario(super::Arrangement::Rules); })+ }
        mod beside_rules { $(#[test] fn $scenario() { super::$scenario(super::Arrangement::Beside); })+ }
    };
}

in_each_arrangement![
    pods_and_services_are_called,
    strangers_are_served_as_policies_say,
    policies_know_who_calls,
    own_business_stays_in_the_pod,
    enrolling_and_withdrawing_under_load_loses_no_connection,
    restarted_agent_takes_up_its_pods,
    ports_of_the_agent_are_nobodys_destination,
];

macro_rules! with_istio_cni {
    ($($scenario:ident),+ $(,)?) => {
        mod rules { $(#[test] fn $scenario() { super::$scenario(super::Arrangement::Rules); })+ }
        mod rules_and_programs { $(#[test] fn $scenario() { super::$scenario(super::Arrangement::Beside); })+ }
    };
}

with_istio_cni![
    restarted_istio_cni_changes_nothing,
    snapshots_decide_which_pods_stay,
    faults_of_istio_cni_cut_no_connection,
    taken_port_is_tried_again,
    pods_are_served_before_their_workload_is_known,
    the_address_of_probes_is_of_no_use_to_pods,
    guests_of_a_pod_call_as_the_pod,
    a_pod_that_bypasses_inbound_capture_takes_tunnels_all_the_same,
];

fn strict() -> PolicySpec {
    let plaintext = Match::any().with("notPrincipals", "[!Presence []]");
    PolicySpec::deny("strict", "shop", vec![rule(plaintext)])
}

/// A client, a server on its node and one on another, each with a service.
fn town(arrangement: Arrangement) -> Town {
    town_with(arrangement, |mesh| mesh, |mesh| mesh)
}

/// The same with more on each node.
fn town_with(
    arrangement: Arrangement,
    on_a: impl FnOnce(Mesh) -> Mesh,
    on_b: impl FnOnce(Mesh) -> Mesh,
) -> Town {
    let mesh = Mesh::new().node("a").pod("client", "web", "client").pod("near", "shop", "server");
    let mesh = on_b(on_a(mesh).node("b").pod("far", "shop", "server"))
        .service(ServiceSpec::new("near", "shop").port(80, PORT).endpoint("near"))
        .service(ServiceSpec::new("far", "shop").port(80, PORT).endpoint("far"));
    let town = Town::start(mesh, arrangement).unwrap();
    for pod in ["near", "far"] {
        serve(&town.mesh, pod, PORT, echo).unwrap();
        serve(&town.mesh, pod, 8081, who).unwrap();
    }
    town
}

fn agents(town: &Town) -> [Agent; 2] {
    ["a", "b"].map(|node| town.agent(node).unwrap())
}

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

fn own_address(mesh: &Running, pod: &str, like: IpAddr) -> String {
    let [v4, v6] = mesh.pod(pod).addresses();
    if like.is_ipv4() { v4.to_string() } else { v6.to_string() }
}

fn assert_answered(mesh: &Running, from: &str, pods: &[&str]) {
    for pod in pods {
        for to in both(mesh, pod) {
            assert_eq!(call(mesh, from, to, "hello").unwrap(), "hello", "{pod} {to:?}");
        }
    }
}

fn say(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(TEXT)?;
    let mut answer = vec![0; TEXT.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, TEXT);
    Ok(())
}

fn open(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> TcpStream {
    let mut stream = connect(mesh, pod, to).unwrap();
    say(&mut stream).unwrap();
    stream
}

fn finish(mut stream: TcpStream) {
    say(&mut stream).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

fn pods_and_services_are_called(arrangement: Arrangement) {
    let town = town(arrangement);
    let mesh = &town.mesh;
    let _agents = agents(&town);
    let wire = mesh.wire("a", "b").unwrap();
    for name in ["near", "far"] {
        assert_answered(mesh, "client", &[name]);
        for ip in mesh.pod(name).addresses() {
            let seen = call(mesh, "client", (ip, 8081), "").unwrap();
            assert_eq!(seen, own_address(mesh, "client", ip), "{name} {ip}");
        }
        for ip in mesh.service(name) {
            assert_eq!(call(mesh, "client", (ip, 80), "hello").unwrap(), "hello", "{name} {ip}");
            is_refused(mesh, "client", (ip, 81)).unwrap();
        }
    }
    let ledger = wire.finish().unwrap();
    assert!(ledger.only_tls(), "{ledger}");
    assert_eq!(ledger.attempts.keys().collect::<Vec<_>>(), [&15008], "{ledger}");
}

fn strangers_are_served_as_policies_say(arrangement: Arrangement) {
    let mut town = town_with(
        arrangement,
        |mesh| mesh.pod_with(PodSpec::outside("plain", "web", "plain")),
        |mesh| mesh.pod_with(PodSpec::unknown("stranger")),
    );
    let [a, b] = agents(&town);
    for caller in ["stranger", "plain"] {
        for name in ["near", "far"] {
            assert_answered(&town.mesh, caller, &[name]);
            for ip in town.mesh.pod(name).addresses() {
                let seen = call(&town.mesh, caller, (ip, 8081), "").unwrap();
                assert_eq!(seen, own_address(&town.mesh, caller, ip), "{name} {ip}");
            }
        }
    }
    culvert_tests::expect::edit(&mut town.mesh, &[&a, &b], |mesh| mesh.policies.push(strict()))
        .unwrap();
    let mesh = &town.mesh;
    for name in ["near", "far"] {
        let node = mesh.pod(name).node();
        let other = if node == "a" { "b" } else { "a" };
        for to in both(mesh, name) {
            is_refused(mesh, "stranger", to).unwrap();
            is_refused(mesh, "plain", to).unwrap();
            // The node's own processes probe their pods; another node is no more than any host.
            let probe = || TcpStream::connect(to).and_then(exchange);
            assert_eq!(mesh.node(node).place().run(probe).unwrap(), "ping", "{name} {to:?}");
            let probe = mesh.node(other).place().run(probe);
            assert!(probe.is_err(), "{name} {to:?}: {probe:?}");
        }
        assert_answered(mesh, "client", &[name]);
    }
}

fn policies_know_who_calls(arrangement: Arrangement) {
    let client = "cluster.local/ns/web/sa/client";
    let allowed = PolicySpec::allow("client", "shop", vec![rule(Match::any().principal(client))]);
    let town = town_with(
        arrangement,
        |mesh| mesh.policy(allowed).pod("beside", "web", "other"),
        |mesh| mesh.pod("other", "web", "other"),
    );
    let mesh = &town.mesh;
    let _agents = agents(&town);
    assert_answered(mesh, "client", &["near", "far"]);
    for name in ["near", "far"] {
        for to in both(mesh, name) {
            is_refused(mesh, "other", to).unwrap();
            is_refused(mesh, "beside", to).unwrap();
        }
    }
}

fn own_business_stays_in_the_pod(arrangement: Arrangement) {
    let town = town_with(arrangement, |mesh| mesh.policy(strict()), |mesh| mesh);
    let mesh = &town.mesh;
    let _agents = agents(&town);
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    for ip in loopback.into_iter().chain(mesh.pod("near").addresses()) {
        assert_eq!(call(mesh, "near", (ip, 8081), "").unwrap(), ip.to_string());
    }
    for ip in mesh.service("near") {
        assert_eq!(call(mesh, "near", (ip, 80), "hello").unwrap(), "hello");
    }
}

fn enrolling_and_withdrawing_under_load_loses_no_connection(arrangement: Arrangement) {
    let outside = |name, namespace| PodSpec::outside(name, namespace, name);
    let mesh = Mesh::new()
        .node("a")
        .pod_with(outside("client", "web"))
        .pod_with(outside("near", "shop"))
        .node("b")
        .pod_with(outside("far", "shop"));
    let mut town = Town::start(mesh, arrangement).unwrap();
    for pod in ["near", "far"] {
        serve(&town.mesh, pod, PORT, echo).unwrap();
    }
    let [a, b] = agents(&town);
    let to = [both(&town.mesh, "far"), both(&town.mesh, "near")].concat();
    let mut live: Vec<TcpStream> = Vec::new();
    if arrangement != Arrangement::File {
        // Rules that are the first of a pod take what is under way for new, before any agent hears
        // of the pod. From then on there is a connection through the agent in each.
        for (agent, pod) in [(&a, "client"), (&b, "far"), (&a, "near")] {
            town.enrol(agent, pod).unwrap();
        }
        live.extend(to.iter().map(|to| open(&town.mesh, "client", *to)));
        for (agent, pod) in [(&a, "near"), (&a, "client"), (&b, "far")] {
            town.withdraw(agent, pod).unwrap();
        }
    }
    let load = Load::start(&town.mesh, "client", &to, 2);
    let grow = |mesh: &Running, live: &mut Vec<TcpStream>| {
        live.iter_mut().for_each(|stream| say(stream).unwrap());
        live.extend(to.iter().map(|to| open(mesh, "client", *to)));
        load.wait_answered(60).unwrap();
    };
    for _ in 0..2 {
        grow(&town.mesh, &mut live);
        // A destination is enrolled before anybody is told to reach it by tunnel.
        for (agent, pod) in [(&a, "client"), (&b, "far"), (&a, "near")] {
            town.enrol(agent, pod).unwrap();
            grow(&town.mesh, &mut live);
        }
        let hbone =
            |hbone| move |mesh: &mut Mesh| mesh.pods.iter_mut().for_each(|pod| pod.hbone = hbone);
        culvert_tests::expect::edit(&mut town.mesh, &[&a, &b], hbone(true)).unwrap();
        grow(&town.mesh, &mut live);
        // Nobody is told to use tunnels any more when the pods leave.
        culvert_tests::expect::edit(&mut town.mesh, &[&a, &b], hbone(false)).unwrap();
        for (agent, pod) in [(&a, "near"), (&a, "client"), (&b, "far")] {
            town.withdraw(agent, pod).unwrap();
            grow(&town.mesh, &mut live);
        }
    }
    // The listeners of withdrawn pods are gone; what was open still is.
    wait::until("the end of the last listener", wait::SOON * 2, || {
        ["client", "near", "far"].iter().all(|pod| {
            let sockets = town.mesh.pod(pod).place().output("ss", &["-Htln"]).unwrap();
            !sockets.contains(":15001")
        })
    })
    .unwrap();
    live.into_iter().for_each(finish);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    // With the last connection goes what it needed.
    wait::until("pods as they were", wait::SOON * 2, || {
        ["client", "near", "far"].iter().all(|pod| {
            let place = town.mesh.pod(pod).place();
            let told = |program, arguments: &[&str]| place.output(program, arguments).unwrap();
            told("nft", &["list", "tables"]).is_empty() && !told("ip", &["rule"]).contains("fwmark")
        })
    })
    .unwrap();
}

fn restarted_agent_takes_up_its_pods(arrangement: Arrangement) {
    let town = town(arrangement);
    let [mut a, _b] = agents(&town);
    let load = Load::start(&town.mesh, "client", &both(&town.mesh, "far"), 1);
    load.wait_answered(20).unwrap();
    a.process().kill().unwrap();
    // Without an agent nothing leaves the pod.
    for to in both(&town.mesh, "far") {
        let error = connect(&town.mesh, "client", to).expect_err("connected");
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{error}");
    }
    let _a = town.agent("a").unwrap();
    load.wait_answered(20).unwrap();
    assert_answered(&town.mesh, "client", &["near", "far"]);
    let tally = load.stop();
    assert_eq!((tally.cut, tally.others.as_slice()), (0, [].as_slice()), "{tally}");
}

fn ports_of_the_agent_are_nobodys_destination(arrangement: Arrangement) {
    let town =
        town_with(arrangement, |mesh| mesh.pod_with(PodSpec::unknown("stranger")), |mesh| mesh);
    let mesh = &town.mesh;
    let [a, _b] = agents(&town);
    let before = figures::descriptors(&a).unwrap();
    for ip in mesh.pod("near").addresses() {
        for port in [15001, 15006] {
            is_refused(mesh, "stranger", (ip, port)).unwrap();
            is_refused(mesh, "near", (ip, port)).unwrap();
        }
    }
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
        is_refused(mesh, "near", (ip, 15001)).unwrap();
        is_refused(mesh, "near", (ip, 15006)).unwrap();
    }
    assert_answered(mesh, "client", &["near"]);
    wait::until("the end of all of it", wait::SOON, || {
        figures::descriptors(&a).unwrap() <= before + 4
    })
    .unwrap();
}

fn restarted_istio_cni_changes_nothing(arrangement: Arrangement) {
    let town = town(arrangement);
    let [a, _b] = agents(&town);
    let mut live: Vec<TcpStream> = ["near", "far"]
        .iter()
        .flat_map(|pod| both(&town.mesh, pod))
        .map(|to| open(&town.mesh, "client", to))
        .collect();
    let load = Load::start(&town.mesh, "client", &both(&town.mesh, "near"), 1);
    for without in [&[][..], &["near", "client"]] {
        town.restart_cni("a", without).unwrap();
        wait::until("the agent to come back", wait::SOON, || town.cni().agents("a") == 1).unwrap();
        load.wait_answered(20).unwrap();
        live.iter_mut().for_each(|stream| say(stream).unwrap());
        assert_eq!(figures::enrolled(&a).unwrap().len(), 2);
    }
    live.into_iter().for_each(finish);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
}

/// A connection of an agent to the test itself, past its greeting.
fn line_of(listening: &mut Listening) -> cni::Line {
    let line = listening.accept(wait::SOON * 2).unwrap();
    assert_eq!(line.hello().unwrap(), [8, 1]);
    line
}

/// An agent on node `a` that the test itself tells of pods.
fn told_by_hand(town: &Town) -> (Agent, Listening) {
    let path = town.mesh.lab().state().join("a.sock");
    let listening = Listening::bind(&path).unwrap();
    (town.mesh.start_agent("a", &town.options()).unwrap(), listening)
}

fn is_listening(town: &Town, pod: &str) -> bool {
    let place = town.mesh.pod(pod).place();
    let sockets = place.output("ss", &["-Htln"]).unwrap();
    [":15001", ":15006", ":15008"].iter().all(|port| sockets.contains(port))
}

fn has_enrolled(agent: &Agent, count: usize) {
    wait::until_some(format!("{count} pods"), wait::SOON, || {
        let now = figures::enrolled(agent)?;
        if now.len() == count { Ok(()) } else { Err(anyhow::anyhow!("{now:?}")) }
    })
    .unwrap();
}

fn snapshots_decide_which_pods_stay(arrangement: Arrangement) {
    let town = town(arrangement);
    let (mut a, mut listening) = told_by_hand(&town);
    let (client, near) = (town.add_of("client"), town.add_of("near"));
    // Z2, Z3: a pod is served when it is acknowledged, and twice is as good as once.
    let line = line_of(&mut listening);
    assert_eq!(line.add(&client).unwrap(), "");
    assert!(is_listening(&town, "client"));
    assert_eq!(line.add(&client).unwrap(), "");
    assert_eq!(line.snapshot_sent().unwrap(), "");
    has_enrolled(&a, 1);
    assert_eq!(line.add(&client).unwrap(), "");
    // Z8
    assert_eq!(line.del("nobody").unwrap(), "");
    assert_eq!(a.metric("workload_manager_proxies_started_total", &[]).unwrap(), 1.0);
    // Z5: the first pod is served until the next snapshot is complete.
    drop(line);
    let line = line_of(&mut listening);
    assert_eq!(line.add(&near).unwrap(), "");
    has_enrolled(&a, 2);
    assert_eq!(line.snapshot_sent().unwrap(), "");
    has_enrolled(&a, 1);
    // Z6
    drop(line);
    let line = line_of(&mut listening);
    let kept = Add { netns: None, ..near.clone() };
    assert_eq!(line.add(&kept).unwrap(), "");
    assert_eq!(line.add(&client).unwrap(), "");
    assert_eq!(line.snapshot_sent().unwrap(), "");
    has_enrolled(&a, 2);
    a.wait_ready(wait::SOON).unwrap();
    // Z4: the same pod in another namespace.
    let other = Add { netns: town.add_of("near").netns, ..client.clone() };
    let refused = line.add(&other).unwrap();
    assert!(refused.starts_with("failure to start proxy : ") && refused.contains("of pod"));
    assert_eq!(line.del(&near.uid).unwrap(), "");
    assert_eq!(line.add(&other).unwrap(), "");
    has_enrolled(&a, 1);
    // Z7, Z13
    assert_eq!(line.del(&other.uid).unwrap(), "");
    has_enrolled(&a, 0);
    drop(line);
    let line = line_of(&mut listening);
    assert_eq!(line.add(&client).unwrap(), "");
    assert_eq!(line.del(&client.uid).unwrap(), "");
    assert_eq!(line.snapshot_sent().unwrap(), "");
    has_enrolled(&a, 0);
}

fn faults_of_istio_cni_cut_no_connection(arrangement: Arrangement) {
    let town = town(arrangement);
    let (mut a, mut listening) = told_by_hand(&town);
    let pods = ["client", "near"].map(|pod| town.add_of(pod));
    let told = |line: &cni::Line| {
        for add in &pods {
            assert_eq!(line.add(add).unwrap(), "");
        }
        assert_eq!(line.snapshot_sent().unwrap(), "");
    };
    let mut line = line_of(&mut listening);
    told(&line);
    a.wait_ready(wait::SOON).unwrap();
    let mut live: Vec<TcpStream> =
        both(&town.mesh, "near").map(|to| open(&town.mesh, "client", to)).into();
    let descriptors = figures::descriptors(&a).unwrap();
    let netns = pods[0].netns.clone().unwrap();
    let null = Arc::new(std::fs::File::open("/dev/null").unwrap());
    let add = [0x0a, 0x0e, 0x0a, 1, b'u', 0x12, 9, 0x0a, 1, b'n', 0x12, 1, b's', 0x1a, 1, b'a'];
    let long = vec![0xff; 2000];
    type Fault<'a> = (&'a [u8], &'a [Arc<std::fs::File>], &'a str);
    let faults: [Fault<'_>; 9] = [
        (&add, &[], "failure to read message : 0 descriptors"),
        (&add, &[netns.clone(), netns.clone()], "failure to read message : 2 descriptors"),
        (&[0x1a, 0], std::slice::from_ref(&netns), "failure to read message : 1 descriptors"),
        (&[0xff; 7], &[], "failure to read message : "),
        (&[0x22, 0], &[], "failure to read message : unknown request"),
        (&long, &vec![netns.clone(); 40], "failure to read message : truncated"),
        (&[0x0a, 3, 0x0a, 1, b'u'], std::slice::from_ref(&netns), "failure to process message : "),
        (&[0x2a, 3, 0x0a, 1, b'u'], &[], "failure to process message : "),
        (&[0x1a, 0], &[], "failure to process message : "),
    ];
    for (bytes, files, answer) in faults {
        let told_of = line.ask(bytes, files).unwrap();
        assert!(told_of.starts_with(answer), "{answer}: {told_of}");
        line.ended().unwrap();
        live.iter_mut().for_each(|stream| say(stream).unwrap());
        line = line_of(&mut listening);
        told(&line);
    }
    let count = faults.len() as f64;
    counted(&a, "culvert_cni_connection_terminations_total", &["reason=\"fault\""], count).unwrap();
    // What is not a network namespace is no fault of the protocol.
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let path_only = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(town.mesh.pod("near").place().netns().path());
    let others = [
        null,
        Arc::new(File::open("/proc/self/ns/mnt").unwrap()),
        Arc::new(File::from(OwnedFd::from(socket))),
        Arc::new(path_only.unwrap()),
    ];
    for file in &others {
        let told = line.ask(&add, std::slice::from_ref(file)).unwrap();
        assert_eq!(told, "failure to start proxy : the descriptor is not a network namespace");
    }
    let told = line.ask(&add, &[town.mesh.node("a").place().netns().file()]).unwrap();
    assert_eq!(
        told,
        "failure to start proxy : the descriptor is the agent's own network namespace"
    );
    counted(&a, "culvert_cni_refused_requests_total", &[], others.len() as f64 + 1.0).unwrap();
    logged(&a, &["cannot enrol pod", "pod=s/n", "is not a network namespace"]).unwrap();
    // A namespace that nobody has any more is one still: it is served until istio-cni says otherwise.
    let gone =
        culvert_lab::netns::Netns::create(&format!("{}-gone", town.mesh.lab().name())).unwrap();
    let file = gone.file();
    culvert_lab::netns::delete(gone.name()).unwrap();
    assert_eq!(line.ask(&add, &[file]).unwrap(), "");
    has_enrolled(&a, 3);
    assert_eq!(line.del("u").unwrap(), "");
    live.into_iter().for_each(finish);
    assert_answered(&town.mesh, "client", &["near"]);
    wait::until_some("no descriptor more", wait::SOON, || {
        let now = figures::descriptors(&a).unwrap();
        if now <= descriptors { Ok(()) } else { Err(format!("{now}, {descriptors} before")) }
    })
    .unwrap();
}

fn taken_port_is_tried_again(arrangement: Arrangement) {
    let town = town(arrangement);
    let squatter = town.mesh.pod("near").place().run(|| {
        std::net::TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 15008))).unwrap()
    });
    let (mut a, mut listening) = told_by_hand(&town);
    let line = line_of(&mut listening);
    assert_eq!(line.add(&town.add_of("client")).unwrap(), "");
    let refused = line.add(&town.add_of("near")).unwrap();
    assert!(refused.starts_with("failure to start proxy : "), "{refused}");
    assert!(refused.contains("15008"), "{refused}");
    assert_eq!(line.snapshot_sent().unwrap(), "");
    assert_eq!(a.metric("workload_manager_pending_proxy_count", &[]).unwrap(), 1.0);
    let dump = culvert_tests::expect::answer(&a, "/config_dump").unwrap();
    let state = |pod: &str| dump["workloadState"][cni::uid(pod)]["state"].clone();
    assert_eq!((state("near"), state("client")), ("Pending".into(), "Up".into()), "{dump}");
    assert!(a.wait_ready(Duration::ZERO).is_err());
    drop(squatter);
    a.wait_ready(wait::SOON).unwrap();
    assert!(is_listening(&town, "near"));
    let dump = culvert_tests::expect::answer(&a, "/config_dump").unwrap();
    let near = &dump["workloadState"][cni::uid("near")];
    assert_eq!((&near["state"], &near["info"]["namespace"]), (&"Up".into(), &"shop".into()));
    assert_eq!(near["info"]["serviceAccount"], "server");
}

fn pods_are_served_before_their_workload_is_known(arrangement: Arrangement) {
    let mut town = town(arrangement);
    let [a, _b] = agents(&town);
    // Its workload is of no node yet: nobody here knows who it is.
    culvert_tests::expect::edit(&mut town.mesh, &[&a], |mesh| {
        mesh.pods.iter_mut().for_each(|pod| pod.known = pod.name != "client");
    })
    .unwrap();
    let to = both(&town.mesh, "far")[0];
    let mut waiting = connect(&town.mesh, "client", to).unwrap();
    waiting.set_read_timeout(Some(LIMIT * 4)).unwrap();
    waiting.write_all(b"hello").unwrap();
    // Its own addresses are known all the same.
    serve(&town.mesh, "client", 8081, who).unwrap();
    for ip in town.mesh.pod("client").addresses() {
        assert_eq!(call(&town.mesh, "client", (ip, 8081), "").unwrap(), ip.to_string());
    }
    town.mesh.change(|mesh| mesh.pods.iter_mut().for_each(|pod| pod.known = true)).unwrap();
    let mut answer = [0; 5];
    waiting.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    assert_answered(&town.mesh, "near", &["far"]);
}

fn the_address_of_probes_is_of_no_use_to_pods(arrangement: Arrangement) {
    let town = town_with(
        arrangement,
        |mesh| mesh.policy(strict()).pod_with(PodSpec::unknown("stranger")),
        |mesh| mesh,
    );
    let mesh = &town.mesh;
    let _agents = agents(&town);
    let stranger = mesh.pod("stranger").place();
    let own = "169.254.7.127";
    stranger.netns().ip(&format!("addr add {own}/32 dev eth0\n")).unwrap();
    let to = SocketAddr::from(both(mesh, "near")[0]);
    // Answers go to the node, which knows no way to that address: nothing is ever established.
    let limit = Duration::from_secs(2);
    let connected = stranger.run(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(own.parse().unwrap(), 0).into())?;
        socket.connect_timeout(&to.into(), limit)
    });
    assert!(connected.is_err(), "{connected:?}");
}

/// Row R15: a guest behind an interface of the pod, such as a virtual machine.
fn guests_of_a_pod_call_as_the_pod(arrangement: Arrangement) {
    let client = "cluster.local/ns/web/sa/client";
    let allowed = PolicySpec::allow("client", "shop", vec![rule(Match::any().principal(client))]);
    let town = town_with(
        arrangement,
        |mesh| mesh.policy(allowed).pod_with(PodSpec::unknown("guest")),
        |mesh| mesh,
    );
    let mesh = &town.mesh;
    let _agents = agents(&town);
    let (pod, guest) = (mesh.pod("client").place(), mesh.pod("guest").place());
    guest.netns().ip("link del eth0\n").unwrap();
    let (pod_name, guest_name) = (pod.netns().name(), guest.netns().name());
    culvert_lab::netns::ip(&[
        "link", "add", "br0", "netns", pod_name, "type", "veth", "peer", "name", "eth0", "netns",
        guest_name,
    ])
    .unwrap();
    pod.netns().ip("addr add 192.0.2.1/24 dev br0\nlink set br0 up\n").unwrap();
    guest.netns().ip("addr add 192.0.2.2/24 dev eth0\nlink set eth0 up\n").unwrap();
    culvert_lab::netns::wait_for_link(guest.netns(), "eth0").unwrap();
    guest.netns().ip("route add default via 192.0.2.1\n").unwrap();
    cni::reroute(pod, "br0").unwrap();
    for name in ["near", "far"] {
        let to = both(mesh, name)[0];
        assert_eq!(call(mesh, "guest", to, "hello").unwrap(), "hello", "{name}");
        let service = (mesh.service(name)[0], 80);
        assert_eq!(call(mesh, "guest", service, "hello").unwrap(), "hello", "{name}");
    }
}

/// Row R14: istio-cni's annotation leaves out the rules for what comes from elsewhere.
fn a_pod_that_bypasses_inbound_capture_takes_tunnels_all_the_same(arrangement: Arrangement) {
    let rules = |pod: &str| PodRules { inbound: pod != "near", ..PodRules::default() };
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .pod_with(PodSpec::unknown("stranger"))
        .node("b")
        .pod("far", "web", "far")
        .policy(strict());
    let town = Town::start_with(mesh, arrangement, rules).unwrap();
    let mesh = &town.mesh;
    serve(mesh, "near", PORT, echo).unwrap();
    let _agents = agents(&town);
    assert_answered(mesh, "client", &["near"]);
    assert_answered(mesh, "far", &["near"]);
    for to in both(mesh, "near") {
        match arrangement {
            // The rules alone say what the agent sees.
            Arrangement::Rules => {
                assert_eq!(call(mesh, "stranger", to, "hello").unwrap(), "hello");
            }
            // The kernel programs know of no annotation: what comes in plain is judged.
            Arrangement::Beside | Arrangement::File => is_refused(mesh, "stranger", to).unwrap(),
        }
    }
}
