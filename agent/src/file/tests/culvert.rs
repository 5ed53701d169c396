//! The `culvert` section: what it holds, and each way in which it can be wrong.

use std::path::{Path, PathBuf};
use std::time::Duration;

use culvert_core::snapshot::RequireWaypoint;

use super::{EXAMPLE, line_of};
use crate::file::{CulvertSection, Mesh, NetnsRef};

const POD: &str = "    - {workload: demo//Pod/web/front-1, netns: /run/netns/front}\n";

fn with(section: &str) -> String {
    format!("{EXAMPLE}culvert:\n{section}")
}

fn section(yaml: &str) -> CulvertSection {
    match Mesh::parse(yaml.as_bytes()) {
        Ok(mesh) => mesh.culvert,
        Err(invalid) => panic!("refused: {invalid:?}\n{yaml}"),
    }
}

/// Refused on the line where `at` stands, with exactly this text.
fn refused_at(yaml: &str, at: &str, text: &str) {
    let invalid = Mesh::parse(yaml.as_bytes()).unwrap_err();
    assert_eq!(invalid.what, text);
    assert_eq!(invalid.place.map(|place| place.line), Some(line_of(yaml, at)), "{text}");
}

#[test]
fn whole_section_loads() {
    let section = section(&with(concat!(
        "  trustDomain: cluster.local\n",
        "  network: \"\"\n",
        "  clusterId: Kubernetes\n",
        "  ca: {directory: /var/lib/culvert/ca, ttl: 90m}\n",
        "  requireWaypoint: [demo//Pod/shop/legacy-1]\n",
        "  nodeNetns: /proc/1/ns/net\n",
        "  pods:\n",
        "    - workload: demo//Pod/web/front-1\n",
        "      netns: /run/netns/front\n",
        "      excludeOutboundPorts: [9999]\n",
        "      excludeOutboundCidrs: [10.9.0.0/16]\n",
        "      excludeInboundPorts: [9090]\n",
        "    - workload: demo//Pod/shop/api-1\n",
        "      pid: 1234\n",
    )));
    assert_eq!(section.trust_domain.as_deref(), Some("cluster.local"));
    assert_eq!(section.network.as_deref(), Some(""));
    assert_eq!(section.ca.directory.as_deref(), Some(Path::new("/var/lib/culvert/ca")));
    assert_eq!(section.ca.ttl, Duration::from_secs(5400));
    assert_eq!(
        section.require_waypoint,
        RequireWaypoint::Workloads(vec!["demo//Pod/shop/legacy-1".into()])
    );
    assert_eq!(section.node_netns, Some(PathBuf::from("/proc/1/ns/net")));
    let [front, api] = section.pods.as_slice() else { panic!("{:?}", section.pods) };
    assert_eq!(front.netns, NetnsRef::Path("/run/netns/front".into()));
    assert_eq!(front.exclude_outbound_ports, [9999]);
    assert_eq!(front.exclude_outbound_cidrs[0].to_string(), "10.9.0.0/16");
    assert_eq!(front.exclude_inbound_ports, [9090]);
    assert_eq!(api.netns.path(), Path::new("/proc/1234/ns/net"));
}

#[test]
fn absent_section_has_defaults() {
    let section = section(EXAMPLE);
    assert_eq!(section, CulvertSection::default());
    assert_eq!(section.ca.ttl, Duration::from_secs(86400));
    assert_eq!(section.require_waypoint, RequireWaypoint::Nobody);
}

#[test]
fn require_waypoint_takes_words_or_known_uids() {
    let read = |text: &str| section(&with(&format!("  requireWaypoint: {text}\n")));
    assert_eq!(read("everyBound").require_waypoint, RequireWaypoint::EveryBound);
    assert_eq!(read("nobody").require_waypoint, RequireWaypoint::Nobody);
    assert_eq!(read("[]").require_waypoint, RequireWaypoint::Workloads(vec![]));
    refused_at(
        &with("  requireWaypoint: all\n"),
        "requireWaypoint: all",
        "culvert.requireWaypoint: \"all\" is not nobody, everyBound or a list of workload uids",
    );
    refused_at(
        &with("  requireWaypoint:\n    - demo//Pod/shop/api-1\n    - other\n"),
        "- other",
        "culvert.requireWaypoint[1]: no workload of this file has the uid \"other\"",
    );
}

#[test]
fn pod_names_a_workload_of_the_file() {
    refused_at(
        &with(&format!("  pods:\n{POD}    - {{workload: other, netns: /run/netns/x}}\n")),
        "workload: other",
        "culvert.pods[1].workload: no workload of this file has the uid \"other\"",
    );
}

#[test]
fn pod_of_a_workload_that_could_never_run_is_refused() {
    refused_at(
        &with("  pods:\n    - {workload: demo//Pod/shop/legacy-1, netns: /run/netns/x}\n"),
        "workload: demo//Pod/shop/legacy-1",
        "culvert.pods[0].workload: workload \"demo//Pod/shop/legacy-1\" has no `node`, so no agent \
         would enrol it",
    );
    let yaml = with(&format!("  pods:\n{POD}")).replacen("    serviceAccount: front\n", "", 1);
    refused_at(
        &yaml,
        "- {workload: demo//Pod/web/front-1",
        "culvert.pods[0].workload: workload \"demo//Pod/web/front-1\" cannot have a certificate: \
         `trustDomain`, `namespace` and `serviceAccount` must all be set, without `/`",
    );
}

