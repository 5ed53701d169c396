#![allow(clippy::unwrap_used)]

use std::io::Write;

use culvert_core::identity::Identity;
use culvert_core::workload::{Health, Locality, NetworkMode, TunnelProtocol};
use tracing::dispatcher::with_default;

use super::logging::{LogFormat, Logging};
use super::testing::{service, stranger};
use super::*;

/// A text that several writers share.
#[derive(Clone, Default)]
pub(super) struct Shared(Arc<Mutex<Vec<u8>>>);

impl Shared {
    pub(super) fn lines(&self) -> Vec<String> {
        String::from_utf8(self.0.lock().clone()).unwrap().lines().map(str::to_owned).collect()
    }
}

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// What is told by metrics and log while `act` runs.
struct Told {
    metrics: String,
    lines: Vec<String>,
}

fn told_with(directives: &str, format: LogFormat, act: impl FnOnce(&Telemetry)) -> Told {
    let telemetry = Telemetry::new(Some("1.30.0".to_owned()), &[]);
    let written = Shared::default();
    let Logging { dispatch, flush, control: _ } =
        Logging::new(directives.parse().unwrap(), format, written.clone());
    with_default(&dispatch, || act(&telemetry));
    drop(flush);
    Told { metrics: telemetry.encode().unwrap(), lines: written.lines() }
}

fn told(act: impl FnOnce(&Telemetry)) -> Told {
    told_with("info", LogFormat::Plain, act)
}

impl Told {
    /// The samples of a metric that have all of these labels.
    fn samples(&self, name: &str, labels: &[(&str, &str)]) -> Vec<&str> {
        let labels: Vec<String> = labels.iter().map(|(k, v)| format!("{k}=\"{v}\"")).collect();
        self.metrics
            .lines()
            .filter(|line| line.starts_with(&format!("{name}{{")))
            .filter(|line| {
                labels
                    .iter()
                    .all(|l| line.contains(&format!("{{{l}")) || line.contains(&format!(",{l}")))
            })
            .collect()
    }

    /// The value of the one sample that has all of these labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> u64 {
        match self.samples(name, labels).as_slice() {
            [sample] => sample.rsplit_once(' ').unwrap().1.parse().unwrap(),
            samples => panic!("{name} {labels:?}: {samples:#?}"),
        }
    }

    /// The fifth column of the only line that ends a connection, without the duration's number.
    fn fields(&self) -> String {
        let lines: Vec<&String> =
            self.lines.iter().filter(|line| line.contains("\tconnection complete\t")).collect();
        let [line] = lines.as_slice() else { panic!("{:#?}", self.lines) };
        let fields = line.split('\t').nth(4).unwrap();
        let (before, after) = fields.split_once("duration=\"").unwrap();
        let (_, after) = after.split_once("ms\"").unwrap();
        format!("{before}duration=\"0ms\"{after}")
    }
}

