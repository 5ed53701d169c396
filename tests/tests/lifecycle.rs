//! Pods come and go, agents restart and leave: what exists goes on, what is new is right.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running};
use culvert_lab::wait;
use culvert_tests::direct::through_agent;
use culvert_tests::figures::{self, Figures, bpftool};
use culvert_tests::load::{Load, TEXT};
use culvert_tests::peer::{Forge, Leaf, Peer};
use culvert_tests::{binary, call, connect, echo, serve};

const PORT: u16 = 8080;

fn both(mesh: &Running, pod: &str) -> [(IpAddr, u16); 2] {
    mesh.pod(pod).addresses().map(|ip| (ip, PORT))
}

fn exchange(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(TEXT)?;
    let mut answer = vec![0; TEXT.len()];
    stream.read_exact(&mut answer)?;
    assert_eq!(answer, TEXT);
    Ok(())
}

fn open(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> TcpStream {
    let mut stream = connect(mesh, pod, to).unwrap();
    exchange(&mut stream).unwrap();
    stream
}

/// Its own end: everything sent comes back, and then the end of file.
fn finish(mut stream: TcpStream) {
    exchange(&mut stream).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

fn wait_enrolled(mesh: &Running, agent: &Agent, pod: &str, wanted: bool) {
    let uid = mesh.spec(pod).uid();
    wait::until(format!("{pod} enrolled: {wanted}"), wait::SOON, || {
        figures::enrolled(agent).unwrap().contains(&uid) == wanted
    })
    .unwrap();
}

fn set(mesh: &mut Running, pod: &str, change: impl FnOnce(&mut PodSpec)) {
    mesh.change(|mesh| change(mesh.pods.iter_mut().find(|spec| spec.name == pod).unwrap()))
        .unwrap();
}

/// The agents have taken the file as it is now: they know a policy that was added last.
fn wait_loads(agent: &Agent, before: f64) {
    wait::until("the file's new version", wait::SOON, || loads(agent) > before).unwrap();
}

fn loads(agent: &Agent) -> f64 {
    agent.metric("culvert_source_loads_total", &[]).unwrap()
}

#[test]
fn enrolling_and_withdrawing_under_load_loses_no_connection() {
    let outside = |name, namespace| PodSpec::outside(name, namespace, name);
    let mut mesh = Mesh::new()
        .node("a")
        .pod_with(outside("client", "web"))
        .pod_with(outside("near", "shop"))
        .node("b")
        .pod_with(outside("server", "shop"))
        .start()
        .unwrap();
    for pod in ["near", "server"] {
        serve(&mesh, pod, PORT, echo).unwrap();
    }
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let to = [both(&mesh, "server"), both(&mesh, "near")].concat();
    let load = Load::start(&mesh, "client", &to, 4);
    let mut live: Vec<TcpStream> = Vec::new();
    let grow = |mesh: &Running, live: &mut Vec<TcpStream>| {
        live.iter_mut().for_each(|stream| exchange(stream).unwrap());
        live.extend(to.iter().map(|to| open(mesh, "client", *to)));
        load.wait_answered(150).unwrap();
    };
    for round in 0..2 {
        grow(&mesh, &mut live);
        set(&mut mesh, "client", |pod| pod.enrolled = true);
        wait_enrolled(&mesh, &a, "client", true);
        let captured = kernel_captured(&a);
        grow(&mesh, &mut live);
        assert!(kernel_captured(&a) >= captured + 150.0, "round {round}: not all captured");

        // A destination is enrolled before anybody is told to reach it by tunnel.
        set(&mut mesh, "server", |pod| pod.enrolled = true);
        wait_enrolled(&mesh, &b, "server", true);
        grow(&mesh, &mut live);
        set(&mut mesh, "near", |pod| pod.enrolled = true);
        wait_enrolled(&mesh, &a, "near", true);
        grow(&mesh, &mut live);
        let before = [loads(&a), loads(&b)];
        mesh.change(|mesh| mesh.pods.iter_mut().for_each(|pod| pod.hbone = true)).unwrap();
        wait_loads(&a, before[0]);
        wait_loads(&b, before[1]);
        let wire = mesh.wire("a", "b").unwrap();
        let tunnelled = live.len();
        live.extend(to.iter().map(|to| open(&mesh, "client", *to)));
        load.wait_answered(150).unwrap();
        let ledger = wire.finish().unwrap();
        assert_eq!(ledger.attempts.get(&PORT), None, "round {round}: {ledger}");
        assert!(ledger.clear.is_empty() && ledger.tunnel_bytes > 0, "{ledger}");

        // Withdrawn at once with their tunnels, as when a namespace leaves the mesh.
        mesh.change(|mesh| {
            for pod in &mut mesh.pods {
                (pod.enrolled, pod.hbone) = (false, false);
            }
        })
        .unwrap();
        for (agent, pod) in [(&a, "client"), (&a, "near"), (&b, "server")] {
            wait_enrolled(&mesh, agent, pod, false);
        }
        let captured = [kernel_captured(&a), kernel_captured(&b)];
        grow(&mesh, &mut live);
        assert_eq!(captured, [kernel_captured(&a), kernel_captured(&b)], "round {round}");
        assert!(tunnelled < live.len());
    }
    live.into_iter().for_each(finish);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    assert!(tally.answered >= 1500, "{tally}");
}

/// Some peers lose what they send just when they are told to go elsewhere. Until they can know
/// better, a pod that left takes it.
#[test]
fn tunnels_of_a_pod_that_left_still_take_streams() {
    const SOON: Duration = Duration::from_secs(4);
    let mut mesh = Mesh::new()
        .node("a")
        .pod_with(PodSpec::outside("outsider", "web", "outsider"))
        .pod("server", "shop", "server")
        .start()
        .unwrap();
    serve(&mesh, "server", PORT, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let leaf = Leaf::uris(&["spiffe://cluster.local/ns/web/sa/client"]);
    let peer = Peer::with(&mesh, "outsider", &Forge::of_mesh(&mesh).unwrap(), &leaf).unwrap();
    let to = IpAddr::from(mesh.pod("server").v4());
    let authority = format!("{to}:{PORT}");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // On a machine so busy that the time has passed, nothing was shown: once more.
    let shown = (0..20).any(|_| {
        set(&mut mesh, "server", |pod| pod.enrolled = true);
        wait_enrolled(&mesh, &a, "server", true);
        let tunnel = runtime.block_on(peer.h2(to)).unwrap();
        let before = runtime.block_on(tunnel.connect(&authority)).unwrap();
        runtime.block_on(before.echo("before")).unwrap();
        let start = Instant::now();
        set(&mut mesh, "server", |pod| pod.enrolled = false);
        wait_enrolled(&mesh, &a, "server", false);
        let after = runtime.block_on(tunnel.connect(&authority));
        if start.elapsed() > SOON {
            return false;
        }
        runtime.block_on(after.unwrap().echo("after")).unwrap();
        true
    });
    assert!(shown);
}

fn kernel_captured(agent: &Agent) -> f64 {
    agent.metric("culvert_kernel_connections_total", &["result=\"captured\""]).unwrap()
}

fn simple() -> Running {
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

#[test]
fn draining_agent_of_the_client_lets_connections_finish_until_its_deadline() {
    let mesh = simple();
    let to = [both(&mesh, "server"), both(&mesh, "near")].concat();
    drain(&mesh, ["a", "b"], &to, ErrorKind::ConnectionRefused);
}

#[test]
fn draining_agent_of_the_server_lets_connections_finish_until_its_deadline() {
    let mesh = simple();
    drain(&mesh, ["b", "a"], &both(&mesh, "server"), ErrorKind::ConnectionReset);
}

/// Drains the first of two agents while connections `to` servers are open; new ones fail with `new`.
fn drain(mesh: &Running, nodes: [&str; 2], to: &[(IpAddr, u16)], new: ErrorKind) {
    // What the kernel carries does not notice.
    let options = through_agent(mesh);
    let [mut draining, _other] = nodes.map(|node| mesh.agent_with(node, &options).unwrap());
    let mut live: Vec<TcpStream> = to.iter().map(|to| open(mesh, "client", *to)).collect();
    let ended_in_time: Vec<TcpStream> = to.iter().map(|to| open(mesh, "client", *to)).collect();

    let begun = Instant::now();
    draining.process().signal(libc::SIGTERM).unwrap();
    wait::until_some("refusals", wait::SOON, || {
        let error = connect(mesh, "client", to[0]).and_then(|mut stream| exchange(&mut stream));
        match error.map_err(|error| error.kind()) {
            Err(kind) if kind == new => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .unwrap();
    ended_in_time.into_iter().for_each(finish);
    // The default deadline is five seconds; connections in use last that long.
    let mut end = None;
    while end.is_none() && begun.elapsed() < wait::SOON {
        end = live.iter_mut().find_map(|stream| exchange(stream).err());
    }
    let (lasted, end) = (begun.elapsed(), end.expect("an end at the deadline"));
    assert!(lasted > Duration::from_secs(4), "ended after {lasted:?}");
    assert!(is_reset(&end), "{end}");
    for mut stream in live {
        let error = (0..100).find_map(|_| exchange(&mut stream).err()).expect("an end");
        assert!(is_reset(&error), "{error}");
    }
    let ended =
        wait::until_some("the agent's end", wait::SOON, || draining.process().ended().ok_or(""));
    assert!(ended.unwrap().success());
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());

    let _again = mesh.agent(nodes[0], &binary()).unwrap();
    for to in to {
        finish(open(mesh, "client", *to));
    }
}

fn is_reset(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[test]
fn draining_agent_without_connections_ends_at_once() {
    let mesh = simple();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let mut b = mesh.agent("b", &binary()).unwrap();
    for to in both(&mesh, "server").into_iter().chain(both(&mesh, "near")) {
        finish(open(&mesh, "client", to));
    }
    let ends = [&mut a, &mut b].map(|agent| {
        let begun = Instant::now();
        assert!(agent.process().terminate(wait::SOON).unwrap().success());
        begun.elapsed()
    });
    // The machine may be busy; the deadline is five seconds.
    assert!(ends.iter().min() < Some(&Duration::from_secs(4)), "{ends:?}");
}

/// Kernel ids behind the pinned links of an agent: of the links, and of their programs.
fn links(pin_path: &Path) -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    for folder in ["links", "pods"] {
        let mut pins: Vec<_> = std::fs::read_dir(pin_path.join(folder))
            .unwrap()
            .map(|pin| pin.unwrap().path())
            .collect();
        pins.sort();
        for pin in pins {
            let link = bpftool(&["link", "show", "pinned", &pin.to_string_lossy()]).unwrap();
            let number = |field: &str| link.get(field).and_then(serde_json::Value::as_u64).unwrap();
            found.push((number("id"), number("prog_id")));
        }
    }
    found
}

fn maps(pin_path: &Path) -> Vec<u64> {
    let pins = std::fs::read_dir(pin_path.join("maps")).unwrap();
    let id = |pin: std::io::Result<std::fs::DirEntry>| {
        let map = bpftool(&["map", "show", "pinned", &pin.unwrap().path().to_string_lossy()]);
        map.unwrap().get("id").and_then(serde_json::Value::as_u64).unwrap()
    };
    let mut ids: Vec<u64> = pins.map(id).collect();
    ids.sort_unstable();
    ids
}

/// Whether the kernel has nothing of this kind (`prog`, `map`, `link`) and id any more.
fn is_gone(kind: &str, id: u64) -> bool {
    bpftool(&[kind, "show", "id", &id.to_string()]).is_err()
}

#[test]
fn restarted_agent_replaces_programs_behind_the_same_links() {
    let mesh = simple();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let before = (links(a.pin_path()), maps(a.pin_path()));
    assert_eq!(before.0.len(), 11 + 2, "eleven attachments, and one for each pod");
    a.process().kill().unwrap();
    assert_eq!(before, (links(a.pin_path()), maps(a.pin_path())), "all stays without an agent");

    let a = mesh.agent("a", &binary()).unwrap();
    let after = (links(a.pin_path()), maps(a.pin_path()));
    assert_eq!(before.1, after.1, "the maps are those of before");
    for ((link, program), (same, other)) in before.0.iter().zip(&after.0) {
        assert_eq!(link, same, "never detached in between");
        assert_ne!(program, other, "the new agent's own program");
    }
    wait::until("the end of the old programs", wait::SOON, || {
        before.0.iter().all(|(_, program)| is_gone("prog", *program))
    })
    .unwrap();
    assert_eq!(call(&mesh, "client", both(&mesh, "near")[0], "hello").unwrap(), "hello");
}

#[test]
fn detach_leaves_no_trace_and_pods_speak_plainly_again() {
    let mesh = simple();
    let trace = |pod: &str| {
        let ip = |arguments: &[&str]| mesh.pod(pod).place().output("ip", arguments).unwrap();
        let all: Vec<String> = ["-4", "-6"]
            .into_iter()
            .flat_map(|family| {
                let table = ["route", "show", "table", "all"];
                [ip(&[family, "rule"]), ip(&[&[family][..], &table].concat())]
            })
            .collect();
        let sysctl = "/proc/sys/net/ipv4/tcp_fwmark_accept";
        all.join("\n") + &mesh.pod(pod).place().run(|| std::fs::read_to_string(sysctl).unwrap())
    };
    let pods = ["client", "near", "server"];
    let before: Vec<String> = pods.iter().map(|pod| trace(pod)).collect();
    let mut a = mesh.agent("a", &binary()).unwrap();
    let mut b = mesh.agent("b", &binary()).unwrap();
    let all = [both(&mesh, "server"), both(&mesh, "near")].concat();
    for to in &all {
        assert_eq!(call(&mesh, "client", *to, "hello").unwrap(), "hello");
    }
    assert_ne!(trace("near"), before[1]);
    let refused = a.detach().expect_err("detached a running agent");
    assert!(refused.to_string().contains("in use"), "{refused}");

    let mut ids = Vec::new();
    for agent in [&mut a, &mut b] {
        for (link, program) in links(agent.pin_path()) {
            ids.extend([("link", link), ("prog", program)]);
        }
        ids.extend(maps(agent.pin_path()).into_iter().map(|map| ("map", map)));
        agent.process().terminate(wait::SOON).unwrap();
        let told = agent.detach().unwrap();
        assert!(told.contains("11"), "{told}");
        assert!(!agent.pin_path().exists());
    }
    wait::until_some("the end of all programs, maps and links", wait::SOON, || {
        match ids.iter().find(|(kind, id)| !is_gone(kind, *id)) {
            None => Ok(()),
            Some(left) => Err(format!("{left:?}")),
        }
    })
    .unwrap();
    let after: Vec<String> = pods.iter().map(|pod| trace(pod)).collect();
    assert_eq!(before, after);
    let wire = mesh.wire("a", "b").unwrap();
    for to in &all {
        assert_eq!(call(&mesh, "client", *to, "hello").unwrap(), "hello");
    }
    let ledger = wire.finish().unwrap();
    assert_eq!(ledger.attempts.get(&PORT), Some(&2), "{ledger}");
    assert_eq!(a.detach().map(|_| ()).ok(), Some(()), "nothing to detach is no error");
}

#[test]
fn agents_of_two_meshes_on_one_kernel_do_not_see_each_others_pods() {
    // The same addresses twice: only the namespaces tell the pods apart.
    let (open_mesh, mut closed_mesh) = (simple(), simple());
    closed_mesh
        .change(|mesh| {
            let all = vec![vec![vec![Match::any().port(PORT)]]];
            mesh.policies.push(PolicySpec::deny("nothing", "shop", all));
        })
        .unwrap();
    let meshes = [&open_mesh, &closed_mesh];
    assert_eq!(both(meshes[0], "server"), both(meshes[1], "server"));
    let mut agents: Vec<Agent> = meshes
        .iter()
        .flat_map(|mesh| ["a", "b"].map(|node| mesh.agent(node, &binary()).unwrap()))
        .collect();
    for (agent, count) in agents.iter().zip([2, 1, 2, 1]) {
        assert_eq!(figures::enrolled(agent).unwrap().len(), count);
        assert_eq!(Figures::of(agent).unwrap().entries["cv_pods"], count);
    }
    let to = [both(meshes[0], "server"), both(meshes[0], "near")].concat();
    let load = Load::start(meshes[0], "client", &to, 2);
    for to in &to {
        let error = call(meshes[1], "client", *to, "hello").expect_err("an answer");
        assert!(is_reset(&error), "{error}");
    }
    load.wait_answered(50).unwrap();
    // Neither the end of the other mesh's agents nor their removal concerns this one.
    for agent in &mut agents[2..] {
        agent.process().kill().unwrap();
    }
    load.wait_answered(50).unwrap();
    for agent in &agents[2..] {
        agent.detach().unwrap();
    }
    load.wait_answered(50).unwrap();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
}

#[test]
fn vanished_namespace_ends_its_connections_and_leaves_nothing_behind() {
    let mut mesh = simple();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let load = Load::start(&mesh, "client", &both(&mesh, "server"), 1);
    load.wait_answered(20).unwrap();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    let mut others = open(&mesh, "client", both(&mesh, "server")[0]);
    // What a client keeps open for good: its tunnels.
    let start = [Figures::of(&a).unwrap(), Figures::of(&b).unwrap()];

    mesh.add_pod("b", PodSpec::new("fleeting", "shop", "fleeting")).unwrap();
    wait_enrolled(&mesh, &b, "fleeting", true);
    serve(&mesh, "fleeting", PORT, echo).unwrap();
    let to = both(&mesh, "fleeting");
    let mut live: Vec<TcpStream> = (0..40).map(|n| open(&mesh, "client", to[n % 2])).collect();
    let from = both(&mesh, "near");
    let out: Vec<TcpStream> = (0..20).map(|n| open(&mesh, "fleeting", from[n % 2])).collect();
    assert_ne!(Figures::of(&b).unwrap(), start[1]);
    drop(out);
    // The file still names the pod when its namespace goes.
    let pod = mesh.pod("fleeting").clone();
    mesh.lab().remove_pod(&pod).unwrap();
    for stream in &mut live {
        let error = stream.read(&mut [0; 8]).expect_err("a clean end");
        assert!(is_reset(&error), "{error}");
    }
    exchange(&mut others).unwrap();
    start[0].wait_back(&a).unwrap();
    wait::until("the reason", wait::SOON, || {
        let pods = b.admin("/culvert/pods").unwrap().body;
        pods.contains("fleeting") && pods.contains("No such file")
    })
    .unwrap();
    // The name is gone, the namespace is not: the test's server still lives in it. What is left
    // inside is refused, never sent in clear.
    let to = std::net::SocketAddr::from(from[0]);
    let left = pod.place().run(|| TcpStream::connect(to)).expect_err("a connection");
    assert_eq!(left.kind(), ErrorKind::ConnectionRefused, "{left}");
    // The operator lets go of it.
    mesh.change(|mesh| mesh.pods.retain(|pod| pod.name != "fleeting")).unwrap();
    start[1].wait_back(&b).unwrap();
    finish(others);
    assert_eq!(call(&mesh, "client", both(&mesh, "server")[1], "hello").unwrap(), "hello");
}
