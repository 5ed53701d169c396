//! The workload API against a control plane over TLS: first sync, rejections, resuming, absence,
//! bad input, several addresses, tokens, demand, and the state kept on disk.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use culvert_agent::config::{AgentPod, ControlPlane as Settings, Kept, Roots, Token, XdsSettings};
use culvert_agent::node::Mesh;
use culvert_agent::telemetry::Telemetry;
use culvert_agent::xds::{self, NodeFacts, Xds, XdsConnection, XdsStatus};
use culvert_core::snapshot::Snapshot;
use culvert_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use culvert_proto::istio::security::Authorization;
use culvert_proto::istio::workload::{NetworkAddress, PortList, Service, Workload, address};
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_tests::control::world::is_ack;
use culvert_tests::control::{Behaviour, ControlPlane, Listen};
use prost::Message;
use prost_types::Any;
use tonic::Status;

/// How long anything may take; no test waits so long when all is well.
const LIMIT: Duration = Duration::from_secs(30);

/// The client with a mesh behind it.
struct Agent {
    xds: Xds,
    mesh: Arc<Mesh>,
    telemetry: Telemetry,
}

impl Agent {
    async fn start(settings: &XdsSettings) -> Self {
        let mesh = Arc::new(Mesh::new(Snapshot::default()));
        let telemetry = Telemetry::new(None, &[]);
        let pod = AgentPod {
            name: "culvert-1".into(),
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            ip: Some([10, 9, 9, 9].into()),
        };
        let facts = NodeFacts { pod, node: "n1".into() };
        let publish = {
            let mesh = mesh.clone();
            move |changes: &mut dyn Iterator<Item = _>| {
                mesh.apply(changes);
            }
        };
        let xds = xds::start(settings, &facts, publish, &telemetry).await;
        Self { xds, mesh, telemetry }
    }

    async fn ready(&self) {
        self.status("ready", |status| status.ready).await;
    }

    async fn status(&self, what: &str, is_it: impl Fn(&XdsStatus) -> bool) -> XdsStatus {
        let mut status = self.xds.status();
        let found = tokio::time::timeout(LIMIT, status.wait_for(|status| is_it(status))).await;
        match found {
            Ok(found) => found.unwrap().clone(),
            Err(_) => panic!("not {what} within {LIMIT:?}: {:?}", self.xds.status().borrow()),
        }
    }

    async fn mesh(&self, what: &str, is_it: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
        let mut changes = self.mesh.changes();
        let found = async {
            loop {
                changes.borrow_and_update();
                let snapshot = self.mesh.snapshot();
                if is_it(&snapshot) {
                    return snapshot;
                }
                changes.changed().await.unwrap();
            }
        };
        let found = tokio::time::timeout(LIMIT, found).await;
        found.unwrap_or_else(|_| panic!("mesh without {what} after {LIMIT:?}"))
    }
}

fn plane() -> ControlPlane {
    ControlPlane::start(Listen::Loopback).unwrap()
}

fn settings(plane: &ControlPlane) -> XdsSettings {
    let control = Settings {
        addresses: vec![plane.address()],
        roots: Roots::Pem(plane.pki.root()),
        alt_hostname: None,
        token: Some(Token::Literal("t".to_owned())),
        headers: Vec::new(),
        cluster_id: "c1".into(),
    };
    XdsSettings { control, on_demand: false, metadata: Vec::new(), kept: None }
}

fn uid(name: &str) -> String {
    format!("c1//Pod/a/{name}")
}

fn workload(name: &str, ip: [u8; 4]) -> Workload {
    Workload {
        uid: uid(name),
        name: name.to_owned(),
        namespace: "a".to_owned(),
        addresses: vec![ip.to_vec()],
        node: "n2".to_owned(),
        ..Workload::default()
    }
}

fn service(name: &str, ip: [u8; 4]) -> Service {
    Service {
        name: name.to_owned(),
        namespace: "a".to_owned(),
        hostname: format!("{name}.a.svc"),
        addresses: vec![NetworkAddress { address: ip.to_vec(), ..NetworkAddress::default() }],
        ..Service::default()
    }
}