#[test]
fn workload_is_enrolled_once() {
    refused_at(
        &with(&format!(
            "  pods:\n{POD}    - {{workload: \"demo//Pod/web/front-1\", netns: /run/netns/x}}\n"
        )),
        "workload: \"demo",
        "culvert.pods[1].workload: \"demo//Pod/web/front-1\" is enrolled by pods[0] already",
    );
}

#[test]
fn network_namespace_is_enrolled_once_per_node() {
    refused_at(
        &with(&format!(
            "  pods:\n{POD}    - workload: demo//Pod/shop/api-1\n      netns: /run/netns/front\n"
        )),
        "      netns: /run/netns/front",
        "culvert.pods[1].netns: /run/netns/front is enrolled by pods[0] already",
    );
    refused_at(
        &with(
            "  pods:\n    - {workload: demo//Pod/web/front-1, netns: /proc/7/ns/net}\n    - \
             {workload: demo//Pod/shop/api-1, pid: 7}\n",
        ),
        "pid: 7",
        "culvert.pods[1].pid: pid 7 is enrolled by pods[0] already",
    );
    let elsewhere =
        format!("  pods:\n{POD}    - {{workload: demo//Pod/shop/wp-1, netns: /run/netns/front}}\n");
    assert_eq!(section(&with(&elsewhere)).pods.len(), 2);
}

#[test]
fn pod_needs_exactly_one_namespace() {
    let pod = |rest: &str| with(&format!("  pods:\n    - workload: demo//Pod/web/front-1\n{rest}"));
    refused_at(
        &pod(""),
        "    - workload: demo//Pod/web/front-1",
        "culvert.pods[0].netns: is missing, and so is `pid`",
    );
    refused_at(
        &pod("      netns: /a\n      pid: 1\n"),
        "pid: 1",
        "culvert.pods[0].pid: `netns` and `pid` exclude each other",
    );
    refused_at(&pod("      pid: 0\n"), "pid: 0", "culvert.pods[0].pid: 0 is not a process");
    refused_at(
        &pod("      netns: run/front\n"),
        "netns: run/front",
        "culvert.pods[0].netns: \"run/front\" is not an absolute path",
    );
}

#[test]
fn exclusions_are_ports_and_ranges() {
    let pod = |rest: &str| {
        with(&format!(
            "  pods:\n    - workload: demo//Pod/web/front-1\n      pid: 7\n      {rest}\n"
        ))
    };
    refused_at(
        &pod("excludeInboundPorts: [80, 0]"),
        "excludeInboundPorts",
        "culvert.pods[0].excludeInboundPorts: 0 is not a port",
    );
    refused_at(
        &pod("excludeOutboundCidrs: [10.9.0.0]"),
        "excludeOutboundCidrs",
        "culvert.pods[0].excludeOutboundCidrs[0]: \"10.9.0.0\" is not a CIDR range; the prefix \
         length is needed, as in 10.0.0.1/32",
    );
    refused_at(
        &pod("excludeOutboundPorts: [65536]"),
        "excludeOutboundPorts",
        "culvert.pods[0].excludeOutboundPorts[0]: invalid value: integer `65536`, expected u16",
    );
}

#[test]
fn unknown_keys_are_refused_everywhere_in_the_section() {
    for yaml in [
        with("  foo: 1\n"),
        with("  ca: {foo: 1}\n"),
        with("  pods:\n    - {workload: demo//Pod/web/front-1, pid: 7, foo: 1}\n"),
    ] {
        let invalid = Mesh::parse(yaml.as_bytes()).unwrap_err();
        assert!(invalid.what.contains("unknown field `foo`"), "{}", invalid.what);
    }
}

#[test]
fn ca_settings_are_checked() {
    refused_at(
        &with("  ca:\n    ttl: soon\n"),
        "ttl: soon",
        "culvert.ca.ttl: \"soon\" is not a duration, as 90s or 24h: expected number at 0",
    );
    refused_at(
        &with("  ca:\n    ttl: 0s\n"),
        "ttl: 0s",
        "culvert.ca.ttl: is shorter than a second",
    );
    refused_at(
        &with("  ca:\n    directory: ca\n"),
        "directory: ca",
        "culvert.ca.directory: \"ca\" is not an absolute path",
    );
}

#[test]
fn names_are_checked() {
    refused_at(
        &with("  trustDomain: \"\"\n"),
        "trustDomain: \"\"",
        "culvert.trustDomain: is empty",
    );
    refused_at(
        &with("  trustDomain: a/b\n"),
        "trustDomain: a/b",
        "culvert.trustDomain: holds a `/`",
    );
    refused_at(&with("  clusterId: \"\"\n"), "clusterId: \"\"", "culvert.clusterId: is empty");
    refused_at(
        &with("  nodeNetns: ns\n"),
        "nodeNetns: ns",
        "culvert.nodeNetns: \"ns\" is not an absolute path",
    );
}
