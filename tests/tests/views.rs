//! What an agent shows of real connections: metrics, log, dumps, commands and the kernel's view.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, TcpStream};
use std::process::Command;

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, ServiceSpec};
use culvert_lab::wait::{self, SOON};
use culvert_tests::expect::{answer, counted, is_refused, logged, rule};
use culvert_tests::{LIMIT, binary, call, connect, echo, serve};
use serde_json::Value;

/// Reads a request to its end, then sends a longer answer.
fn longer(mut stream: TcpStream, _peer: std::net::SocketAddr) {
    let mut request = Vec::new();
    if stream.read_to_end(&mut request).is_ok() {
        // A caller that has gone away need not be answered.
        let _ = stream.write_all(&[b'x'; 2246]);
    }
}

/// Clients and servers of every kind.
fn mesh() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("other", "web", "other")
        .pod("near", "shop", "server")
        .node("b")
        .pod("far", "shop", "server")
        .pod_with(PodSpec::outside("legacy", "old", "legacy"))
        .pod_with(PodSpec::unknown("stranger"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("far"))
        .service(ServiceSpec::new("empty", "shop").port(80, 8080))
}

const OPENED: &str = "istio_tcp_connections_opened_total";
const CLOSED: &str = "istio_tcp_connections_closed_total";
const FAILED: &str = "istio_tcp_connections_failed_total";
const RECEIVED: &str = "istio_tcp_received_bytes_total";
const SENT: &str = "istio_tcp_sent_bytes_total";

fn counted_all(agent: &Agent, expected: &[(&str, f64)], labels: &[&str]) {
    for (name, value) in expected {
        counted(agent, name, labels, *value).unwrap();
    }
}

