//! The format's test vectors, by their numbers, and what errors say.

use culvert_core::addr::NetworkAddress;
use culvert_core::authorization::StringMatch;
use culvert_core::service::{BalanceMode, HealthPolicy, IpFamilies, Visibility};
use culvert_core::workload::{
    ApplicationTunnelProtocol, GatewayDestination, Health, TunnelProtocol, Workload,
};

use super::{EXAMPLE, edited, line_of};
use crate::file::Mesh;

fn loads(yaml: &str) -> Mesh {
    match Mesh::parse(yaml.as_bytes()) {
        Ok(mesh) => mesh,
        Err(invalid) => panic!("refused: {invalid:?}\n{yaml}"),
    }
}

/// The error's text, with the line it names in front.
fn refused(yaml: &str) -> String {
    match Mesh::parse(yaml.as_bytes()) {
        Ok(_) => panic!("loads:\n{yaml}"),
        Err(invalid) => {
            let place = invalid.place.unwrap_or_else(|| panic!("no place: {}", invalid.what));
            format!("{}: {}", place.line, invalid.what)
        }
    }
}

/// Refused on the line where `at` stands, with an error that holds `says`.
fn refused_at(yaml: &str, at: &str, says: &str) {
    let error = refused(yaml);
    let expected = format!("{}: ", line_of(yaml, at));
    assert!(error.starts_with(&expected), "not on line {expected}{error}");
    assert!(error.contains(says), "{error}");
}

fn workload<'a>(mesh: &'a Mesh, uid: &str) -> &'a Workload {
    &mesh.workloads[uid]
}

const API: &str = "demo//Pod/shop/api-1";
const FRONT: &str = "demo//Pod/web/front-1";
const LEGACY: &str = "demo//Pod/shop/legacy-1";
const WAYPOINT: &str = "demo//Pod/shop/wp-1";

#[test]
fn f1_example_loads_whole() {
    let mesh = loads(EXAMPLE);
    assert_eq!(mesh.workloads.len(), 4);
    assert_eq!(mesh.services.len(), 3);
    assert_eq!(mesh.policies.len(), 2);

    let front = workload(&mesh, FRONT);
    assert_eq!(front.identity().to_string(), "spiffe://cluster.local/ns/web/sa/front");
    assert_eq!(
        front.addresses,
        ["10.2.0.3".parse::<std::net::IpAddr>().unwrap(), "fd00:2::3".parse().unwrap()]
    );
    assert_eq!(front.tunnel_protocol, TunnelProtocol::Hbone);
    assert_eq!(&*front.locality.zone, "eu-1");
    assert_eq!(&*front.workload_type, "deployment");

    let api = workload(&mesh, API);
    assert_eq!(api.capacity, 2);
    assert_eq!(api.status, Health::Healthy);
    assert_eq!(&*api.authorization_policies[0], "shop/api-clients");
    let key = "shop/api.shop.svc.cluster.local".parse().unwrap();
    assert_eq!(api.services[&key][&80], 8080);

    let tunnel = workload(&mesh, WAYPOINT).application_tunnel.unwrap();
    assert_eq!(tunnel.protocol, ApplicationTunnelProtocol::Proxy);
    assert_eq!(tunnel.port, Some(15088));

    let service = &mesh.services[&key];
    assert_eq!(
        service.vips,
        [NetworkAddress { network: "".into(), ip: "10.96.0.10".parse().unwrap() }]
    );
    assert_eq!(service.ip_families, IpFamilies::Ipv4Only);
    assert_eq!(service.visibility, Visibility::Public);
    assert!(service.canonical);
    assert_eq!(service.weighted_waypoints[0].weight, 10);
    let balancer = service.load_balancer.as_ref().unwrap();
    assert_eq!(balancer.mode, BalanceMode::Failover);
    assert_eq!(balancer.health_policy, HealthPolicy::OnlyHealthy);

    let outside = &mesh.services[&"shop/*.outside.example".parse().unwrap()];
    assert_eq!(outside.cidr_vips[0].cidr.to_string(), "203.0.113.0/24");

    let first = &mesh.policies["shop/api-clients"];
    assert!(!first.dry_run);
    assert_eq!(first.rules.len(), 1);
    assert_eq!(first.rules[0].clauses.len(), 2);
    assert_eq!(first.rules[0].clauses[0].matches.len(), 2);
    assert_eq!(first.rules[0].clauses[0].matches[1].not_principals, [StringMatch::Presence]);
    let second = &mesh.policies["shop/need-mtls"];
    assert!(second.dry_run);
    assert_eq!(
        second.rules[1].clauses[0].matches[0].principals,
        [
            StringMatch::Prefix("old.domain/".into()),
            StringMatch::Exact("cluster.local/ns/x/sa/y".into()),
            StringMatch::Suffix("/sa/guest".into()),
        ]
    );
}

