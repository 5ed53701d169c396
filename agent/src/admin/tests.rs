#![allow(clippy::unwrap_used)]

use std::io::Read;
use std::net::SocketAddr;
use std::time::Duration;

use culvert_core::authorize::PermittedBy;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

use super::*;
use crate::connections::{Direction, Guard, LiveConnection, Protocol};
use crate::drain::{DrainTrigger, drain};
use crate::telemetry::ConnectionContext;
use crate::telemetry::logging::{LogFlush, LogFormat, Logging};
use crate::telemetry::testing::{service, stranger};

/// An agent whose parts the test sets.
#[derive(Default)]
pub(super) struct Fixed {
    pub(super) snapshot: Mutex<Snapshot>,
    pub(super) certificates: Mutex<Vec<CertificateState>>,
    pub(super) pods: Mutex<Vec<Pod>>,
    pub(super) connections: Connections,
    pub(super) file: Mutex<Option<Snapshot>>,
    pub(super) shutdown: Notify,
}

impl AdminState for Fixed {
    fn snapshot(&self) -> Arc<Snapshot> {
        Arc::new(self.snapshot.lock().clone())
    }

    fn certificates(&self) -> Vec<CertificateState> {
        self.certificates.lock().clone()
    }

    fn pods(&self) -> Vec<Pod> {
        self.pods.lock().clone()
    }

    fn connections(&self) -> &Connections {
        &self.connections
    }

    fn measure(&self) {}

    fn agent(&self) -> Agent {
        Agent {
            version: "0.1.0".to_owned(),
            node: "node-a".to_owned(),
            uptime: Duration::from_secs(61),
            source: Source {
                kind: "file",
                path: "/etc/mesh.yaml".to_owned(),
                loaded_at: Some(time::macros::datetime!(2026-03-01 10:00 UTC)),
                error: Some("mesh.yaml:3: no such field".to_owned()),
            },
            handover: None,
            kernel: Kernel {
                cgroup: "/sys/fs/cgroup".to_owned(),
                pin_path: "/sys/fs/bpf/culvert".to_owned(),
                programs: vec![Program { name: "culvert_connect4".to_owned(), id: 12 }],
                flow_entries: 3,
                verdicts: Some(2),
                acceleration: None,
            },
        }
    }

    fn version(&self) -> Version {
        Version { version: "0.1.0".to_owned(), ..Version::default() }
    }

    fn config(&self) -> serde_json::Value {
        serde_json::json!({"network": ""})
    }

    fn static_config(&self) -> Result<Snapshot, String> {
        self.file.lock().clone().ok_or_else(|| "/etc/mesh.yaml: no such file".to_owned())
    }

    fn explain<'a>(
        &'a self,
        src: &'a str,
        dst: &'a str,
    ) -> BoxFuture<'a, Result<Explanation, ExplainError>> {
        Box::pin(async move {
            if src == "nobody" {
                return Err(ExplainError::UnknownSource(src.to_owned()));
            }
            Ok(Explanation {
                source: src.to_owned(),
                destination: dst.to_owned(),
                steps: vec![ExplainStep {
                    decision: "authorize".to_owned(),
                    result: "denied".to_owned(),
                    because: "shop/no-front rule 0".to_owned(),
                }],
                outcome: Outcome::Refused,
                policy: Some("shop/no-front".to_owned()),
                rule: Some(0),
                path: Some("tunnel".to_owned()),
                via: None,
                authority: None,
            })
        })
    }

    fn shutdown(&self) {
        self.shutdown.notify_one();
    }
}

/// Running servers and how to reach them.
struct Running {
    admin: Vec<SocketAddr>,
    stats: SocketAddr,
    readiness: SocketAddr,
    state: Arc<Fixed>,
    sources: Sources,
    trigger: DrainTrigger,
    _log: (tracing::Dispatch, LogFlush),
}

