#![allow(clippy::unwrap_used)]

use super::*;
use crate::mesh::{Mesh, PodSpec, ServiceSpec};

#[test]
fn every_blank_of_the_templates_is_filled() {
    let mesh = Mesh::new()
        .node("a")
        .pod("server", "shop", "server")
        .pod_with(PodSpec::waypoint("gate", "shop", "gate"))
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server"))
        .start()
        .unwrap();
    let authority = Authority::create(&mesh.ca(), TRUST_DOMAIN).unwrap();
    let passage = Passage { service: "site".into(), port: 80, pod: "server".into(), target: 8080 };
    let path = write_config(&mesh, &authority, "gate", &plan(passage)).unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let blank = text.lines().find(|line| line.replace("\"@type\"", "").contains('@'));
    assert_eq!(blank, None);
    assert!(text.contains("domains: [\"10.96.0.10:80\", \"[fd00:10:96::a]:80\"]"), "{text}");
}

fn plan(passage: Passage) -> Plan {
    Plan { passages: vec![passage], ..Plan::default() }
}
