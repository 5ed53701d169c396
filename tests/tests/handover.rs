//! A new agent takes the place of the one that runs: nobody's connection is refused, none is cut.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use culvert_abi::ABI_VERSION;
use culvert_agent::handover::{self, Asked, Estate, Greeting, PROTOCOL, Predecessor, Socket, Wish};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait;
use culvert_tests::cni::{Arrangement, Town};
use culvert_tests::direct::warm;
use culvert_tests::expect::{edit, is_refused, rule};
use culvert_tests::figures::{self, Figures};
use culvert_tests::load::Load;
use culvert_tests::names::{ask_tcp, ask_udp, query};
use culvert_tests::upgrade::{TAKE_OVER, patient, upgrade, wait_ended};
use culvert_tests::{binary, call, connect, echo, serve};
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::RecordType;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

const PORT: u16 = 8080;
/// As many pods as an agent's tables have room for.
const MAX_PODS: u32 = 1024;

fn parts() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "near")
        .node("b")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::outside("stranger", "web", "stranger"))
        .service(ServiceSpec::new("shop", "shop").port(80, PORT).endpoint("server"))
}

fn begin(mesh: &Running) {
    for pod in ["near", "server"] {
        serve(mesh, pod, PORT, echo).unwrap();
    }
}

fn mesh() -> Running {
    let mesh = parts().start().unwrap();
    begin(&mesh);
    mesh
}

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

fn assert_answered(mesh: &Running) {
    for pod in ["near", "server"] {
        for to in both(mesh, pod) {
            assert_eq!(call(mesh, "client", to, "hello").unwrap(), "hello", "{pod}");
        }
    }
}

fn with(mut options: AgentOptions, name: &str, value: &str) -> AgentOptions {
    options.environment.push((name.to_owned(), value.to_owned()));
    options
}

fn start(mesh: &Running, node: &str, options: &AgentOptions) -> Agent {
    mesh.start_agent(node, options).unwrap()
}

fn handovers(agent: &Agent, result: &str) -> f64 {
    let label = format!("result=\"{result}\"");
    agent.metric("culvert_handovers_total", &[&label]).unwrap()
}

/// A connection that is never idle, and knows what has to come back.
struct Stream {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<std::io::Result<u64>>,
}

impl Stream {
    fn start(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> Stream {
        let mut tcp = connect(mesh, pod, to).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut carried, mut back) = (0_u64, [0; 16 << 10]);
            while !stopped.load(Ordering::Relaxed) || carried == 0 {
                let text: Vec<u8> =
                    (carried..).take(back.len()).map(|at| ((at * 31) >> 3) as u8).collect();
                tcp.write_all(&text)?;
                tcp.read_exact(&mut back)?;
                assert!(text == back, "other bytes at {carried}");
                carried += text.len() as u64;
                std::thread::park_timeout(Duration::from_millis(2));
            }
            tcp.shutdown(Shutdown::Write)?;
            assert_eq!(tcp.read(&mut back)?, 0, "bytes after the end");
            Ok(carried)
        });
        Stream { stop, thread }
    }

    /// Its own end, and how many bytes it has carried each way.
    fn finish(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap().unwrap()
    }
}

#[test]
fn agents_upgraded_again_and_again_under_load_refuse_and_cut_nothing() {
    let mesh = mesh();
    let options = patient(&mesh);
    let mut agents = ["a", "b"].map(|node| mesh.agent_with(node, &options).unwrap());
    let to = [both(&mesh, "server"), both(&mesh, "near")].concat();
    let wire = mesh.wire("a", "b").unwrap();
    let loads = [
        // Tunnels from a to b, and connections within a.
        Load::start(&mesh, "client", &to, 2),
        // Tunnels from b to a.
        Load::start(&mesh, "server", &both(&mesh, "near"), 1),
    ];
    for round in 0..20 {
        let node = round % 2;
        let streams = [
            Stream::start(&mesh, "client", both(&mesh, "server")[0]),
            Stream::start(&mesh, "client", both(&mesh, "server")[1]),
            Stream::start(&mesh, "server", both(&mesh, "near")[0]),
            Stream::start(&mesh, "client", both(&mesh, "near")[1]),
        ];
        let new = upgrade(&mesh, ["a", "b"][node], &agents[node], &options).unwrap();
        let mut old = std::mem::replace(&mut agents[node], new);
        for load in &loads {
            load.wait_answered(20).unwrap();
            assert_eq!(load.tally().failed(), 0, "round {round}: {}", load.tally());
        }
        // The old agent lives for as long as they do.
        assert!(old.process().ended().is_none(), "round {round}");
        for stream in streams {
            assert!(stream.finish() > 0);
        }
        wait_ended(&mut old).unwrap();
    }
    for load in loads {
        let tally = load.stop();
        assert_eq!(tally.failed(), 0, "{tally}");
    }
    let ledger = wire.finish().unwrap();
    assert!(ledger.only_tls() && !ledger.attempts.contains_key(&PORT), "{ledger}");
    for agent in &agents {
        assert_eq!(handovers(agent, "taken"), 1.0);
    }
    let entries = Figures::of(&agents[0]).unwrap().entries;
    assert_eq!((entries["cv_pods"], entries["cv_listeners"]), (2, 6), "{entries:?}");
}

