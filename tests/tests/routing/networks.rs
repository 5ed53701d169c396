//! Two networks, and a gateway between them: a tunnel in a tunnel.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_lab::process::Process;
use culvert_lab::wait;
use culvert_lab::waypoint::{self, Crossing, Plan};
use culvert_tests::expect::{counted, is_refused, is_reset, logged, rule};
use culvert_tests::peer::Forge;
use culvert_tests::{binary, call, connect, echo, figures, serial_bytes, serve};

use super::stage::{ask, tell};

const HOST: &str = "site.shop.svc.cluster.local";

/// Node a is network `n1`, node b is `n2`; `east` is the way into `n2`.
fn mesh() -> Running {
    let identity = format!("spiffe://{TRUST_DOMAIN}/ns/shop/sa/server");
    culvert_tests::mesh()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod("server", "shop", "server")
        .pod("stranger", "web", "stranger")
        .pod_with(PodSpec::waypoint("east", "gate", "east"))
        .service(
            ServiceSpec::new("site", "shop")
                .port(80, 8080)
                .endpoint("server")
                .with("subjectAltNames", &format!("[\"{identity}\"]")),
        )
        .start()
        .unwrap()
}

/// The mesh as network `n1` knows it: of `n2` its gateway, and that somebody there has the service.
fn from_n1(
    mesh: &Running,
    name: &str,
    gateway: Option<&str>,
    change: impl FnOnce(&mut Mesh),
) -> PathBuf {
    let gateway = gateway.map_or_else(String::new, |at| {
        format!("networkGateway: {{destination: \"{at}\", hboneMtlsPort: 15008}}, ")
    });
    let summary = format!(
        "{{uid: \"n2/SplitHorizonWorkload/east/shop/{HOST}\", name: \"{HOST}\", namespace: shop, \
         workloadIps: [], network: n2, protocol: HBONE, trustDomain: {TRUST_DOMAIN}, \
         serviceAccount: placeholder, {gateway}services: {{\"shop/{HOST}\": {{80: 8080}}}}}}"
    );
    mesh.view(name, |mesh| {
        mesh.network = "n1".to_owned();
        for pod in &mut mesh.pods {
            pod.known &= !["server", "stranger"].contains(&pod.name.as_str());
            if pod.name == "east" {
                *pod = pod.clone().with("network", "n2");
            }
        }
        mesh.workloads.push(summary);
        change(mesh);
    })
    .unwrap()
}

fn agent(mesh: &Running, node: &str, config: &Path) -> Agent {
    mesh.agent_with(node, &AgentOptions::new(&binary(), config)).unwrap()
}

fn start_gateway(mesh: &Running) -> Process {
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../target");
    let envoy = waypoint::find_envoy(Path::new(target)).unwrap();
    let authority = Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let target = (std::net::IpAddr::from(mesh.pod("server").v4()), 15008).into();
    let crossings = vec![Crossing { authority: format!("{HOST}:80"), target }];
    let plan = Plan { crossings, ..Plan::default() };
    waypoint::start_plan(mesh, &authority, "east", &envoy, &plan).unwrap()
}

#[test]
fn a_service_of_another_network_is_reached_through_its_gateway() {
    let mesh = mesh();
    let mut gateway = start_gateway(&mesh);
    let east = format!("n2/{}", mesh.pod("east").v4());
    let from = from_n1(&mesh, "n1", Some(&east), |_| ());
    let in_n2 = mesh.view("n2", |mesh| {
        mesh.network = "n2".to_owned();
        let others =
            Match::any().with("notPrincipals", "[!Exact \"cluster.local/ns/web/sa/client\"]");
        mesh.policies = vec![PolicySpec::deny("client-only", "shop", vec![rule(others)])];
    });
    tell(&mesh, &["server"], 8080);
    let a = agent(&mesh, "a", &from);
    let b = agent(&mesh, "b", &in_n2.unwrap());
    let to = (mesh.service("site")[0], 80);
    let answer = ask(&mesh, "client", to);
    // The gateway does not speak for the client's address, but the client's identity comes through.
    let (server, east) = (mesh.pod("server").v4(), mesh.pod("east").v4());
    assert_eq!(answer, ["server".to_owned(), format!("{server}:8080"), east.to_string()]);
    let line = logged(&b, &["inbound", "dst.workload=\"server\""]).unwrap();
    assert!(line.contains("spiffe://cluster.local/ns/web/sa/client"), "{line}");
    logged(&a, &["outbound", HOST]).unwrap();

    // A port that the service does not have, the gateway's end, and no gateway to be found.
    is_refused(&mesh, "client", (to.0, 81)).unwrap();
    gateway.kill().unwrap();
    is_refused(&mesh, "client", to).unwrap();
}

