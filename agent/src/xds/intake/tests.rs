#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use culvert_core::snapshot::Snapshot;
use culvert_proto::envoy::config::core::v3::Node;
use culvert_proto::istio::security::Authorization;
use culvert_proto::istio::workload as proto;
use proptest::prelude::*;
use prost::Message;

use super::super::frames::Part;
use super::super::read::Piece;
use super::super::session::Subscription;
use super::super::wire::{Payload, Resource};
use super::*;

fn intake() -> Intake {
    Intake::new(Session::new(Node::default(), Subscription::Wildcard), None)
}

fn resource(kind: Kind, name: &str, version: &str, value: Vec<u8>) -> Bytes {
    let payload = Payload { type_url: kind.url().into(), value: value.into() };
    let resource = Resource {
        version: version.to_owned().into(),
        payload: Some(payload),
        name: name.to_owned().into(),
        aliases: Vec::new(),
    };
    resource.encode_to_vec().into()
}

fn workload(uid: &str, ip: [u8; 4], service: Option<&str>) -> Vec<u8> {
    let services = service.map(|key| (key.to_owned(), proto::PortList::default()));
    let workload = proto::Workload {
        uid: uid.to_owned(),
        addresses: vec![ip.to_vec()],
        services: services.into_iter().collect(),
        ..Default::default()
    };
    proto::Address { r#type: Some(proto::address::Type::Workload(workload)) }.encode_to_vec()
}

fn service(namespace: &str, hostname: &str) -> Vec<u8> {
    let service = proto::Service {
        namespace: namespace.to_owned(),
        hostname: hostname.to_owned(),
        ..Default::default()
    };
    proto::Address { r#type: Some(proto::address::Type::Service(service)) }.encode_to_vec()
}

fn policy(namespace: &str, name: &str) -> Vec<u8> {
    let policy = Authorization {
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        ..Default::default()
    };
    policy.encode_to_vec()
}

fn response(kind: Kind, resources: Vec<Bytes>, removed: &[&str]) -> Response {
    Response {
        resources,
        type_url: kind.url().to_owned(),
        nonce: "n".to_owned(),
        removed_resources: removed.iter().map(ToString::to_string).collect(),
    }
}

/// Applies a response to a snapshot as the agent does.
fn apply(intake: &mut Intake, snapshot: &mut Snapshot, response: Response) -> Outcome {
    let needs = Needs::new(false);
    intake.take(response, &needs, |changes| *snapshot = snapshot.with(changes))
}

/// Applies parts of a response that come in these groups, and then no more. Every other group was
/// read where it was received.
fn arrive(intake: &mut Intake, snapshot: &mut Snapshot, groups: Vec<Vec<Part>>) -> Option<Outcome> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let (sender, pieces) = tokio::sync::mpsc::channel(groups.len().max(1));
    let mut reader = Reader::default();
    for (number, group) in groups.into_iter().enumerate() {
        let pieces = group.into_iter().filter_map(Piece::of);
        let group = match number % 2 {
            0 => pieces.map(|piece| reader.piece(piece)).collect(),
            _ => pieces.collect(),
        };
        sender.try_send(group).unwrap();
    }
    drop(sender);
    let arriving = Arriving::new(runtime.handle().clone(), pieces);
    let publish = |changes: &mut dyn Iterator<Item = _>| *snapshot = snapshot.with(changes);
    intake.take_arriving(arriving, 1000, &Needs::new(false), publish)
}

fn grouped(response: Response, size: usize) -> Vec<Vec<Part>> {
    let Response { resources, type_url, nonce, removed_resources } = response;
    let end = Response { resources: Vec::new(), type_url, nonce, removed_resources };
    let mut parts = resources.into_iter().map(Part::Resource).chain([Part::End(end)]).peekable();
    let mut groups = Vec::new();
    while parts.peek().is_some() {
        groups.push(parts.by_ref().take(size).collect());
    }
    groups
}

fn versions(intake: &Intake, kind: Kind) -> BTreeMap<String, String> {
    let names = intake.session.names(kind).iter();
    names.map(|(name, version)| (name.to_string(), version.to_string())).collect()
}

#[test]
fn a_bad_resource_rejects_only_itself_and_is_named() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let good = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    let bad = proto::Workload {
        uid: "u2".to_owned(),
        addresses: vec![vec![1, 2, 3, 4, 5]],
        ..Default::default()
    };
    let bad = proto::Address { r#type: Some(proto::address::Type::Workload(bad)) };
    let bad = resource(Kind::Address, "u2", "1", bad.encode_to_vec());
    let cut = Bytes::from_static(&[0x0a, 0xff]);
    let renamed = resource(Kind::Address, "u4", "1", workload("u3", [10, 0, 0, 3], None));
    let foreign = resource(Kind::Authorization, "a/p", "", policy("a", "p"));
    let empty = resource(Kind::Address, "u5", "1", Vec::new());
    let all = vec![bad, cut, renamed, good, foreign, empty];
    let outcome = apply(&mut intake, &mut snapshot, response(Kind::Address, all, &[]));
    assert_eq!((outcome.accepted, outcome.rejected.len()), (1, 5));
    assert!(snapshot.workload("u1").is_some());
    assert_eq!(snapshot.workload_count(), 1);
    let message = outcome.answer.error_detail.unwrap().message;
    for part in [
        "u2: addresses: an address of 5 bytes is neither IPv4 nor IPv6; ",
        "resource 1: cannot be read: ",
        "u4: uid: u3 is not the resource's name; ",
        "a/p: type_url: type.googleapis.com/istio.security.Authorization is not that of",
        "u5: both workload and service is missing",
    ] {
        assert!(message.contains(part), "{part:?} in {message}");
    }
    assert_eq!(versions(&intake, Kind::Address).into_keys().collect::<Vec<_>>(), ["u1"]);
}

#[test]
fn a_million_bad_resources_are_told_in_few_words() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let good = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    let mut all = vec![Bytes::from_static(&[0x0a, 0xff]); 1_000_000];
    all.push(good);
    let removed = vec!["nobody"; 1000];
    let outcome = apply(&mut intake, &mut snapshot, response(Kind::Address, all, &removed));
    assert_eq!((outcome.accepted, outcome.rejected.len()), (1, 1_000_000));
    assert!(snapshot.workload("u1").is_some());
    let message = outcome.answer.error_detail.unwrap().message;
    assert!(message.ends_with("; and 999900 more"), "{message}");
    assert!(message.len() < 20_000, "{} bytes", message.len());
}

