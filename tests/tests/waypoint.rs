//! A real waypoint in the path: taken where one is named, never gone around.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use culvert_lab::http::{self, Response};
use culvert_lab::mesh::{Mesh, PodSpec, Running, ServiceSpec, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_lab::process::Process;
use culvert_lab::waypoint::{self, Passage};
use culvert_tests::expect::{counted, edit, is_refused, logged};
use culvert_tests::{LIMIT, binary, serve};

/// Answers one HTTP request with the caller's address, and counts it.
fn website(mesh: &Running, pod: &str) -> Arc<AtomicUsize> {
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    let each = move |mut stream: TcpStream, peer: SocketAddr| {
        counter.fetch_add(1, Ordering::Relaxed);
        let head = BufReader::new(&stream).lines().map_while(Result::ok);
        if head.take_while(|line| !line.is_empty()).count() == 0 {
            return;
        }
        let seen = peer.ip().to_string();
        let length = seen.len();
        // A caller that has gone away need not be told.
        let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{seen}");
    };
    serve(mesh, pod, 8080, each).unwrap();
    calls
}

fn get(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> anyhow::Result<Response> {
    mesh.pod(pod).place().run(|| http::get(to.into(), "/", LIMIT))
}

fn passage(addressed: &str, port: u16, pod: &str) -> Passage {
    let (service, pod) = (addressed.to_owned(), pod.to_owned());
    Passage { service, port, pod, target: 8080 }
}

fn start_envoy(mesh: &Running, passages: &[Passage]) -> Process {
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    let envoy = waypoint::find_envoy(Path::new(target)).unwrap();
    let authority = Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    waypoint::start(mesh, &authority, "gate", &envoy, passages).unwrap()
}

const GATE: &str = "shop/gate.shop.svc.cluster.local";

/// Clients, servers on two nodes, and the waypoint `gate` of the service `site`.
fn mesh() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod_with(PodSpec::outside("plain", "web", "plain"))
        .pod("near", "shop", "server")
        .node("b")
        .pod("far", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .service(ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("gate"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("far").behind(GATE))
}

#[test]
fn what_is_addressed_to_a_bound_service_or_pod_passes_its_waypoint() {
    let mut mesh = mesh();
    for pod in &mut mesh.pods {
        pod.waypoint = (pod.name == "near").then(|| GATE.to_owned());
    }
    let mesh = mesh.start().unwrap();
    website(&mesh, "near");
    website(&mesh, "far");
    let _envoy = start_envoy(&mesh, &[passage("site", 80, "far"), passage("near", 8080, "near")]);
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let bound = mesh.service("site").map(|ip| (ip, 80)).into_iter();
    for to in bound.chain(mesh.pod("near").addresses().map(|ip| (ip, 8080))) {
        let response = get(&mesh, "client", to).unwrap();
        assert_eq!((response.status, response.header("x-waypoint")), (200, Some("gate")), "{to:?}");
        assert_eq!(response.body, mesh.pod("gate").v4().to_string(), "{to:?}");
    }
    // The pod behind the service is not bound by its own address.
    for ip in mesh.pod("far").addresses() {
        let response = get(&mesh, "client", (ip, 8080)).unwrap();
        assert_eq!((response.status, response.header("x-waypoint")), (200, None), "{ip}");
    }
    // The source tells of the waypoint as the next hop, and of the service that was addressed.
    let labels = [
        "reporter=\"source\"",
        "destination_workload=\"gate\"",
        "destination_service=\"site.shop.svc.cluster.local\"",
    ];
    counted(&a, "istio_tcp_connections_opened_total", &labels, 2.0).unwrap();
}

#[test]
fn a_waypoint_that_is_required_or_gone_is_never_bypassed() {
    let mut mesh = mesh();
    mesh.require_waypoint = "everyBound".to_owned();
    for pod in &mut mesh.pods {
        pod.waypoint = (pod.name == "near").then(|| GATE.to_owned());
    }
    let mut mesh = mesh.start().unwrap();
    let near_calls = website(&mesh, "near");
    let calls = website(&mesh, "far");
    let mut envoy =
        start_envoy(&mesh, &[passage("site", 80, "far"), passage("near", 8080, "near")]);
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let direct = mesh.pod("far").addresses().map(|ip| (ip, 8080));
    let bound = mesh.service("site").map(|ip| (ip, 80));

    for to in bound {
        let response = get(&mesh, "client", to).unwrap();
        assert_eq!((response.status, response.header("x-waypoint")), (200, Some("gate")), "{to:?}");
    }
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    for to in direct {
        is_refused(&mesh, "client", to).unwrap();
        is_refused(&mesh, "plain", to).unwrap();
    }
    is_refused(&mesh, "plain", (mesh.pod("near").v4().into(), 8080)).unwrap();
    let told = format!("not from waypoint: {GATE}");
    logged(&b, &["inbound", "src.workload=\"client\"", &told]).unwrap();
    logged(&b, &["inbound", "src.workload=\"plain\"", &told]).unwrap();
    logged(&a, &["outbound", "error=\"http status: 401", &told]).unwrap();
    logged(&a, &["inbound", "src.workload=\"plain\"", &told]).unwrap();
    let denied = "culvert_authorization_denied_total";
    counted(&b, denied, &["reason=\"not_from_waypoint\""], 4.0).unwrap();

    envoy.kill().unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let started = Instant::now();
    for to in bound.into_iter().chain([(mesh.pod("near").v4().into(), 8080)]) {
        is_refused(&mesh, "client", to).unwrap();
    }
    assert!(started.elapsed() < LIMIT, "{:?}", started.elapsed());
    let ledger = wire.finish().unwrap();
    assert_eq!(ledger.attempts.keys().collect::<Vec<_>>(), [&15008], "{ledger}");
    assert_eq!(calls.load(Ordering::Relaxed), 2);
    assert_eq!(near_calls.load(Ordering::Relaxed), 0);

    // Without the demand the same calls reach the pod directly.
    edit(&mut mesh, &[&a, &b], |mesh| mesh.require_waypoint = "nobody".to_owned()).unwrap();
    assert_eq!(get(&mesh, "client", direct[0]).unwrap().status, 200);
    // The bound service stays behind its waypoint even so.
    is_refused(&mesh, "client", bound[0]).unwrap();
}

#[test]
fn the_demand_also_holds_on_one_node_and_for_live_connections() {
    let mut mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .service(ServiceSpec::new("gate", "shop").port(15008, 15008).endpoint("gate"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("near").behind(GATE))
        .start()
        .unwrap();
    serve(&mesh, "near", 8080, culvert_tests::echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = (mesh.pod("near").v4().into(), 8080);
    let open = culvert_tests::connect(&mesh, "client", to).unwrap();
    counted(&a, "istio_tcp_connections_opened_total", &[], 2.0).unwrap();
    let uid = mesh.spec("near").uid();
    edit(&mut mesh, &[&a], |mesh| mesh.require_waypoint = format!("[\"{uid}\"]")).unwrap();
    culvert_tests::expect::is_reset(&open).unwrap();
    is_refused(&mesh, "client", to).unwrap();
    logged(&a, &["inbound", &format!("not from waypoint: {GATE}")]).unwrap();
    logged(&a, &["inbound", "connection closed due to policy change"]).unwrap();
}

#[test]
fn an_unknown_waypoint_refuses() {
    let unknown = "shop/nowhere.shop.svc.cluster.local";
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .pod_with(PodSpec::new("bound", "shop", "server").behind(unknown))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("near").behind(unknown))
        .start()
        .unwrap();
    let calls = [website(&mesh, "near"), website(&mesh, "bound")];
    let a = mesh.agent("a", &binary()).unwrap();
    for ip in mesh.service("site") {
        is_refused(&mesh, "client", (ip, 80)).unwrap();
    }
    for ip in mesh.pod("bound").addresses() {
        is_refused(&mesh, "client", (ip, 8080)).unwrap();
    }
    let told = format!("unknown waypoint: waypoint {unknown}");
    logged(&a, &["connection failed", &told]).unwrap();
    counted(&a, "culvert_connections_failed_early_total", &["reporter=\"source\""], 4.0).unwrap();
    assert_eq!(calls.map(|calls| calls.load(Ordering::Relaxed)), [0, 0]);
}
