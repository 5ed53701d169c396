//! Services: endpoints, weights, ports, families, localities, ranges, names.

use std::net::IpAddr;

use culvert_lab::mesh::{Mesh, PodSpec, Running, ServiceSpec};
use culvert_tests::binary;
use culvert_tests::expect::{is_refused, logged};

use super::stage::{ask, shares, tell};

/// A client; `one` beside it, `two` on another node in another zone, `three` in another region.
fn mesh() -> Mesh {
    let at = |name: &str, namespace: &str, region: &str, zone: &str| {
        let locality = format!("{{region: {region}, zone: {zone}, subzone: s}}");
        PodSpec::new(name, namespace, name).with("locality", &locality)
    };
    culvert_tests::mesh()
        .node("a")
        .pod_with(at("client", "web", "r", "z1"))
        .pod_with(at("one", "shop", "r", "z1"))
        .pod_with(PodSpec::unknown("outside"))
        .node("b")
        .pod_with(at("two", "shop", "r", "z2").with("capacity", "3"))
        .pod_with(at("three", "shop", "q", "z1"))
}

fn service(name: &str, endpoints: &[&str]) -> ServiceSpec {
    let service = ServiceSpec::new(name, "shop").port(80, 8080);
    endpoints.iter().fold(service, |service, pod| service.endpoint(pod))
}

fn balanced(service: ServiceSpec, mode: &str, scopes: &str, health: &str) -> ServiceSpec {
    let value = format!("{{routingPreferences: {scopes}, mode: {mode}, healthPolicy: {health}}}");
    ServiceSpec { load_balancer: Some(value), ..service }
}

fn v4(mesh: &Running, service: &str) -> (IpAddr, u16) {
    (mesh.service(service)[0], 80)
}

