//! Agents that are configured as in a cluster: by a control plane, its certificates, and istio-cni.
//! With `CULVERT_PEER_ZTUNNEL=<program>` each scenario also has the peer's agent on one of two nodes.

#![allow(clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::process::Process;
use culvert_lab::wait;
use culvert_tests::cluster::{Cluster, ztunnel};
use culvert_tests::control::Behaviour;
use culvert_tests::expect::{answer, counted, is_refused, is_reset, logged, rule};
use culvert_tests::peer::{Forge, Terminus};
use culvert_tests::{LIMIT, call, connect, echo, serve, who};
use socket2::SockRef;

const PORT: u16 = 8080;

/// Whose agent a node has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Whose {
    Ours,
    Theirs,
}

use Whose::{Ours, Theirs};

/// Two nodes with agents, the client's node first.
struct Town {
    mesh: Running,
    cluster: Arc<Cluster>,
    whose: [Whose; 2],
    ours: Vec<Agent>,
    _theirs: Vec<Process>,
}

impl Town {
    fn start(mesh: Mesh, whose: [Whose; 2], by_rules: bool) -> Self {
        let (mesh, cluster) = Cluster::start(mesh, by_rules).unwrap();
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for (node, whose) in ["a", "b"].into_iter().zip(whose) {
            match whose {
                Ours => ours.push(cluster.culvert(&mesh, node).unwrap()),
                Theirs => {
                    let program = ztunnel().unwrap();
                    theirs.push(cluster.ztunnel(&mesh, node, &program).unwrap());
                }
            }
        }
        Self { mesh, cluster, whose, ours, _theirs: theirs }
    }

    fn addresses(&self, pod: &str) -> [(IpAddr, u16); 2] {
        self.mesh.pod(pod).addresses().map(|ip| (ip, PORT))
    }

    /// The peer's agent gives a clean end where ours refuses.
    fn gets_nothing(&self, pod: &str, to: (IpAddr, u16)) {
        if self.whose[0] == Ours {
            return is_refused(&self.mesh, pod, to).unwrap();
        }
        if let Ok(mut stream) = connect(&self.mesh, pod, to) {
            let read = stream.read(&mut [0; 64]);
            assert!(matches!(&read, Ok(0)) || read.as_ref().is_err_and(is_cut), "{read:?}");
        }
    }
}

fn is_cut(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

/// Every pair of agents that is to be shown, in both ways in which ours can be reached.
fn in_each_town(mesh: impl Fn() -> Mesh, scenario: impl Fn(&mut Town)) {
    let mut pairs = vec![[Ours, Ours]];
    match ztunnel() {
        Some(_) => pairs.extend([[Ours, Theirs], [Theirs, Ours]]),
        None => eprintln!("CULVERT_PEER_ZTUNNEL is not set: skipped beside the peer's agent"),
    }
    for whose in pairs {
        for by_rules in [true, false] {
            eprintln!("{whose:?}, by rules: {by_rules}");
            scenario(&mut Town::start(mesh(), whose, by_rules));
        }
    }
}

/// A client and somebody else on one node, a server with a service on the other.
fn two_nodes() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("other", "web", "other")
        .node("b")
        .pod("server", "shop", "server")
        .service(ServiceSpec::new("site", "shop").port(80, PORT).endpoint("server"))
}

#[test]
fn pods_and_services_are_called_with_both_families() {
    in_each_town(two_nodes, |town| {
        let mesh = &town.mesh;
        serve(mesh, "server", PORT, echo).unwrap();
        serve(mesh, "server", 8081, who).unwrap();
        let wire = mesh.wire("a", "b").unwrap();
        for to in town.addresses("server") {
            assert_eq!(call(mesh, "client", to, "hello").unwrap(), "hello", "{to:?}");
        }
        for (ip, own) in mesh.service("site").into_iter().zip(mesh.pod("client").addresses()) {
            assert_eq!(call(mesh, "client", (ip, 80), "hello").unwrap(), "hello", "{ip}");
            town.gets_nothing("client", (ip, 81));
            let server = mesh.pod("server").addresses();
            let server = server.into_iter().find(|ip| ip.is_ipv4() == own.is_ipv4()).unwrap();
            assert_eq!(call(mesh, "client", (server, 8081), "").unwrap(), own.to_string());
        }
        for to in mesh.pod("server").addresses() {
            town.gets_nothing("client", (to, 9));
        }
        for agent in &town.ours {
            let known = |state: &str| agent.metric("culvert_identities", &[state]).unwrap();
            assert!(known("\"available") >= 1.0 && known("unavailable\"") == 0.0);
            assert_eq!(agent.metric("culvert_certificate_failures_total", &[]).unwrap(), 0.0);
        }
        let ledger = wire.finish().unwrap();
        assert!(!ledger.clear.contains_key(&15008), "{ledger}");
        assert!(!ledger.attempts.contains_key(&PORT), "{ledger}");
    });
}

