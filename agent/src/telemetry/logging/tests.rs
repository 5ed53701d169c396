#![allow(clippy::unwrap_used)]

use std::sync::mpsc;

use tracing::dispatcher::with_default;

use super::*;
use crate::telemetry::tests::Shared;

fn parsed(text: &str) -> Directives {
    text.parse().unwrap()
}

fn written(directives: &str, format: LogFormat, act: impl FnOnce(&LogControl)) -> Vec<String> {
    let written = Shared::default();
    let Logging { dispatch, control, flush } =
        Logging::new(parsed(directives), format, written.clone());
    with_default(&dispatch, || act(&control));
    drop(flush);
    written.lines()
}

#[test]
fn directives_accept_both_separators_and_print_back() {
    assert_eq!(parsed("").to_string(), "info");
    assert_eq!(parsed("debug").to_string(), "debug");
    let text = "access=debug,hbone::pool=trace,warn";
    assert_eq!(parsed(text).to_string(), text);
    assert_eq!(parsed("warn, hbone::pool:trace ,access:debug"), parsed(text));
    assert_eq!(parsed(&parsed(text).to_string()), parsed(text));
    assert_eq!(parsed("access=WARNING,critical"), parsed("access=warn,error"));
    assert_eq!(parsed("culvert_agent::hbone=debug"), parsed("hbone=debug"));
}

#[test]
fn debug_is_wanted_of_everything_or_of_a_scope_and_what_lies_below() {
    for (directives, wanted) in [
        ("debug", true),
        ("trace", true),
        ("info,culvert::kernel=debug", true),
        ("culvert=debug", true),
        ("info", false),
        ("info,access=debug", false),
        ("debug,culvert::kernel=info", false),
    ] {
        assert_eq!(parsed(directives).want_debug("culvert::kernel"), wanted, "{directives}");
    }
}

#[test]
fn what_is_no_directive_is_named() {
    let invalid = |text: &str| text.parse::<Directives>().unwrap_err().to_string();
    let level = "\"loud\" is not a level: off, error, warn, info, debug or trace";
    assert_eq!(invalid("loud"), level);
    assert_eq!(invalid("info,access=loud"), level);
    assert_eq!(invalid("a b=debug"), "\"a b\" is not a scope: letters, digits, '_', '-' and '::'");
    assert!(invalid("=debug").contains("is not a scope"));
}

#[test]
fn scopes_cover_own_modules_and_other_crates() {
    let lines = written("warn,hbone=debug,h2=info", LogFormat::Plain, |_| {
        tracing::debug!(target: "culvert_agent::hbone::pool", "own");
        tracing::debug!(target: "culvert_agent::relay", "other");
        tracing::info!(target: "h2", "foreign");
        tracing::debug!(target: "h2", "foreign");
    });
    let columns: Vec<&str> = lines.iter().map(|line| line.split_once('\t').unwrap().1).collect();
    assert_eq!(columns, ["debug\thbone::pool\town", "info\th2\tforeign"]);
}

#[test]
fn levels_change_while_it_runs_and_go_back() {
    let lines = written("info", LogFormat::Plain, |control| {
        tracing::debug!(target: "access", "unwanted");
        let changed = control.change(&parsed("access=debug")).unwrap();
        assert_eq!(changed.to_string(), "access=debug,info");
        tracing::debug!(target: "access", "wanted");
        tracing::debug!(target: "other", "unwanted");
        assert_eq!(control.change(&parsed("warn")).unwrap().to_string(), "access=debug,warn");
        assert_eq!(control.reset().unwrap().to_string(), "info");
        tracing::debug!(target: "access", "unwanted");
    });
    assert_eq!(lines.len(), 1);
    assert!(lines[0].ends_with("\tdebug\taccess\twanted"));
}

#[test]
fn time_is_rfc_3339_with_microseconds() {
    let lines = written("info", LogFormat::Plain, |_| tracing::info!("now"));
    let time = lines[0].split('\t').next().unwrap();
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000Z");
}

#[test]
fn no_value_begins_a_line_of_its_own() {
    let lines = written("info", LogFormat::Plain, |_| {
        let evil = "x\n2026-01-01T00:00:00.000000Z\tinfo";
        tracing::info!(bare = %evil, quoted = evil, "{evil}");
    });
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0].matches('\t').count(), 4);
}

#[test]
fn json_keeps_numbers_and_booleans() {
    let lines = written("info", LogFormat::Json, |_| {
        tracing::info!(target: "x", n = 7_u64, below = -1_i64, yes = true, half = 0.5, "m");
    });
    assert!(lines[0].contains("\"message\":\"m\",\"n\":7,\"below\":-1,\"yes\":true,\"half\":0.5}"));
}

/// Holds up its first line until it is released.
struct Stalled(mpsc::Receiver<()>);

impl Write for Stalled {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_stalled_reader_drops_lines_and_holds_up_nobody() {
    let (release, released) = mpsc::sync_channel(1024);
    let Logging { dispatch, control, flush } =
        Logging::new(parsed("info"), LogFormat::Plain, Stalled(released));
    with_default(&dispatch, || {
        for n in 0..WAITING_LINES + 10_000 {
            tracing::info!(n, "line");
        }
    });
    // Those in the writer's hands; the shortest line is longer than this.
    let held = (WRITTEN_TOGETHER / 32) as u64;
    let dropped = control.dropped_lines();
    assert!((10_000 - held..=10_000).contains(&dropped), "{dropped}");
    drop(release);
    drop(flush);
}