fn workload(name: &str, owner: &str, namespace: &str, account: &str) -> Workload {
    Workload {
        uid: format!("c1//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        trust_domain: "cluster.local".into(),
        service_account: account.into(),
        addresses: Vec::new(),
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        node: "node-a".into(),
        cluster_id: "c1".into(),
        locality: Arc::new(Locality { region: "eu".into(), ..Locality::default() }),
        native_tunnel: false,
        application_tunnel: None,
        services: Default::default(),
        authorization_policies: Vec::new(),
        status: Health::Healthy,
        capacity: 1,
        workload_name: owner.into(),
        workload_type: "deployment".into(),
        canonical_name: owner.into(),
        canonical_revision: "v1".into(),
    }
}

fn front() -> Workload {
    workload("front-7d9f", "front", "web", "front")
}

fn api() -> Workload {
    workload("api-5c6b", "api", "shop", "api")
}

/// HBONE from the front to the api.
fn hbone(reporter: Reporter) -> ConnectionContext {
    ConnectionContext {
        reporter,
        source_identity: Some(front().identity()),
        source: Some(Arc::new(front())),
        destination: Some(Arc::new(api())),
        service: Some(Arc::new(service("api", "shop"))),
        hbone_addr: Some("10.1.0.7:8080".parse().unwrap()),
        ..stranger()
    }
}

fn plaintext(reporter: Reporter) -> ConnectionContext {
    ConnectionContext {
        source_identity: None,
        hbone_addr: None,
        mutual_tls: false,
        ..hbone(reporter)
    }
}

fn one_request(telemetry: &Telemetry, context: ConnectionContext) {
    let open = telemetry.open(context);
    open.counters().add_received(74);
    open.counters().add_sent(2246);
    open.close(Ok(()));
}

const HBONE_FIELDS: &str = "src.addr=10.2.0.3:40112 src.workload=\"front-7d9f\" \
    src.namespace=\"web\" src.identity=\"spiffe://cluster.local/ns/web/sa/front\" \
    src.cluster=\"c1\" dst.addr=10.1.0.7:15008 dst.hbone_addr=10.1.0.7:8080 \
    dst.service=\"api.shop.svc.cluster.local\" dst.workload=\"api-5c6b\" dst.namespace=\"shop\" \
    dst.identity=\"spiffe://cluster.local/ns/shop/sa/api\" dst.cluster=\"c1\"";

// O1

#[test]
fn a_request_is_counted_from_its_own_side_at_both_ends() {
    for (reporter, label) in [(Reporter::Source, "source"), (Reporter::Destination, "destination")]
    {
        let told = told(|telemetry| one_request(telemetry, hbone(reporter)));
        let labels = [("reporter", label), ("response_flags", "-")];
        assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
        assert_eq!(told.value("istio_tcp_connections_closed_total", &labels), 1);
        assert_eq!(told.value("istio_tcp_received_bytes_total", &labels), 74);
        assert_eq!(told.value("istio_tcp_sent_bytes_total", &labels), 2246);
        assert!(told.samples("istio_tcp_connections_failed_total", &[]).is_empty());
    }
}

#[test]
fn the_log_tells_bytes_from_the_reporters_side() {
    let source = told(|telemetry| one_request(telemetry, hbone(Reporter::Source)));
    let outbound = "direction=\"outbound\" bytes_sent=74 bytes_recv=2246 duration=\"0ms\"";
    assert_eq!(source.fields(), format!("{HBONE_FIELDS} {outbound}"));
    let destination = told(|telemetry| one_request(telemetry, hbone(Reporter::Destination)));
    let inbound = "direction=\"inbound\" bytes_sent=2246 bytes_recv=74 duration=\"0ms\"";
    assert_eq!(destination.fields(), format!("{HBONE_FIELDS} {inbound}"));
}

#[test]
fn labels_stand_in_the_order_that_dashboards_know() {
    let told = told(|telemetry| one_request(telemetry, hbone(Reporter::Source)));
    let expected = "istio_tcp_connections_opened_total{reporter=\"source\",\
        source_workload=\"front\",source_canonical_service=\"front\",\
        source_canonical_revision=\"v1\",source_workload_namespace=\"web\",\
        source_principal=\"spiffe://cluster.local/ns/web/sa/front\",source_app=\"front\",\
        source_version=\"v1\",source_cluster=\"c1\",\
        destination_service=\"api.shop.svc.cluster.local\",\
        destination_service_namespace=\"shop\",destination_service_name=\"api\",\
        destination_workload=\"api\",destination_canonical_service=\"api\",\
        destination_canonical_revision=\"v1\",destination_workload_namespace=\"shop\",\
        destination_principal=\"spiffe://cluster.local/ns/shop/sa/api\",destination_app=\"api\",\
        destination_version=\"v1\",destination_cluster=\"c1\",request_protocol=\"tcp\",\
        response_flags=\"-\",connection_security_policy=\"mutual_tls\",source_region=\"eu\",\
        source_zone=\"unknown\",destination_region=\"eu\",destination_zone=\"unknown\"} 1";
    assert!(told.metrics.lines().any(|line| line == expected), "{}", told.metrics);
}

#[test]
fn families_are_named_without_the_suffix_of_their_samples() {
    let told = told(|telemetry| one_request(telemetry, hbone(Reporter::Source)));
    assert!(told.metrics.contains("# TYPE istio_tcp_connections_opened counter\n"));
    assert!(told.metrics.contains("# TYPE istio_tcp_sockets_open gauge\n"));
    assert!(told.metrics.contains("istio_build{component=\"ztunnel\",tag=\"1.30.0\"} 1\n"));
    assert!(told.metrics.ends_with("# EOF\n"));
}

// O2

#[test]
fn a_denial_is_closed_and_failed_with_the_policy_named() {
    let told = told(|telemetry| {
        let context = ConnectionContext { service: None, ..hbone(Reporter::Destination) };
        telemetry.open(context).close(Err(Failure::denied(
            "connection closed due to policy rejection: explicitly denied by: shop/no-front",
            Denial {
                reason: DenialReason::Explicit,
                policy: Some("shop/no-front".into()),
                rule: Some(1),
            },
        )));
    });
    let deny = [("reporter", "destination"), ("response_flags", "DENY")];
    assert_eq!(told.value("istio_tcp_connections_closed_total", &deny), 1);
    assert_eq!(told.value("istio_tcp_connections_failed_total", &deny), 1);
    let none = [("reporter", "destination"), ("response_flags", "-")];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &none), 1);
    assert!(told.samples("istio_tcp_connections_closed_total", &none).is_empty());
    let denied = "culvert_authorization_denied_total{policy=\"shop/no-front\",rule=\"1\",\
                  reason=\"explicit\"} 1";
    assert!(told.metrics.lines().any(|line| line == denied), "{}", told.metrics);
    let fields = told.fields();
    let end = "direction=\"inbound\" bytes_sent=0 bytes_recv=0 duration=\"0ms\" \
               policy=\"shop/no-front\" rule=1 error=\"connection closed due to policy \
               rejection: explicitly denied by: shop/no-front\"";
    assert!(fields.ends_with(end), "{fields}");
    assert!(told.lines[0].contains("\terror\taccess\tconnection complete\t"));
}

