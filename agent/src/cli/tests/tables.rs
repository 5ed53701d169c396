//! What people see of the agent's answers.

use std::path::Path;
use std::time::{Duration, SystemTime};

use culvert_core::tables::NetnsCookie;
use serde_json::json;

use crate::capture::DetachReport;
use crate::cli::connections::Names;
use crate::cli::dump::Dump;
use crate::cli::{connections, detach, explain, lists, status, table};

const DUMP: &str = include_str!("config_dump.json");

fn dump() -> Dump {
    Dump::read(serde_json::from_str(DUMP).unwrap()).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// 2026-03-01T12:00:00Z
const NOON: u64 = 1_772_366_400;

#[track_caller]
fn shows(text: &str, lines: &[&str]) {
    assert_eq!(text.lines().collect::<Vec<_>>(), lines, "\n{text}");
}

#[test]
fn workloads_show_their_waypoints_service() {
    shows(
        &lists::workloads(&dump()).render(),
        &[
            "NAMESPACE   POD NAME   ADDRESS    NODE     WAYPOINT   PROTOCOL",
            "shop        api-5c6b   10.1.0.7   node-a   waypoint   HBONE",
        ],
    );
}

#[test]
fn waypoint_is_none_without_and_na_when_unknown() {
    let workload = |name: &str, waypoint: serde_json::Value| json!({"name": name, "namespace": "a", "waypoint": waypoint, "workloadIps": []});
    let dump = Dump::read(json!({
        "workloads": {
            "1": workload("bare", json!(null)),
            "2": workload("lost", json!({"destination": "a/absent"})),
            "3": workload("by-vip", json!({"destination": "n/10.0.0.1"})),
        },
        "services": [{"name": "w", "namespace": "a", "hostname": "w.a", "vips": ["n/10.0.0.1"]}],
    }));
    shows(
        &lists::workloads(&dump.unwrap()).render(),
        &[
            "NAMESPACE   POD NAME   ADDRESS   NODE   WAYPOINT   PROTOCOL",
            "a           bare       -         -      None       -",
            "a           by-vip     -         -      w          -",
            "a           lost       -         -      NA         -",
        ],
    );
}

#[test]
fn services_count_healthy_endpoints() {
    shows(
        &lists::services(&dump()).render(),
        &[
            "NAMESPACE   SERVICE NAME   SERVICE VIP   WAYPOINT   ENDPOINTS",
            "shop        api            10.96.0.10    None       1/1",
            "shop        waypoint       10.96.0.20    None       0/0",
        ],
    );
    let mut answer: serde_json::Value = serde_json::from_str(DUMP).unwrap();
    answer["workloads"][0]["status"] = json!("Unhealthy");
    let text = lists::services(&Dump::read(answer).unwrap()).render();
    assert!(text.contains("0/1"), "{text}");
}

#[test]
fn endpoints_count_although_their_workloads_are_in_another_namespace() {
    let mut answer: serde_json::Value = serde_json::from_str(DUMP).unwrap();
    answer["workloads"][0]["namespace"] = json!("other");
    let dump = Dump::read(answer).unwrap().of_namespace(Some("shop"));
    assert!(dump.workloads.is_empty());
    assert!(lists::services(&dump).render().contains("1/1"));
    assert_eq!(dump.raw_services().as_array().unwrap().len(), 2);
}

#[test]
fn policies_show_action_and_scope() {
    shows(
        &lists::policies(&dump()).render(),
        &[
            "NAMESPACE   POLICY NAME   ACTION   SCOPE              RULES   DRY RUN",
            "shop        api-clients   Allow    WorkloadSelector   1       false",
        ],
    );
}

#[test]
fn certificates_show_validity_and_hexadecimal_serial() {
    let header = "CERTIFICATE NAME                        TYPE   STATUS      VALID CERT   \
                  SERIAL NUMBER   NOT AFTER              NOT BEFORE";
    let line = |kind: &str, valid: &str, rest: &str| {
        format!(
            "spiffe://cluster.local/ns/shop/sa/api   {kind:<4}   Available   {valid:<10}   {rest}"
        )
    };
    let shown = |now| lists::certificates(&dump(), at(now)).render();
    let leaf = "1234            2026-03-02T00:00:00Z   2026-03-01T00:00:00Z";
    let root = "1               2036-01-01T00:00:00Z   2026-01-01T00:00:00Z";
    shows(&shown(NOON), &[header, &line("Leaf", "true", leaf), &line("Root", "true", root)]);
    let next_day = shown(NOON + 86_400);
    assert!(next_day.contains(&line("Leaf", "false", leaf)), "{next_day}");
}

#[test]
fn certificate_without_roots_shows_its_chains_end_as_root() {
    let link = |serial: &str| json!({"serialNumber": serial, "validFrom": "x", "expirationTime": "2036-01-01T00:00:00Z"});
    let dump = Dump::read(json!({"certificates": [
        {"identity": "a", "state": "Available",
         "certChain": [link("1461501637330902918203684832716283019655932542975"), link("no"), link("16")]},
        {"identity": "b", "state": "Unavailable: the CA is not to be found"},
    ]}));
    shows(
        &lists::certificates(&dump.unwrap(), at(NOON)).render(),
        &[
            "CERTIFICATE NAME   TYPE           STATUS        VALID CERT   SERIAL NUMBER                              NOT AFTER              NOT BEFORE",
            "a                  Leaf           Available     false        ffffffffffffffffffffffffffffffffffffffff   2036-01-01T00:00:00Z   x",
            "a                  Intermediate   Available     false        no                                         2036-01-01T00:00:00Z   x",
            "a                  Root           Available     false        10                                         2036-01-01T00:00:00Z   x",
            "b                  Leaf           Unavailable   false        -                                          -                      -",
        ],
    );
}

#[test]
fn pods_show_state_and_connections() {
    let pods = json!([
        {"workload": "c1//Pod/web/front-1", "name": "front-1", "namespace": "web",
         "serviceAccount": "front", "netns": "/run/netns/front", "cookie": 7,
         "addresses": ["10.2.0.3", "fd00:2::3"], "state": "Enrolled", "certificate": "Available",
         "connections": {"inbound": 1, "outbound": 2}, "verdicts": 4},
        {"workload": "c1//Pod/web/front-2", "state": "Failed: no such namespace", "certificate": null},
    ]);
    shows(
        &lists::pods(&serde_json::from_value::<Vec<_>>(pods).unwrap()).render(),
        &[
            "NAMESPACE   POD NAME              SERVICE ACCOUNT   ADDRESS              STATE                       CERTIFICATE   INBOUND   OUTBOUND   VERDICTS   NETNS",
            "web         front-1               front             10.2.0.3,fd00:2::3   Enrolled                    Available     1         2          4          /run/netns/front",
            "-           c1//Pod/web/front-2   -                 -                    Failed: no such namespace   -             0         0          0          -",
        ],
    );
}

#[test]
fn connections_show_names_for_addresses() {
    let connections = || {
        serde_json::from_value(json!([
            {"direction": "outbound", "protocol": "HBONE", "src": "10.1.0.7:51000",
             "dst": "10.96.0.20:80", "target": "10.1.0.9:15008", "srcIdentity": null,
             "dstIdentity": "spiffe://cluster.local/ns/shop/sa/wp",
             "workload": "c1//Pod/shop/api-5c6b", "service": "shop/waypoint", "policy": null,
             "openedSecondsAgo": 125, "received": 2048, "sent": 10},
            {"direction": "inbound", "protocol": "TCP", "src": "10.2.0.3:40112",
             "dst": null, "target": "10.1.0.7:8080", "workload": "c1//Pod/shop/api-5c6b",
             "policy": "shop/api-clients rule 0", "openedSecondsAgo": 3, "received": 0, "sent": 0},
        ]))
        .unwrap()
    };
    shows(
        &connections::table(connections(), &Names::of(&dump())).render(),
        &[
            "WORKLOAD        DIRECTION   LOCAL                 REMOTE           REMOTE TARGET      PROTOCOL   PEER                          PERMITTED BY              AGE   RECEIVED   SENT",
            "api-5c6b.shop   Inbound     api-5c6b.shop:8080    10.2.0.3:40112   -                  TCP        -                             shop/api-clients rule 0   3s    0 B        0 B",
            "api-5c6b.shop   Outbound    api-5c6b.shop:51000   10.1.0.9:15008   waypoint.shop:80   HBONE      cluster.local/ns/shop/sa/wp   -                         2m    2.0 KiB    10 B",
        ],
    );
    let raw = connections::table(connections(), &Names::default()).render();
    assert!(raw.contains("10.96.0.20:80") && raw.contains("c1//Pod/shop/api-5c6b"), "{raw}");
}

#[test]
fn status_shows_a_refused_edit() {
    let answer = json!({
        "version": "0.1.0", "node": "node-a", "ready": false, "pending": ["pods", "state manager"],
        "uptimeSeconds": 7300,
        "source": {"kind": "file", "path": "/etc/mesh.yaml", "loadedAt": "2026-03-01T00:00:00Z",
                   "ageSeconds": 61, "error": "/etc/mesh.yaml:3:5: workloads[0]: missing field"},
        "snapshot": {"workloads": 4, "services": 1, "policies": 2},
        "pods": {"enrolled": 2, "failed": 1}, "certificates": {"available": 2, "unavailable": 0},
        "connections": {"inbound": 3, "outbound": 4},
        "kernel": {"cgroup": "/sys/fs/cgroup", "pinPath": "/sys/fs/bpf/culvert",
                   "programs": [{"name": "connect4", "id": 17}, {"name": "lookup", "id": 18}],
                   "flowEntries": 9, "verdicts": 6, "acceleration": "on; differs: splice"},
    });
    shows(
        &status::text(&serde_json::from_value(answer).unwrap()),
        &[
            "Agent          culvert 0.1.0 on node-a, up 2h",
            "Ready          no, pending: pods, state manager",
            "Source         file /etc/mesh.yaml, loaded 1m ago",
            "               NOT in force as it is now: /etc/mesh.yaml:3:5: workloads[0]: missing field",
            "Mesh           4 workloads, 1 service, 2 policies",
            "Pods           2 enrolled, 1 failed",
            "Certificates   2 available",
            "Connections    3 inbound, 4 outbound",
            "Kernel         attached to /sys/fs/cgroup, pinned in /sys/fs/bpf/culvert",
            "               connect4 (id 17), lookup (id 18)",
            "               9 flow entries",
            "               admits by 6 verdicts",
            "               acceleration on; differs: splice",
        ],
    );
}

#[test]
fn status_without_a_loaded_source_says_so() {
    let answer =
        json!({"source": {"kind": "file", "path": "/m", "loadedAt": null, "ageSeconds": null}});
    let text = status::text(&serde_json::from_value(answer).unwrap());
    assert!(text.contains("file /m, not loaded yet"), "{text}");
}

#[test]
fn status_without_programs_names_no_place_where_they_would_be() {
    let answer = json!({"kernel": {"cgroup": "/sys/fs/cgroup", "pinPath": "/sys/fs/bpf/culvert",
                                   "programs": [], "flowEntries": 0}});
    let text = status::text(&serde_json::from_value(answer).unwrap());
    assert!(text.contains("Kernel         no programs of the agent"), "{text}");
    assert!(!text.contains("/sys/fs"), "{text}");
}

#[test]
fn detach_tells_what_it_took_away() {
    let report = |programs, pods, unreachable: &[u64]| {
        let unreachable = unreachable.iter().copied().map(NetnsCookie).collect();
        detach::text(Path::new("/p"), &DetachReport { programs, pods, ended: 0, unreachable })
    };
    assert_eq!(report(0, 0, &[]), "nothing was attached: no pins in /p");
    assert_eq!(report(5, 1, &[]), "removed 5 programs and 1 pod of /p");
    assert_eq!(
        report(1, 2, &[7, 8]),
        "removed 1 program and 2 pods of /p\n\
         routing rules stay in network namespaces that cannot be entered until they end: 7, 8"
    );
}

#[test]
fn explanation_shows_steps_and_the_rule() {
    let answer = json!({
        "source": "web/front-1", "destination": "10.96.0.10:80",
        "steps": [
            {"decision": "resolve", "result": "service shop/api", "because": "10.96.0.10 is its address"},
            {"decision": "authorize", "result": "refused", "because": "shop/no matches"},
        ],
        "outcome": "refused", "policy": "shop/no", "rule": 1, "path": "tunnel",
        "via": "10.1.0.7:15008", "authority": "10.1.0.7:8080",
    });
    shows(
        &explain::text(&serde_json::from_value(answer).unwrap()),
        &[
            "web/front-1 → 10.96.0.10:80",
            "",
            "  1. resolve    service shop/api",
            "                because 10.96.0.10 is its address",
            "  2. authorize  refused",
            "                because shop/no matches",
            "",
            "Outcome:   refused by policy shop/no, rule 1",
            "Path:      tunnel",
            "Via:       10.1.0.7:15008",
            "Authority: 10.1.0.7:8080",
        ],
    );
}

#[test]
fn empty_lists_show_their_headers() {
    let empty = Dump::read(json!({})).unwrap();
    shows(
        &lists::policies(&empty).render(),
        &["NAMESPACE   POLICY NAME   ACTION   SCOPE   RULES   DRY RUN"],
    );
}

#[test]
fn cells_keep_to_one_line() {
    let pods = json!([{"workload": "x", "state": "Failed: a\nb"}]);
    let text = lists::pods(&serde_json::from_value::<Vec<_>>(pods).unwrap()).render();
    assert_eq!(text.lines().count(), 2, "{text}");
}

#[test]
fn ages_and_sizes_have_one_unit() {
    let age = |seconds| table::age(Duration::from_secs(seconds));
    assert_eq!([age(0), age(59), age(60), age(7199), age(86_400)], ["0s", "59s", "1m", "1h", "1d"]);
    assert_eq!(table::bytes(0), "0 B");
    assert_eq!(table::bytes(1023), "1023 B");
    assert_eq!(table::bytes(1536), "1.5 KiB");
    assert_eq!(table::bytes(20 << 20), "20.0 MiB");
    assert_eq!(table::bytes(u64::MAX), "16384.0 PiB");
}