#[test]
fn absent_keys_keep_the_formats_own_defaults() {
    let mesh = loads("workloads: [{workloadIps: [], namespace: a, services: {}}]");
    let bare = workload(&mesh, "");
    assert_eq!(bare.tunnel_protocol, TunnelProtocol::None);
    assert_eq!((&*bare.trust_domain, &*bare.service_account, &*bare.cluster_id), ("", "", ""));
    assert_eq!(bare.capacity, 1);
    assert_eq!(bare.status, Health::Healthy);
}

#[test]
fn f2_empty_documents_load_empty() {
    for yaml in [
        "{}",
        "",
        "\n",
        "# nothing yet\n",
        "---\n",
        "workloads: []\n",
        "culvert: {}\n",
        "culvert:\n",
    ] {
        assert_eq!(loads(yaml), Mesh::default(), "{yaml:?}");
    }
}

#[test]
fn f3_unknown_top_level_key_is_refused() {
    let yaml = format!("{EXAMPLE}foo: 1\n");
    assert!(refused(&yaml).contains("unknown field `foo`"));
}

#[test]
fn f4_unknown_key_in_an_entity_is_refused() {
    for (from, to) in [
        ("    name: api-1\n", "    name: api-1\n    foo: 1\n"),
        ("  - name: outside\n", "  - name: outside\n    foo: 1\n"),
        ("  - name: need-mtls\n", "  - name: need-mtls\n    foo: 1\n"),
    ] {
        assert!(refused(&edited(from, to)).contains("unknown field `foo`"));
    }
}

#[test]
fn f5_unknown_key_in_a_match_is_ignored() {
    let yaml = edited(
        "          - destinationPorts: [8080]",
        "          - destinationPorts: [8080]\n            foo: 1",
    );
    assert_eq!(loads(&yaml), loads(EXAMPLE));
}

#[test]
fn f6_f7_workload_needs_services_and_addresses() {
    let yaml = edited("    services: {}\n", "");
    assert!(refused(&yaml).contains("workloads[0]: missing field `services`"));
    let yaml = edited("    workloadIps: [\"10.1.0.7\"]\n", "");
    assert!(refused(&yaml).contains("workloads[1]: missing field `workloadIps`"));
}

#[test]
fn f8_uid_may_be_absent() {
    let mesh = loads(&edited("  - uid: \"demo//Pod/shop/legacy-1\"\n    name", "  - name"));
    assert_eq!(&*workload(&mesh, "").name, "legacy-1");
}

#[test]
fn f9_service_key_needs_its_namespace() {
    let yaml = edited("      \"shop/api.shop.svc.cluster.local\":\n", "      api:\n");
    refused_at(
        &yaml,
        "      api:\n",
        "workloads[1].services: key \"api\" is not <namespace>/<hostname>",
    );
}

#[test]
fn f10_vip_needs_its_network() {
    let yaml = edited("/10.96.0.10", "10.96.0.10");
    refused_at(&yaml, "10.96.0.10", "services[0].vips[0]: \"10.96.0.10\" is not <network>/<ip>");
}

#[test]
fn f11_locality_needs_all_parts() {
    let yaml = edited("{region: eu, zone: eu-1, subzone: \"\"}", "{region: eu}");
    refused_at(&yaml, "{region: eu}", "workloads[0].locality: missing field `zone`");
}