#[test]
fn a_refused_tunnel_is_a_connect_failure_at_the_source() {
    let told = told(|telemetry| {
        let error = "http status: 401 Unauthorized";
        telemetry
            .open(hbone(Reporter::Source))
            .close(Err(Failure::new(ResponseFlag::Connect, error)));
    });
    let labels = [("reporter", "source"), ("response_flags", "CONNECT")];
    assert_eq!(told.value("istio_tcp_connections_closed_total", &labels), 1);
    assert_eq!(told.value("istio_tcp_connections_failed_total", &labels), 1);
    assert!(told.fields().ends_with(" duration=\"0ms\" error=\"http status: 401 Unauthorized\""));
}

// O3

#[test]
fn a_failure_without_context_is_one_line_and_no_connection_counter() {
    let told = told(|telemetry| {
        let error = "no healthy upstream: 10.96.0.10:80";
        let (src, dst) = ("10.2.0.3:40112", "10.96.0.10:80");
        let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
        telemetry.failed_early(Reporter::Source, src, dst, &error);
    });
    assert!(!told.metrics.contains("istio_tcp_connections_opened_total{"));
    assert!(!told.metrics.contains("istio_tcp_connections_failed_total{"));
    let [line] = told.lines.as_slice() else { panic!("{:?}", told.lines) };
    let (_, rest) = line.split_once('\t').unwrap();
    assert_eq!(
        rest,
        "warn\taccess\tconnection failed\tsrc.addr=10.2.0.3:40112 dst.addr=10.96.0.10:80 \
         direction=\"outbound\" error=\"no healthy upstream: 10.96.0.10:80\""
    );
}

// O4