#[test]
fn strangers_and_questions_for_names_are_answered_throughout() {
    let mesh = mesh();
    let options = with(patient(&mesh), "ISTIO_META_DNS_CAPTURE", "true");
    let mut agents = ["a", "b"].map(|node| mesh.agent_with(node, &options).unwrap());
    // Plain connections to an enrolled pod.
    let load = Load::start(&mesh, "stranger", &both(&mesh, "server"), 1);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, place) = (stop.clone(), mesh.pod("server").place().clone());
    let asking = std::thread::spawn(move || {
        let server: SocketAddr = "192.0.2.53:53".parse().unwrap();
        let question = query("shop.shop.svc.cluster.local", RecordType::A);
        let mut asked = 0;
        while !stopped.load(Ordering::Relaxed) {
            for answer in [ask_udp(&place, server, &question), ask_tcp(&place, server, &question)] {
                let answer = answer.unwrap();
                assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
                assert_eq!(answer.answers.len(), 1, "{answer}");
                asked += 1;
            }
            std::thread::park_timeout(Duration::from_millis(1));
        }
        asked
    });
    for _ in 0..4 {
        let new = upgrade(&mesh, "b", &agents[1], &options).unwrap();
        let mut old = std::mem::replace(&mut agents[1], new);
        load.wait_answered(50).unwrap();
        wait_ended(&mut old).unwrap();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(asking.join().unwrap() > 0);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
}

#[test]
fn pods_of_istio_cni_are_handed_over_and_stay_enrolled() {
    let mut town = Town::start(parts(), Arrangement::Beside).unwrap();
    begin(&town.mesh);
    let mut agents = ["a", "b"].map(|node| town.agent(node).unwrap());
    let to = [both(&town.mesh, "server"), both(&town.mesh, "near")].concat();
    let load = Load::start(&town.mesh, "client", &to, 2);
    for round in 0..4 {
        let node = round % 2;
        let name = ["a", "b"][node];
        let stream = Stream::start(&town.mesh, "client", both(&town.mesh, "server")[round % 2]);
        let new = upgrade(&town.mesh, name, &agents[node], &town.options()).unwrap();
        let mut old = std::mem::replace(&mut agents[node], new);
        agents[node].wait_ready(wait::SOON).unwrap();
        load.wait_answered(20).unwrap();
        stream.finish();
        wait_ended(&mut old).unwrap();
        load.wait_answered(20).unwrap();
        assert_eq!(figures::enrolled(&agents[node]).unwrap().len(), 2 - node);
    }
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    // The last agent is the one that istio-cni talks to.
    town.withdraw(&agents[0], "near").unwrap();
    town.enrol(&agents[0], "near").unwrap();
    assert_answered(&town.mesh);
}

#[test]
fn in_kubernetes_the_old_agent_drains_until_it_is_told_to_end() {
    let mesh = mesh();
    let options = AgentOptions::new(&binary(), &mesh.config());
    let options = with(options, "CONNECTION_TERMINATION_DEADLINE", "2s");
    let options = with(options, "KUBERNETES_SERVICE_HOST", "10.96.0.1");
    let options = with(options, "POD_NAME", "culvert-x7k2p");
    let mut old = mesh.agent_with("a", &options).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let to = both(&mesh, "server");
    let stream = Stream::start(&mesh, "client", to[0]);
    let mut idle = connect(&mesh, "client", to[1]).unwrap();
    idle.write_all(b"x").unwrap();
    idle.read_exact(&mut [0]).unwrap();

    let new = start(&mesh, "a", &options);
    wait::until("the take-over", TAKE_OVER, || {
        let status = figures::status(&new).unwrap_or_default();
        let told = status["handover"].as_str().unwrap_or_default().to_owned();
        told.starts_with("taken over from pod culvert-x7k2p")
    })
    .unwrap();
    let taken_over = Instant::now();
    assert_answered(&mesh);
    // Longer than connections may go on once it is told.
    wait::until("a while", wait::SOON, || taken_over.elapsed() > Duration::from_secs(4)).unwrap();
    stream.finish();
    assert!(old.process().ended().is_none(), "whoever ends is started again");
    idle.write_all(b"y").unwrap();
    idle.read_exact(&mut [0]).unwrap();
    assert!(old.process().terminate(wait::SOON).unwrap().success());
    let end = idle.read(&mut [0]).expect_err("cut at the deadline");
    assert_eq!(end.kind(), ErrorKind::ConnectionReset);
    assert_answered(&mesh);
}