#[test]
fn f12_policy_needs_dry_run() {
    assert!(
        refused(&edited("    dryRun: false\n", "")).contains("policies[0]: missing field `dryRun`")
    );
}

#[test]
fn f13_canonical_may_be_absent() {
    let mesh = loads(&edited("    canonical: true\n", ""));
    assert!(mesh.services.values().all(|service| !service.canonical));
}

#[test]
fn f14_service_needs_ports() {
    let yaml = edited("    ports: {80: 8080}\n", "");
    assert!(refused(&yaml).contains("services[0]: missing field `ports`"));
}

#[test]
fn f15_load_balancer_needs_all_three() {
    for line in [
        "      routingPreferences: [Network, Region, Zone]\n",
        "      mode: Failover\n",
        "      healthPolicy: OnlyHealthy\n",
    ] {
        assert!(refused(&edited(line, "")).contains("services[0].loadBalancer: missing field"));
    }
}

#[test]
fn f16_f17_cidr_needs_its_prefix_length_and_may_have_host_bits() {
    let yaml = edited("10.9.0.0/16", "10.9.0.1");
    refused_at(
        &yaml,
        "10.9.0.1",
        "policies[0].rules[0][0][1].sourceIps[0]: \"10.9.0.1\" is not a CIDR range",
    );
    loads(&edited("10.9.0.0/16", "10.9.0.1/16"));
}

#[test]
fn f18_f19_string_match_needs_a_tag() {
    let presence = "notPrincipals: [!Presence []]";
    for wrong in ["[{Exact: x}]", "[Presence]", "[x]", "[!Near x]"] {
        let yaml = edited(presence, &format!("principals: {wrong}"));
        refused_at(&yaml, wrong, "policies[0].rules[0][0][1].principals");
    }
}

#[test]
fn f20_application_tunnel_port_may_be_absent() {
    let mesh = loads(&edited("{protocol: PROXY, port: 15088}", "{protocol: PROXY}"));
    assert_eq!(workload(&mesh, WAYPOINT).application_tunnel.unwrap().port, None);
}

#[test]
fn f21_f32_port_keys_are_integers() {
    let yaml = edited("ports: {80: 8080}", "ports: {\"80\": 8080}");
    refused_at(&yaml, "{\"80\"", "services[0].ports: invalid type: string \"80\", expected u16");
    let yaml = edited("        80: 8080", "        \"80\": 8080");
    refused_at(&yaml, "\"80\": 8080", "invalid type: string \"80\", expected u16");
}

#[test]
fn f22_cidr_vip_is_an_object() {
    let yaml = edited("[{network: \"\", cidr: 203.0.113.0/24}]", "[\"/203.0.113.0/24\"]");
    refused_at(&yaml, "\"/203", "services[2].cidrVips[0]");
}

#[test]
fn f23_words_are_case_sensitive() {
    let yaml = edited("protocol: HBONE", "protocol: hbone");
    refused_at(
        &yaml,
        "protocol: hbone",
        "workloads[0].protocol: \"hbone\" is not one of HBONE, TCP",
    );
}

#[test]
fn f24_f25_f26_gateway_destination_is_an_address_or_a_hostname() {
    let legacy = "      destination: \"shop/waypoint.shop.svc.cluster.local\"\n";
    let mesh = loads(EXAMPLE);
    let waypoint = workload(&mesh, LEGACY).waypoint.clone().unwrap();
    assert!(matches!(waypoint.destination, GatewayDestination::Hostname(_)));

    let mesh = loads(&edited(legacy, "      destination: \"/10.96.0.20\"\n"));
    let waypoint = workload(&mesh, LEGACY).waypoint.clone().unwrap();
    assert!(matches!(waypoint.destination, GatewayDestination::Address(_)));

    let yaml = edited(legacy, "      destination: nonsense\n");
    refused_at(
        &yaml,
        "destination: nonsense",
        "workloads[3].waypoint.destination: \"nonsense\" is neither",
    );
}