#[test]
fn a_request_is_counted_and_logged_at_both_ends() {
    let mesh = mesh().start().unwrap();
    serve(&mesh, "near", 8080, longer).unwrap();
    serve(&mesh, "far", 8080, longer).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let request = "r".repeat(74);
    let [site, _] = mesh.service("site");
    assert_eq!(call(&mesh, "client", (site, 80), &request).unwrap().len(), 2246);
    let near = mesh.pod("near").v4().into();
    assert_eq!(call(&mesh, "client", (near, 8080), &request).unwrap().len(), 2246);

    let once = [(OPENED, 1.0), (CLOSED, 1.0), (RECEIVED, 74.0), (SENT, 2246.0), (FAILED, 0.0)];
    let parties = [
        "source_workload=\"client\"",
        "source_canonical_service=\"client\"",
        "source_canonical_revision=\"v1\"",
        "source_workload_namespace=\"web\"",
        "source_principal=\"spiffe://cluster.local/ns/web/sa/client\"",
        "source_cluster=\"Kubernetes\"",
        "destination_workload_namespace=\"shop\"",
        "destination_principal=\"spiffe://cluster.local/ns/shop/sa/server\"",
        "request_protocol=\"tcp\"",
        "response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    let with = |further: &[&'static str]| [&parties[..], further].concat();
    let service = [
        "destination_service=\"site.shop.svc.cluster.local\"",
        "destination_service_name=\"site\"",
        "destination_service_namespace=\"shop\"",
        "destination_workload=\"far\"",
    ];
    let at_source = with(&["reporter=\"source\""]);
    let at_destination = with(&["reporter=\"destination\""]);
    counted_all(&a, &once, &[&at_source[..], &service].concat());
    counted_all(&b, &once, &[&at_destination[..], &service].concat());
    let near = ["destination_workload=\"near\"", "destination_service=\"unknown\""];
    counted_all(&a, &once, &[&at_source[..], &near].concat());
    counted_all(&a, &once, &[&at_destination[..], &near].concat());

    let identities = "src.identity=\"spiffe://cluster.local/ns/web/sa/client\"";
    let outbound = ["info\taccess\tconnection complete", identities, "direction=\"outbound\""];
    let inbound = ["info\taccess\tconnection complete", identities, "direction=\"inbound\""];
    let (up, down) = ("bytes_sent=74 bytes_recv=2246", "bytes_sent=2246 bytes_recv=74");
    for to in ["dst.workload=\"far\"", "dst.workload=\"near\""] {
        logged(&a, &[&outbound[..], &[to, up]].concat()).unwrap();
        let destination = if to.contains("far") { &b } else { &a };
        logged(destination, &[&inbound[..], &[to, down]].concat()).unwrap();
    }
    let hbone = format!("dst.hbone_addr={}:8080 dst.service=\"site.shop.svc", mesh.pod("far").v4());
    logged(&a, &["direction=\"outbound\"", &hbone]).unwrap();
    logged(&b, &["direction=\"inbound\"", &hbone]).unwrap();
}

#[test]
fn refusals_are_counted_at_both_ends_with_their_flags() {
    let no = PolicySpec::deny("no", "shop", vec![rule(Match::any().port(8080))]);
    let mesh = mesh().policy(no).start().unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    is_refused(&mesh, "client", (mesh.pod("far").v4().into(), 8080)).unwrap();
    is_refused(&mesh, "client", (mesh.pod("near").v4().into(), 8080)).unwrap();
    // Nobody listens there: it reads as at a server without Culvert.
    is_refused(&mesh, "client", (mesh.pod("far").v4().into(), 9090)).unwrap();
    for (agent, to) in [(&b, "destination_workload=\"far\""), (&a, "destination_workload=\"near\"")]
    {
        let of = |reporter: &'static str, flag: &'static str| [reporter, to, flag];
        let once = [(CLOSED, 1.0), (FAILED, 1.0)];
        counted_all(agent, &once, &of("reporter=\"destination\"", "response_flags=\"DENY\""));
        let source = of("reporter=\"source\"", "response_flags=\"CONNECT\"");
        let times = if to.contains("far") { 2.0 } else { 1.0 };
        counted_all(&a, &[(CLOSED, times), (FAILED, times)], &source);
        counted_all(&a, &[(OPENED, times)], &of("reporter=\"source\"", "response_flags=\"-\""));
    }
    logged(&a, &["direction=\"outbound\"", "error=\"http status: 401 Unauthorized"]).unwrap();
    logged(&a, &["direction=\"outbound\"", "error=\"http status: 503 Service Unavailable"])
        .unwrap();
    logged(&b, &["direction=\"inbound\"", "error=\"connection failed: Connection refused"])
        .unwrap();
    let connect = ["reporter=\"destination\"", "response_flags=\"CONNECT\""];
    counted_all(&b, &[(CLOSED, 1.0), (FAILED, 1.0)], &connect);
}

#[test]
fn what_the_mesh_does_not_know_reads_unknown() {
    let mesh = mesh().start().unwrap();
    serve(&mesh, "stranger", 8080, longer).unwrap();
    serve(&mesh, "far", 8080, longer).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let [empty, _] = mesh.service("empty");
    is_refused(&mesh, "client", (empty, 80)).unwrap();
    let told = format!("error=\"no healthy upstream: {empty}:80\"");
    logged(&a, &["warn\taccess\tconnection failed", &told]).unwrap();
    counted_all(&a, &[(OPENED, 0.0), (CLOSED, 0.0), (FAILED, 0.0)], &[]);

    let far = mesh.pod("far").v4().into();
    assert_eq!(
        call(&mesh, "client", (mesh.pod("stranger").v4().into(), 8080), "").unwrap().len(),
        2246
    );
    assert_eq!(call(&mesh, "legacy", (far, 8080), "").unwrap().len(), 2246);
    assert_eq!(call(&mesh, "stranger", (far, 8080), "").unwrap().len(), 2246);
    let once = [(OPENED, 1.0), (CLOSED, 1.0), (SENT, 2246.0)];
    let plain = "connection_security_policy=\"unknown\"";
    let outbound = [
        "reporter=\"source\"",
        "source_workload=\"client\"",
        "source_principal=\"unknown\"",
        "destination_workload=\"unknown\"",
        "destination_service=\"unknown\"",
        "destination_principal=\"unknown\"",
        plain,
    ];
    counted_all(&a, &once, &outbound);
    let inbound = ["reporter=\"destination\"", "source_principal=\"unknown\"", plain];
    counted_all(&b, &once, &[&inbound[..], &["source_workload=\"legacy\""]].concat());
    counted_all(&b, &once, &[&inbound[..], &["source_workload=\"unknown\""]].concat());
    let line = logged(&b, &["connection complete", "src.workload=\"legacy\""]).unwrap();
    assert!(!line.contains("identity"), "{line}");
}

#[test]
fn the_dump_has_the_shape_that_istioctl_reads() {
    let no = PolicySpec::deny("no", "shop", vec![rule(Match::any().principal("x").port(1))]);
    let mesh = mesh().policy(no).start().unwrap();
    serve(&mesh, "far", 8080, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let [site, _] = mesh.service("site");
    let _open = connect(&mesh, "client", (site, 80)).unwrap();
    counted(&b, OPENED, &[], 1.0).unwrap();

    let dump = answer(&a, "/config_dump").unwrap();
    let keys: Vec<&str> = dump.as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "certificates",
        "config",
        "policies",
        "services",
        "stagedServices",
        "staticConfig",
        "version",
        "workloadState",
        "workloads",
    ];
    assert_eq!(keys, expected);
    for list in ["workloads", "services", "policies"] {
        let lists = (&dump[list], &dump["staticConfig"][list]);
        assert!(lists.0.as_array().is_some_and(|list| !list.is_empty()), "{list}");
        assert_eq!(lists.0, lists.1, "{list}");
    }
    let uid = "lab//Pod/web/client";
    let client = dump["workloads"].as_array().unwrap().iter().find(|it| it["uid"] == uid).unwrap();
    let [v4, v6] = mesh.pod("client").addresses();
    assert_eq!(client["workloadIps"], serde_json::json!([v4, v6]));
    let fields = ["protocol", "networkMode", "name", "namespace", "status", "clusterId", "node"];
    let values = ["HBONE", "Standard", "client", "web", "Healthy", "Kubernetes", "a"];
    assert_eq!(fields.map(|field| text(client, &format!("/{field}"))), values);
    let site = dump["services"].as_array().unwrap().iter().find(|it| it["name"] == "site").unwrap();
    let endpoint = "/endpoints/lab~1~1Pod~1shop~1far";
    assert_eq!(text(site, &format!("{endpoint}/status")), "Healthy");
    assert_eq!(site["ports"]["80"], 8080);
    let rules = serde_json::json!([[[
        {"principals": [{"Exact": "x"}], "destinationPorts": [1]}
    ]]]);
    assert_eq!(dump["policies"][0]["rules"], rules);
    assert_eq!(text(&dump, "/policies/0/action"), "Deny");
    let ours = "spiffe://cluster.local/ns/web/sa/client";
    let mut certificates = dump["certificates"].as_array().unwrap().iter();
    let certificate = certificates.find(|it| it["identity"] == ours).unwrap();
    assert_eq!(text(certificate, "/state"), "Available");
    let serial = text(certificate, "/certChain/0/serialNumber");
    assert!(serial.bytes().all(|digit| digit.is_ascii_digit()), "{serial}");
    // Base64 of the PEM text.
    let pem = text(certificate, "/rootCerts/0/pem");
    assert!(pem.starts_with("LS0t"), "{pem}");
    assert_eq!(text(&dump, "/version/cryptoProvider"), "aws-lc-rs");

    let states = |dump: &Value, name: &str| {
        let mut states = dump["workloadState"].as_object().unwrap().values();
        states.find(|state| state["info"]["name"] == name).cloned().unwrap()
    };
    let state = states(&dump, "client");
    assert_eq!(text(&state, "/state"), "Up");
    assert_eq!(text(&state, "/connections/outbound/0/protocol"), "HBONE");
    let [vip, _] = mesh.service("site");
    assert_eq!(text(&state, "/connections/outbound/0/originalDst"), format!("{vip}:80"));
    let state = states(&answer(&b, "/config_dump").unwrap(), "far");
    let inbound = "/connections/inbound/0";
    assert_eq!(text(&state, &format!("{inbound}/originalDst")), "site.shop.svc.cluster.local");
    let actual = format!("{}:8080", mesh.pod("far").v4());
    assert_eq!(text(&state, &format!("{inbound}/actualDst")), actual);
}

fn text<'v>(value: &'v Value, path: &str) -> &'v str {
    value.pointer(path).and_then(Value::as_str).unwrap_or_else(|| panic!("no {path} in {value:#}"))
}

