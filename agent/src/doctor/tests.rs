#![allow(clippy::unwrap_used)]

use super::bytes::Pattern;
use super::*;

fn case(name: &str, result: Outcome) -> Case {
    Case {
        name: name.to_owned(),
        expected: "all".to_owned(),
        result,
        seen: (result != Outcome::Passed).then(|| "less".to_owned()),
        milliseconds: 1,
    }
}

#[test]
fn machine_qualifies_unless_something_is_lost() {
    let with = |results: &[Outcome]| Report {
        cases: results.iter().map(|result| case("case", *result)).collect(),
        ..Report::default()
    };
    assert!(with(&[Outcome::Passed, Outcome::Differs]).qualifies());
    assert!(!with(&[Outcome::Passed, Outcome::Failed]).qualifies());
    // Nothing was tried.
    assert!(!with(&[]).qualifies());
}

#[test]
fn report_survives_its_way_between_the_processes() {
    let report = Report {
        kernel: "6.1".to_owned(),
        facts: vec![Fact { name: "a".to_owned(), needs: "5.8".to_owned(), supported: true }],
        cases: vec![case("order", Outcome::Passed), case("reset", Outcome::Differs)],
        lacking: None,
    };
    let text = serde_json::to_string(&report).unwrap();
    assert!(text.contains("\"result\":\"differs\""), "{text}");
    assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
}

#[test]
fn pattern_tells_a_byte_that_is_missing_or_another() {
    let pattern = Pattern::new(1);
    for at in [0, 1_048_570, 5_000_000] {
        let piece = pattern.piece(at, 3_000_000);
        pattern.check(at, &piece).unwrap();
        let mut other = piece.clone();
        other[2_000_000] ^= 1;
        let told = pattern.check(at, &other).unwrap_err().to_string();
        assert_eq!(told, format!("byte {} is another", at + 2_000_000));
        let mut shifted = piece;
        shifted.remove(7);
        assert!(pattern.check(at, &shifted).is_err());
    }
}