#[test]
fn an_unknown_destination_reads_unknown() {
    let told = told(|telemetry| {
        let context = ConnectionContext {
            destination: None,
            service: None,
            dst: "203.0.113.9:443".parse().unwrap(),
            ..plaintext(Reporter::Source)
        };
        one_request(telemetry, context);
    });
    let labels = [
        ("reporter", "source"),
        ("source_principal", "unknown"),
        ("destination_workload", "unknown"),
        ("destination_service", "unknown"),
        ("destination_principal", "unknown"),
        ("connection_security_policy", "unknown"),
    ];
    assert_eq!(told.value("istio_tcp_sent_bytes_total", &labels), 2246);
    assert_eq!(
        told.fields(),
        "src.addr=10.2.0.3:40112 src.workload=\"front-7d9f\" src.namespace=\"web\" \
         src.cluster=\"c1\" dst.addr=203.0.113.9:443 direction=\"outbound\" bytes_sent=74 \
         bytes_recv=2246 duration=\"0ms\""
    );
}

// O5

#[test]
fn plaintext_from_a_known_pod_tells_no_source_identity() {
    let told = told(|telemetry| one_request(telemetry, plaintext(Reporter::Destination)));
    let labels = [
        ("source_workload", "front"),
        ("source_principal", "unknown"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/api"),
        ("connection_security_policy", "unknown"),
    ];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
    assert!(!told.fields().contains("identity"));
    assert!(!told.fields().contains("hbone_addr"));
}

// O6

#[test]
fn through_a_waypoint_the_workload_is_the_waypoint_and_the_service_the_original() {
    let told = told(|telemetry| {
        let waypoint = workload("wp-1", "waypoint", "shop", "waypoint");
        let destination = Some(Arc::new(waypoint));
        one_request(telemetry, ConnectionContext { destination, ..hbone(Reporter::Source) });
    });
    let labels = [
        ("destination_workload", "waypoint"),
        ("destination_principal", "spiffe://cluster.local/ns/shop/sa/waypoint"),
        ("destination_service", "api.shop.svc.cluster.local"),
    ];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
}

// O7 and O8: which service it is, admission decides; here it is told as decided.

#[test]
fn the_destination_service_is_the_one_that_admission_found() {
    for name in ["api", "other"] {
        let told = told(|telemetry| {
            let service = Some(Arc::new(service(name, "shop")));
            one_request(telemetry, ConnectionContext { service, ..hbone(Reporter::Destination) });
        });
        let hostname = format!("{name}.shop.svc.cluster.local");
        let labels = [("destination_service", hostname.as_str())];
        assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
    }
}

fn baggage() -> Baggage {
    Baggage {
        cluster_id: Some("c2".into()),
        namespace: Some("far".into()),
        workload_name: Some("teller".into()),
        canonical_name: Some("teller-app".into()),
        canonical_revision: Some("v9".into()),
        region: Some("us".into()),
        zone: None,
    }
}

#[test]
fn a_source_unknown_by_address_is_told_by_its_baggage() {
    let told = told(|telemetry| {
        let baggage = Some(Box::new(baggage()));
        let context = ConnectionContext { source: None, baggage, ..hbone(Reporter::Destination) };
        one_request(telemetry, context);
    });
    let labels = [
        ("source_workload", "teller"),
        ("source_app", "teller"),
        ("source_canonical_service", "teller-app"),
        ("source_version", "v9"),
        ("source_cluster", "c2"),
        ("source_principal", "spiffe://cluster.local/ns/web/sa/front"),
        ("source_region", "us"),
        ("destination_workload", "api"),
    ];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
    assert!(told.fields().contains("src.workload=\"teller\" src.namespace=\"far\""));
}

#[test]
fn a_source_known_by_address_wins_over_its_baggage() {
    let told = told(|telemetry| {
        let baggage = Some(Box::new(baggage()));
        one_request(telemetry, ConnectionContext { baggage, ..hbone(Reporter::Destination) });
    });
    let labels = [("source_workload", "front"), ("source_cluster", "c1")];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
}

#[test]
fn baggage_of_the_answer_replaces_the_destination_at_the_source() {
    let told = told(|telemetry| {
        let context = ConnectionContext {
            baggage: Some(Box::new(baggage())),
            destination_identity: Some(Identity::new("far.local", "far", "teller")),
            ..hbone(Reporter::Source)
        };
        one_request(telemetry, context);
    });
    let labels = [
        ("source_workload", "front"),
        ("destination_workload", "teller"),
        ("destination_app", "teller"),
        ("destination_principal", "spiffe://far.local/ns/far/sa/teller"),
    ];
    assert_eq!(told.value("istio_tcp_connections_opened_total", &labels), 1);
    assert!(told.fields().contains("dst.workload=\"teller\" dst.namespace=\"far\""));
}

#[test]
fn a_dropped_connection_is_closed_once_and_not_failed() {
    let told = told(|telemetry| drop(telemetry.open(hbone(Reporter::Source))));
    let labels = [("response_flags", "-")];
    assert_eq!(told.value("istio_tcp_connections_closed_total", &labels), 1);
    assert!(told.samples("istio_tcp_connections_failed_total", &[]).is_empty());
    assert!(told.fields().ends_with("error=\"connection dropped\""));
    assert!(told.lines[0].contains("\terror\taccess\t"));
}

#[test]
fn the_start_is_told_at_debug() {
    let told = told_with("access=debug", LogFormat::Plain, |telemetry| {
        one_request(telemetry, hbone(Reporter::Source));
    });
    let (_, start) = told.lines[0].split_once('\t').unwrap();
    let expected =
        format!("debug\taccess\tconnection opened\t{HBONE_FIELDS} direction=\"outbound\"");
    assert_eq!(start, expected);
    assert_eq!(told.lines.len(), 2);
}

#[test]
fn json_lines_have_the_same_fields() {
    let told = told_with("info", LogFormat::Json, |telemetry| {
        let open = telemetry.open(hbone(Reporter::Source));
        open.close(Err(Failure::new(ResponseFlag::Connect, "a \"quoted\"\nerror")));
    });
    let line: serde_json::Value = serde_json::from_str(&told.lines[0]).unwrap();
    let keys: Vec<&str> = line.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        keys,
        [
            "level",
            "time",
            "scope",
            "message",
            "src.addr",
            "src.workload",
            "src.namespace",
            "src.identity",
            "src.cluster",
            "dst.addr",
            "dst.hbone_addr",
            "dst.service",
            "dst.workload",
            "dst.namespace",
            "dst.identity",
            "dst.cluster",
            "direction",
            "bytes_sent",
            "bytes_recv",
            "duration",
            "error",
        ]
    );
    assert_eq!(line["level"], "error");
    assert_eq!(line["scope"], "access");
    assert_eq!(line["message"], "connection complete");
    assert_eq!(line["src.addr"], "10.2.0.3:40112");
    assert_eq!(line["bytes_sent"], 0);
    assert_eq!(line["error"], "a \"quoted\"\nerror");
}