fn socket(mesh: &Running, node: &str) -> PathBuf {
    mesh.lab().state().join(node).join("handover.sock")
}

/// What an agent of the same version would say of itself.
fn greeting(mesh: &Running, node: &str) -> Greeting {
    let pins = std::fs::metadata(mesh.lab().pin_path(node)).unwrap();
    Greeting {
        protocol: PROTOCOL,
        abi: ABI_VERSION,
        max_pods: MAX_PODS,
        pins: (pins.dev(), pins.ino()),
        netns: 0,
        pid: std::process::id(),
        pod: String::new(),
        version: "test".to_owned(),
    }
}

async fn find(mesh: &Running, node: &str, own: &Greeting) -> Predecessor {
    handover::find(&socket(mesh, node), own).await.unwrap().expect("an agent answers")
}

#[test]
fn agents_with_other_tables_follow_each_other_by_letting_go() {
    let mesh = mesh();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let runtime = Runtime::new().unwrap();
    let newer = Greeting { abi: ABI_VERSION + 1, ..greeting(&mesh, "a") };
    let open = connect(&mesh, "client", both(&mesh, "server")[0]).unwrap();
    runtime.block_on(async {
        let found = find(&mesh, "a", &newer).await;
        let mismatch = found.mismatch.expect("a mismatch");
        assert_eq!((mismatch.old, mismatch.new), (ABI_VERSION, ABI_VERSION + 1));
        assert!(found.ask().await.is_err(), "gave what cannot be used");
        find(&mesh, "a", &newer).await.ask_to_let_go().await.unwrap();
    });
    let refused = connect(&mesh, "client", both(&mesh, "server")[0]).expect_err("connected");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    wait::until("the reason", wait::SOON, || a.log().contains("no new connections until")).unwrap();
    // The next one begins at once, while the old one drains.
    let again = mesh.agent("a", &binary()).unwrap();
    assert_answered(&mesh);
    drop(open);
    wait_ended(&mut a).unwrap();
    assert_eq!(handovers(&again, "taken"), 0.0);

    // The other way round: the one that runs has other tables.
    let mut again = again;
    again.process().kill().unwrap();
    let (asked, mut asking) = mpsc::channel(1);
    let _serving = {
        let _inside = runtime.enter();
        let socket = Socket::bind(&socket(&mesh, "a")).unwrap();
        runtime.spawn(handover::serve(socket, newer, asked))
    };
    let mut a = start(&mesh, "a", &AgentOptions::new(&binary(), &mesh.config()));
    let asked: Asked = runtime.block_on(asking.recv()).unwrap();
    assert_eq!((asked.wish, asked.by.pid), (Wish::LetGo, a.pid()));
    drop(asked);
    a.wait_ready(wait::SOON * 3).unwrap();
    let told = "cannot take over what the running agent has";
    wait::until("the reason", wait::SOON, || a.log().contains(told)).unwrap();
    assert_answered(&mesh);
}

#[test]
fn successor_that_dies_midway_leaves_the_old_agent_serving() {
    let mesh = mesh();
    let options = patient(&mesh);
    let mut a = mesh.agent_with("a", &options).unwrap();
    let _b = mesh.agent_with("b", &options).unwrap();
    let to = [both(&mesh, "server"), both(&mesh, "near")].concat();
    let load = Load::start(&mesh, "client", &to, 2);
    let runtime = Runtime::new().unwrap();
    for died in 1..=3 {
        runtime.block_on(async {
            let found = find(&mesh, "a", &greeting(&mesh, "a")).await;
            // It has every listener, and ends.
            let bequest = found.ask().await.unwrap();
            assert_eq!(bequest.pods.len(), 2);
            drop(bequest);
        });
        wait::until("the failure", wait::SOON, || handovers(&a, "failed") == f64::from(died))
            .unwrap();
        load.wait_answered(20).unwrap();
    }
    // One that is killed while it makes itself ready: nobody is there that would tell it the mesh.
    let waiting = with(options.clone(), "XDS_ADDRESS", "https://127.0.0.1:1");
    let log = a.log().len();
    let mut new = start(&mesh, "a", &waiting);
    wait::until("a greeting", wait::SOON * 3, || a.log()[log..].contains("makes itself ready"))
        .unwrap();
    new.process().kill().unwrap();
    wait::until("its end", wait::SOON, || a.log()[log..].contains("it has ended before")).unwrap();
    load.wait_answered(20).unwrap();
    // The pods can still be changed, and the agent be upgraded.
    let mut new = upgrade(&mesh, "a", &a, &options).unwrap();
    wait_ended(&mut a).unwrap();
    load.wait_answered(20).unwrap();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    assert!(new.process().terminate(wait::SOON).unwrap().success());
}

