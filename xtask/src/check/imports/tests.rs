#![allow(clippy::unwrap_used)]

use super::*;

fn rules_of(files: &[(&str, &str)]) -> Vec<String> {
    let sources: Vec<Source> = files
        .iter()
        .map(|(path, text)| Source::parse(path.as_ref(), (*text).to_owned()).unwrap().unwrap())
        .collect();
    check(&sources).into_iter().map(|violation| violation.to_string()).collect()
}

const ROOT: (&str, &str) = ("agent/core/src/lib.rs", "pub mod addr;\npub mod route;\n");

#[test]
fn the_core_imports_upwards_only() {
    assert!(rules_of(&[ROOT, ("agent/core/src/route.rs", "use crate::addr::A;")]).is_empty());
    let rules = rules_of(&[ROOT, ("agent/core/src/addr.rs", "\nuse super::route::{R, S};")]);
    assert_eq!(
        rules,
        ["agent/core/src/addr.rs:2: `addr` imports `route`, which is declared below it"]
    );
}

#[test]
fn the_core_does_not_reach_for_the_world() {
    let rules = rules_of(&[ROOT, ("agent/core/src/addr.rs", "fn f() { std::fs::read(\"x\"); }")]);
    assert_eq!(rules, ["agent/core/src/addr.rs:1: the core decides without the world: no std::fs"]);
    for (text, expected) in [
        ("fn f() { std::thread::scope(|_| ()); }", 0),
        ("fn f() { std::thread::sleep(T); }", 1),
        ("use std::thread;", 1),
    ] {
        let rules = rules_of(&[ROOT, ("agent/core/src/addr.rs", text)]);
        assert_eq!(rules.len(), expected, "{text}");
    }
}

#[test]
fn a_foreign_package_stays_in_its_room() {
    assert!(rules_of(&[("agent/src/capture/load.rs", "use aya::Ebpf;")]).is_empty());
    for text in ["use aya::Ebpf;", "fn f(e: aya::Ebpf) {}", "fn f() { x!(y, aya::Ebpf::new()); }"] {
        assert_eq!(
            rules_of(&[("agent/src/pods.rs", text)]),
            ["agent/src/pods.rs:1: `aya` belongs to `capture`, not to `pods`"],
            "{text}"
        );
    }
}

#[test]
fn corridors_rooms_and_the_wiring_keep_apart() {
    for (path, text, expected) in [
        ("agent/src/inbound.rs", "use crate::outbound::X;", 1),
        ("agent/src/inbound/step.rs", "use super::super::outbound::X;", 1),
        ("agent/src/inbound/step.rs", "use super::X; use crate::decide::Y;", 0),
        ("agent/src/relay.rs", "use crate::decide::X;", 1),
        ("agent/src/relay.rs", "use crate::app::X;", 1),
        ("agent/src/cli/run.rs", "use crate::app::X;", 0),
        ("agent/src/main.rs", "use culvert_agent::cli;", 0),
        ("agent/src/drain.rs", "use crate::connections::X;", 1),
        ("agent/src/drain.rs", "use culvert_core::addr::X; use self::part::Y;", 0),
        ("agent/src/relay.rs", "fn f() { tokio::sync::mpsc::unbounded_channel(); }", 1),
        ("agent/src/relay.rs", "fn f() { tokio::sync::mpsc::channel(9); }", 0),
        ("agent/src/file.rs", "fn f() { std::env::var(\"X\"); }", 1),
    ] {
        assert_eq!(rules_of(&[(path, text)]).len(), expected, "{path}: {text}");
    }
}

#[test]
fn tests_may_import_anything() {
    let text = "#[cfg(test)]\nmod tests { use crate::outbound::X; }";
    assert!(rules_of(&[("agent/src/inbound.rs", text)]).is_empty());
    assert!(rules_of(&[("agent/src/inbound/tests.rs", "use crate::outbound::X;")]).is_empty());
}
