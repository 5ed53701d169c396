#![allow(clippy::unwrap_used)]

use super::*;

const OUT: &str = "2026-03-01T10:00:00.123456Z\tinfo\taccess\tconnection complete\tsrc.addr=10.2.0.3:40112 src.workload=\"front\" src.namespace=\"web\" src.identity=\"spiffe://cluster.local/ns/web/sa/front\" dst.addr=10.1.0.7:15008 dst.hbone_addr=10.1.0.7:8080 dst.service=\"api.shop.svc.cluster.local\" dst.workload=\"api\" dst.namespace=\"shop\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/api\" direction=\"outbound\" bytes_sent=74 bytes_recv=2246 duration=\"9ms\"";
const IN: &str = "2026-03-01T10:00:00.123456Z\tinfo\taccess\tconnection complete\tsrc.addr=10.2.0.3:51234 src.workload=\"front\" src.identity=\"spiffe://cluster.local/ns/web/sa/front\" dst.addr=10.1.0.7:15008 dst.hbone_addr=10.1.0.7:8080 dst.workload=\"api\" dst.identity=\"spiffe://cluster.local/ns/shop/sa/api\" direction=\"inbound\" bytes_sent=2246 bytes_recv=74 duration=\"9ms\"";

fn call() -> Expected {
    Expected {
        source: "front".to_owned(),
        destination: "api".to_owned(),
        local: "10.2.0.3:40112".to_owned(),
        port: 8080,
        through: Through::Mesh,
    }
}

fn check_one(call: &Expected, leaving: &[Line], arriving: &[Line]) -> Result<(), String> {
    // As if another call were known to have the line's port.
    check(call, leaving, arriving, &mut BTreeSet::from(["10.2.0.3:40112".to_owned()]))
}

#[test]
fn both_agents_with_identities_carried_it() {
    assert_eq!(check_one(&call(), &lines(OUT), &lines(IN)), Ok(()));
}

#[test]
fn plaintext_is_not_carried() {
    let clear = OUT.replace("src.identity", "src.nothing");
    assert!(check_one(&call(), &lines(&clear), &lines(IN)).unwrap_err().contains("without both"));
    let clear = IN.replace("dst.identity", "dst.nothing");
    assert!(
        check_one(&call(), &lines(OUT), &lines(&clear)).unwrap_err().contains("arrived without")
    );
    assert!(check_one(&call(), &lines(OUT), &[]).unwrap_err().contains("does not tell"));
    assert!(check_one(&call(), &[], &lines(IN)).unwrap_err().contains("does not tell"));
}

#[test]
fn another_connection_does_not_count() {
    let other = Expected { local: "10.2.0.3:40113".to_owned(), ..call() };
    assert!(check_one(&other, &lines(OUT), &lines(IN)).is_err());
    let other = Expected { port: 80, ..call() };
    assert!(check_one(&other, &lines(OUT), &lines(IN)).is_err());
}

#[test]
fn a_port_that_two_calls_share_tells_of_both() {
    let elsewhere = OUT.replace("dst.workload=\"api\"", "dst.workload=\"other\"");
    let leaving = [elsewhere.as_str(), OUT].join("\n");
    assert_eq!(check_one(&call(), &lines(&leaving), &lines(IN)), Ok(()));
    assert!(check_one(&call(), &lines(&elsewhere), &lines(IN)).unwrap_err().contains("elsewhere"));
}

#[test]
fn a_port_that_was_translated_counts_for_one_call() {
    let translated = Expected { local: "10.2.0.3:40113".to_owned(), ..call() };
    let mut taken = BTreeSet::from([translated.local.clone()]);
    let mut check = |leaving: &str| check(&translated, &lines(leaving), &lines(IN), &mut taken);
    let elsewhere = OUT.replace("dst.workload=\"api\"", "dst.workload=\"other\"");
    assert!(check(&elsewhere).is_err());
    assert!(check(&OUT.replace("10.2.0.3", "10.2.0.4")).is_err());
    assert_eq!(check(OUT), Ok(()));
    assert!(check(OUT).is_err(), "it was another call's");
}

#[test]
fn a_waypoint_is_another_workload() {
    let through = Expected { through: Through::Waypoint, ..call() };
    assert!(check_one(&through, &lines(OUT), &[]).unwrap_err().contains("past the waypoint"));
    let waypoint = OUT.replace("dst.workload=\"api\"", "dst.workload=\"waypoint-1\"");
    assert_eq!(check_one(&through, &lines(&waypoint), &[]), Ok(()));
}

#[test]
fn json_reads_the_same() {
    let line = r#"{"level":"info","time":"t","scope":"access","message":"connection complete","src.addr":"10.2.0.3:40112","src.workload":"front","src.identity":"spiffe://a/ns/b/sa/c","dst.identity":"spiffe://a/ns/b/sa/d","dst.workload":"api","direction":"outbound","bytes_sent":74}"#;
    let lines = lines(line);
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].field("bytes_sent"), "74");
    assert!(lines[0].has_identities());
}

#[test]
fn other_scopes_and_noise_are_passed_over() {
    assert!(lines("").is_empty());
    assert!(lines("2026\tinfo\txds\tsubscribed\ta=b").is_empty());
    assert!(lines("{}\n{\"scope\":1}\nplain words").is_empty());
    let quoted =
        "t\terror\taccess\tconnection complete\terror=\"said \\\"no\\\"\" direction=\"outbound\"";
    assert_eq!(lines(quoted)[0].field("error"), "said \"no\"");
    assert_eq!(lines(quoted)[0].field("direction"), "outbound");
}
