//! Edits of the mesh file: good ones at once, bad ones not at all and with the place of the fault.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::time::{Duration, Instant};

use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, PodSpec, PolicySpec, Running, ServiceSpec};
use culvert_lab::wait::{self, SOON};
use culvert_tests::expect::{answer, counted, edit, is_refused, logged, rule};
use culvert_tests::{binary, call, connect, echo, exchange, serve, who};

fn mesh() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("server", "shop", "server")
        .service(ServiceSpec::new("site", "shop").port(80, 8080).endpoint("server"))
        .policy(PolicySpec::deny("never", "shop", vec![rule(Match::any().port(1))]))
        .start()
        .unwrap();
    serve(&mesh, "server", 8080, echo).unwrap();
    mesh
}

fn write(mesh: &Running, text: &str) {
    let new = mesh.config().with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(&new, mesh.config()).unwrap();
}

fn calls_work(mesh: &Running) {
    let [ip, _] = mesh.service("site");
    assert_eq!(call(mesh, "client", (ip, 80), "hello").unwrap(), "hello");
}

#[test]
fn an_edit_takes_effect_within_a_second() {
    let mut mesh = mesh();
    let _a = mesh.agent("a", &binary()).unwrap();
    let to = (mesh.pod("server").v4().into(), 8080);
    let mut prompt = Vec::new();
    // The best of them counts: the machine may be busy.
    while prompt.len() < 20 && prompt.iter().all(|took| *took >= SECOND) {
        calls_work(&mesh);
        let edited = Instant::now();
        let everyone = PolicySpec::deny("everyone", "shop", vec![rule(Match::any().port(8080))]);
        mesh.change(|mesh| mesh.policies.push(everyone)).unwrap();
        wait::until("calls to be refused", SOON, || is_refused(&mesh, "client", to).is_ok())
            .unwrap();
        prompt.push(edited.elapsed());
        let edited = Instant::now();
        mesh.change(|mesh| drop(mesh.policies.pop())).unwrap();
        wait::until("calls to be allowed", SOON, || call(&mesh, "client", to, "").is_ok()).unwrap();
        prompt.push(edited.elapsed());
    }
    assert!(prompt.iter().min() < Some(&SECOND), "{prompt:?}");
}

