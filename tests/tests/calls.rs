//! Plain calls through the mesh: same node and across, both families, by pod and by service.

#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_tests::expect::{counted, is_refused, rule};
use culvert_tests::{binary, call, echo, serve, who};

/// Denies everyone who has no identity.
fn strict() -> PolicySpec {
    let plaintext = Match::any().with("notPrincipals", "[!Presence []]");
    PolicySpec::deny("strict", "shop", vec![rule(plaintext)])
}

/// A client, a server on its node and one on another.
fn two_nodes() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "server")
        .node("b")
        .pod("far", "shop", "server")
}

fn own_address(mesh: &Running, pod: &str, like: IpAddr) -> String {
    let [v4, v6] = mesh.pod(pod).addresses();
    if like.is_ipv4() { v4.to_string() } else { v6.to_string() }
}

#[test]
fn pods_call_each_other_on_one_node_and_across() {
    let mesh = two_nodes().start().unwrap();
    for name in ["near", "far"] {
        serve(&mesh, name, 8080, echo).unwrap();
        serve(&mesh, name, 8081, who).unwrap();
    }
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for name in ["near", "far"] {
        for ip in mesh.pod(name).addresses() {
            assert_eq!(call(&mesh, "client", (ip, 8080), "hello").unwrap(), "hello", "{name} {ip}");
            let seen = call(&mesh, "client", (ip, 8081), "").unwrap();
            assert_eq!(seen, own_address(&mesh, "client", ip), "{name} {ip}");
        }
    }
}

#[test]
fn services_are_called_by_their_addresses() {
    let mesh = two_nodes()
        .service(ServiceSpec::new("near", "shop").port(80, 8080).endpoint("near"))
        .service(ServiceSpec::new("far", "shop").port(80, 8080).endpoint("far"))
        .service(ServiceSpec::new("empty", "shop").port(80, 8080))
        .start()
        .unwrap();
    serve(&mesh, "near", 8080, who).unwrap();
    serve(&mesh, "far", 8080, who).unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for name in ["near", "far"] {
        for ip in mesh.service(name) {
            let seen = call(&mesh, "client", (ip, 80), "").unwrap();
            assert_eq!(seen, own_address(&mesh, "client", ip), "{name} {ip}");
            is_refused(&mesh, "client", (ip, 81)).unwrap();
        }
    }
    for ip in mesh.service("empty") {
        is_refused(&mesh, "client", (ip, 80)).unwrap();
    }
}

#[test]
fn an_ipv6_socket_calls_ipv4_addresses() {
    let mesh = two_nodes()
        .service(ServiceSpec::new("far", "shop").port(80, 8080).endpoint("far"))
        .policy(strict())
        .start()
        .unwrap();
    serve(&mesh, "near", 8080, who).unwrap();
    serve(&mesh, "far", 8080, who).unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let [service, _] = mesh.service("far");
    let targets =
        [(mesh.pod("near").v4().into(), 8080), (mesh.pod("far").v4().into(), 8080), (service, 80)];
    for (ip, port) in targets {
        let IpAddr::V4(v4) = ip else { panic!("{ip} is not IPv4") };
        let seen = call(&mesh, "client", (v4.to_ipv6_mapped().into(), port), "").unwrap();
        assert_eq!(seen, mesh.pod("client").v4().to_string(), "{ip}");
    }
}

#[test]
fn between_nodes_there_is_only_tls_on_one_port() {
    let mesh = two_nodes()
        .service(ServiceSpec::new("far", "shop").port(80, 8080).endpoint("far"))
        .start()
        .unwrap();
    serve(&mesh, "far", 8080, echo).unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let text = "readable ".repeat(10_000);
    for ip in mesh.pod("far").addresses() {
        assert_eq!(call(&mesh, "client", (ip, 8080), &text).unwrap(), text, "{ip}");
    }
    for ip in mesh.service("far") {
        assert_eq!(call(&mesh, "client", (ip, 80), &text).unwrap(), text, "{ip}");
    }
    let ledger = wire.finish().unwrap();
    assert!(ledger.only_tls(), "{ledger}");
    assert!(ledger.tunnel_bytes > 4 * 2 * text.len() as u64, "{ledger}");
    assert_eq!(ledger.attempts.keys().collect::<Vec<_>>(), [&15008], "{ledger}");
    assert_eq!((ledger.dropped, ledger.unchecked_bytes), (0, 0), "{ledger}");
}

