#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use super::*;

#[test]
fn names_are_unique_and_say_their_subject() {
    let all = all();
    let names: BTreeSet<&str> = all.iter().map(|scenario| scenario.name).collect();
    assert_eq!(names.len(), all.len());
    for name in names {
        let (subject, what) = name.split_once('/').unwrap();
        assert!(!subject.is_empty() && !what.is_empty(), "{name}");
    }
}

#[test]
fn the_documentation_names_every_scenario_and_no_other() {
    let page = std::fs::read_to_string(crate::shell::root().join("docs/e2e.md")).unwrap();
    let known: BTreeSet<&str> = super::all().iter().map(|scenario| scenario.name).collect();
    let subjects: BTreeSet<&str> = known.iter().filter_map(|name| name.split('/').next()).collect();
    let quoted = page.split('`').skip(1).step_by(2);
    let named: BTreeSet<&str> = quoted
        .filter(|text| {
            text.split_once('/').is_some_and(|(subject, what)| {
                subjects.contains(subject)
                    && what.chars().all(|letter| letter.is_ascii_lowercase() || letter == '-')
            })
        })
        .collect();
    let missing: Vec<_> = known.difference(&named).collect();
    let invented: Vec<_> = named.difference(&known).collect();
    assert!(missing.is_empty(), "not documented: {missing:?}");
    assert!(invented.is_empty(), "documented, but not there: {invented:?}");
}
