#![allow(clippy::unwrap_used)]

use std::time::Instant;

use culvert_core::workload::{Health, NetworkMode};
use proptest::prelude::*;

use super::*;

fn workload(uid: &str, account: &str, node: &str) -> Workload {
    Workload {
        uid: uid.into(),
        name: uid.into(),
        namespace: "a".into(),
        trust_domain: "td1".into(),
        service_account: account.into(),
        addresses: vec![],
        hostname: "".into(),
        network: "".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        node: node.into(),
        cluster_id: "".into(),
        locality: Arc::default(),
        native_tunnel: false,
        application_tunnel: None,
        services: Default::default(),
        authorization_policies: vec![],
        status: Health::Healthy,
        capacity: 1,
        workload_name: "".into(),
        workload_type: "pod".into(),
        canonical_name: "".into(),
        canonical_revision: "".into(),
    }
}

fn add(uid: &str, account: &str, node: &str) -> Change {
    Change::workload(workload(uid, account, node))
}

fn remove(uid: &str) -> Change {
    Change::RemoveWorkload(uid.into())
}

fn id(account: &str) -> Identity {
    Identity::new("td1", "a", account)
}

impl LocalIdentities {
    fn step(&mut self, changes: &[Change]) -> IdentityChanges {
        changes.iter().for_each(|change| self.note(change));
        self.due()
    }
}

fn due(prefetch: &[&str], forget: &[&str]) -> IdentityChanges {
    let ids = |names: &[&str]| names.iter().map(|name| id(name)).collect();
    IdentityChanges { prefetch: ids(prefetch), forget: ids(forget) }
}

#[test]
fn identity_is_fetched_with_its_first_workload_and_forgotten_with_its_last() {
    let mut local = LocalIdentities::new("n1".into());
    assert_eq!(local.step(&[add("1", "x", "n1"), add("2", "x", "n1")]), due(&["x"], &[]));
    assert_eq!(local.step(&[add("3", "x", "n1")]), due(&[], &[]));
    assert_eq!(local.step(&[remove("1"), remove("3")]), due(&[], &[]));
    assert_eq!(local.step(&[remove("2")]), due(&[], &["x"]));
    assert_eq!(local.step(&[remove("2"), remove("never")]), due(&[], &[]));
}

#[test]
fn only_mesh_workloads_of_this_node_count() {
    let mut local = LocalIdentities::new("n1".into());
    let plain = Workload { tunnel_protocol: TunnelProtocol::None, ..workload("p", "plain", "n1") };
    let native = Workload { native_tunnel: true, uid: "n".into(), ..plain.clone() };
    let native = Workload { service_account: "native".into(), ..native };
    let changes = [
        Change::workload(plain),
        Change::workload(native),
        add("o", "other", "n2"),
        add("e", "e", ""),
    ];
    assert_eq!(local.step(&changes), due(&["native"], &[]));
}

#[test]
fn change_of_account_node_or_protocol_moves_the_identity() {
    let mut local = LocalIdentities::new("n1".into());
    local.step(&[add("1", "x", "n1")]);
    assert_eq!(local.step(&[add("1", "y", "n1")]), due(&["y"], &["x"]));
    assert_eq!(local.step(&[add("1", "y", "n2")]), due(&[], &["y"]));
    assert_eq!(local.step(&[add("1", "y", "n1")]), due(&["y"], &[]));
    let plain = Workload { tunnel_protocol: TunnelProtocol::None, ..workload("1", "y", "n1") };
    assert_eq!(local.step(&[Change::workload(plain)]), due(&[], &["y"]));
}

#[test]
fn pod_replaced_within_one_step_keeps_its_certificate() {
    let mut local = LocalIdentities::new("n1".into());
    local.step(&[add("1", "x", "n1")]);
    assert_eq!(local.step(&[remove("1"), add("2", "x", "n1")]), due(&[], &[]));
    assert_eq!(local.step(&[remove("2"), add("2", "z", "n1"), remove("2")]), due(&[], &["x"]));
}

#[test]
fn changes_of_other_nodes_cost_nothing_that_grows() {
    let mut local = LocalIdentities::new("n1".into());
    let mesh: Vec<_> = (0..100_000)
        .map(|number| {
            let node = if number % 1000 == 0 { "n1" } else { "n2" };
            add(&format!("uid-{number}"), &format!("sa-{}", number % 5000), node)
        })
        .collect();
    assert_eq!(local.step(&mesh).prefetch.len(), 5);
    assert_eq!((local.by_uid.len(), local.workloads.len()), (100, 5));
    let began = Instant::now();
    for change in &mesh[..1000] {
        local.step(std::slice::from_ref(change));
    }
    // A second's worth of changes; a scan of the mesh for each would take a hundred times as long.
    assert!(began.elapsed().as_millis() < 500, "{:?}", began.elapsed());
}

proptest! {
    #[test]
    fn what_is_known_is_always_what_a_count_would_tell(
        steps in prop::collection::vec(
            prop::collection::vec((0u8..6, 0u8..3, prop::bool::ANY, prop::bool::ANY), 0..6),
            0..12,
        )
    ) {
        let mut local = LocalIdentities::new("n1".into());
        let mut known = std::collections::BTreeSet::new();
        let mut pods = HashMap::new();
        for step in steps {
            let changes: Vec<_> = step
                .iter()
                .map(|(uid, account, ours, there)| match there {
                    true => add(&uid.to_string(), &account.to_string(), if *ours { "n1" } else { "n2" }),
                    false => remove(&uid.to_string()),
                })
                .collect();
            for (uid, account, ours, there) in step {
                match there && ours {
                    true => pods.insert(uid, id(&account.to_string())),
                    false => pods.remove(&uid),
                };
            }
            let due = local.step(&changes);
            for identity in due.forget {
                prop_assert!(known.remove(&identity));
            }
            for identity in due.prefetch {
                prop_assert!(known.insert(identity));
            }
            prop_assert_eq!(&known, &pods.values().cloned().collect());
        }
    }
}