#[test]
fn endpoints_share_by_weight_place_and_health() {
    let nobody = |name: &str| PodSpec::new(name, "shop", name);
    let mut mesh = mesh()
        .pod_with(nobody("sick").with("status", "Unhealthy"))
        .pod_with(nobody("weightless").with("capacity", "0"))
        .service(service("weighted", &["one", "two", "weightless", "sick"]))
        .service(service("weightless", &["weightless"]))
        .service(service("sick", &["sick"]))
        .service(balanced(service("lenient", &["sick"]), "Standard", "[]", "AllowAll"));
    let near_first = "[Network, Region, Zone]";
    for (name, mode, scopes, endpoints) in [
        ("near-first", "Failover", near_first, &["one", "two", "three"][..]),
        ("region-left", "Failover", near_first, &["two", "three"]),
        ("far-left", "Failover", near_first, &["three"]),
        ("strict", "Strict", "[Region, Zone]", &["one", "two", "three"]),
        ("strict-nobody", "Strict", "[Node]", &["two", "three"]),
    ] {
        mesh = mesh.service(balanced(service(name, endpoints), mode, scopes, "OnlyHealthy"));
    }
    let mesh = mesh.start().unwrap();
    tell(&mesh, &["one", "two", "three", "sick", "weightless"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();

    let got = shares(&mesh, "client", v4(&mesh, "weighted"), 120);
    assert_eq!(got.keys().collect::<Vec<_>>(), ["one", "two"], "{got:?}");
    assert!(got["two"] > got["one"], "{got:?}");
    for (name, only) in [
        ("lenient", "sick"),
        ("near-first", "one"),
        ("region-left", "two"),
        ("far-left", "three"),
        ("strict", "one"),
    ] {
        let got = shares(&mesh, "client", v4(&mesh, name), 8);
        assert_eq!(got.keys().collect::<Vec<_>>(), [only], "{name}");
    }
    for name in ["weightless", "sick", "strict-nobody"] {
        is_refused(&mesh, "client", v4(&mesh, name)).unwrap();
        let told = format!("no healthy upstream: {}:80", mesh.service(name)[0]);
        logged(&a, &["connection failed", &told]).unwrap();
    }
}

#[test]
fn ports_are_translated_by_the_service_or_the_endpoint() {
    let named = service("named", &[]).with("ports", "{80: 0}");
    let key = named.key();
    let also = service("also", &["one", "two"]);
    let services = |own: &str| format!("{{\"{key}\": {own}, \"{}\": {{80: 8080}}}}", also.key());
    let mut mesh = mesh();
    for pod in &mut mesh.pods {
        let own = match pod.name.as_str() {
            // Only this one has a port of that name.
            "one" => "{80: 9090}",
            "two" => "{}",
            _ => continue,
        };
        *pod = pod.clone().with("services", &services(own));
    }
    let mesh = mesh.service(named).service(also.clone()).start().unwrap();
    tell(&mesh, &["one", "two"], 8080);
    tell(&mesh, &["one", "two"], 9090);
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for ip in mesh.service("named") {
        for _ in 0..4 {
            let answer = ask(&mesh, "client", (ip, 80));
            assert_eq!(answer[0], "one");
            assert!(answer[1].ends_with(":9090"), "{answer:?}");
        }
    }
    let got = shares(&mesh, "client", v4(&mesh, "also"), 40);
    assert_eq!(got.len(), 2, "{got:?}");
    is_refused(&mesh, "client", (mesh.service("also")[0], 81)).unwrap();
    is_refused(&mesh, "client", (mesh.service("named")[0], 9090)).unwrap();
}

#[test]
fn families_are_chosen_as_the_service_says() {
    let only4 = |mesh: Mesh| mesh.pod_with(PodSpec::new("four", "shop", "four"));
    let with =
        |name: &str, families: &str, pod: &str| service(name, &[pod]).with("ipFamilies", families);
    let mesh = only4(mesh())
        .service(with("v4", "IPv4", "two"))
        .service(with("v6", "IPv6", "two"))
        .service(with("dual", "Dual", "two"))
        .service(with("four", "Dual", "four"))
        .service(with("none", "IPv6", "four"))
        .start();
    let mut mesh = mesh.unwrap();
    let ip = mesh.pod("four").v4();
    mesh.change(|mesh| {
        for pod in mesh.pods.iter_mut().filter(|pod| pod.name == "four") {
            *pod = pod.clone().with("workloadIps", &format!("[\"{ip}\"]"));
        }
    })
    .unwrap();
    tell(&mesh, &["two", "four"], 8080);
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    let [two4, two6] = mesh.pod("two").addresses();
    for (name, seen) in [
        ("v4", [two4, two4]),
        ("v6", [two6, two6]),
        ("dual", [two4, two6]),
        ("four", [ip.into(); 2]),
    ] {
        for (vip, seen) in mesh.service(name).into_iter().zip(seen) {
            let answer = ask(&mesh, "client", (vip, 80));
            let own: std::net::SocketAddr = answer[1].parse().unwrap();
            assert_eq!(own.ip(), seen, "{name} {vip}");
        }
    }
    for vip in mesh.service("none") {
        is_refused(&mesh, "client", (vip, 80)).unwrap();
    }
}

#[test]
fn ranges_pod_addresses_and_hidden_services() {
    let range = |network: &str| format!("{{network: \"\", cidr: \"{network}\"}}");
    let ranges = format!("[{}, {}]", range("203.0.113.0/24"), range("2001:db8:7::/48"));
    let mesh = mesh()
        .service(service("range", &["two"]).with("vips", "[]").with("cidrVips", &ranges))
        .service(service("headless", &["one", "two"]).with("vips", "[]"))
        .service(service("hidden", &["two"]).with("visibility", "Namespace"))
        .start()
        .unwrap();
    tell(&mesh, &["one", "two"], 8080);
    let _a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for within in ["203.0.113.1", "203.0.113.200", "2001:db8:7::1", "2001:db8:7:ffff::9"] {
        let to: IpAddr = within.parse().unwrap();
        assert_eq!(ask(&mesh, "client", (to, 80))[0], "two", "{within}");
        is_refused(&mesh, "client", (to, 81)).unwrap();
    }
    for pod in ["one", "two"] {
        for ip in mesh.pod(pod).addresses() {
            assert_eq!(ask(&mesh, "client", (ip, 8080))[0], pod);
        }
    }
    // To others its address is nobody's, and leads nowhere.
    for vip in mesh.service("hidden") {
        assert_eq!(ask(&mesh, "one", (vip, 80))[0], "two");
        is_refused(&mesh, "client", (vip, 80)).unwrap();
    }
}

#[test]
fn passthrough_goes_to_the_original_destination_and_no_further() {
    let lost = "shop/lost.shop.svc.cluster.local";
    let open = |name: &str| balanced(service(name, &["two"]), "Passthrough", "[]", "AllowAll");
    let mut mesh =
        mesh().service(open("open")).service(open("bound").behind(lost)).start().unwrap();
    let [out4, out6] = mesh.pod("outside").addresses();
    mesh.change(|mesh| {
        // Whoever has these addresses is known to nobody.
        mesh.services[0] =
            mesh.services[0].clone().with("vips", &format!("[\"/{out4}\", \"/{out6}\"]"));
    })
    .unwrap();
    tell(&mesh, &["outside"], 80);
    tell(&mesh, &["outside"], 443);
    tell(&mesh, &["two"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();
    let _b = mesh.agent("b", &binary()).unwrap();
    for to in [out4, out6] {
        assert_eq!(ask(&mesh, "client", (to, 443))[0], "outside");
        // Also on ports that nobody declares: there is no selection.
        let seen = ask(&mesh, "client", (to, 80)).remove(2);
        assert!(mesh.pod("client").addresses().iter().any(|ip| ip.to_string() == seen), "{seen}");
    }
    is_refused(&mesh, "client", v4(&mesh, "bound")).unwrap();
    logged(&a, &["connection failed", &format!("unknown waypoint: waypoint {lost}")]).unwrap();
}

#[test]
fn workloads_with_a_name_are_resolved() {
    let external = |number: u8, hostname: &str, service: &ServiceSpec| {
        format!(
            "{{uid: \"external-{number}\", name: external, namespace: shop, workloadIps: [], \
             hostname: \"{hostname}\", protocol: TCP, services: {{\"{}\": {{80: 8080}}}}}}",
            service.key()
        )
    };
    let (known, unknown) = (service("known", &[]), service("unknown", &[]));
    let mesh = mesh()
        .workload(&external(1, "localhost", &known))
        .workload(&external(2, "nowhere.invalid", &unknown))
        .service(known)
        .service(unknown)
        .start()
        .unwrap();
    // The name leads to the pod itself, which is known by another address only.
    tell(&mesh, &["client"], 8080);
    let a = mesh.agent("a", &binary()).unwrap();
    let answer = ask(&mesh, "client", v4(&mesh, "known"));
    assert_eq!(answer[0], "client");
    assert!(answer[1].parse::<std::net::SocketAddr>().unwrap().ip().is_loopback(), "{answer:?}");
    is_refused(&mesh, "client", v4(&mesh, "unknown")).unwrap();
    logged(&a, &["no ip addresses were resolved for workload: external-2"]).unwrap();
}
