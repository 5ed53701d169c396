//! Waypoints beyond the ordinary: canaries, sandwiched ones, and applications that want to know.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};

use culvert_lab::mesh::{Match, PodSpec, PolicySpec, Running, ServiceSpec, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_tests::expect::{edit, is_refused, logged, rule};
use culvert_tests::peer::{Forge, Terminus};
use culvert_tests::{LIMIT, binary};

use super::stage::{ask, shares, tell};

fn weights(parts: &[(&str, u32)]) -> String {
    let entry = |(name, weight): &(&str, u32)| {
        let destination = format!("shop/{name}.shop.svc.cluster.local");
        format!(
            "{{destination: {{destination: \"{destination}\", hboneMtlsPort: 15008}}, weight: {weight}}}"
        )
    };
    format!("[{}]", parts.iter().map(entry).collect::<Vec<_>>().join(", "))
}

#[test]
fn a_canary_gets_its_share() {
    let gate = |name: &str| ServiceSpec::new(name, "shop").port(15008, 15008).endpoint(name);
    let site = ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server");
    let mut mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .pod_with(PodSpec::waypoint("canary", "shop", "canary"))
        .service(gate("gate"))
        .service(gate("canary"))
        .service(site.with("weightedWaypoints", &weights(&[("gate", 3), ("canary", 1)])))
        .start()
        .unwrap();
    Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let forge = Forge::of_mesh(&mesh).unwrap();
    let of =
        |pod: &str| Terminus::start(&mesh, pod, &forge, &[&mesh.spec(pod).identity()]).unwrap();
    let (gate, canary) = (of("gate"), of("canary"));
    tell(&mesh, &["server"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();
    let to = (mesh.service("site")[0], 80);
    let got = shares(&mesh, "client", to, 80);
    assert_eq!(got.keys().collect::<Vec<_>>(), ["canary", "gate"], "{got:?}");
    assert!(got["gate"] > got["canary"], "{got:?}");
    assert_eq!(gate.arrivals().len() + canary.arrivals().len(), 80);
    assert!(gate.arrivals().iter().all(|arrival| arrival.authority == format!("{}:80", to.0)));

    // All to the canary, then all to nobody: never past them.
    let set = |mesh: &mut Running, parts: &[(&str, u32)]| {
        edit(mesh, &[&a], |mesh| {
            let site = mesh.services.iter_mut().find(|service| service.name == "site").unwrap();
            site.fields = vec![("weightedWaypoints".to_owned(), weights(parts))];
        })
        .unwrap();
    };
    set(&mut mesh, &[("gate", 0), ("canary", 1)]);
    assert_eq!(shares(&mesh, "client", to, 8).keys().collect::<Vec<_>>(), ["canary"]);
    set(&mut mesh, &[("gate", 0), ("lost", 1)]);
    is_refused(&mesh, "client", to).unwrap();
    logged(&a, &["connection failed", "unknown waypoint: waypoint shop/lost.shop"]).unwrap();
}

/// What a PROXY header said: source, destination, and the identity of the peer.
struct Header {
    source: SocketAddr,
    destination: SocketAddr,
    identity: String,
}

/// Reads a header of PROXY protocol version 2 over IPv4, with the peer's identity in value 0xD0.
fn read_header(stream: &mut TcpStream) -> Header {
    let mut start = [0; 16];
    stream.read_exact(&mut start).unwrap();
    assert_eq!(&start[..12], b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!((start[12], start[13]), (0x21, 0x11));
    let mut content = vec![0; usize::from(u16::from_be_bytes([start[14], start[15]]))];
    stream.read_exact(&mut content).unwrap();
    let ip = |at: usize| IpAddr::from(<[u8; 4]>::try_from(&content[at..at + 4]).unwrap());
    let number = |at: usize| u16::from_be_bytes([content[at], content[at + 1]]);
    assert_eq!(content[12], 0xD0);
    assert_eq!(usize::from(number(13)), content.len() - 15);
    Header {
        source: SocketAddr::new(ip(0), number(8)),
        destination: SocketAddr::new(ip(4), number(10)),
        identity: String::from_utf8(content[15..].to_vec()).unwrap(),
    }
}

/// A waypoint that is itself a captured pod, as its application: goes on to pods, and answers what
/// was addressed to a service with what the header said.
fn sandwich(mesh: &Running, pod: &str, port: u16) {
    let netns = mesh.pod(pod).place().netns().clone();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let listener = netns.run(|| TcpListener::bind(at)).unwrap();
    let place = mesh.pod(pod).place().clone();
    let service = mesh.service("site")[0];
    std::thread::spawn(move || {
        while let Ok((mut stream, peer)) = listener.accept() {
            let place = place.clone();
            std::thread::spawn(move || {
                assert!(peer.ip().is_loopback());
                let Header { source, destination, identity } = read_header(&mut stream);
                let mut question = Vec::new();
                stream.read_to_end(&mut question).unwrap();
                let answer = if destination.ip() == service {
                    format!("header {} {destination} {identity}", source.ip())
                } else {
                    let onward = || TcpStream::connect_timeout(&destination, LIMIT);
                    let mut onward = place.run(onward).unwrap();
                    onward.write_all(&question).unwrap();
                    onward.shutdown(Shutdown::Write).unwrap();
                    let mut answer = String::new();
                    onward.read_to_string(&mut answer).unwrap();
                    format!("onward {answer}")
                };
                let _ = stream.write_all(answer.as_bytes());
            });
        }
    });
}

#[test]
fn a_sandwiched_waypoint_learns_of_connections_and_reaches_pods_directly() {
    let gate = "shop/gate.shop.svc.cluster.local";
    let mut mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod_with(PodSpec::new("server", "shop", "server").behind(gate))
        .pod_with(
            PodSpec::new("gate", "shop", "gate")
                .with("applicationTunnel", "{protocol: PROXY, port: 15088}"),
        )
        // Its port is not declared: the tunnel makes it reachable.
        .service(ServiceSpec::new("gate", "shop").port(80, 80).endpoint("gate"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server").behind(gate))
        .start()
        .unwrap();
    tell(&mesh, &["server"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();
    let b = mesh.agent("b", &binary()).unwrap();
    let (site, server) = (mesh.service("site")[0], IpAddr::from(mesh.pod("server").v4()));
    let client = mesh.pod("client").v4().to_string();

    // Nobody listens there yet.
    is_refused(&mesh, "client", (site, 80)).unwrap();
    sandwich(&mesh, "gate", 15088);

    let answer = ask(&mesh, "client", (site, 80));
    let identity = mesh.spec("client").identity();
    assert_eq!(answer, ["header", &client, &format!("{site}:80"), &identity]);

    // The waypoint goes on to the pod that is bound to it, as itself and not through itself.
    let answer = ask(&mesh, "client", (server, 8080));
    let gate_ip = mesh.pod("gate").v4().to_string();
    assert_eq!(answer, ["onward", "server", &format!("{server}:8080"), &gate_ip]);

    // Policies judge the port that the application listens on.
    edit(&mut mesh, &[&a, &b], |mesh| {
        let deny = PolicySpec::deny("no-header", "shop", vec![rule(Match::any().port(15088))]);
        mesh.policies = vec![deny];
    })
    .unwrap();
    is_refused(&mesh, "client", (site, 80)).unwrap();
    is_refused(&mesh, "client", (server, 8080)).unwrap();
    logged(&b, &["connection closed due to policy rejection", "no-header"]).unwrap();
}

#[test]
fn a_tunnel_without_header_leads_to_another_port() {
    let mesh = culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod_with(
            PodSpec::new("server", "shop", "server")
                .with("applicationTunnel", "{protocol: NONE, port: 9090}"),
        )
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server"))
        .start()
        .unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let server = IpAddr::from(mesh.pod("server").v4());
    // The port that was asked for is not the one that is dialled.
    tell(&mesh, &["server"], 8080);
    is_refused(&mesh, "client", (server, 8080)).unwrap();
    tell(&mesh, &["server"], 9090);
    let expected =
        ["server".to_owned(), format!("{server}:9090"), mesh.pod("client").v4().to_string()];
    for to in [(server, 8080), (server, 7), (mesh.service("site")[0], 80)] {
        assert_eq!(ask(&mesh, "client", to), expected, "{to:?}");
    }
}
