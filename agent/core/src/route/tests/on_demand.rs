//! Where the control plane tells only what it is asked for.

use super::*;

/// Asks until it is decided; gives what was asked for, and the decision in a line.
fn ask(
    known: Snapshot,
    to: &str,
    mut tell: impl FnMut(&Snapshot, &str) -> (Snapshot, Fetched),
) -> (Vec<String>, String) {
    let (source, enrolled) = (front(), Enrolled::default());
    let destination = OriginalDst::new(to.parse().unwrap());
    let request = Outbound { source: &source, client: source.addresses[0], destination };
    let (mut snapshot, mut answers, mut asked) = (known, Answers::default(), Vec::new());
    loop {
        let view = View {
            snapshot: &snapshot,
            network: "n1",
            node: "",
            enrolled: &enrolled,
            answers: &answers,
            coverage: Coverage::OnDemand,
        };
        match route(&view, &request, &mut StdRng::seed_from_u64(5)) {
            Step::Done(result) => return (asked, line(result)),
            Step::Need(Need::Resource(key)) => {
                assert!(!asked.contains(&key.to_string()), "asked twice for {key}");
                asked.push(key.to_string());
                let (next, fetched) = tell(&snapshot, &key.to_string());
                answers.note_resource(key, fetched);
                snapshot = next;
            }
            Step::Need(Need::Dns(name)) => panic!("no name is asked for: {name}"),
        }
    }
}

fn alone() -> Snapshot {
    snapshot([front()], [])
}

#[test]
fn an_address_passes_through_only_when_it_is_said_to_be_nobodys() {
    let (asked, route) = ask(alone(), "1.1.1.1:443", |now, _| (now.clone(), Fetched::Answered));
    assert_eq!(asked, ["n1/1.1.1.1"]);
    assert_eq!(route, "passthrough 1.1.1.1:443 (unknown address: passthrough)");

    let (asked, route) = ask(alone(), "1.1.1.1:443", |now, _| (now.clone(), Fetched::Unanswered));
    assert_eq!(asked, ["n1/1.1.1.1"]);
    assert_eq!(route, "the control plane did not tell about n1/1.1.1.1");
}

#[test]
fn what_is_known_is_not_asked_for() {
    for to in ["10.1.0.7:8080", "10.96.0.10:80"] {
        let (asked, route) = ask(mesh(), to, |now, _| (now.clone(), Fetched::Unanswered));
        assert_eq!(asked.len(), 0, "{to}");
        assert!(route.starts_with("hbone"), "{route}");
    }
}

#[test]
fn a_service_and_its_waypoint_are_fetched_one_after_the_other() {
    let whole = mesh().with([changed_api(|s| s.waypoint = Some(by_hostname(WAYPOINT)))]);
    let api = whole.service(&key(API)).unwrap().as_ref().clone();
    let (asked, route) = ask(alone(), "10.96.0.10:80", |now, asked| match asked {
        "n1/10.96.0.10" => (now.with([Change::service(api.clone())]), Fetched::Answered),
        WAYPOINT => (whole.clone(), Fetched::Answered),
        other => panic!("asked for {other}"),
    });
    assert_eq!(asked, ["n1/10.96.0.10", WAYPOINT]);
    assert_eq!(route, "hbone 10.1.0.20:15008 10.96.0.10:80 shop/wp (service waypoint)");
}

#[test]
fn a_waypoint_that_is_absent_or_not_told_about_closes_the_way() {
    for reference in [by_hostname("shop/lost.shop"), by_address("n1", "10.9.9.9")] {
        let bound = mesh().with([changed_api(|s| s.waypoint = Some(reference.clone()))]);
        let name = reference.destination.to_string();
        for (fetched, expected) in [
            (Fetched::Answered, format!("unknown waypoint: waypoint {reference} not found")),
            (Fetched::Unanswered, format!("the control plane did not tell about {name}")),
        ] {
            let (asked, route) =
                ask(bound.clone(), "10.96.0.10:80", |now, _| (now.clone(), fetched));
            assert_eq!((asked, route), (vec![name.clone()], expected));
        }
    }
}

#[test]
fn the_waypoint_of_a_pod_is_fetched_before_it_is_asked_who_calls() {
    let bound = changed_endpoint(|w| w.waypoint = Some(by_hostname(WAYPOINT)));
    let whole = mesh().with([bound]);
    let pod = whole.workload("c1//Pod/shop/api").unwrap().as_ref().clone();
    let known = snapshot([front(), pod], []);
    let tell = |_: &Snapshot, _: &str| (whole.clone(), Fetched::Answered);
    let (asked, route) = ask(known, "10.1.0.7:8080", tell);
    assert_eq!(asked, [WAYPOINT]);
    assert_eq!(route, "hbone 10.1.0.20:15008 10.1.0.7:8080 shop/wp (workload waypoint)");
}