#[test]
fn a_silenced_access_log_still_counts() {
    let told = told_with("access=off", LogFormat::Plain, |telemetry| {
        one_request(telemetry, hbone(Reporter::Source));
    });
    assert!(told.lines.is_empty());
    assert_eq!(told.value("istio_tcp_received_bytes_total", &[]), 74);
}

#[test]
fn a_policy_change_counts_as_rejudged() {
    let told = told(|telemetry| {
        let denial = Denial { reason: DenialReason::PolicyChange, policy: None, rule: None };
        let failure = Failure::denied("connection closed due to policy change", denial);
        telemetry.open(hbone(Reporter::Destination)).close(Err(failure));
        let policy = "shop/need-mtls".into();
        telemetry.dry_run(DryRunEvaluation { policy, action: Action::Deny, matched: true });
    });
    for line in [
        "culvert_authorization_rejudged_closings_total 1",
        "culvert_authorization_denied_total{policy=\"\",rule=\"\",reason=\"policy_change\"} 1",
        "culvert_authorization_dry_run_total{policy=\"shop/need-mtls\",action=\"deny\",\
         matched=\"true\"} 1",
    ] {
        assert!(told.metrics.lines().any(|l| l == line), "{line}\n{}", told.metrics);
    }
}

#[test]
fn sockets_are_open_until_their_guard_is_dropped() {
    let telemetry = Telemetry::new(None, &[]);
    let guard = telemetry.socket_opened(Reporter::Destination);
    let sample = |value| format!("istio_tcp_sockets_open{{reporter=\"destination\"}} {value}\n");
    assert!(telemetry.encode().unwrap().contains(&sample(1)));
    drop(guard);
    assert!(telemetry.encode().unwrap().contains(&sample(0)));
}