async fn running() -> Running {
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let addresses = AdminAddrs { admin: loopback, stats: loopback, readiness: loopback };
    let servers = AdminServers::bind(&addresses, Vec::new()).await.unwrap();
    let (admin, stats, readiness) = servers.addresses().unwrap();
    let state = Arc::new(Fixed::default());
    let Logging { control, flush, dispatch } =
        Logging::new("info".parse().unwrap(), LogFormat::Plain, std::io::sink());
    let sources = Sources {
        telemetry: Telemetry::new(None, &[]),
        readiness: Readiness::default(),
        log: control,
        state: state.clone(),
    };
    let (trigger, watch) = drain();
    tokio::spawn(servers.serve(sources.clone(), watch));
    Running { admin, stats, readiness, state, sources, trigger, _log: (dispatch, flush) }
}

struct Answer {
    status: u16,
    headers: String,
    body: Vec<u8>,
}

impl Answer {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> serde_json::Value {
        assert_eq!(self.status, 200, "{}", self.text());
        assert!(self.headers.contains("content-type: application/json"), "{}", self.headers);
        serde_json::from_slice(&self.body).unwrap()
    }
}

async fn ask(address: SocketAddr, method: &str, target: &str, headers: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("{method} {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let end = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n").unwrap();
    let headers = std::str::from_utf8(&answer[..end]).unwrap().to_owned();
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, headers, body: answer[end + 4..].to_vec() }
}

async fn get(address: SocketAddr, target: &str) -> Answer {
    ask(address, "GET", target, "").await
}

async fn post(address: SocketAddr, target: &str) -> Answer {
    ask(address, "POST", target, "").await
}

// O9, O10

#[tokio::test]
async fn logging_is_read_and_changed_by_post_only() {
    let running = running().await;
    let admin = running.admin[0];
    let refused = get(admin, "/logging").await;
    assert_eq!((refused.status, refused.text()), (405, ""));
    assert!(refused.headers.contains("allow: POST"));
    assert_eq!(ask(admin, "PUT", "/logging?level=debug", "").await.status, 405);
    for (target, expected) in [
        ("/logging", "info"),
        ("/logging?level=", "info"),
        ("/logging?level=access=debug", "access=debug,info"),
        ("/logging?level=hbone%3Adebug", "access=debug,hbone=debug,info"),
        ("/logging?level=warning", "access=debug,hbone=debug,warn"),
        ("/logging", "access=debug,hbone=debug,warn"),
        ("/logging?level=error&reset", "error"),
        ("/logging?reset", "info"),
        ("/logging?level=access:off,hbone:trace", "access=off,hbone=trace,info"),
        ("/logging?level=critical", "access=off,hbone=trace,error"),
        ("/logging?level=info&reset", "info"),
    ] {
        let answer = post(admin, target).await;
        let body = format!("current log level is {expected}\n");
        assert_eq!((answer.status, answer.text()), (200, body.as_str()), "{target}");
    }
    let invalid = post(admin, "/logging?level=access=loud").await;
    assert_eq!(invalid.status, 400);
    assert!(invalid.text().starts_with("Invalid level provided: "));
    assert!(invalid.text().contains("usage: POST /logging"));
    assert_eq!(post(admin, "/logging").await.text(), "current log level is info\n");
}

// O11

#[tokio::test]
async fn readiness_names_the_open_tasks() {
    let running = running().await;
    let state = running.sources.readiness.open(readiness::STATE_MANAGER);
    let pods = running.sources.readiness.open(readiness::WORKLOAD_PROXY_MANAGER);
    let answer = get(running.readiness, "/healthz/ready").await;
    let body = "not ready, pending: state manager, workload proxy manager\n";
    assert_eq!((answer.status, answer.text()), (500, body));
    drop(state);
    let answer = get(running.readiness, "/healthz/ready").await;
    assert_eq!(answer.text(), "not ready, pending: workload proxy manager\n");
    drop(pods);
    let answer = get(running.readiness, "/healthz/ready").await;
    assert_eq!((answer.status, answer.text()), (200, "ready\n"));
    assert_eq!(post(running.readiness, "/healthz/ready").await.status, 405);
    assert_eq!(get(running.readiness, "/").await.status, 404);
    let _again = running.sources.readiness.open(readiness::WORKLOAD_PROXY_MANAGER);
    assert_eq!(get(running.readiness, "/healthz/ready").await.status, 500);
}