#[test]
fn f27_unknown_keys_in_locality_and_service_account_are_ignored() {
    let yaml = edited("{region: eu,", "{foo: 1, region: eu,");
    assert_eq!(loads(&yaml), loads(EXAMPLE));
    let yaml = edited(
        "{namespace: web, serviceAccount: front}",
        "{foo: 1, namespace: web, serviceAccount: front}",
    );
    assert_eq!(loads(&yaml), loads(EXAMPLE));
}

#[test]
fn f28_endpoint_needs_all_three() {
    let ports = "    ports: {80: 8080}\n";
    let with = |endpoint: &str| {
        edited(ports, &format!("{ports}    endpoints: {{a//Pod/b/c: {endpoint}}}\n"))
    };
    let yaml = with("{workloadUid: a//Pod/b/c, port: {80: 8080}}");
    refused_at(&yaml, "a//Pod/b/c", "missing field `status`");
    let mesh = loads(&with("{workloadUid: a//Pod/b/c, port: {80: 8080}, status: Healthy}"));
    let service = &mesh.services[&"shop/api.shop.svc.cluster.local".parse().unwrap()];
    assert_eq!(service.fixed_endpoints["a//Pod/b/c"][&80], 8080);
}

#[test]
fn f29_unknown_keys_in_small_objects_are_refused() {
    for (from, to) in [
        ("{protocol: PROXY,", "{foo: 1, protocol: PROXY,"),
        ("{destination: \"/10.96.0.20\",", "{foo: 1, destination: \"/10.96.0.20\","),
        ("{routingPreferences: [],", "{foo: 1, routingPreferences: [],"),
    ] {
        refused_at(&edited(from, to), "{foo: 1", "unknown field `foo`");
    }
}

#[test]
fn f30_gateway_reference_needs_its_port() {
    let yaml = edited(
        "{destination: \"/10.96.0.20\", hboneMtlsPort: 15008}",
        "{destination: \"/10.96.0.20\"}",
    );
    refused_at(&yaml, "{destination: \"/10.96.0.20\"}", "missing field `hboneMtlsPort`");
}

#[test]
fn f31_weighted_waypoint_takes_a_whole_reference() {
    let yaml = edited(
        "{destination: \"shop/waypoint.shop.svc.cluster.local\", hboneMtlsPort: 15008}\n        weight",
        "\"shop/waypoint.shop.svc.cluster.local\"\n        weight",
    );
    assert!(refused(&yaml).contains("services[0].weightedWaypoints[0].destination"));
}

#[test]
fn f33_ports_have_sixteen_bits() {
    let yaml = edited("[8080]", "[70000]");
    refused_at(
        &yaml,
        "[70000]",
        "destinationPorts[0]: invalid value: integer `70000`, expected u16",
    );
}

#[test]
fn f34_later_of_two_with_one_key_wins() {
    let mesh = loads(&edited("  - name: need-mtls\n", "  - name: api-clients\n"));
    assert_eq!(mesh.policies.len(), 1);
    assert!(mesh.policies["shop/api-clients"].dry_run);

    let mesh = loads(&edited(LEGACY, API));
    assert_eq!(mesh.workloads.len(), 3);
    assert_eq!(&*workload(&mesh, API).name, "legacy-1");
}

#[test]
fn addresses_lose_their_ipv4_mapping() {
    let mesh = loads(&edited("\"10.1.0.7\"", "\"::ffff:10.1.0.7\""));
    assert_eq!(workload(&mesh, API).addresses, ["10.1.0.7".parse::<std::net::IpAddr>().unwrap()]);
}

#[test]
fn syntax_errors_name_their_line() {
    let yaml = edited("    namespace: web\n", "    namespace: [web\n");
    let error = refused(&yaml);
    let line: usize = error.split(':').next().unwrap().parse().unwrap();
    assert!(line >= line_of(&yaml, "[web"), "{error}");
}

#[test]
fn text_that_is_not_utf8_is_refused() {
    assert!(Mesh::parse(b"workloads: [\xff\xfe]").is_err());
}

#[test]
fn a_second_document_is_refused() {
    assert!(Mesh::parse(b"{}\n---\n{}\n").is_err());
}
