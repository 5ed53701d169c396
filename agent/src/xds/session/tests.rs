#![allow(clippy::unwrap_used)]

use super::*;

fn session(subscription: Subscription) -> Session {
    let node = Node { id: "ztunnel~1.1.1.1~p.n~n.svc.cluster.local".to_owned(), metadata: None };
    Session::new(node, subscription)
}

#[test]
fn a_stream_begins_with_addresses_then_policies_and_the_node_in_both() {
    let [addresses, policies] = session(Subscription::Wildcard).open();
    assert_eq!(addresses.type_url, "type.googleapis.com/istio.workload.Address");
    assert_eq!(policies.type_url, "type.googleapis.com/istio.security.Authorization");
    for request in [addresses, policies] {
        assert!(request.node.unwrap().id.starts_with("ztunnel~"));
        assert!(request.resource_names_subscribe.is_empty());
        assert!(request.resource_names_unsubscribe.is_empty());
        assert!(request.initial_resource_versions.is_empty());
        assert!(request.response_nonce.is_empty());
    }
}

#[test]
fn on_demand_subscribes_to_everything_and_nothing_for_addresses_only() {
    let [addresses, policies] = session(Subscription::OnDemand).open();
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    assert!(policies.resource_names_subscribe.is_empty());
    assert!(policies.resource_names_unsubscribe.is_empty());
}

#[test]
fn a_need_is_asked_for_without_node_or_nonce() {
    let request = subscribe(&["net/10.0.0.1".into()], &["old".into()]);
    assert_eq!(request.resource_names_subscribe, ["net/10.0.0.1"]);
    assert_eq!(request.resource_names_unsubscribe, ["old"]);
    assert_eq!(request.type_url, Kind::Address.url());
    assert!(request.node.is_none() && request.response_nonce.is_empty());
}

/// What was not taken over.
fn these(rejected: &[(String, String)]) -> Rejections {
    let mut all = Rejections::default();
    for (name, why) in rejected {
        all.add(name.clone(), why.clone());
    }
    all
}

#[test]
fn an_ack_has_the_nonce_and_a_nack_the_reasons_too() {
    let mut session = session(Subscription::Wildcard);
    let ack = session.answer(Kind::Address.url(), "n1", &these(&[]));
    assert_eq!((ack.response_nonce.as_str(), ack.error_detail), ("n1", None));
    assert!(ack.node.is_none());
    let rejected = [("a".to_owned(), "is bad".to_owned()), ("b".to_owned(), "is worse".to_owned())];
    let nack = session.answer(Kind::Address.url(), "n2", &these(&rejected));
    let detail = nack.error_detail.unwrap();
    assert_eq!((nack.response_nonce.as_str(), detail.code), ("n2", 0));
    assert_eq!(detail.message, "a: is bad; b: is worse");

    let many: Vec<_> = (0..150).map(|i| (i.to_string(), "bad".to_owned())).collect();
    let message =
        session.answer(Kind::Address.url(), "n3", &these(&many)).error_detail.unwrap().message;
    assert!(message.ends_with("99: bad; and 50 more"), "{message}");
}

#[test]
fn an_unknown_type_is_acked_and_makes_nothing_ready() {
    let mut session = session(Subscription::Wildcard);
    let ack = session.answer("type.googleapis.com/other", "n", &these(&[]));
    assert_eq!((ack.type_url.as_str(), ack.error_detail), ("type.googleapis.com/other", None));
    assert!(!session.is_ready());
}

#[test]
fn ready_once_each_whole_type_was_accepted_in_full() {
    let bad = [("a".to_owned(), "bad".to_owned())];
    let mut wildcard = session(Subscription::Wildcard);
    for (kind, rejected, ready) in [
        (Kind::Authorization, &[][..], false),
        (Kind::Address, &bad[..], false),
        (Kind::Address, &[][..], true),
        (Kind::Address, &bad[..], true),
    ] {
        wildcard.answer(kind.url(), "n", &these(rejected));
        assert_eq!(wildcard.is_ready(), ready, "{kind:?} {rejected:?}");
    }
    let mut on_demand = session(Subscription::OnDemand);
    assert!(!on_demand.is_ready());
    on_demand.answer(Kind::Authorization.url(), "n", &these(&[]));
    assert!(on_demand.is_ready());
}

#[test]
fn a_new_stream_names_what_is_held_with_its_versions() {
    let mut session = session(Subscription::Wildcard);
    let names = session.names_mut(Kind::Address);
    names.accept("w1".into(), Version::new("00ff"), Item::Workload);
    names.accept("w2".into(), Version::new("a1"), Item::Workload);
    names.accept("w2".into(), Version::new("a2"), Item::Workload);
    names.accept("w3".into(), Version::new("1"), Item::Workload);
    assert_eq!(names.remove("w3"), Some(Item::Workload));
    session.names_mut(Kind::Authorization).accept("n/p".into(), Version::new(""), Item::Policy);
    let [addresses, policies] = session.open();
    let versions: Vec<_> = addresses.initial_resource_versions.into_iter().collect();
    let expected = [("w1", "00ff"), ("w2", "a2")];
    assert_eq!(versions, expected.map(|(name, version)| (name.to_owned(), version.to_owned())));
    assert_eq!(policies.initial_resource_versions["n/p"], "");
}

#[test]
fn versions_are_given_back_as_they_came() {
    for text in
        ["", "0", "1a", "1A", "00ff", "ffffffffffffffff", "10000000000000000", "+1", "v1", "é"]
    {
        assert_eq!(Version::new(text).to_string(), text);
    }
    assert_eq!(Version::new("1a"), Version::Hex(26));
}

/// Row 6 of the removal vectors: a workload and a service of one name.
#[test]
fn a_workload_goes_before_a_service_of_the_same_name() {
    let mut names = Names::default();
    names.accept("a/x".into(), Version::new("1"), Item::Workload);
    names.accept("a/x".into(), Version::new("2"), Item::Service);
    assert_eq!(names.remove("a/x"), Some(Item::Workload));
    assert_eq!(names.len(), 1);
    assert_eq!(names.remove("a/x"), Some(Item::Service));
    assert_eq!(names.remove("a/x"), None);
    assert_eq!(names.len(), 0);
}