// O12

#[tokio::test]
async fn metrics_have_the_content_type_that_is_asked_for() {
    let running = running().await;
    let openmetrics = "content-type: application/openmetrics-text;charset=utf-8;version=1.0.0";
    let plain = "content-type: text/plain; charset=utf-8";
    for (path, accept, expected) in [
        ("/metrics", "text/plain, application/openmetrics-text;version=1.0.0", openmetrics),
        ("/stats/prometheus", "application/openmetrics-text", openmetrics),
        ("/metrics", "text/plain", plain),
        ("/metrics", "*/*", plain),
    ] {
        let answer = ask(running.stats, "GET", path, &format!("accept: {accept}\r\n")).await;
        assert_eq!(answer.status, 200);
        assert!(answer.headers.contains(&format!("{expected}\r\n")), "{}", answer.headers);
        assert!(answer.text().contains("# TYPE istio_build gauge\n"));
        assert!(answer.text().ends_with("# EOF\n"));
    }
    assert_eq!(post(running.stats, "/metrics").await.status, 200);
    assert_eq!(get(running.stats, "/other").await.status, 404);
}

#[tokio::test]
async fn metrics_are_compressed_when_asked() {
    let running = running().await;
    let ask = |accept: &'static str| async move {
        ask(running.stats, "GET", "/metrics", &format!("accept-encoding: {accept}\r\n")).await
    };
    let answer = ask("br, gzip;q=0.5").await;
    assert!(answer.headers.contains("content-encoding: gzip"));
    let mut text = String::new();
    flate2::read::GzDecoder::new(&answer.body[..]).read_to_string(&mut text).unwrap();
    assert!(text.ends_with("# EOF\n"));
    assert!(ask("gzip;q=0").await.text().ends_with("# EOF\n"));
}

#[tokio::test]
async fn the_index_lists_the_paths_and_others_are_not_found() {
    let running = running().await;
    let index = get(running.admin[0], "/").await;
    assert_eq!(index.status, 200);
    assert!(index.headers.contains("content-type: text/html"));
    assert!(index.text().contains("href=\"/config_dump\""));
    let missing = get(running.admin[0], "/nothing").await;
    assert_eq!((missing.status, missing.text()), (404, ""));
}

#[tokio::test]
async fn shutdown_is_triggered_by_post_only_and_answered_at_once() {
    let running = running().await;
    assert_eq!(get(running.admin[0], "/quitquitquit").await.status, 405);
    let answer = post(running.admin[0], "/quitquitquit").await;
    assert_eq!((answer.status, answer.text()), (200, "shutdown now\n"));
    let triggered = running.state.shutdown.notified();
    tokio::time::timeout(Duration::from_secs(20), triggered).await.unwrap();
}

#[tokio::test]
async fn profiling_checks_its_parameters() {
    let running = running().await;
    for (target, status) in [
        ("/debug/pprof/profile", 501),
        ("/debug/pprof/profile?seconds=300&frequency=1000", 501),
        ("/debug/pprof/profile?seconds=0", 400),
        ("/debug/pprof/profile?seconds=x", 400),
        ("/debug/pprof/profile?frequency=1001", 400),
        ("/debug/pprof/heap", 501),
    ] {
        assert_eq!(get(running.admin[0], target).await.status, status, "{target}");
    }
}

#[tokio::test]
async fn admin_listens_on_both_loopbacks() {
    let running = running().await;
    for address in &running.admin {
        assert!(address.ip().is_loopback());
        assert_eq!(get(*address, "/").await.status, 200);
    }
    let v6 = tokio::net::TcpListener::bind("[::1]:0").await.is_ok();
    assert_eq!(running.admin.len(), if v6 { 2 } else { 1 });
}

