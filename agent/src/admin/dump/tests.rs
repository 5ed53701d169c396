#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use culvert_core::authorization::*;
use culvert_core::identity::Identity;
use culvert_core::service::*;
use culvert_core::snapshot::Change;
use culvert_core::workload::*;
use serde_json::{Value, json};

use super::super::tests::{Fixed, pod, register};
use super::*;
use crate::admin::readiness::Readiness;
use crate::connections::Direction;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::{LogFormat, Logging};

/// The dump of an agent in this state.
fn dumped(state: Fixed) -> Value {
    let log = Logging::new("info".parse().unwrap(), LogFormat::Plain, std::io::sink());
    let sources = Sources {
        telemetry: Telemetry::new(None, &[]),
        readiness: Readiness::default(),
        log: log.control.clone(),
        state: Arc::new(state),
    };
    serde_json::from_slice(&config_dump(&sources).unwrap()).unwrap()
}

fn dumped_mesh(changes: Vec<Change>) -> Value {
    let state = Fixed::default();
    *state.snapshot.lock() = Snapshot::default().with(changes);
    dumped(state)
}

fn gateway(destination: &str) -> Arc<GatewayAddress> {
    let destination = GatewayDestination::Hostname(destination.parse().unwrap());
    Arc::new(GatewayAddress { destination, hbone_mtls_port: 15008 })
}

fn api_workload() -> Workload {
    Workload {
        uid: "c1//Pod/shop/api-5c6b".into(),
        name: "api-5c6b".into(),
        namespace: "shop".into(),
        trust_domain: "cluster.local".into(),
        service_account: "api".into(),
        addresses: vec!["10.1.0.7".parse().unwrap()],
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: Some(gateway("shop/waypoint.shop.svc.cluster.local")),
        network_gateway: None,
        node: "node-a".into(),
        cluster_id: "c1".into(),
        locality: Arc::default(),
        native_tunnel: false,
        application_tunnel: None,
        services: [("shop/api.shop.svc.cluster.local".parse().unwrap(), [(80, 8080)].into())]
            .into(),
        authorization_policies: vec!["shop/api-clients".into()],
        status: Health::Healthy,
        capacity: 1,
        workload_name: "api".into(),
        workload_type: "deployment".into(),
        canonical_name: "api".into(),
        canonical_revision: "v1".into(),
    }
}

fn service(name: &str, vip: &str, ports: PortMap, ip_families: IpFamilies) -> Service {
    Service {
        name: name.into(),
        namespace: "shop".into(),
        hostname: format!("{name}.shop.svc.cluster.local").into(),
        vips: vec![culvert_core::addr::NetworkAddress {
            network: "".into(),
            ip: vip.parse().unwrap(),
        }],
        cidr_vips: Vec::new(),
        ports,
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families,
        canonical: true,
        visibility: Visibility::Public,
        fixed_endpoints: Default::default(),
    }
}

fn api_service() -> Service {
    service("api", "10.96.0.10", [(80, 8080)].into(), IpFamilies::Ipv4Only)
}

fn policy(matched: Match) -> Authorization {
    Authorization {
        name: "api-clients".into(),
        namespace: "shop".into(),
        scope: PolicyScope::WorkloadSelector,
        action: Action::Allow,
        rules: vec![Rule { clauses: vec![Clause { matches: vec![matched] }] }],
        dry_run: false,
    }
}

fn certificate(pem: &str, serial: &str) -> Certificate {
    Certificate {
        pem: pem.to_owned(),
        serial: serial.to_owned(),
        valid_from: time::macros::datetime!(2026-03-01 01:00 +1),
        expiration: time::macros::datetime!(2026-03-02 0:00 UTC),
    }
}