#[test]
fn without_a_gateway_or_a_proof_nobody_is_reached() {
    let mesh = mesh();
    let _gateway = start_gateway(&mesh);
    tell(&mesh, &["server"], 8080);
    let in_n2 = mesh.view("n2", |mesh| mesh.network = "n2".to_owned()).unwrap();
    let _b = agent(&mesh, "b", &in_n2);
    let to = (mesh.service("site")[0], 80);
    let east = format!("n2/{}", mesh.pod("east").v4());
    let claims = |names: &'static str| {
        move |mesh: &mut Mesh| {
            for service in &mut mesh.services {
                service.fields = vec![("subjectAltNames".to_owned(), names.to_owned())];
            }
        }
    };
    let keep = |_: &mut Mesh| ();
    type Change = Box<dyn FnOnce(&mut Mesh)>;
    let cases: [(&str, Option<&str>, Change, &str); 4] = [
        ("none", None, Box::new(keep), "no healthy upstream"),
        ("lost", Some("n2/192.0.2.9"), Box::new(keep), "unknown network gateway"),
        ("nameless", Some(&east), Box::new(claims("[]")), "outbound"),
        (
            "misnamed",
            Some(&east),
            Box::new(claims("[\"spiffe://cluster.local/ns/shop/sa/other\"]")),
            "outbound",
        ),
    ];
    let config = from_n1(&mesh, "n1", Some(&east), |_| ());
    let a = agent(&mesh, "a", &config);
    assert_eq!(ask(&mesh, "client", to)[0], "server");
    for (name, gateway, change, told) in cases {
        let next = from_n1(&mesh, name, gateway, change);
        let before = culvert_tests::expect::loads(&a).unwrap();
        std::fs::rename(next, &config).unwrap();
        culvert_lab::wait::until("the edit to be taken over", culvert_lab::wait::SOON, || {
            culvert_tests::expect::loads(&a).is_ok_and(|now| now > before)
        })
        .unwrap();
        is_refused(&mesh, "client", to).unwrap();
        logged(&a, &[told]).unwrap();
    }
}

/// The serial number of a certificate in a file, big-endian bytes.
fn serial_of(certificate: &Path) -> Vec<u8> {
    let mut openssl = Command::new("openssl");
    openssl.args(["x509", "-noout", "-serial", "-in"]).arg(certificate);
    let printed = String::from_utf8(openssl.output().unwrap().stdout).unwrap();
    let digits = printed.trim().strip_prefix("serial=").unwrap();
    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).unwrap();
    (0..digits.len()).step_by(2).map(byte).collect()
}

#[test]
fn a_tunnel_in_a_tunnel_is_cut_off_when_either_of_its_peers_is_revoked() {
    let mesh = mesh();
    let _gateway = start_gateway(&mesh);
    serve(&mesh, "server", 8080, echo).unwrap();
    let from = from_n1(&mesh, "n1", Some(&format!("n2/{}", mesh.pod("east").v4())), |_| ());
    let in_n2 = mesh.view("n2", |mesh| mesh.network = "n2".to_owned()).unwrap();
    let crl = mesh.lab().state().join("crl.pem");
    let mut options = AgentOptions::new(&binary(), &from);
    options.environment.push(("CRL_PATH".to_owned(), crl.to_string_lossy().into_owned()));
    let a = mesh.agent_with("a", &options).unwrap();
    let b = agent(&mesh, "b", &in_n2);
    let to = (mesh.service("site")[0], 80);
    assert_eq!(call(&mesh, "client", to, "hello").unwrap(), "hello");
    let server = figures::serial(&b, &mesh.spec("server").identity()).unwrap().unwrap();
    let gateway = serial_of(&mesh.lab().state().join("waypoint/east.pem"));
    let forge = Forge::of_mesh(&mesh).unwrap();
    let replace = |text: &str| {
        let draft = crl.with_extension("draft");
        std::fs::write(&draft, text).unwrap();
        std::fs::rename(&draft, &crl).unwrap();
    };
    let cut = "istio_tcp_connections_failed_total";
    for (count, serial) in [(1.0, serial_bytes(&server).unwrap()), (2.0, gateway)] {
        let mut live = connect(&mesh, "client", to).unwrap();
        live.write_all(b"ping").unwrap();
        live.read_exact(&mut [0; 4]).unwrap();
        live.set_read_timeout(Some(wait::SOON)).unwrap();
        replace(&forge.revoke(&[serial]));
        is_reset(&live).unwrap();
        counted(&a, cut, &["response_flags=\"CERT_REVOKED\""], count).unwrap();
        is_refused(&mesh, "client", to).unwrap();
        replace("");
        wait::until("the peers to be trusted again", wait::SOON, || {
            call(&mesh, "client", to, "hello").is_ok_and(|answer| answer == "hello")
        })
        .unwrap();
    }
    logged(&a, &["connection closed: peer certificate revoked by CRL", "access"]).unwrap();
    assert_eq!(a.metric("istio_crl_untracked_connections_total", &[]).unwrap(), 0.0);
}