#[tokio::test]
async fn the_wildcard_serves_ipv4_with_and_without_ipv6() {
    let any: SocketAddr = "[::]:0".parse().unwrap();
    let listener = bind("stats", any, &mut Given(Vec::new())).await.unwrap();
    let port = listener.local_addr().unwrap().port();
    TcpStream::connect(("127.0.0.1", port)).await.unwrap();
}

#[tokio::test]
async fn an_address_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let free: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let addresses = AdminAddrs { admin: free, stats: address, readiness: free };
    let error = AdminServers::bind(&addresses, Vec::new()).await.unwrap_err().to_string();
    let expected = format!("the stats server cannot listen on {address}: Address already in use");
    assert!(error.starts_with(&expected), "{error}");
}

#[tokio::test]
async fn the_servers_close_as_soon_as_the_drain_begins() {
    let running = running().await;
    // A connection that says nothing does not hold up the drain.
    let mut silent = TcpStream::connect(running.stats).await.unwrap();
    assert_eq!(get(running.stats, "/metrics").await.status, 200);
    let end = running.trigger.begin(Duration::from_secs(60)).await;
    assert_eq!(end, crate::drain::DrainEnd::Complete);
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0);
    for address in [running.admin[0], running.stats, running.readiness] {
        let refused = TcpStream::connect(address).await.unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
}