#[test]
fn the_dump_that_istioctl_reads_has_exactly_its_shape() {
    let state = Fixed::default();
    *state.snapshot.lock() = Snapshot::default().with([
        Change::workload(api_workload()),
        Change::service(service(
            "waypoint",
            "10.96.0.20",
            [(15008, 15008)].into(),
            IpFamilies::Automatic,
        )),
        Change::service(api_service()),
        Change::Authorization(policy(Match {
            principals: vec![StringMatch::Exact("cluster.local/ns/web/sa/front".into())],
            ..Match::default()
        })),
    ]);
    *state.certificates.lock() = vec![CertificateState {
        identity: Identity::new("cluster.local", "shop", "api"),
        status: CertificateStatus::Available,
        chain: vec![certificate("---", "4660")],
        roots: vec![certificate("---", "1")],
    }];
    *state.pods.lock() = vec![pod()];
    let host = "api.shop.svc.cluster.local";
    let _in = register(&state.connections, Direction::Inbound, Some(host), "10.1.0.7:8080");
    let vip = "10.96.0.11:80";
    let _out = register(&state.connections, Direction::Outbound, Some(vip), "10.1.0.9:15008");
    let mut dump = dumped(state);

    let keys: Vec<&String> = dump.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "certificates",
            "config",
            "policies",
            "services",
            "stagedServices",
            "staticConfig",
            "version",
            "workloadState",
            "workloads",
        ]
    );
    let times =
        json!({"validFrom": "2026-03-01T00:00:00Z", "expirationTime": "2026-03-02T00:00:00Z"});
    let certificate = |serial: &str| {
        let (from, until) = (&times["validFrom"], &times["expirationTime"]);
        json!({"pem": "LS0t", "serialNumber": serial, "validFrom": from, "expirationTime": until})
    };
    assert_eq!(
        dump["workloads"].take(),
        json!([{
            "uid": "c1//Pod/shop/api-5c6b", "workloadIps": ["10.1.0.7"], "protocol": "HBONE",
            "networkMode": "Standard", "name": "api-5c6b", "namespace": "shop",
            "serviceAccount": "api", "trustDomain": "cluster.local", "workloadName": "api",
            "workloadType": "deployment", "canonicalName": "api", "canonicalRevision": "v1",
            "clusterId": "c1", "node": "node-a", "status": "Healthy", "capacity": 1,
            "waypoint": {"destination": "shop/waypoint.shop.svc.cluster.local", "hboneMtlsPort": 15008},
            "authorizationPolicies": ["shop/api-clients"],
            "services": ["shop/api.shop.svc.cluster.local"],
        }])
    );
    assert_eq!(
        dump["services"].take(),
        json!([
            {"name": "api", "namespace": "shop", "hostname": "api.shop.svc.cluster.local",
             "vips": ["/10.96.0.10"], "ports": {"80": 8080}, "subjectAltNames": [],
             "canonical": true, "visibility": "Public", "ipFamilies": "IPv4",
             "endpoints": {"c1//Pod/shop/api-5c6b": {"workloadUid": "c1//Pod/shop/api-5c6b",
                                                     "port": {"80": 8080}, "status": "Healthy"}}},
            {"name": "waypoint", "namespace": "shop",
             "hostname": "waypoint.shop.svc.cluster.local", "vips": ["/10.96.0.20"],
             "ports": {"15008": 15008}, "endpoints": {}, "subjectAltNames": [],
             "canonical": true, "visibility": "Public"},
        ])
    );
    assert_eq!(
        dump["policies"].take(),
        json!([{
            "name": "api-clients", "namespace": "shop", "scope": "WorkloadSelector",
            "action": "Allow", "dryRun": false,
            "rules": [[[{"principals": [{"Exact": "cluster.local/ns/web/sa/front"}]}]]],
        }])
    );
    assert_eq!(
        dump["certificates"].take(),
        json!([{
            "identity": "spiffe://cluster.local/ns/shop/sa/api", "state": "Available",
            "certChain": [certificate("4660")], "rootCerts": [certificate("1")],
        }])
    );
    assert_eq!(
        dump["workloadState"].take(),
        json!({"8f0c2a5e-0000-4000-8000-000000000001": {
            "state": "Up",
            "info": {"name": "api-5c6b", "namespace": "shop", "serviceAccount": "api"},
            "connections": {
                "inbound": [{"src": "10.2.0.3:40112", "originalDst": host,
                             "actualDst": "10.1.0.7:8080", "protocol": "HBONE"}],
                "outbound": [{"src": "10.2.0.3:40112", "originalDst": vip,
                              "actualDst": "10.1.0.9:15008", "protocol": "HBONE"}],
            },
        }})
    );
}