#[test]
fn a_rejected_update_leaves_what_was_accepted_before_with_its_version() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let good = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    apply(&mut intake, &mut snapshot, response(Kind::Address, vec![good], &[]));
    let bad = resource(Kind::Address, "u1", "2", vec![0xff]);
    let outcome = apply(&mut intake, &mut snapshot, response(Kind::Address, vec![bad], &[]));
    assert!(outcome.answer.error_detail.is_some());
    assert!(snapshot.workload("u1").is_some());
    assert_eq!(versions(&intake, Kind::Address)["u1"], "1");
}

/// The rows of the table of names and removals.
#[test]
fn a_removal_takes_away_what_its_name_brought() {
    let uid = "c1//Pod/a/x";
    let pod = || resource(Kind::Address, uid, "1", workload(uid, [10, 0, 0, 1], None));
    let both = || {
        vec![
            resource(Kind::Address, "a/x", "1", workload("a/x", [10, 0, 0, 2], None)),
            resource(Kind::Address, "a/x", "2", service("a", "x")),
        ]
    };
    let host = "a/x.a.svc.cluster.local";
    let known = || resource(Kind::Address, host, "1", service("a", "x.a.svc.cluster.local"));
    for (row, before, name, workloads, services) in [
        (1, vec![pod()], uid, 0, 0),
        (2, vec![], uid, 0, 0),
        (3, vec![known()], host, 0, 0),
        (4, vec![], host, 0, 0),
        (5, vec![pod(), known()], "plain", 1, 1),
        (6, both(), "a/x", 0, 1),
    ] {
        let (mut intake, mut snapshot) = (intake(), Snapshot::default());
        apply(&mut intake, &mut snapshot, response(Kind::Address, before, &[]));
        let outcome =
            apply(&mut intake, &mut snapshot, response(Kind::Address, Vec::new(), &[name]));
        assert!(outcome.answer.error_detail.is_none());
        assert_eq!(snapshot.workload_count(), workloads, "row {row}");
        assert_eq!(snapshot.service_count(), services, "row {row}");
    }
}

#[test]
fn removals_come_after_the_resources_of_the_same_response() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let put = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    apply(&mut intake, &mut snapshot, response(Kind::Address, vec![put], &["u1"]));
    assert!(snapshot.workload("u1").is_none());
    assert!(versions(&intake, Kind::Address).is_empty());
}