fn policy(name: &str) -> Authorization {
    Authorization { name: name.to_owned(), namespace: "a".to_owned(), ..Authorization::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_sync_asks_acknowledges_and_makes_ready() {
    let plane = plane();
    plane.world.put_workload(workload("w1", [10, 0, 0, 1]));
    plane.world.put_service(service("s1", [10, 1, 0, 1]));
    plane.world.put_policy(&policy("p1"));
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    let snapshot = agent.mesh.snapshot();
    assert!(snapshot.workload(&uid("w1")).is_some() && snapshot.policy("a/p1").is_some());
    assert_eq!(snapshot.service_count(), 1);

    for url in [ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL] {
        let ack =
            plane.world.request("ack", |it| it.request.type_url == url && is_ack(&it.request));
        assert!(ack.await.unwrap().request.node.is_none());
    }
    let requests = plane.world.requests();
    for (recorded, url) in requests.iter().zip([ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL]) {
        let request = &recorded.request;
        assert_eq!(request.type_url, url);
        assert!(request.resource_names_subscribe.is_empty());
        let node = request.node.as_ref().unwrap();
        assert_eq!(
            node.id,
            "ztunnel~10.9.9.9~culvert-1.istio-system~istio-system.svc.cluster.local"
        );
        assert_eq!(recorded.metadata["authorization"], "Bearer t");
        assert_eq!(recorded.metadata["clusterid"], "c1");
    }
    let status = agent.status("counted", |status| status.acks == 2).await;
    assert_eq!((status.addresses, status.authorizations, status.nacks), (2, 1, 0));
    assert_eq!(status.connection, XdsConnection::Open { address: plane.address().into() });
    let metrics = agent.telemetry.encode().unwrap();
    for line in [
        format!("istio_xds_message_total{{url=\"{ADDRESS_TYPE_URL}\"}} 1"),
        format!("istio_xds_message_total{{url=\"{AUTHORIZATION_TYPE_URL}\"}} 1"),
        "culvert_xds_connected 1.0".to_owned(),
        "culvert_xds_state_age_seconds 0.0\n".to_owned(),
        "culvert_xds_resources{type=\"address\"} 2".to_owned(),
    ] {
        assert!(metrics.contains(&line), "{line} in {metrics}");
    }
    assert!(metrics.contains("istio_xds_message_bytes_total{url="), "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pushes_are_followed() {
    let plane = plane();
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    plane.world.put_workload(workload("w1", [10, 0, 0, 1]));
    agent.mesh("w1", |mesh| mesh.workload(&uid("w1")).is_some()).await;
    plane.world.put_workload(workload("w1", [10, 0, 0, 2]));
    agent.mesh("new address", |mesh| mesh.workload_at("", [10, 0, 0, 2].into()).is_some()).await;
    plane.world.put_policy(&policy("p1"));
    agent.mesh("p1", |mesh| mesh.policy("a/p1").is_some()).await;
    plane.world.remove_address(&uid("w1"));
    plane.world.remove_policy("a/p1");
    let gone = |mesh: &Snapshot| mesh.workload_count() == 0 && mesh.policy("a/p1").is_none();
    agent.mesh("neither", gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_resource_is_named_in_a_nack_and_the_rest_holds() {
    let plane = plane();
    let bad = Workload { addresses: vec![vec![1; 5]], ..workload("bad", [0; 4]) };
    plane.world.put_all([
        address::Type::Workload(workload("w1", [10, 0, 0, 1])),
        address::Type::Workload(bad),
    ]);
    let agent = Agent::start(&settings(&plane)).await;
    let nack = plane.world.request("nack", |it| it.request.error_detail.is_some()).await.unwrap();
    let detail = nack.request.error_detail.unwrap();
    let message = "addresses: an address of 5 bytes is neither IPv4 nor IPv6";
    assert_eq!(detail.message, format!("{}: {message}", uid("bad")));
    assert!(!nack.request.response_nonce.is_empty());
    agent.mesh("w1", |mesh| mesh.workload(&uid("w1")).is_some()).await;
    let status = agent.status("told", |status| status.nacks == 1).await;
    assert!(!status.ready);
    assert!(status.last_rejected.unwrap().contains("5 bytes"));

    plane.world.put_workload(workload("bad", [10, 0, 0, 2]));
    agent.ready().await;
    assert_eq!(agent.mesh.snapshot().workload_count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_stream_resumes_from_what_is_held() {
    let mut plane = plane();
    for (name, ip) in [("w1", 1), ("w2", 2), ("w3", 3)] {
        plane.world.put_workload(workload(name, [10, 0, 0, ip]));
    }
    plane.world.put_policy(&policy("p1"));
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    plane.stop();
    agent.status("apart", |status| status.connection == XdsConnection::Waiting).await;
    plane.world.remove_address(&uid("w1"));
    plane.world.put_workload(workload("w2", [10, 0, 0, 22]));
    assert_eq!(agent.mesh.snapshot().workload_count(), 3);
    let before = plane.world.requests().len();
    plane.restart().unwrap();
    let resumed = |mesh: &Snapshot| {
        mesh.workload(&uid("w1")).is_none() && mesh.workload_at("", [10, 0, 0, 22].into()).is_some()
    };
    agent.mesh("the changes", resumed).await;
    let again = plane.world.requests()[before].request.clone();
    let names: Vec<_> = again.initial_resource_versions.keys().cloned().collect();
    assert_eq!(names, [uid("w1"), uid("w2"), uid("w3")]);
    assert!(again.initial_resource_versions.values().all(|version| !version.is_empty()));
    assert!(again.node.is_some());
    // What did not change was not sent again: it is the same value as before.
    assert_eq!(agent.mesh.snapshot().workload_count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_served_while_the_control_plane_is_away() {
    let mut plane = plane();
    plane.world.put_workload(workload("w1", [10, 0, 0, 1]));
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    plane.stop();
    let status = agent.status("away", |status| status.errors >= 3).await;
    assert!(status.ready && status.last_error.is_some());
    assert!(agent.mesh.snapshot().workload(&uid("w1")).is_some());
    let metrics = agent.telemetry.encode().unwrap();
    assert!(metrics.contains("reason=\"ConnectionError\"}"), "{metrics}");
    assert!(metrics.contains("culvert_xds_connected 0.0"), "{metrics}");
    assert!(!metrics.contains("culvert_xds_state_age_seconds 0.0\n"), "{metrics}");
    plane.restart().unwrap();
    let open = |status: &XdsStatus| matches!(status.connection, XdsConnection::Open { .. });
    agent.status("back", open).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn odd_responses_are_taken_for_what_they_are() {
    let plane = plane();
    plane.world.put_workload(workload("w1", [10, 0, 0, 1]));
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    let response = |url: &str, nonce: &str| DeltaDiscoveryResponse {
        type_url: url.to_owned(),
        nonce: nonce.to_owned(),
        ..DeltaDiscoveryResponse::default()
    };
    let acked = async |nonce: &str| {
        let found = plane.world.request(nonce, |it| it.request.response_nonce == nonce).await;
        found.unwrap().request.error_detail.map(|detail| detail.message)
    };
    // A forced push without any content, and a type that nobody asked for.
    plane.world.send(response(AUTHORIZATION_TYPE_URL, "empty"));
    assert_eq!(acked("empty").await, None);
    plane.world.send(response("type.googleapis.com/other", "other"));
    assert_eq!(acked("other").await, None);
    // The same resource twice: the last one counts.
    let twice = [[10, 0, 0, 8], [10, 0, 0, 9]].map(|ip| {
        let kind = Some(address::Type::Workload(workload("twice", ip)));
        let value = culvert_proto::istio::workload::Address { r#type: kind }.encode_to_vec();
        Resource {
            name: uid("twice"),
            resource: Some(Any { type_url: ADDRESS_TYPE_URL.to_owned(), value }),
            ..Resource::default()
        }
    });
    let mut double = response(ADDRESS_TYPE_URL, "twice");
    double.resources = twice.to_vec();
    plane.world.send(double);
    assert_eq!(acked("twice").await, None);
    let address = agent.mesh.snapshot().workload(&uid("twice")).unwrap().addresses.clone();
    assert_eq!(address, [std::net::IpAddr::from([10, 0, 0, 9])]);
    // Garbage in a resource, and removals of what never was.
    let mut garbage = response(ADDRESS_TYPE_URL, "garbage");
    let value = vec![0xff; 100];
    garbage.resources = vec![Resource {
        name: "g".to_owned(),
        resource: Some(Any { type_url: ADDRESS_TYPE_URL.to_owned(), value }),
        ..Resource::default()
    }];
    garbage.removed_resources = vec![String::new(), "/".to_owned(), "plain".to_owned()];
    plane.world.send(garbage);
    assert!(acked("garbage").await.unwrap().starts_with("g: cannot be read: "));
    assert_eq!(agent.mesh.snapshot().workload_count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_is_opened_again() {
    let plane = plane();
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    for (stream, status) in
        [(1, None), (2, Some(Status::cancelled("bye"))), (3, Some(Status::internal("broken")))]
    {
        plane.world.end_streams(status);
        let asked = plane.world.request("a new stream", |it| it.stream == stream).await;
        assert_eq!(asked.unwrap().request.type_url, ADDRESS_TYPE_URL);
        // The next one ends only after this one brought something.
        let acked =
            |it: &culvert_tests::control::Recorded| it.stream == stream && is_ack(&it.request);
        plane.world.request("an answer", acked).await.unwrap();
    }
    let metrics = agent.telemetry.encode().unwrap();
    for reason in ["Complete", "Reconnect", "Error"] {
        assert!(metrics.contains(&format!("{{reason=\"{reason}\"}} 1")), "{metrics}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_thousand_resources_come_in_one_response() {
    let plane = plane();
    let ip = |index: u32| (0x0a00_0000 + index).to_be_bytes();
    plane.world.put_all(
        (0..50_000).map(|index| address::Type::Workload(workload(&format!("w{index}"), ip(index)))),
    );
    let agent = Agent::start(&settings(&plane)).await;
    agent.ready().await;
    assert_eq!(agent.mesh.snapshot().workload_count(), 50_000);
    assert_eq!(agent.xds.status().borrow().nacks, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_next_address_is_tried_when_one_is_dead_or_says_nothing() {
    let (silent, hanging, serving) = (plane(), plane(), plane());
    silent.world.behave(Behaviour::Silent);
    hanging.world.behave(Behaviour::Refuse(Status::unavailable("no")));
    let mut settings = settings(&serving);
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    settings.control.addresses =
        vec![format!("https://{dead}"), hanging.address(), silent.address(), serving.address()];
    let roots = [&hanging, &silent, &serving].map(|plane| plane.pki.root()).concat();
    settings.control.roots = Roots::Pem(roots);
    let agent = Agent::start(&settings).await;
    agent.ready().await;
    let open = XdsConnection::Open { address: serving.address().into() };
    assert_eq!(agent.xds.status().borrow().connection, open);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_replaced_is_read_again() {
    let plane = plane();
    let directory = Scratch::new("token");
    let token = directory.0.join("token");
    fs::write(&token, "one").unwrap();
    plane.world.require_token(Some("one"));
    let mut settings = settings(&plane);
    settings.control.token = Some(Token::File(token.clone()));
    let agent = Agent::start(&settings).await;
    agent.ready().await;
    plane.world.require_token(Some("two"));
    plane.world.end_streams(None);
    let refused = |status: &XdsStatus| {
        status.last_error.as_ref().is_some_and(|error| error.contains("authentication failure"))
    };
    agent.status("refused", refused).await;
    fs::write(&token, "two").unwrap();
    let with_two =
        |it: &culvert_tests::control::Recorded| it.metadata["authorization"] == "Bearer two";
    plane.world.request("the new token", with_two).await.unwrap();
    let open = |status: &XdsStatus| matches!(status.connection, XdsConnection::Open { .. });
    agent.status("back", open).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_demand_brings_what_is_needed_and_what_runs_here() {
    let mut plane = plane();
    let here = Workload { node: "n1".to_owned(), ..workload("here", [10, 0, 0, 1]) };
    let member = Workload {
        services: [("a/s1.a.svc".to_owned(), PortList::default())].into(),
        ..workload("member", [10, 0, 0, 3])
    };
    plane.world.put_all([
        address::Type::Workload(here),
        address::Type::Workload(workload("there", [10, 0, 0, 2])),
        address::Type::Workload(member),
        address::Type::Service(service("s1", [10, 1, 0, 1])),
    ]);
    plane.world.put_policy(&policy("p1"));
    let settings = XdsSettings { on_demand: true, ..settings(&plane) };
    let agent = Agent::start(&settings).await;
    agent.ready().await;
    assert!(agent.mesh.snapshot().policy("a/p1").is_some());
    agent.mesh("here", |mesh| mesh.workload(&uid("here")).is_some()).await;
    assert_eq!(agent.mesh.snapshot().workload_count(), 1);
    let first = plane.world.requests()[0].request.clone();
    assert_eq!(first.resource_names_subscribe, ["*"]);
    assert_eq!(first.resource_names_unsubscribe, ["*"]);

    // By address, which the answer has as an alias; twice, but asked once.
    let (one, two) = tokio::join!(agent.xds.need("/10.0.0.2"), agent.xds.need("/10.0.0.2"));
    assert!(one && two);
    assert!(agent.mesh.snapshot().workload(&uid("there")).is_some());
    let asked = |key: &str| {
        let names = plane.world.requests().into_iter();
        let names = names.flat_map(|it| it.request.resource_names_subscribe);
        names.filter(|name| name == key).count()
    };
    assert_eq!(asked("/10.0.0.2"), 1);
    // A service by its name, with its endpoints.
    assert!(agent.xds.need("a/s1.a.svc").await);
    assert_eq!(agent.mesh.snapshot().service_count(), 1);
    assert!(agent.mesh.snapshot().workload(&uid("member")).is_some());
    // What is not there is answered too, and comes when it comes into being.
    assert!(agent.xds.need("/10.0.0.77").await);
    plane.world.put_workload(workload("late", [10, 0, 0, 77]));
    agent.mesh("late", |mesh| mesh.workload(&uid("late")).is_some()).await;

    // A new stream has what was subscribed to.
    plane.stop();
    assert!(!agent.xds.need("/10.0.0.78").await);
    plane.world.put_workload(workload("later", [10, 0, 0, 78]));
    plane.world.put_workload(workload("there", [10, 0, 0, 22]));
    plane.restart().unwrap();
    agent.mesh("later", |mesh| mesh.workload(&uid("later")).is_some()).await;
    agent.mesh("moved", |mesh| mesh.workload_at("", [10, 0, 0, 22].into()).is_some()).await;
}

/// A folder that goes with the test.
struct Scratch(std::path::PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("culvert-xds-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

async fn written(path: &Path) {
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    let written = async {
        while !path.exists() {
            tick.tick().await;
        }
    };
    tokio::time::timeout(LIMIT, written).await.expect("a kept state");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_state_serves_until_the_control_plane_answers() {
    let mut plane = plane();
    let directory = Scratch::new("kept");
    let path = directory.0.join("state");
    plane.world.put_workload(workload("w1", [10, 0, 0, 1]));
    plane.world.put_workload(workload("w2", [10, 0, 0, 2]));
    plane.world.put_service(service("s1", [10, 1, 0, 1]));
    plane.world.put_policy(&policy("p1"));
    let kept = Kept { path: path.clone(), max_age: Duration::from_secs(3600) };
    let settings = XdsSettings { kept: Some(kept), ..settings(&plane) };
    let agent = Agent::start(&settings).await;
    agent.ready().await;
    written(&path).await;
    drop(agent);
    plane.stop();

    let agent = Agent::start(&settings).await;
    let status = agent.xds.status().borrow().clone();
    assert!(status.ready && status.kept.is_some());
    assert_eq!((status.addresses, status.authorizations), (3, 1));
    let snapshot = agent.mesh.snapshot();
    assert_eq!((snapshot.workload_count(), snapshot.service_count()), (2, 1));
    assert!(snapshot.policy("a/p1").is_some());

    let before = plane.world.requests().len();
    plane.world.remove_address(&uid("w1"));
    plane.restart().unwrap();
    agent.mesh("w1 no more", |mesh| mesh.workload(&uid("w1")).is_none()).await;
    agent.status("superseded", |status| status.kept.is_none()).await;
    let versions = plane.world.requests()[before].request.initial_resource_versions.clone();
    assert_eq!(versions.len(), 3);
    drop(agent);

    // What cannot be trusted is not served.
    plane.stop();
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let agent = Agent::start(&settings).await;
    assert!(!agent.xds.status().borrow().ready);
    assert_eq!(agent.mesh.snapshot().workload_count(), 0);
}