#[test]
fn every_match_field_has_its_name() {
    let text = |value: &str| vec![StringMatch::Prefix(value.into())];
    let account = || {
        let (namespace, service_account) = ("web".into(), "front".into());
        vec![ServiceAccountMatch { namespace, service_account }]
    };
    let dump = dumped_mesh(vec![Change::Authorization(policy(Match {
        namespaces: vec![StringMatch::Presence],
        not_namespaces: vec![StringMatch::Suffix("x".into())],
        principals: text("p"),
        not_principals: text("q"),
        service_accounts: account(),
        not_service_accounts: account(),
        source_ips: vec!["10.9.0.0/16".parse().unwrap()],
        not_source_ips: vec!["fd00::/8".parse().unwrap()],
        destination_ips: vec!["10.1.0.7/32".parse().unwrap()],
        not_destination_ips: vec!["10.1.0.8/32".parse().unwrap()],
        destination_ports: vec![8080],
        not_destination_ports: vec![9090],
    }))]);
    assert_eq!(
        dump["policies"][0]["rules"][0][0][0],
        json!({
            "namespaces": [{"Presence": []}], "notNamespaces": [{"Suffix": "x"}],
            "principals": [{"Prefix": "p"}], "notPrincipals": [{"Prefix": "q"}],
            "serviceAccounts": [{"namespace": "web", "serviceAccount": "front"}],
            "notServiceAccounts": [{"namespace": "web", "serviceAccount": "front"}],
            "sourceIps": ["10.9.0.0/16"], "notSourceIps": ["fd00::/8"],
            "destinationIps": ["10.1.0.7/32"], "notDestinationIps": ["10.1.0.8/32"],
            "destinationPorts": [8080], "notDestinationPorts": [9090],
        })
    );
}

#[test]
fn what_is_set_is_shown() {
    let address = culvert_core::addr::NetworkAddress {
        network: "net".into(),
        ip: "10.96.0.20".parse().unwrap(),
    };
    let destination = GatewayDestination::Address(address);
    let by_address = Arc::new(GatewayAddress { destination, hbone_mtls_port: 15008 });
    let workload = Workload {
        network_gateway: Some(by_address.clone()),
        network_mode: NetworkMode::HostNetwork,
        tunnel_protocol: TunnelProtocol::None,
        network: "net".into(),
        hostname: "db.example".into(),
        native_tunnel: true,
        application_tunnel: Some(ApplicationTunnel {
            protocol: ApplicationTunnelProtocol::Proxy,
            port: Some(15088),
        }),
        locality: Arc::new(Locality {
            region: "eu".into(),
            zone: "eu-1".into(),
            subzone: "".into(),
        }),
        status: Health::Unhealthy,
        ..api_workload()
    };
    let service = Service {
        cidr_vips: vec![culvert_core::addr::NetworkCidr {
            network: "net".into(),
            cidr: "203.0.113.0/24".parse().unwrap(),
        }],
        weighted_waypoints: vec![WeightedWaypoint { destination: by_address, weight: 10 }],
        load_balancer: Some(LoadBalancer {
            routing_preferences: vec![Scope::Network, Scope::Region],
            mode: BalanceMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        }),
        visibility: Visibility::Namespace,
        fixed_endpoints: [("gone".into(), [(80, 8081)].into())].into(),
        ..api_service()
    };
    let dump = dumped_mesh(vec![Change::workload(workload), Change::service(service)]);
    let workload = &dump["workloads"][0];
    let gateway = json!({"destination": "net/10.96.0.20", "hboneMtlsPort": 15008});
    for (key, value) in [
        ("networkGateway", gateway.clone()),
        ("networkMode", json!("HostNetwork")),
        ("protocol", json!("TCP")),
        ("network", json!("net")),
        ("hostname", json!("db.example")),
        ("nativeTunnel", json!(true)),
        ("applicationTunnel", json!({"protocol": "PROXY", "port": 15088})),
        ("locality", json!({"region": "eu", "zone": "eu-1", "subzone": ""})),
        ("status", json!("Unhealthy")),
    ] {
        assert_eq!(workload[key], value, "{key}");
    }
    let service = &dump["services"][0];
    for (key, value) in [
        ("cidrVips", json!([{"network": "net", "cidr": "203.0.113.0/24"}])),
        ("weightedWaypoints", json!([{"destination": gateway, "weight": 10}])),
        (
            "loadBalancer",
            json!({"routingPreferences": ["Network", "Region"], "mode": "Failover",
                   "healthPolicy": "AllowAll"}),
        ),
        ("visibility", json!("Namespace")),
    ] {
        assert_eq!(service[key], value, "{key}");
    }
    assert_eq!(service["endpoints"]["gone"]["port"], json!({"80": 8081}));
    assert_eq!(service["endpoints"]["c1//Pod/shop/api-5c6b"]["status"], "Unhealthy");
}