#[test]
fn an_empty_response_is_published_and_acked() {
    let mut intake = intake();
    let mut published = 0;
    let needs = Needs::new(false);
    let outcome = intake.take(response(Kind::Authorization, Vec::new(), &[]), &needs, |changes| {
        published += 1;
        assert_eq!(changes.count(), 0);
    });
    assert_eq!((published, outcome.answer.error_detail), (1, None));
}

#[test]
fn an_unknown_type_is_ignored_and_acked() {
    let mut intake = intake();
    let mut response = response(Kind::Address, vec![Bytes::from_static(b"?")], &["x"]);
    response.type_url = "type.googleapis.com/other".to_owned();
    let needs = Needs::new(false);
    let outcome = intake.take(response, &needs, |_| panic!("nothing to publish"));
    assert_eq!(outcome.answer.type_url, "type.googleapis.com/other");
    assert!(outcome.answer.error_detail.is_none());
}

#[test]
fn a_response_that_arrives_in_groups_is_taken_as_one_that_is_whole() {
    let resources: Vec<_> = (0..100_u8)
        .map(|number| {
            let uid = format!("u{}", number % 90);
            let value = workload(&uid, [10, 0, 0, number], Some("ns/svc.ns"));
            // Every tenth cannot be read.
            let value = if number % 10 == 3 { vec![0x0a, 0xff] } else { value };
            resource(Kind::Address, &uid, &number.to_string(), value)
        })
        .collect();
    let response = response(Kind::Address, resources, &["u1", "u2", "nobody"]);
    let (mut whole, mut expected) = (intake(), Snapshot::default());
    let told = apply(&mut whole, &mut expected, response.clone());
    for size in [1, 7, 1000] {
        let (mut intake, mut snapshot) = (intake(), Snapshot::default());
        let groups = grouped(response.clone(), size);
        let outcome = arrive(&mut intake, &mut snapshot, groups).unwrap();
        let counts = |it: &Outcome| (it.accepted, it.removed, it.rejected.len());
        assert_eq!(counts(&outcome), counts(&told));
        assert_eq!(outcome.answer, told.answer);
        assert_eq!(versions(&intake, Kind::Address), versions(&whole, Kind::Address));
        assert_eq!(snapshot.workload_count(), expected.workload_count());
        for workload in expected.workloads() {
            assert_eq!(snapshot.workload(&workload.uid), Some(workload));
        }
    }
}

#[test]
fn of_a_response_that_breaks_off_what_came_is_in_force_and_held() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let came = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    let outcome = arrive(&mut intake, &mut snapshot, vec![vec![Part::Resource(came)]]);
    assert!(outcome.is_none());
    assert!(snapshot.workload("u1").is_some());
    let requests = intake.session.open();
    assert_eq!(requests[0].initial_resource_versions.keys().collect::<Vec<_>>(), ["u1"]);
    apply(&mut intake, &mut snapshot, response(Kind::Authorization, Vec::new(), &[]));
    assert!(!intake.session.is_ready(), "not all addresses came");
    apply(&mut intake, &mut snapshot, response(Kind::Address, Vec::new(), &["u1"]));
    assert!(intake.session.is_ready());
    assert!(snapshot.workload("u1").is_none());
}

#[test]
fn a_type_that_is_not_that_of_what_arrived_is_refused() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    let came = resource(Kind::Address, "u1", "1", workload("u1", [10, 0, 0, 1], None));
    let groups = grouped(response(Kind::Authorization, vec![came], &["u1"]), 1);
    let outcome = arrive(&mut intake, &mut snapshot, groups).unwrap();
    let message = outcome.answer.error_detail.unwrap().message;
    assert!(message.contains("is not that of its resources"), "{message}");
    assert_eq!(outcome.removed, 0);
    let other = Response { type_url: "other".to_owned(), ..Response::default() };
    let outcome = arrive(&mut intake, &mut snapshot, grouped(other, 1)).unwrap();
    assert_eq!((outcome.answer.error_detail, &*outcome.answer.type_url), (None, "other"));
}

#[test]
fn names_are_in_memory_once() {
    let (mut intake, mut snapshot) = (intake(), Snapshot::default());
    for version in ["1", "2"] {
        let put = resource(Kind::Address, "u1", version, workload("u1", [10, 0, 0, 1], None));
        apply(&mut intake, &mut snapshot, response(Kind::Address, vec![put], &[]));
        let (name, _) = intake.session.names(Kind::Address).iter().next().unwrap();
        assert!(Arc::ptr_eq(name, &snapshot.workload("u1").unwrap().uid));
    }
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, u8),
    Spoil(u8),
    Remove(u8),
    Service(u8),
    RemoveService(u8),
    Policy(u8, u8),
    RemovePolicy(u8),
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let small = 0..6u8;
    let step = prop_oneof![
        (small.clone(), 0..4u8).prop_map(|(name, ip)| Step::Put(name, ip)),
        small.clone().prop_map(Step::Spoil),
        small.clone().prop_map(Step::Remove),
        small.clone().prop_map(Step::Service),
        small.clone().prop_map(Step::RemoveService),
        (small.clone(), 0..3u8).prop_map(|(name, version)| Step::Policy(name, version)),
        small.prop_map(Step::RemovePolicy),
    ];
    proptest::collection::vec(proptest::collection::vec(step, 0..6), 0..12)
}

