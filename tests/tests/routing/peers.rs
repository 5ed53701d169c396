//! The other end of a tunnel is not Culvert: a pod that ends tunnels itself, Envoy, a peer that names
//! services.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use culvert_lab::mesh::{Match, PodSpec, PolicySpec, ServiceSpec, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_lab::waypoint::{self, Crossing, Plan, WayOut};
use culvert_tests::expect::{counted, is_refused, logged, rule};
use culvert_tests::peer::{Forge, Leaf, Peer, Terminus};
use culvert_tests::{binary, connect, echo, serve};

use super::stage::{ask, tell};

#[test]
fn a_pod_that_ends_tunnels_itself_is_reached_when_it_proves_who_it_is() {
    let native = |name: &str| PodSpec::waypoint(name, "shop", name).with("nativeTunnel", "true");
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .pod_with(native("native"))
        .pod_with(native("liar"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("native"))
        .start()
        .unwrap();
    Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let forge = Forge::of_mesh(&mesh).unwrap();
    let identity = mesh.spec("native").identity();
    let native = Terminus::start(&mesh, "native", &forge, &[&identity]).unwrap();
    let liar = Terminus::start(&mesh, "liar", &forge, &[&identity]).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let ip = IpAddr::from(mesh.pod("native").v4());
    let expected = ["native".to_owned(), format!("{ip}:8080")];
    for to in [(ip, 8080), (mesh.service("site")[0], 80)] {
        assert_eq!(ask(&mesh, "client", to), expected, "{to:?}");
    }
    let arrivals = native.arrivals();
    let client = mesh.pod("client").v4().to_string();
    let header = |number: usize, name: &str| {
        arrivals[number].headers.get(name).unwrap().to_str().unwrap().to_owned()
    };
    assert!(arrivals.iter().all(|arrival| arrival.peer.ip().to_string() == client));
    let forwarded = header(0, "forwarded");
    assert!(forwarded.starts_with(&format!("for=\"{client}:")), "{forwarded}");
    assert!(!forwarded.contains("host="), "{forwarded}");
    assert!(header(1, "forwarded").ends_with(";host=site.shop.svc.cluster.local"));
    assert!(header(0, "baggage").contains("k8s.namespace.name=web,k8s.deployment.name=client"));
    assert_eq!(header(0, "traceparent").len(), 55);
    assert!(!arrivals[0].headers.contains_key("x-forwarded-network"));

    is_refused(&mesh, "client", (mesh.pod("liar").v4().into(), 8080)).unwrap();
    assert_eq!(liar.arrivals().len(), 0);
    logged(&a, &["outbound", "error=\"io error"]).unwrap();
}

#[test]
fn a_peer_may_name_a_service_of_the_pod() {
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod_with(PodSpec::waypoint("far-gate", "web", "client"))
        .pod("server", "shop", "server")
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server"))
        .policy(PolicySpec::deny("no-99", "shop", vec![rule(Match::any().port(9999))]))
        .start()
        .unwrap();
    serve(&mesh, "server", 8080, echo).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let forge = Forge::of_mesh(&mesh).unwrap();
    let leaf = Leaf::uris(&[&mesh.spec("far-gate").identity()]);
    let peer = Peer::with(&mesh, "far-gate", &forge, &leaf).unwrap();
    let to = IpAddr::from(mesh.pod("server").v4());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let tunnel = peer.h2(to).await.unwrap();
        let host = "site.shop.svc.cluster.local";
        for network in ["n2", ""] {
            let headers: [(&'static str, &[u8]); 1] = [("x-forwarded-network", network.as_bytes())];
            let answer = tunnel.connect_with(&format!("{host}:80"), &headers).await.unwrap();
            answer.echo("through a gateway").await.unwrap();
        }
        for (authority, status) in [
            (format!("{host}:81"), 503),
            ("nosuch.example:80".to_owned(), 503),
            (format!("{to}:9999"), 401),
            (format!("{to}:15001"), 503),
            ("10.96.0.10:80".to_owned(), 400),
            ("10.9.9.9:80".to_owned(), 400),
        ] {
            let answer = tunnel.connect(&authority).await.unwrap();
            assert_eq!(answer.status.as_u16(), status, "{authority}");
        }
    });
    // Who calls from another network is not looked up by an address of this one.
    let line = logged(&a, &["inbound", "dst.workload=\"server\""]).unwrap();
    assert!(line.contains("src.identity"), "{line}");
}

#[test]
fn envoy_and_culvert_carry_each_others_tunnels() {
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::waypoint("envoy", "shop", "envoy"))
        .start()
        .unwrap();
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    let binary_of_envoy = waypoint::find_envoy(std::path::Path::new(target)).unwrap();
    let authority = Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let (envoy, server) = (mesh.pod("envoy").addresses(), IpAddr::from(mesh.pod("server").v4()));
    let inside = SocketAddr::from(([127, 0, 0, 1], 8080));
    let crossing = |ip: &IpAddr| Crossing {
        authority: SocketAddr::new(*ip, 8080).to_string(),
        target: inside,
    };
    let way = |port, identity| WayOut {
        port,
        authority: format!("{server}:8080"),
        via: server,
        identity,
    };
    let plan = Plan {
        crossings: envoy.iter().map(crossing).collect(),
        ways_out: vec![
            way(7001, mesh.spec("server").identity()),
            way(7002, mesh.spec("client").identity()),
        ],
        ..Plan::default()
    };
    let _envoy = waypoint::start_plan(&mesh, &authority, "envoy", &binary_of_envoy, &plan).unwrap();
    tell(&mesh, &["server", "envoy"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();

    for ip in envoy {
        assert_eq!(ask(&mesh, "client", (ip, 8080))[0], "envoy");
        // A target that Envoy has no way to.
        is_refused(&mesh, "client", (ip, 8081)).unwrap();
    }
    logged(&a, &["outbound", "error=\"http status: 404"]).unwrap();

    let loopback = |port| (IpAddr::from([127, 0, 0, 1]), port);
    let answer = ask(&mesh, "envoy", loopback(7001));
    let source = mesh.pod("envoy").v4().to_string();
    assert_eq!(answer, ["server".to_owned(), format!("{server}:8080"), source]);
    // Envoy wants somebody else there. What it tells its own client is its own affair.
    let wrong = culvert_tests::call(&mesh, "envoy", loopback(7002), "x").unwrap_or_default();
    assert_eq!(wrong, "");
}

/// What a NetworkPolicy does that knows of the application's port alone.
#[test]
fn a_tunnel_port_that_drops_everything_is_told_as_such() {
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod("server", "shop", "server")
        .start()
        .unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let filter = "table inet blocked { chain input { type filter hook input priority filter; \
                  tcp dport 15008 drop; }; }";
    mesh.pod("server").place().output("nft", &[filter]).unwrap();
    let mut live = connect(&mesh, "client", (mesh.pod("server").v4().into(), 8080)).unwrap();
    live.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let error = live.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let closed = "istio_tcp_connections_closed_total";
    counted(&a, closed, &["response_flags=\"NETWORK_POLICY\""], 1.0).unwrap();
    logged(&a, &["maybe a NetworkPolicy is blocking HBONE port 15008"]).unwrap();
}