/// Makes each edit in turn to a good file; the agent must tell of it with its line and the given
/// text, and go on as before.
fn refuses(edits: &[(&str, &str, &str)]) {
    let mesh = mesh();
    let a = mesh.agent("a", &binary()).unwrap();
    let good = fs::read_to_string(mesh.config()).unwrap();
    let mut wrong = Vec::new();
    for (from, to, why) in edits {
        assert!(good.contains(from), "{from:?} is not in\n{good}");
        let bad = good.replacen(from, to, 1);
        let changed = bad.lines().zip(good.lines()).position(|(bad, good)| bad != good).unwrap();
        write(&mesh, &bad);
        let place = format!("{}:{}:", mesh.config().display(), changed + 1);
        if let Err(error) = told(&a, &place, why) {
            wrong.push(format!("{to:?}: {error:#}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    calls_work(&mesh);
    assert!(!answer(&a, "/culvert/status").unwrap()["source"]["error"].is_null());
    let table = a.cli(&["status"]).unwrap();
    assert!(table.contains("NOT in force as it is now: "), "{table}");
    assert!(table.contains("2 workloads, 1 service, 1 policy"), "{table}");
    counted(&a, "culvert_source_errors_total", &[], edits.len() as f64).unwrap();

    write(&mesh, &good);
    wait::until("the fault to be forgotten", SOON, || {
        answer(&a, "/culvert/status").is_ok_and(|status| status["source"]["error"].is_null())
    })
    .unwrap();
    calls_work(&mesh);
}

fn told(a: &Agent, place: &str, why: &str) -> anyhow::Result<()> {
    let line = wait::until_some(format!("an error at {place} {why}"), 2 * SECOND, || {
        let log = a.log();
        let last = log.lines().rfind(|line| line.contains("the mesh file stays as it was"));
        let last = last.unwrap_or_default().to_owned();
        // Quotes are escaped in the log.
        let plain = last.replace("\\\"", "\"");
        if plain.contains(place) && plain.contains(why) { Ok(last) } else { Err(last) }
    })?;
    let status = answer(a, "/culvert/status")?["source"]["error"].clone();
    let status = status.as_str().unwrap_or_default();
    anyhow::ensure!(status.contains(place) && status.contains(why), "{line}\nbut {status}");
    Ok(())
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_fault_in_a_workload_is_told_with_its_place() {
    refuses(&[
        ("    name: \"server\"\n", "    nam: \"server\"\n", "unknown field `nam`"),
        ("protocol: HBONE", "protocol: hbone", "workloads[0].protocol: \"hbone\" is not one of"),
        ("workloadIps: [\"10.", "workloadIps: [\"300.", "workloads[0].workloadIps[0]: \"300."),
        ("canonicalName: \"client\"", "canonicalName: [1]", "workloads[0].canonicalName: "),
        ("\"shop/site.shop.svc.cluster.local\": {80: 8080}", "site: {80: 8080}", "key \"site\""),
        ("local\": {80: 8080}", "local\": {80: 80800}", "80800"),
    ]);
}

#[test]
fn a_fault_in_a_service_or_policy_is_told_with_its_place() {
    refuses(&[
        ("vips: [\"/10.", "vips: [\"10.", "services[0].vips[0]: \"10.96.0.10\" is not"),
        ("    ports: {80: 8080}", "    ports: {eighty: 8080}", "services[0].ports"),
        ("action: Deny", "action: Refuse", "policies[0].action: \"Refuse\" is not one of"),
        ("scope: Namespace", "scope: Cluster", "policies[0].scope: \"Cluster\" is not one of"),
        ("dryRun: false", "dryRun: perhaps", "policies[0].dryRun: invalid type"),
        ("[[[{destinationPorts: [1]}]]]", "[[{destinationPorts: [1]}]]", "policies[0].rules[0]"),
    ]);
}

#[test]
fn a_fault_in_culverts_section_is_told_with_its_place() {
    refuses(&[
        ("culvert:\n", "culvert:\n  trustDomain: other\n", "culvert.trustDomain: "),
        ("ttl: 86400s", "ttl: long", "culvert.ca.ttl: \"long\" is not a duration"),
        ("requireWaypoint: nobody", "requireWaypoint: some", "culvert.requireWaypoint: "),
        ("requireWaypoint: nobody", "requireWaypoint: [\"lab//Pod/no/no\"]", "no workload of this"),
        ("- workload: \"lab//Pod/web/client\"", "- workload: \"no\"", "culvert.pods[0].workload: "),
        ("netns: \"/", "netns: \"", "is not an absolute path"),
        ("culvert:", "culvrt:", "unknown field `culvrt`"),
    ]);
}

#[test]
fn pods_come_and_go_with_the_file() {
    let mut mesh = mesh();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = (mesh.pod("server").v4().into(), 8080);
    let opened = "istio_tcp_connections_opened_total";

    mesh.add_pod("a", PodSpec::new("late", "web", "late")).unwrap();
    logged(&a, &["pod enrolled", "lab//Pod/web/late"]).unwrap();
    counted(&a, "workload_manager_active_proxy_count", &[], 3.0).unwrap();
    assert_eq!(call(&mesh, "late", to, "hello").unwrap(), "hello");
    let identity = "source_principal=\"spiffe://cluster.local/ns/web/sa/late\"";
    counted(&a, opened, &[identity, "reporter=\"destination\""], 1.0).unwrap();

    // A pod that is let go stays a pod: what it opened goes on, what is new goes its plain way.
    let open = connect(&mesh, "late", to).unwrap();
    counted(&a, opened, &[identity, "reporter=\"destination\""], 2.0).unwrap();
    let let_go = |mesh: &mut Mesh| {
        for pod in &mut mesh.pods {
            pod.enrolled &= pod.name != "late";
        }
    };
    edit(&mut mesh, &[&a], let_go).unwrap();
    logged(&a, &["pod withdrawn", "lab//Pod/web/late"]).unwrap();
    assert_eq!(call(&mesh, "late", to, "hello").unwrap(), "hello");
    counted(&a, opened, &[identity, "reporter=\"destination\""], 2.0).unwrap();
    let plain = ["source_workload=\"late\"", "connection_security_policy=\"unknown\""];
    counted(&a, opened, &plain, 1.0).unwrap();
    assert_eq!(exchange(open).unwrap(), "ping");

    mesh.remove_pod("client").unwrap();
    // Its namespace may be missed before the file is read, and is told of differently then.
    counted(&a, "workload_manager_active_proxy_count", &[], 1.0).unwrap();
    let rest = || {
        let pods = answer(&a, "/culvert/pods").unwrap();
        let names: Vec<_> = pods.as_array().unwrap().iter().map(|pod| &pod["name"]).collect();
        names == ["server"]
    };
    wait::until("the other pod alone", SOON, rest).unwrap();
}

#[test]
fn exclusions_change_with_the_file() {
    let mut mesh = mesh();
    serve(&mesh, "client", 9090, who).unwrap();
    let a = mesh.agent("a", &binary()).unwrap();
    let to = (mesh.pod("client").v4().into(), 9090);
    let opened = "istio_tcp_connections_opened_total";
    call(&mesh, "server", to, "").unwrap();
    counted(&a, opened, &[], 2.0).unwrap();
    let exclude = |mesh: &mut Mesh| {
        for pod in &mut mesh.pods {
            pod.exclude_outbound_ports = vec![9090];
            pod.exclude_inbound_ports = vec![9090];
        }
    };
    edit(&mut mesh, &[&a], exclude).unwrap();
    wait::until("a connection to be left alone", SOON, || {
        let before = a.metric(opened, &[]).unwrap();
        call(&mesh, "server", to, "").unwrap();
        a.metric(opened, &[]).unwrap() == before
    })
    .unwrap();
}
