//! Agents that die at any moment, and what changed while they were away.

#![allow(clippy::unwrap_used)]

use std::io::ErrorKind;
use std::net::IpAddr;
use std::path::Path;

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Mesh, PodSpec, Running};
use culvert_lab::wait;
use culvert_tests::figures::{self, Figures};
use culvert_tests::load::Load;
use culvert_tests::{binary, call, connect, echo, serve};

const PORT: u16 = 8080;

fn mesh() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "near")
        .node("b")
        .pod("server", "shop", "server")
        .start()
        .unwrap();
    for pod in ["near", "server"] {
        serve(&mesh, pod, PORT, echo).unwrap();
    }
    mesh
}

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

fn assert_answered(mesh: &Running, pods: &[&str]) {
    for pod in pods {
        for to in both(mesh, pod) {
            assert_eq!(call(mesh, "client", to, "hello").unwrap(), "hello", "{pod}");
        }
    }
}

fn start(mesh: &Running) -> Agent {
    let options = AgentOptions::new(&binary(), &mesh.config());
    Agent::start(mesh.lab(), mesh.node("a"), &options).unwrap()
}

fn is_not_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}

/// A moment of an agent's start, and how to tell that it has come.
type Moment<'m> = (&'m str, &'m dyn Fn(&Agent) -> bool);

#[test]
fn agent_killed_at_any_moment_of_its_start_leaves_nothing_that_the_next_cannot_take_up() {
    let mesh = mesh();
    let _b = mesh.agent("b", &binary()).unwrap();
    let pins = mesh.lab().pin_path("a");
    let moments: [Moment<'_>; 6] = [
        ("it has begun", &|_| true),
        ("the first map", &|_| is_not_empty(&pins.join("maps"))),
        ("the first link", &|_| is_not_empty(&pins.join("links"))),
        ("the last link", &|_| pins.join("links/cv_connect4").exists()),
        ("the first pod", &|_| is_not_empty(&pins.join("pods"))),
        ("a pod is enrolled", &|agent| agent.log().contains("pod enrolled")),
    ];
    for (moment, come) in moments {
        let mut dying = start(&mesh);
        wait::until(moment, wait::SOON, || come(&dying)).unwrap();
        dying.process().kill().unwrap();
        // Whichever it was, a connection is answered in the plain way or refused; none is lost.
        let answer = call(&mesh, "client", both(&mesh, "near")[0], "hello");
        match answer.map_err(|error| error.kind()) {
            Ok(answer) => assert_eq!(answer, "hello", "killed at {moment}"),
            Err(kind) => assert_eq!(kind, ErrorKind::ConnectionRefused, "killed at {moment}"),
        }
        let mut next = mesh.agent("a", &binary()).unwrap();
        assert_answered(&mesh, &["near", "server"]);
        let entries = Figures::of(&next).unwrap().entries;
        assert_eq!((entries["cv_pods"], entries["cv_listeners"]), (2, 6), "{entries:?}");
        next.process().kill().unwrap();
        next.detach().unwrap();
        assert!(!pins.exists(), "killed at {moment}");
    }
}

#[test]
fn pods_that_left_the_file_or_the_machine_meanwhile_are_let_go() {
    let mut mesh = mesh();
    let mut a = mesh.agent("a", &binary()).unwrap();
    mesh.add_pod("a", PodSpec::new("fleeting", "shop", "fleeting")).unwrap();
    wait::until("three pods", wait::SOON, || figures::enrolled(&a).unwrap().len() == 3).unwrap();
    a.process().kill().unwrap();
    let refused = connect(&mesh, "near", both(&mesh, "server")[0]).expect_err("connected");
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);

    mesh.change(|mesh| {
        for pod in mesh.pods.iter_mut().filter(|pod| pod.name == "near") {
            (pod.enrolled, pod.hbone) = (false, false);
        }
    })
    .unwrap();
    mesh.remove_pod("fleeting").unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    assert_answered(&mesh, &["near", "server"]);
    assert_eq!(call(&mesh, "near", both(&mesh, "server")[0], "hello").unwrap(), "hello");
    let entries = Figures::of(&a).unwrap().entries;
    assert_eq!((entries["cv_pods"], entries["cv_pod_flows"]), (1, 1), "{entries:?}");
    assert_eq!((entries["cv_addresses"], entries["cv_listeners"]), (2, 3), "{entries:?}");
    assert_eq!(std::fs::read_dir(a.pin_path().join("pods")).unwrap().count(), 1);
}

#[test]
fn pod_that_comes_back_under_its_name_is_another_one() {
    let mut mesh = mesh();
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for _ in 0..3 {
        mesh.add_pod("a", PodSpec::new("again", "shop", "again")).unwrap();
        serve(&mesh, "again", PORT, echo).unwrap();
        // Its workload may be known a moment before its namespace is captured.
        wait::until_some("the pod to answer", wait::SOON, || {
            call(&mesh, "client", both(&mesh, "again")[0], "hello")
        })
        .unwrap();
        assert_answered(&mesh, &["again"]);
        assert_eq!(call(&mesh, "again", both(&mesh, "server")[1], "hello").unwrap(), "hello");
        mesh.remove_pod("again").unwrap();
    }
    wait::until("the last one to be gone", wait::SOON, || {
        Figures::of(&a).unwrap().entries["cv_pods"] == 2
    })
    .unwrap();
}

#[test]
fn agents_restarted_again_and_again_under_load_lose_no_answer() {
    let mesh = mesh();
    let mut agents = ["a", "b"].map(|node| mesh.agent(node, &binary()).unwrap());
    let wire = mesh.wire("a", "b").unwrap();
    let to = [both(&mesh, "server"), both(&mesh, "near")].concat();
    let load = Load::start(&mesh, "client", &to, 3);
    for round in 0..6 {
        load.wait_answered(40).unwrap();
        let node = round % 2;
        if round < 4 {
            agents[node].process().kill().unwrap();
        } else {
            agents[node].process().terminate(wait::SOON).unwrap();
        }
        agents[node] = mesh.agent(["a", "b"][node], &binary()).unwrap();
    }
    load.wait_answered(40).unwrap();
    let tally = load.stop();
    // What could not be answered was refused or reset, never cut off and never left hanging.
    assert_eq!((tally.cut, tally.others.as_slice()), (0, [].as_slice()), "{tally}");
    let ledger = wire.finish().unwrap();
    assert!(ledger.only_tls() && !ledger.attempts.contains_key(&PORT), "{ledger}");
}

#[test]
fn corrected_addresses_of_an_enrolled_pod_count_from_then_on() {
    let mesh = mesh();
    let right = std::fs::read_to_string(mesh.config()).unwrap();
    let (own, wrong) = (mesh.pod("client").v4().to_string(), "10.244.1.77");
    let (path, new) = (mesh.lab().state().join("own.yaml"), mesh.lab().state().join("new.yaml"));
    std::fs::write(&path, right.replace(&own, wrong)).unwrap();
    let a = mesh.agent_with("a", &AgentOptions::new(&binary(), &path)).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let to = mesh.pod("server").v4().into();
    let error = call(&mesh, "client", (to, PORT), "hello").expect_err("with a wrong address");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);

    std::fs::write(&new, &right).unwrap();
    std::fs::rename(&new, &path).unwrap();
    wait::until("the right address", wait::SOON, || {
        a.admin("/culvert/pods").unwrap().body.contains(&own)
    })
    .unwrap();
    assert_answered(&mesh, &["near", "server"]);
}