#[tokio::test]
async fn what_other_rooms_keep_is_read_at_each_scrape() {
    let telemetry = Telemetry::new(None, &[Handle::current(), Handle::current()]);
    telemetry.watch_kernel(|| KernelReading {
        captured: 7,
        passed: 5,
        refused: 1,
        flow_entries: vec![("outbound_flows".to_owned(), 3)],
    });
    telemetry.watch_source(|| SourceReading {
        kind: "file",
        loaded: Some(std::time::SystemTime::now()),
        loads: 2,
        errors: 1,
    });
    telemetry.watch_certificates(|| {
        let (not_before, not_after) = (std::time::UNIX_EPOCH, std::time::UNIX_EPOCH);
        let identity = front().identity().to_string();
        vec![CertificateReading { identity, not_before, not_after }]
    });
    telemetry.watch_tunnels(|| TunnelReading { connections: 4, streams: 9 });
    telemetry.pods().active.set(2);
    telemetry.pods().started.inc();
    let text = telemetry.encode().unwrap();
    for sample in [
        "culvert_kernel_connections_total{result=\"captured\"} 7\n",
        "culvert_kernel_connections_total{result=\"refused\"} 1\n",
        "culvert_kernel_flow_entries{map=\"outbound_flows\"} 3\n",
        "culvert_source_age_seconds{kind=\"file\"} ",
        "culvert_source_loads_total{kind=\"file\"} 2\n",
        "culvert_source_errors_total{kind=\"file\"} 1\n",
        "culvert_certificate_age_seconds{identity=\"spiffe://cluster.local/ns/web/sa/front\"} ",
        "culvert_certificate_expires_in_seconds{identity=\"spiffe://cluster.local/ns/web/sa/front\"} -",
        "culvert_tunnel_connections 4\n",
        "culvert_tunnel_streams 9\n",
        "workload_manager_active_proxy_count 2\n",
        "workload_manager_pending_proxy_count 0\n",
        "workload_manager_proxies_started_total 1\n",
        "workload_manager_proxies_stopped_total 0\n",
        "istio_build{component=\"ztunnel\",tag=\"unknown\"} 1\n",
        "tokio_num_workers 2\n",
        "tokio_num_alive_tasks ",
        "tokio_global_queue_depth ",
        "tokio_worker_total_busy_duration_seconds_total{worker=\"0\"} ",
        "tokio_worker_park_count_total{worker=\"0\"} ",
        "tokio_worker_park_count_total{worker=\"1\"} ",
        "tokio_worker_park_unpark_count_total{worker=\"0\"} ",
        "process_open_fds ",
        "process_max_fds ",
    ] {
        assert!(text.contains(&format!("\n{sample}")), "{sample}\n{text}");
    }
}

#[test]
fn two_agents_in_one_process_count_apart() {
    let (one, other) = (Telemetry::new(None, &[]), Telemetry::new(None, &[]));
    one_request(&one, hbone(Reporter::Source));
    assert!(one.encode().unwrap().contains("istio_tcp_connections_opened_total{"));
    assert!(!other.encode().unwrap().contains("istio_tcp_connections_opened_total{"));
}
