use super::*;

fn figure(rounds: &[(f64, f64)]) -> Figure {
    let (path, measure) = ("same", "throughput-1".to_owned());
    let round = |(plain, culvert): &(f64, f64)| {
        let mut round = Round::default();
        round.set(Side::Plain, *plain);
        round.set(Side::Culvert, *culvert);
        round
    };
    Figure { path, measure, rounds: rounds.iter().map(round).collect(), unit: "Gbit/s" }
}

#[test]
fn the_median_of_an_even_count_lies_between() {
    assert_eq!(median([4.0, 1.0, 3.0, 2.0].into_iter()), 2.5);
    assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
    assert_eq!(median([].into_iter()), 0.0);
}

#[test]
fn the_ratio_is_taken_round_by_round() {
    let figure = figure(&[(10.0, 5.0), (20.0, 10.0), (40.0, 10.0)]);
    assert_eq!(figure.json()["ratio"], 0.5);
    assert_eq!(figure.json()["plain"], 20.0);
    assert_eq!(figure.json()["spread"], 0.5);
}

#[test]
fn a_plain_path_that_costs_nothing_has_no_ratio() {
    let figure = figure(&[(0.0, 2.0), (0.0, 3.0)]);
    assert_eq!(figure.json()["ratio"], Value::Null);
    assert_eq!(figure.json()["culvert"], 2.5);
}

#[test]
fn a_target_is_told_beside_what_was_reached() {
    let reached = |culvert| figure(&[(10.0, culvert)]).json()["reached"].clone();
    assert_eq!(figure(&[(10.0, 9.0)]).json()["target"], "≥ 0.97");
    assert_eq!((reached(9.0), reached(9.8)), (Value::Bool(false), Value::Bool(true)));
}

#[test]
fn a_peer_is_told_where_it_was_measured() {
    let without = figure(&[(10.0, 9.0)]);
    let mut with = without.clone();
    with.rounds[0].set(Side::Peer, 2.0);
    assert_eq!(with.json()["ztunnel"], 2.0);
    assert_eq!(with.json()["ztunnel_ratio"], 0.2);
    assert_eq!(with.json()["ratio"], without.json()["ratio"]);
    assert_eq!(without.json().get("ztunnel"), None);
    assert!(with.summary().ends_with("(0.90), ztunnel 2.0 Gbit/s (0.20)"), "{}", with.summary());
    assert!(Report(vec![without.clone(), with]).to_string().contains("ztunnel"));
    assert!(!Report(vec![without]).to_string().contains("ztunnel"));
}