#[test]
fn policies_decide_and_end_what_they_no_longer_allow() {
    let client = "cluster.local/ns/web/sa/client";
    let mesh = || {
        let allowed = rule(Match::any().principal(client));
        two_nodes().policy(PolicySpec::allow("client", "shop", vec![allowed]))
    };
    in_each_town(mesh, |town| {
        serve(&town.mesh, "server", PORT, echo).unwrap();
        for to in town.addresses("server") {
            assert_eq!(call(&town.mesh, "client", to, "hello").unwrap(), "hello", "{to:?}");
            town.gets_nothing("other", to);
        }
        let mut live = connect(&town.mesh, "client", town.addresses("server")[0]).unwrap();
        live.write_all(b"ping").unwrap();
        live.read_exact(&mut [0; 4]).unwrap();
        let from_web = Match::any().with("namespaces", "[!Exact web]");
        let denied = PolicySpec::deny("web", "shop", vec![rule(from_web)]);
        town.mesh.change(|mesh| mesh.policies.push(denied)).unwrap();
        live.set_read_timeout(Some(wait::SOON)).unwrap();
        let end = live.read(&mut [0; 4]);
        // The peer ends the stream with a code that its own source takes for a clean end.
        match town.whose {
            [Ours, Ours] => assert!(end.as_ref().is_err_and(is_cut), "{end:?}"),
            _ => assert!(matches!(end, Ok(0)) || end.as_ref().is_err_and(is_cut), "{end:?}"),
        }
        town.gets_nothing("client", town.addresses("server")[1]);
        town.mesh.change(|mesh| mesh.policies.clear()).unwrap();
        wait::until("the end of the policies", wait::SOON, || {
            let to = town.addresses("server")[1];
            call(&town.mesh, "other", to, "hello").is_ok_and(|answer| answer == "hello")
        })
        .unwrap();
    });
}

#[test]
fn a_waypoint_takes_what_is_addressed_to_its_service() {
    let mesh = || {
        let gate = ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("gate");
        let bound = ServiceSpec::new("bound", "shop").port(80, PORT).endpoint("server");
        two_nodes()
            .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
            .service(bound.behind(&gate.key()))
            .service(gate)
    };
    in_each_town(mesh, |town| {
        let mesh = &town.mesh;
        let forge = Forge::of_mesh(mesh).unwrap();
        let gate = Terminus::start(mesh, "gate", &forge, &[&mesh.spec("gate").identity()]).unwrap();
        let client = mesh.pod("client").addresses();
        for (ip, own) in mesh.service("bound").into_iter().zip(client) {
            let authority = SocketAddr::new(ip, 80).to_string();
            let told = call(mesh, "client", (ip, 80), "hello").unwrap();
            assert_eq!(told, format!("gate {authority}"));
            let arrival = gate.arrivals().pop().unwrap();
            assert_eq!((arrival.authority, arrival.peer.ip()), (authority, own));
        }
        // Someone else under its name is nobody.
        drop(gate);
        let other = Terminus::start(mesh, "gate", &forge, &[&mesh.spec("client").identity()]);
        let _other = other.unwrap();
        town.gets_nothing("other", (mesh.service("bound")[0], 80));
    });
}

/// One connection to a listener in the server's pod.
fn pair(town: &Town, listener: &TcpListener, to: (IpAddr, u16)) -> [TcpStream; 2] {
    let mut client = connect(&town.mesh, "client", to).unwrap();
    client.write_all(b"x").unwrap();
    let (mut server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(LIMIT * 4)).unwrap();
    client.set_read_timeout(Some(LIMIT * 4)).unwrap();
    server.read_exact(&mut [0]).unwrap();
    [client, server]
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
}