#[tokio::test]
async fn too_many_connections_are_closed_and_others_served() {
    let running = running().await;
    let mut held = Vec::new();
    for _ in 0..64 {
        let mut stream = TcpStream::connect(running.admin[0]).await.unwrap();
        stream.write_all(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        stream.read_exact(&mut [0; 12]).await.unwrap();
        held.push(stream);
    }
    let mut refused = TcpStream::connect(running.admin[0]).await.unwrap();
    assert!(matches!(refused.read(&mut [0; 1]).await, Ok(0) | Err(_)));
    assert_eq!(get(running.stats, "/metrics").await.status, 200);
}

#[tokio::test]
async fn oversized_headers_are_refused() {
    let running = running().await;
    let header = format!("x: {}\r\n", "y".repeat(20_000));
    assert_eq!(ask(running.admin[0], "GET", "/", &header).await.status, 431);
}

pub(super) fn register(
    connections: &Connections,
    direction: Direction,
    original_dst: Option<&str>,
    actual_dst: &str,
) -> Guard {
    connections.register(LiveConnection {
        direction,
        protocol: Protocol::Hbone,
        about: Arc::new(ConnectionContext {
            source_identity: Some("spiffe://cluster.local/ns/web/sa/front".parse().unwrap()),
            service: Some(Arc::new(service("api", "shop"))),
            ..stranger()
        }),
        original_dst: original_dst.map(str::to_owned),
        actual_dst: actual_dst.parse().unwrap(),
        pod: pod().uid,
        workload: "c1//Pod/shop/api-5c6b".into(),
        connection: None,
        counters: Arc::default(),
    })
}

pub(super) fn pod() -> Pod {
    Pod {
        uid: "8f0c2a5e-0000-4000-8000-000000000001".into(),
        workload: "c1//Pod/shop/api-5c6b".into(),
        name: "api-5c6b".into(),
        namespace: "shop".into(),
        service_account: "api".into(),
        netns: "/run/netns/api".to_owned(),
        cookie: 4026,
        addresses: vec!["10.1.0.7".parse().unwrap()],
        state: PodState::Enrolled,
        verdicts: 5,
        certificate: CertificateStatus::Available,
    }
}

#[tokio::test]
async fn culverts_own_views_have_their_shapes() {
    let running = running().await;
    let admin = running.admin[0];
    let failed = PodState::Failed("the namespace is gone".to_owned());
    let other = Pod { workload: "a".into(), state: failed, ..pod() };
    *running.state.pods.lock() = vec![pod(), other];
    let connections = &running.state.connections;
    let guard = register(connections, Direction::Inbound, None, "10.1.0.7:8080");
    guard.entry().permitted(&PermittedBy::Rule { policy: "shop/api-clients".into(), rule: 0 });
    guard.entry().live().counters.add_received(74);
    let _pending = running.sources.readiness.open(readiness::PROXY);

    let mut status = get(admin, "/culvert/status").await.json();
    assert!(status["source"]["ageSeconds"].take().is_u64());
    let expected = serde_json::json!({
        "version": "0.1.0", "node": "node-a", "ready": false, "pending": ["proxy"],
        "uptimeSeconds": 61,
        "source": {"kind": "file", "path": "/etc/mesh.yaml", "loadedAt": "2026-03-01T10:00:00Z",
                   "ageSeconds": null, "error": "mesh.yaml:3: no such field"},
        "snapshot": {"workloads": 0, "services": 0, "policies": 0},
        "pods": {"enrolled": 1, "failed": 1},
        "certificates": {"available": 0, "unavailable": 0},
        "connections": {"inbound": 1, "outbound": 0},
        "handover": null,
        "kernel": {"cgroup": "/sys/fs/cgroup", "pinPath": "/sys/fs/bpf/culvert",
                   "programs": [{"name": "culvert_connect4", "id": 12}], "flowEntries": 3, "verdicts": 2,
                   "acceleration": null},
    });
    assert_eq!(status, expected);

    let pods = get(admin, "/culvert/pods").await.json();
    assert_eq!(pods[0]["state"], "Failed: the namespace is gone");
    let expected = serde_json::json!({
        "workload": "c1//Pod/shop/api-5c6b", "name": "api-5c6b", "namespace": "shop",
        "serviceAccount": "api", "netns": "/run/netns/api", "cookie": 4026,
        "addresses": ["10.1.0.7"], "state": "Enrolled", "certificate": "Available",
        "connections": {"inbound": 1, "outbound": 0}, "verdicts": 5,
    });
    assert_eq!(pods[1], expected);

    let mut connections = get(admin, "/culvert/connections").await.json();
    assert!(connections[0]["openedSecondsAgo"].take().is_u64());
    let expected = serde_json::json!([{
        "direction": "inbound", "protocol": "HBONE", "src": "10.2.0.3:40112", "dst": null,
        "target": "10.1.0.7:8080", "srcIdentity": "spiffe://cluster.local/ns/web/sa/front",
        "dstIdentity": null, "workload": "c1//Pod/shop/api-5c6b",
        "service": "api.shop.svc.cluster.local", "policy": "allowed by: shop/api-clients, rule 0",
        "openedSecondsAgo": null, "received": 74, "sent": 0,
    }]);
    assert_eq!(connections, expected);
}

#[tokio::test]
async fn explanations_take_two_parameters() {
    let running = running().await;
    let admin = running.admin[0];
    assert_eq!(get(admin, "/culvert/explain?src=web/front").await.status, 400);
    let unknown = get(admin, "/culvert/explain?src=nobody&dst=10.1.0.7:80").await;
    assert_eq!((unknown.status, unknown.text()), (404, "no workload \"nobody\"\n"));
    let target = "/culvert/explain?src=c1%2F%2FPod%2Fweb%2Ffront&dst=api.shop:80";
    let explanation = get(admin, target).await.json();
    let expected = serde_json::json!({
        "source": "c1//Pod/web/front", "destination": "api.shop:80",
        "steps": [{"decision": "authorize", "result": "denied", "because": "shop/no-front rule 0"}],
        "outcome": "refused", "policy": "shop/no-front", "rule": 0,
        "path": "tunnel", "via": null, "authority": null,
    });
    assert_eq!(explanation, expected);
}

#[tokio::test]
async fn the_dump_is_served_pretty() {
    let running = running().await;
    let dump = get(running.admin[0], "/config_dump").await;
    assert!(dump.text().starts_with("{\n  \"certificates\": [],\n"));
    assert!(dump.json()["workloads"].as_array().unwrap().is_empty());
}