#[test]
fn every_command_prints_a_table_and_json() {
    let no = PolicySpec::deny("no", "shop", vec![rule(Match::any().port(1))]);
    let mesh = mesh().policy(no).start().unwrap();
    serve(&mesh, "near", 8080, echo).unwrap();
    serve(&mesh, "far", 8080, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let _far = connect(&mesh, "client", (mesh.pod("far").v4().into(), 8080)).unwrap();
    let _near = connect(&mesh, "client", (mesh.pod("near").v4().into(), 8080)).unwrap();
    counted(&a, OPENED, &[], 3.0).unwrap();

    let client = mesh.pod("client").v4().to_string();
    let netns = mesh.pod("near").place().netns().path().display().to_string();
    let tables: [(&str, &[&str]); 8] = [
        ("status", &["on a, up", "Ready          yes", "3 enrolled", "1 inbound, 2 outbound"]),
        ("pods", &["SERVICE ACCOUNT", "Enrolled", "Available", &client, &netns]),
        ("workloads", &["PROTOCOL", "client", &client, "HBONE", "TCP", "None"]),
        ("services", &["ENDPOINTS", "site", "10.96.0.10,fd00:10:96::a", "1/1", "0/0"]),
        ("policies", &["DRY RUN", "no", "Deny", "Namespace", "false"]),
        ("certificates", &["NOT AFTER", "spiffe://cluster.local/ns/web/sa/other", "Leaf", "Root"]),
        ("connections", &["PERMITTED BY", "near.shop:8080", "far.shop:15008", "no policy"]),
        ("logging", &["current log level is info"]),
    ];
    for (command, parts) in tables {
        let told = a.cli(&[command]).unwrap();
        let missing: Vec<_> = parts.iter().filter(|part| !told.contains(**part)).collect();
        assert!(missing.is_empty(), "{command} lacks {missing:?}:\n{told}");
    }
    let raw = a.cli(&["connections", "--raw"]).unwrap();
    assert!(raw.contains(&format!("{}:15008", mesh.pod("far").v4())), "{raw}");
    let shop = a.cli(&["workloads", "--namespace", "shop"]).unwrap();
    assert!(shop.contains("near") && !shop.contains("client"), "{shop}");

    let lengths: [(&str, usize); 6] = [
        ("pods", 3),
        ("workloads", 5),
        ("services", 2),
        ("policies", 1),
        ("certificates", 3),
        ("connections", 3),
    ];
    for (command, length) in lengths {
        let list = json(&a, &[command]);
        assert_eq!(list.as_array().map(Vec::len), Some(length), "{command}: {list:#}");
    }
    let status = json(&a, &["status"]);
    assert_eq!(status["connections"], serde_json::json!({"inbound": 1, "outbound": 2}));
    let told = a.cli(&["explain", "web/client", "site.shop.svc.cluster.local:80"]).unwrap();
    assert!(told.contains("endpoint of service") && told.contains("Outcome:   allowed"), "{told}");

    assert!(a.cli(&["logging", "access=off"]).unwrap().contains("access=off"));
    assert!(a.cli(&["logging"]).unwrap().contains("access=off"));
    assert_eq!(a.cli(&["logging", "--reset"]).unwrap(), "current log level is info\n");
    assert!(a.cli(&["logging", "access=loud"]).is_err());
    assert!(a.cli(&["explain", "nobody/here", "10.0.0.1:80"]).is_err());
}

fn json(agent: &Agent, command: &[&str]) -> Value {
    let told = agent.cli(&[command, &["-o", "json"]].concat()).unwrap();
    serde_json::from_str(&told).unwrap_or_else(|error| panic!("{command:?}: {error}:\n{told}"))
}

#[test]
fn explanations_agree_with_what_happens() {
    let front = Match::any().service_account("web", "client").port(8080);
    let plain = Match::any().with("notPrincipals", "[!Presence []]").port(8081);
    let mut old = PodSpec::new("old", "shop", "old");
    old.hbone = false;
    let mut near_old = PodSpec::new("near-old", "shop", "old");
    near_old.hbone = false;
    near_old.exclude_inbound_ports = vec![8080];
    let mut careful = PodSpec::new("careful", "web", "careful");
    careful.exclude_outbound_ports = vec![8081];
    let own = rule(Match::any().service_account("web", "client"));
    let mut mesh = mesh()
        .policy(PolicySpec::deny("some", "shop", vec![rule(front), rule(plain)]))
        .policy(PolicySpec::deny("own", "web", vec![own]))
        .service(ServiceSpec::new("nowhere", "shop").port(80, 8080).endpoint("far").behind("x/y"));
    mesh = mesh.pod_with(old);
    for pod in [near_old, careful] {
        let node = "a".to_owned();
        mesh.pods.push(PodSpec { node, ..pod });
    }
    let mesh = mesh.start().unwrap();
    for pod in ["client", "careful", "near", "far", "legacy", "stranger", "old", "near-old"] {
        for port in [8080, 8081] {
            serve(&mesh, pod, port, echo).unwrap();
        }
    }
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let pod = |name: &str, port| (IpAddr::from(mesh.pod(name).v4()), port);
    let service = |name: &str, port| (mesh.service(name)[0], port);
    let targets = [
        pod("near", 8080),
        pod("near", 8081),
        pod("far", 8080),
        pod("far", 8081),
        (mesh.pod("far").v6().into(), 8080),
        service("site", 80),
        service("site", 81),
        service("empty", 80),
        service("nowhere", 80),
        pod("legacy", 8080),
        pod("stranger", 8080),
        pod("old", 8080),
        pod("old", 8081),
        pod("near-old", 8080),
        pod("near-old", 8081),
        pod("client", 8080),
        pod("careful", 8081),
        (IpAddr::from([127, 0, 0, 1]), 8080),
    ];
    let mut wrong = Vec::new();
    for source in ["client", "other", "careful"] {
        for to in targets {
            if source == "other" && to.0.is_loopback() {
                continue;
            }
            let target = std::net::SocketAddr::from(to).to_string();
            let explained = json(&a, &["explain", &format!("web/{source}"), &target]);
            let answered = call(&mesh, source, to, "x").is_ok();
            let fits = match text(&explained, "/outcome") {
                "allowed" => answered,
                "refused" => !answered,
                // What another agent decides is not known here, and must be said.
                _ => to.0 == pod("old", 0).0 || (source == "careful" && to.1 == 8081),
            };
            if !fits {
                wrong.push(format!("{source} to {target}, answered {answered}: {explained:#}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let explained = json(&a, &["explain", "web/client", "site.shop.svc.cluster.local:80"]);
    let decided = (text(&explained, "/policy"), &explained["rule"], text(&explained, "/path"));
    assert_eq!(decided, ("shop/some", &0.into(), "tunnel"));
    let uid = mesh.spec("other").uid();
    let explained = json(&a, &["explain", &uid, &format!("{}:8080", mesh.pod("near").v4())]);
    assert_eq!((text(&explained, "/outcome"), text(&explained, "/path")), ("allowed", "local"));
}

#[test]
fn the_kernels_own_view_names_programs_maps_and_fields() {
    let mesh = mesh().start().unwrap();
    serve(&mesh, "far", 8080, echo).unwrap();
    let options = AgentOptions::new(&binary(), &mesh.config());
    let options = AgentOptions { log: "info,culvert=debug".to_owned(), ..options };
    let a = mesh.agent_with("a", &options).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    assert_eq!(call(&mesh, "client", (mesh.pod("far").v4().into(), 8080), "x").unwrap(), "x");
    let captured = format!("{} port 8080", mesh.pod("far").v4());
    logged(&a, &["debug\tculvert::kernel", "captured to", &captured]).unwrap();

    let bpftool = |arguments: &[&str]| {
        let output = Command::new("bpftool").arg("--json").args(arguments).output();
        let output = output.expect("bpftool is missing; cargo xtask setup --for test installs it");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}");
        serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    };
    let programs = answer(&a, "/culvert/status").unwrap()["kernel"]["programs"].clone();
    let programs = programs.as_array().unwrap();
    assert!(programs.len() >= 7, "{programs:#?}");
    for program in programs {
        let name = text(program, "/name");
        let shown = bpftool(&["prog", "show", "id", &program["id"].to_string()]);
        assert_eq!(text(&shown, "/name"), name);
        assert!(name.starts_with("cv_") && name.len() <= 15, "{name}");
    }
    let maps = a.pin_path().join("maps");
    let mut names = Vec::new();
    for entry in std::fs::read_dir(&maps).unwrap() {
        let path = entry.unwrap().path();
        let shown = bpftool(&["map", "show", "pinned", path.to_str().unwrap()]);
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert_eq!(text(&shown, "/name"), name);
        // The kernel takes no type information for these.
        let untyped = ["hash_of_maps", "sockhash", "ringbuf"].contains(&text(&shown, "/type"));
        assert!(untyped || shown["btf_id"].is_u64(), "{name} has no type information: {shown:#}");
        names.push(name);
    }
    assert!(names.len() >= 8, "{names:?}");
    let pods = bpftool(&["map", "dump", "pinned", maps.join("cv_pods").to_str().unwrap()]);
    let pods = pods.as_array().unwrap();
    assert_eq!(pods.len(), 3);
    assert!(pods.iter().all(|pod| pod["formatted"]["value"]["flags"].is_u64()), "{pods:#?}");
}

#[test]
fn readiness_names_what_is_not_ready() {
    let mesh = mesh().start().unwrap();
    let good = std::fs::read_to_string(mesh.config()).unwrap();
    let path = mesh.pod("near").place().netns().path();
    let bad = good.replace(&format!("netns: \"{}\"", path.display()), "netns: \"/run/nowhere\"");
    assert_ne!(good, bad);
    std::fs::write(mesh.config(), bad).unwrap();
    let options = AgentOptions::new(&binary(), &mesh.config());
    let mut a = Agent::start(mesh.lab(), mesh.node("a"), &options).unwrap();
    let ready = || {
        let at = "127.0.0.1:15021".parse().unwrap();
        mesh.node("a").place().run(|| culvert_lab::http::get(at, "/healthz/ready", LIMIT))
    };
    let pending = "not ready, pending: workload proxy manager\n";
    wait::until_some("the agent to name what is pending", SOON, || match ready() {
        Ok(told) if (told.status, told.body.as_str()) == (500, pending) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .unwrap();
    let status = answer(&a, "/culvert/status").unwrap();
    assert_eq!((&status["ready"], &status["pods"]["failed"]), (&false.into(), &1.into()));
    assert!(a.cli(&["pods"]).unwrap().contains("/run/nowhere"));

    std::fs::write(mesh.config(), good).unwrap();
    a.wait_ready(SOON).unwrap();
    assert_eq!(ready().unwrap().body, "ready\n");
}