proptest! {
    /// Whatever came in whatever order, what is held and what is published are what a control
    /// plane with the same end state would send to an agent that starts anew.
    #[test]
    fn what_is_held_equals_a_state_built_anew(responses in steps()) {
        let (mut intake, mut snapshot) = (intake(), Snapshot::default());
        let mut model: BTreeMap<(bool, String), (String, Vec<u8>)> = BTreeMap::new();
        for steps in responses {
            for kind in Kind::ALL {
                let (mut put, mut removed) = (Vec::new(), Vec::new());
                let address = kind == Kind::Address;
                for step in &steps {
                    let (name, value) = match (step, address) {
                        (Step::Put(name, ip), true) => {
                            let (uid, key) = (format!("c//Pod/a/{name}"), format!("a/h{ip}"));
                            (uid.clone(), workload(&uid, [10, 0, 0, *ip], Some(&key)))
                        }
                        (Step::Service(name), true) => {
                            (format!("a/h{name}"), service("a", &format!("h{name}")))
                        }
                        (Step::Policy(name, version), false) => {
                            let name = format!("p{name}");
                            let mut value = policy("a", &name);
                            value.extend([0x20, version & 1]);
                            (format!("a/{name}"), value)
                        }
                        (Step::Spoil(name), true) => {
                            let name = format!("c//Pod/a/{name}");
                            put.push(resource(kind, &name, "bad", vec![0xff]));
                            continue;
                        }
                        (Step::Remove(name), true) => {
                            removed.push(format!("c//Pod/a/{name}"));
                            continue;
                        }
                        (Step::RemoveService(name), true) => {
                            removed.push(format!("a/h{name}"));
                            continue;
                        }
                        (Step::RemovePolicy(name), false) => {
                            removed.push(format!("a/p{name}"));
                            continue;
                        }
                        _ => continue,
                    };
                    let version = match address {
                        true => format!("{:x}", value.len() * 7 + usize::from(value[value.len() - 1])),
                        false => String::new(),
                    };
                    put.push(resource(kind, &name, &version, value.clone()));
                    model.insert((address, name), (version, value));
                }
                for name in &removed {
                    model.remove(&(address, name.clone()));
                }
                let removed: Vec<&str> = removed.iter().map(String::as_str).collect();
                apply(&mut intake, &mut snapshot, response(kind, put, &removed));
            }
        }
        let (mut anew, mut fresh) = (self::intake(), Snapshot::default());
        for kind in Kind::ALL {
            let of_kind = model.iter().filter(|((address, _), _)| *address == (kind == Kind::Address));
            let all = of_kind.map(|((_, name), (version, value))| {
                resource(kind, name, version, value.clone())
            });
            let outcome = apply(&mut anew, &mut fresh, response(kind, all.collect(), &[]));
            prop_assert!(outcome.rejected.is_empty());
            prop_assert_eq!(versions(&intake, kind), versions(&anew, kind));
        }
        let sorted = |snapshot: &Snapshot| {
            let mut workloads: Vec<_> = snapshot.workloads().map(|it| format!("{it:?}")).collect();
            workloads.extend(snapshot.services().map(|it| format!("{it:?}")));
            workloads.extend(snapshot.policies().map(|it| format!("{it:?}")));
            workloads.sort();
            workloads
        };
        prop_assert_eq!(sorted(&snapshot), sorted(&fresh));
    }

    /// No bytes that a control plane sends make the agent panic.
    #[test]
    fn any_bytes_are_taken_or_rejected(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let (mut intake, mut snapshot) = (intake(), Snapshot::default());
        for kind in Kind::ALL {
            let raw = Bytes::from(bytes.clone());
            let named = resource(kind, "x", "1", bytes.clone());
            apply(&mut intake, &mut snapshot, response(kind, vec![raw, named], &["x", ""]));
        }
        let _ = Response::decode(&bytes[..]);
    }
}