#[test]
fn successor_that_vanishes_as_it_takes_leaves_the_old_agent_deciding() {
    let mut mesh = mesh();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let to = both(&mesh, "near");
    warm(&mesh, &a, "client", to[0]).unwrap();
    let own = greeting(&mesh, "a");
    Runtime::new().unwrap().block_on(async {
        let mut bequest = find(&mesh, "a", &own).await.ask().await.unwrap();
        // It hears that it is to give all, and that nobody is there, at once.
        a.process().signal(libc::SIGSTOP).unwrap();
        let taking = bequest.take();
        assert!(tokio::time::timeout(Duration::from_millis(50), taking).await.is_err(), "answered");
        drop(bequest);
        a.process().signal(libc::SIGCONT).unwrap();
    });
    wait::until("the failure", wait::SOON, || handovers(&a, "failed") == 1.0).unwrap();
    // It gives verdicts, and takes them back.
    warm(&mesh, &a, "client", to[1]).unwrap();
    let client = Match::any().service_account("web", "client");
    let policy = PolicySpec::deny("no-client", "shop", vec![rule(client)]);
    edit(&mut mesh, &[&a], |mesh| mesh.policies.push(policy)).unwrap();
    for to in to {
        is_refused(&mesh, "client", to).unwrap();
    }
}

#[test]
fn successor_goes_on_alone_when_the_old_agent_dies() {
    let mesh = mesh();
    let options = AgentOptions::new(&binary(), &mesh.config());
    let mut a = mesh.agent_with("a", &options).unwrap();
    let _b = mesh.agent_with("b", &options).unwrap();
    // Before it is asked for anything.
    let waiting = with(options.clone(), "XDS_ADDRESS", "https://127.0.0.1:1");
    let mut new = start(&mesh, "a", &waiting);
    wait::until("a greeting", wait::SOON * 3, || a.log().contains("makes itself ready")).unwrap();
    a.process().kill().unwrap();
    wait::until_some("an answer", wait::SOON * 3, || {
        call(&mesh, "client", both(&mesh, "server")[0], "hello")
    })
    .unwrap();
    assert_answered(&mesh);
    new.process().kill().unwrap();

    // After it has given, and before it has said so.
    let runtime = Runtime::new().unwrap();
    let (asked, mut asking) = mpsc::channel(1);
    let _serving = {
        let _inside = runtime.enter();
        let socket = Socket::bind(&socket(&mesh, "a")).unwrap();
        runtime.spawn(handover::serve(socket, greeting(&mesh, "a"), asked))
    };
    let mut new = start(&mesh, "a", &options);
    runtime.block_on(async {
        let asked = asking.recv().await.unwrap();
        let pins = File::open(mesh.lab().pin_path("a")).unwrap();
        let estate = Estate { pins: pins.as_fd(), pods: Vec::new(), servers: Vec::new() };
        asked.give(&estate).await.unwrap();
    });
    new.wait_ready(wait::SOON * 3).unwrap();
    assert_answered(&mesh);
    // What it was given was not even locked, and is this agent's alone.
    assert!(new.process().terminate(wait::SOON).unwrap().success());
}

#[test]
fn agent_that_is_not_to_hand_over_keeps_others_out() {
    let mesh = mesh();
    let options = with(AgentOptions::new(&binary(), &mesh.config()), "CULVERT_HANDOVER", "");
    let _a = mesh.agent_with("a", &options).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    assert!(!socket(&mesh, "a").exists());
    let mut second = start(&mesh, "a", &AgentOptions::new(&binary(), &mesh.config()));
    wait::until("the end of a second agent", wait::SOON, || second.process().ended().is_some())
        .unwrap();
    assert!(second.log().contains("in use by another agent"));
    assert_answered(&mesh);
}
