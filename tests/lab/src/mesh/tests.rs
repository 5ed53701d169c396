#![allow(clippy::unwrap_used)]

use super::*;

fn small() -> Mesh {
    Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .node("b")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .pod_with(PodSpec::unknown("stranger"))
        .service(ServiceSpec::new("api", "shop").port(80, 8080).endpoint("server"))
        .policy(PolicySpec::allow(
            "only-client",
            "shop",
            vec![vec![vec![Match::any().principal("cluster.local/ns/web/sa/client").port(8080)]]],
        ))
}

#[test]
fn the_file_follows_the_description() {
    let mut mesh = small().start().unwrap();
    let text = std::fs::read_to_string(mesh.config()).unwrap();
    for line in [
        "  - uid: \"lab//Pod/web/client\"",
        "    services: {\"shop/api.shop.svc.cluster.local\": {80: 8080}}",
        "    vips: [\"/10.96.0.10\", \"/fd00:10:96::a\"]",
        "    rules: [[[{principals: [!Exact \"cluster.local/ns/web/sa/client\"], destinationPorts: [8080]}]]]",
        "    - workload: \"lab//Pod/shop/server\"",
    ] {
        assert!(text.lines().any(|other| other == line), "no line {line} in:\n{text}");
    }
    assert!(!text.contains("stranger") && !text.contains("workload: \"lab//Pod/shop/gate\""));
    mesh.change(|mesh| mesh.policies.clear()).unwrap();
    assert!(!std::fs::read_to_string(mesh.config()).unwrap().contains("only-client"));
}

#[test]
fn pods_come_and_go_while_the_mesh_runs() {
    let mut mesh = small().start().unwrap();
    mesh.add_pod("a", PodSpec::new("late", "web", "late")).unwrap();
    assert_eq!(mesh.pod("late").node(), "a");
    assert!(std::fs::read_to_string(mesh.config()).unwrap().contains("lab//Pod/web/late"));
    mesh.remove_pod("late").unwrap();
    assert!(!std::fs::read_to_string(mesh.config()).unwrap().contains("lab//Pod/web/late"));
}

#[test]
fn the_authority_signs_what_openssl_verifies() {
    let mesh = small().start().unwrap();
    let authority = crate::pki::Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let identity = mesh.spec("gate").identity();
    let signed = authority.sign_identity(mesh.lab().state(), "gate", &identity).unwrap();
    let root = signed.root.to_str().unwrap().to_owned();
    let leaf = signed.certificate.to_str().unwrap().to_owned();
    let place = mesh.node("a").place();
    place.output("openssl", &["verify", "-CAfile", &root, &leaf]).unwrap();
    let text = place.output("openssl", &["x509", "-in", &leaf, "-noout", "-text"]).unwrap();
    assert!(text.contains("URI:spiffe://cluster.local/ns/shop/sa/gate"), "{text}");
}