#[test]
fn strangers_and_pods_without_tunnels_are_called_in_plain() {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod_with(PodSpec::unknown("stranger"))
        .pod_with(PodSpec::outside("legacy", "shop", "legacy"))
        .service(ServiceSpec::new("old", "shop").port(80, 8080).endpoint("legacy"))
        .start()
        .unwrap();
    serve(&mesh, "stranger", 8080, who).unwrap();
    serve(&mesh, "legacy", 8080, who).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let wire = mesh.wire("a", "b").unwrap();
    let both = |name: &str| mesh.pod(name).addresses().map(|ip| (ip, 8080));
    let services = mesh.service("old").map(|ip| (ip, 80));
    for to in both("stranger").into_iter().chain(both("legacy")).chain(services) {
        let seen = call(&mesh, "client", to, "").unwrap();
        assert_eq!(seen, own_address(&mesh, "client", to.0), "{to:?}");
    }
    let ledger = wire.finish().unwrap();
    assert_eq!(ledger.attempts.into_iter().collect::<Vec<_>>(), [(8080, 6)]);
    assert_eq!(ledger.tls_records, 0);
    let plain = "connection_security_policy=\"unknown\"";
    let opened = "istio_tcp_connections_opened_total";
    counted(&a, opened, &[plain, "destination_workload=\"unknown\""], 2.0).unwrap();
    counted(&a, opened, &[plain, "destination_workload=\"legacy\""], 4.0).unwrap();
}

#[test]
fn excluded_ports_and_networks_are_left_alone() {
    let mut by_port = PodSpec::new("by-port", "web", "client");
    by_port.exclude_outbound_ports = vec![9999];
    let mut by_network = PodSpec::new("by-network", "web", "client");
    by_network.exclude_outbound_cidrs = vec!["10.244.2.0/24".into(), "fd00:10:244:2::/64".into()];
    let mut far = PodSpec::new("far", "shop", "server");
    far.exclude_inbound_ports = vec![9090];
    let mesh = Mesh::new()
        .node("a")
        .pod_with(by_port)
        .pod_with(by_network)
        .node("b")
        .pod_with(far)
        .policy(strict())
        .start()
        .unwrap();
    for port in [8080, 9090, 9999] {
        serve(&mesh, "far", port, who).unwrap();
    }
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for ip in mesh.pod("far").addresses() {
        let own = |pod| own_address(&mesh, pod, ip);
        assert_eq!(call(&mesh, "by-port", (ip, 8080), "").unwrap(), own("by-port"));
        // What is not captured arrives without an identity, and is denied as such.
        is_refused(&mesh, "by-port", (ip, 9999)).unwrap();
        is_refused(&mesh, "by-network", (ip, 8080)).unwrap();
        assert_eq!(call(&mesh, "by-network", (ip, 9090), "").unwrap(), own("by-network"));
    }
}

#[test]
fn the_node_itself_reaches_pods_that_refuse_plaintext() {
    let mesh = Mesh::new()
        .node("a")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::outside("plain", "web", "plain"))
        .node("b")
        .pod_with(PodSpec::unknown("stranger"))
        .policy(strict())
        .start()
        .unwrap();
    serve(&mesh, "server", 8080, echo).unwrap();
    let _a = mesh.agent("a", &binary()).unwrap();
    for ip in mesh.pod("server").addresses() {
        let probe = || std::net::TcpStream::connect((ip, 8080)).and_then(culvert_tests::exchange);
        assert_eq!(mesh.node("a").place().run(probe).unwrap(), "ping", "{ip}");
        is_refused(&mesh, "plain", (ip, 8080)).unwrap();
        is_refused(&mesh, "stranger", (ip, 8080)).unwrap();
        // Another node is no more than any other host.
        let probe = mesh.node("b").place().run(probe);
        assert!(probe.is_err(), "{ip}: {probe:?}");
    }
}

#[test]
fn what_a_pod_says_to_itself_is_its_own_business() {
    let mesh = Mesh::new()
        .node("a")
        .pod("alone", "shop", "server")
        .service(ServiceSpec::new("own", "shop").port(80, 8080).endpoint("alone"))
        .policy(strict())
        .start()
        .unwrap();
    serve(&mesh, "alone", 8080, who).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let loopback = [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()];
    for ip in loopback.into_iter().chain(mesh.pod("alone").addresses()) {
        assert_eq!(call(&mesh, "alone", (ip, 8080), "").unwrap(), ip.to_string());
    }
    counted(&a, "istio_tcp_connections_opened_total", &[], 0.0).unwrap();
    for ip in mesh.service("own") {
        let seen = call(&mesh, "alone", (ip, 80), "").unwrap();
        assert_eq!(seen, own_address(&mesh, "alone", ip));
    }
    counted(&a, "istio_tcp_connections_opened_total", &[], 4.0).unwrap();
}