#[test]
fn each_direction_ends_by_itself_and_resets_arrive_where_both_agents_carry_them() {
    in_each_town(two_nodes, |town| {
        let any = SocketAddr::from(([0u16; 8], PORT));
        let listener = town.mesh.pod("server").place().run(|| TcpListener::bind(any)).unwrap();
        for to in town.addresses("server") {
            // The client ends first, the server still speaks.
            let [mut client, mut server] = pair(town, &listener, to);
            client.write_all(b"last words").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut heard = String::new();
            server.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "last words");
            server.write_all(b"answer").unwrap();
            drop(server);
            heard.clear();
            client.read_to_string(&mut heard).unwrap();
            assert_eq!(heard, "answer");
            // What is reset at one end ends at the other; ours never tell it as a clean end.
            for by_server in [true, false] {
                let [client, server] = pair(town, &listener, to);
                let (one, mut other) = if by_server { (server, client) } else { (client, server) };
                reset(one);
                let end = other.read(&mut [0; 8]);
                let is_reset = end.as_ref().is_err_and(is_cut);
                eprintln!("{:?}, reset by the server: {by_server}: {end:?}", town.whose);
                match town.whose {
                    [Ours, Ours] => assert!(is_reset, "{end:?}"),
                    _ => assert!(is_reset || matches!(end, Ok(0)), "{end:?}"),
                }
            }
        }
    });
}

/// Our agent on both nodes, told by the control plane alone.
fn own_town(mesh: Mesh) -> Town {
    Town::start(mesh, [Ours, Ours], false)
}

#[test]
fn what_an_agent_lacks_is_asked_for_when_it_is_needed() {
    let gate = ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("gate");
    let bound = ServiceSpec::new("bound", "shop").port(80, PORT).endpoint("server");
    let mesh = two_nodes()
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .pod_with(PodSpec::unknown("stranger"))
        .service(bound.behind(&gate.key()))
        .service(gate);
    let (mesh, cluster) = Cluster::start(mesh, false).unwrap();
    let mut options = cluster.options(&mesh).unwrap();
    let mut set = |name: &str, value: &str| {
        options.environment.push((name.to_owned(), value.to_owned()));
    };
    set("XDS_ON_DEMAND", "true");
    set("ISTIO_META_DNS_CAPTURE", "false");
    let [a, _b] = ["a", "b"].map(|node| mesh.agent_with(node, &options).unwrap());
    for pod in ["server", "stranger"] {
        serve(&mesh, pod, PORT, echo).unwrap();
    }
    let forge = Forge::of_mesh(&mesh).unwrap();
    let _gate = Terminus::start(&mesh, "gate", &forge, &[&mesh.spec("gate").identity()]).unwrap();
    let held = || a.metric("culvert_xds_resources", &["type=\"address\""]).unwrap();
    // Those of its own node came unasked.
    assert_eq!(held(), 2.0);
    let wire = mesh.wire("a", "b").unwrap();
    for ip in mesh.pod("server").addresses() {
        assert_eq!(call(&mesh, "client", (ip, PORT), "hello").unwrap(), "hello");
    }
    let ledger = wire.finish().unwrap();
    assert!(!ledger.attempts.contains_key(&PORT), "in plain: {ledger}");
    assert_eq!(held(), 3.0);
    for ip in mesh.service("site") {
        assert_eq!(call(&mesh, "client", (ip, 80), "hello").unwrap(), "hello");
    }
    for ip in mesh.service("bound") {
        let told = call(&mesh, "client", (ip, 80), "hello").unwrap();
        assert!(told.starts_with("gate "), "{told}");
    }
    // Who is nobody's is reached in plain, once that is known.
    for ip in mesh.pod("stranger").addresses() {
        assert_eq!(call(&mesh, "client", (ip, PORT), "hello").unwrap(), "hello");
    }
    // While nobody can be asked, nobody who is not known is reached.
    cluster.plane(|plane| plane.stop()).unwrap();
    counted(&a, "culvert_xds_connected", &[], 0.0).unwrap();
    assert_eq!(call(&mesh, "client", (mesh.service("site")[0], 80), "hello").unwrap(), "hello");
    let nobodys = connect(&mesh, "other", ("10.96.0.200".parse().unwrap(), 80)).unwrap();
    nobodys.set_read_timeout(Some(wait::SOON)).unwrap();
    is_reset(&nobodys).unwrap();
}

#[test]
fn a_control_plane_that_hangs_is_told_and_the_last_state_serves() {
    let town = own_town(two_nodes());
    serve(&town.mesh, "server", PORT, echo).unwrap();
    let [a, _b] = town.ours.as_slice() else { panic!() };
    let to = town.addresses("server")[0];
    // Accepted and not answered at all; then answered with nothing.
    town.cluster.plane(|plane| plane.world.behave(Behaviour::Hang)).unwrap();
    town.cluster.plane(|plane| plane.world.end_streams(None)).unwrap();
    counted(a, "culvert_xds_connected", &[], 0.0).unwrap();
    assert_eq!(call(&town.mesh, "client", to, "hello").unwrap(), "hello");
    assert!(a.metric("culvert_xds_state_age_seconds", &[]).unwrap() > 0.0);
    let status = answer(a, "/culvert/status").unwrap();
    assert_eq!(status["source"]["kind"], "xds", "{status}");
    town.cluster.plane(|plane| plane.world.behave(Behaviour::Silent)).unwrap();
    assert_eq!(call(&town.mesh, "client", to, "hello").unwrap(), "hello");
    town.cluster.plane(|plane| plane.world.behave(Behaviour::Serve)).unwrap();
    let before = a.metric("istio_xds_message_total", &[]).unwrap();
    wait::until("news from the control plane", wait::SOON * 4, || {
        a.metric("istio_xds_message_total", &[]).is_ok_and(|now| now > before)
    })
    .unwrap();
    assert_eq!(call(&town.mesh, "client", to, "hello").unwrap(), "hello");
}