#[test]
fn keys_of_the_dump_stand_in_alphabetical_order() {
    let dump = dumped(Fixed::default());
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
    let mut version: Vec<&str> =
        dump["version"].as_object().unwrap().keys().map(String::as_str).collect();
    version.sort_unstable();
    let expected = [
        "buildProfile",
        "buildStatus",
        "cryptoProvider",
        "gitRevision",
        "istioVersion",
        "rustVersion",
        "version",
    ];
    assert_eq!(version, expected);
}

#[test]
fn endpoints_without_their_service_are_staged() {
    let dump = dumped_mesh(vec![Change::workload(api_workload())]);
    let uid = "c1//Pod/shop/api-5c6b";
    assert_eq!(
        dump["stagedServices"],
        json!({"shop/api.shop.svc.cluster.local":
               {uid: {"workloadUid": uid, "port": {"80": 8080}, "status": "Healthy"}}})
    );
    assert_eq!(dump["services"], json!([]));
}

#[test]
fn the_file_is_shown_as_it_is_now_and_empty_when_it_cannot_be_read() {
    let empty = json!({"policies": [], "services": [], "workloads": []});
    assert_eq!(dumped(Fixed::default())["staticConfig"], empty);
    let state = Fixed::default();
    let file = Snapshot::default().with([Change::workload(api_workload())]);
    *state.file.lock() = Some(file);
    let dump = dumped(state);
    assert_eq!(dump["staticConfig"]["workloads"][0]["name"], "api-5c6b");
    assert_eq!(dump["workloads"], json!([]));
}

#[test]
fn a_certificate_that_cannot_be_had_says_why() {
    let state = Fixed::default();
    let of = |account: &str, status| CertificateState {
        identity: Identity::new("cluster.local", "shop", account),
        status,
        chain: Vec::new(),
        roots: Vec::new(),
    };
    *state.certificates.lock() = vec![
        of("b", CertificateStatus::Unavailable("the authority refused".to_owned())),
        of("a", CertificateStatus::Initializing),
    ];
    let dump = dumped(state);
    assert_eq!(dump["certificates"][0]["state"], "Initializing");
    assert_eq!(dump["certificates"][1]["state"], "Unavailable: the authority refused");
    assert_eq!(dump["certificates"][1]["certChain"], json!([]));
}

#[test]
fn a_pod_that_is_not_enrolled_is_pending() {
    let state = Fixed::default();
    let failed = PodState::Failed("no such namespace".to_owned());
    *state.pods.lock() = vec![Pod { uid: "p".into(), state: failed, ..pod() }];
    assert_eq!(dumped(state)["workloadState"]["p"]["state"], "Pending");
}
