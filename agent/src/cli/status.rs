//! The agent's state in a few lines.

use std::time::Duration;

use super::answers::{Kernel, Status};
use super::table::age;

pub(super) fn text(status: &Status) -> String {
    let old = |seconds| age(Duration::from_secs(seconds));
    let mut lines = vec![row(
        "Agent",
        format!("culvert {} on {}, up {}", status.version, status.node, old(status.uptime_seconds)),
    )];
    lines.push(row(
        "Ready",
        match (status.ready, status.pending.as_slice()) {
            (true, _) => "yes".to_owned(),
            (false, []) => "no".to_owned(),
            (false, pending) => format!("no, pending: {}", pending.join(", ")),
        },
    ));
    if let Some(handover) = &status.handover {
        lines.push(row("Hand-over", handover.clone()));
    }
    let source = &status.source;
    let loaded = match source.age_seconds {
        Some(seconds) => format!("loaded {} ago", old(seconds)),
        None => "not loaded yet".to_owned(),
    };
    lines.push(row("Source", format!("{} {}, {loaded}", source.kind, source.path)));
    if let Some(error) = &source.error {
        lines.push(row(
            "",
            match source.kind.as_str() {
                "file" => format!("NOT in force as it is now: {error}"),
                _ => error.clone(),
            },
        ));
    }
    let snapshot = &status.snapshot;
    lines.push(row(
        "Mesh",
        format!(
            "{}, {}, {}",
            count(snapshot.workloads, "workload", "workloads"),
            count(snapshot.services, "service", "services"),
            count(snapshot.policies, "policy", "policies"),
        ),
    ));
    lines.push(row(
        "Pods",
        with_bad(status.pods.enrolled, "enrolled", status.pods.failed, "failed"),
    ));
    let certificates = &status.certificates;
    lines.push(row(
        "Certificates",
        with_bad(certificates.available, "available", certificates.unavailable, "unavailable"),
    ));
    lines.push(row(
        "Connections",
        format!("{} inbound, {} outbound", status.connections.inbound, status.connections.outbound),
    ));
    lines.extend(kernel(&status.kernel));
    lines.join("\n")
}

fn kernel(kernel: &Kernel) -> Vec<String> {
    if kernel.programs.is_empty() {
        let text = "no programs of the agent; packet rules bring the connections";
        return vec![row("Kernel", text.to_owned())];
    }
    let programs = kernel.programs.iter();
    let programs: Vec<String> =
        programs.map(|program| format!("{} (id {})", program.name, program.id)).collect();
    let admits = match kernel.verdicts {
        Some(verdicts) => format!("admits by {}", count(verdicts, "verdict", "verdicts")),
        None => "admits nothing by itself".to_owned(),
    };
    let mut rows = vec![
        row("Kernel", format!("attached to {}, pinned in {}", kernel.cgroup, kernel.pin_path)),
        row("", programs.join(", ")),
        row("", count(kernel.flow_entries, "flow entry", "flow entries")),
        row("", admits),
    ];
    if let Some(acceleration) = &kernel.acceleration {
        rows.push(row("", format!("acceleration {acceleration}")));
    }
    rows
}

fn row(label: &str, text: String) -> String {
    format!("{label:<15}{text}")
}

pub(super) fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

fn with_bad(good: u64, good_word: &str, bad: u64, bad_word: &str) -> String {
    match bad {
        0 => format!("{good} {good_word}"),
        bad => format!("{good} {good_word}, {bad} {bad_word}"),
    }
}
