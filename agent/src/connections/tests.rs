#![allow(clippy::unwrap_used)]

use super::*;
use crate::telemetry::testing::stranger;

fn live(direction: Direction, workload: &str) -> LiveConnection {
    LiveConnection {
        direction,
        protocol: Protocol::Hbone,
        about: Arc::new(stranger()),
        original_dst: None,
        actual_dst: "10.1.0.7:8080".parse().unwrap(),
        pod: workload.into(),
        workload: workload.into(),
        connection: None,
        counters: Arc::default(),
    }
}

fn policy_change() -> CloseReason {
    CloseReason::PolicyChange { policy: Some("shop/no-front".into()), rule: Some(0) }
}

#[test]
fn a_dropped_guard_leaves_nothing() {
    let connections = Connections::default();
    let guards: Vec<Guard> =
        (0..100).map(|_| connections.register(live(Direction::Outbound, "a"))).collect();
    assert_eq!(connections.count(), (0, 100));
    drop(guards);
    assert_eq!(connections.count(), (0, 0));
    assert!(connections.all().is_empty());
}

#[test]
fn only_the_inbound_connections_of_the_workload_are_given() {
    let connections = Connections::default();
    let guards = [
        connections.register(live(Direction::Inbound, "a")),
        connections.register(live(Direction::Inbound, "b")),
        connections.register(live(Direction::Outbound, "a")),
    ];
    let ids = |entries: Vec<Arc<Entry>>| entries.iter().map(|e| e.id).collect::<Vec<_>>();
    assert_eq!(ids(connections.inbound_of("a")), [guards[0].entry.id]);
    assert_eq!(connections.all_inbound().len(), 2);
    assert_eq!(connections.of("a").len(), 2);
    assert_eq!(ids(connections.all()), [0, 1, 2]);
}

#[tokio::test]
async fn closing_wakes_the_connection_with_the_first_reason() {
    let connections = Connections::default();
    let guard = connections.register(live(Direction::Inbound, "a"));
    let waiting = tokio::spawn(async move { guard.closed().await });
    let entry = connections.inbound_of("a").pop().unwrap();
    assert!(entry.close(policy_change()));
    assert!(!entry.close(CloseReason::Drain));
    assert_eq!(waiting.await.unwrap(), policy_change());
    assert_eq!(connections.count(), (0, 0));
}

#[tokio::test]
async fn a_closing_before_the_connection_looks_is_not_missed() {
    let connections = Connections::default();
    let guard = connections.register(live(Direction::Inbound, "a"));
    connections.all_inbound()[0].close(policy_change());
    assert_eq!(guard.close_reason(), Some(&policy_change()));
    assert_eq!(guard.closed().await, policy_change());
}

#[test]
fn a_policy_change_is_a_denial_and_a_drain_is_no_failure() {
    let denied = Failure::from(policy_change());
    assert_eq!(denied.flag, ResponseFlag::Deny);
    assert_eq!(denied.error, "connection closed due to policy change");
    assert_eq!(denied.denial.unwrap().policy.as_deref(), Some("shop/no-front"));
    let drained = Failure::from(CloseReason::Drain);
    assert_eq!(drained.flag, ResponseFlag::None);
    assert_eq!(drained.error, "connection closed due to connection drain");
}

#[test]
fn the_permit_is_shown_once_it_is_there() {
    let connections = Connections::default();
    let guard = connections.register(live(Direction::Inbound, "a"));
    assert_eq!(guard.entry().permit(), None);
    let by = PermittedBy::Rule { policy: "shop/api-clients".into(), rule: 0 };
    guard.entry().permitted(&by);
    assert_eq!(connections.all()[0].permit(), Some(by));
}