#[test]
fn an_agent_that_is_told_nothing_takes_no_pods() {
    let (mesh, cluster) = Cluster::start(two_nodes(), false).unwrap();
    let options = cluster.options(&mesh).unwrap();
    for behaviour in [Behaviour::Hang, Behaviour::Silent] {
        cluster.plane(|plane| plane.world.behave(behaviour)).unwrap();
        let mut a = mesh.start_agent("a", &options).unwrap();
        wait::until_some("the agent to ask in vain", wait::SOON * 3, || {
            if a.metric("istio_xds_connection_terminations_total", &[])? >= 1.0 {
                return Ok(());
            }
            Err(anyhow::anyhow!("{}", a.log()))
        })
        .unwrap();
        logged(&a, &["no stream from the control plane"]).unwrap();
        let pending = a.wait_ready(Duration::ZERO).unwrap_err();
        assert!(format!("{pending:#}").contains("state manager"), "{pending:#}");
        assert_eq!(a.metric("workload_manager_active_proxy_count", &[]).unwrap(), 0.0);
        // istio-cni's rules hold already: nothing leaves the pod in plain.
        is_refused(&mesh, "client", (mesh.pod("server").v4().into(), PORT)).unwrap();
    }
    cluster.plane(|plane| plane.world.behave(Behaviour::Serve)).unwrap();
    let _a = cluster.culvert(&mesh, "a").unwrap();
}

#[test]
fn the_agent_itself_is_a_pod_of_the_mesh() {
    let mut town = own_town(two_nodes());
    let identity = "cluster.local/ns/istio-system/sa/ztunnel";
    let node = town.mesh.node("b");
    let ips = [IpAddr::from(node.v4()), node.v6().into()];
    let workload = format!(
        "{{uid: \"lab//Pod/istio-system/agent-b\", name: agent-b, namespace: istio-system, \
         serviceAccount: ztunnel, trustDomain: cluster.local, clusterId: Kubernetes, \
         workloadIps: [\"{}\", \"{}\"], protocol: HBONE, node: b, services: {{}}}}",
        ips[0], ips[1]
    );
    town.mesh.change(|mesh| mesh.workloads.push(workload)).unwrap();
    let [a, b] = town.ours.as_slice() else { panic!() };
    // Without an end of its own: the server would take that for the client's leaving.
    let scrape = |ip: IpAddr| -> std::io::Result<String> {
        let mut stream = connect(&town.mesh, "client", (ip, 15020))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let wire = town.mesh.wire("a", "b").unwrap();
    for ip in ips {
        wait::until_some("the metrics", wait::SOON, || match scrape(ip) {
            Ok(text) if text.contains("istio_build") => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .unwrap();
    }
    logged(a, &["outbound", identity, ":15008"]).unwrap();
    logged(b, &["inbound", "dst.workload=\"agent-b\"", "src.workload=\"client\""]).unwrap();
    let ledger = wire.finish().unwrap();
    assert!(ledger.attempts.contains_key(&15008), "{ledger}");
    // Policies for it hold, also for what is open.
    let mut live = connect(&town.mesh, "client", (ips[0], 15020)).unwrap();
    live.write_all(b"GET /metrics HTTP/1.1\r\nhost: b\r\n\r\n").unwrap();
    live.read_exact(&mut [0; 16]).unwrap();
    let client = rule(Match::any().principal("cluster.local/ns/web/sa/client"));
    let denied = PolicySpec::deny("scrapers", "istio-system", vec![client]);
    town.mesh.change(|mesh| mesh.policies.push(denied)).unwrap();
    live.set_read_timeout(Some(wait::SOON)).unwrap();
    let end = live.read_to_end(&mut Vec::new());
    assert!(end.as_ref().is_err_and(is_cut), "{end:?}");
    is_refused(&town.mesh, "client", (ips[0], 15020)).unwrap();
    let b = &town.ours[1];
    logged(b, &["istio-system/scrapers", "dst.workload=\"agent-b\""]).unwrap();
}
