//! Who may import what: the reading order of the core and the rooms of the agent.

use super::Violation;
use super::source::Source;

mod paths;

use paths::Import;

/// Foreign packages and the rooms of the agent that they live in.
const ROOMS: [(&[&str], &[&str]); 9] = [
    (&["aya", "aya_log", "aya_obj"], &["capture"]),
    (
        &["rustls", "tokio_rustls", "rustls_pki_types", "webpki", "x509_parser", "rcgen"],
        &["tls", "ca", "control"],
    ),
    (&["aws_lc_rs"], &["tls"]),
    (&["hyper", "hyper_util"], &["admin", "cli", "control"]),
    (&["clap", "comfy_table"], &["cli"]),
    (
        &["prost", "prost_types", "tonic", "tonic_prost", "culvert_proto"],
        &["xds", "ca", "control", "zds"],
    ),
    (&["tokio_seqpacket"], &["packet", "zds", "handover"]),
    (&["serde_yaml_ng"], &["file", "config"]),
    (&["hickory_proto", "hickory_resolver"], &["dns"]),
];

/// The two ways of a connection, which never know of each other.
const WAYS: [&str; 2] = ["inbound", "outbound"];
/// What the rooms below never reach up to.
const CORRIDORS: [&str; 4] = ["inbound", "outbound", "decide", "recheck"];
/// Rooms that know nothing of ours but the core.
const CORE_ONLY: [&str; 3] = ["telemetry", "drain", "config"];
/// Queues without a bound.
const QUEUES: [&str; 4] = [
    "tokio::sync::mpsc::unbounded_channel",
    "mpsc::unbounded_channel",
    "std::sync::mpsc::channel",
    "futures_util::channel::mpsc::unbounded",
];
/// What a decision must not reach for: the world outside of its arguments.
const WORLD: [&str; 7] =
    ["fs", "process", "env", "thread", "net::TcpStream", "net::TcpListener", "net::UdpSocket"];

/// Parts of the world that only compute: threads that end with the decision that began them.
const COMPUTING: [&str; 2] = ["std::thread::Builder", "std::thread::scope"];

pub fn check(sources: &[Source]) -> Vec<Violation> {
    let order = core_order(sources);
    let mut violations = Vec::new();
    for source in sources.iter().filter(|source| !source.tests) {
        let Some(module) = &source.module else { continue };
        for import in paths::imports(&source.parsed, module) {
            let broken = match source.package.as_str() {
                "agent/core" => core_rule(&order, module, &import),
                "agent" => agent_rule(module, &import),
                _ => None,
            };
            violations.extend(broken.map(|rule| Violation {
                file: source.path.clone(),
                line: import.line,
                rule,
            }));
        }
    }
    violations.dedup();
    violations
}

/// The modules of the core in the order in which its root declares them.
fn core_order(sources: &[Source]) -> Vec<String> {
    let is_root = |source: &&Source| {
        source.package == "agent/core" && source.module.as_ref().is_some_and(Vec::is_empty)
    };
    let items = sources.iter().find(is_root).map(|root| root.parsed.items.as_slice());
    let modules = items.unwrap_or_default().iter().filter_map(|item| match item {
        syn::Item::Mod(module) => Some(module.ident.to_string()),
        _ => None,
    });
    modules.collect()
}

fn core_rule(order: &[String], module: &[String], import: &Import) -> Option<String> {
    let reaches_out = WORLD.iter().find(|part| {
        let path = import.path.join("::");
        let is_within =
            path == format!("std::{part}") || path.starts_with(&format!("std::{part}::"));
        is_within && !COMPUTING.contains(&path.as_str())
    });
    if let Some(part) = reaches_out {
        return Some(format!("the core decides without the world: no std::{part}"));
    }
    let place = |name: &str| order.iter().position(|other| other == name);
    let (own, theirs) = (module.first()?, import.path.get(1)?);
    let (here, there) = (place(own)?, place(theirs)?);
    (import.is_ours() && there > here)
        .then(|| format!("`{own}` imports `{theirs}`, which is declared below it"))
}

fn agent_rule(module: &[String], import: &Import) -> Option<String> {
    let own = module.first().map_or("main", String::as_str);
    let first = import.path.first()?.as_str();
    for (packages, rooms) in ROOMS {
        if packages.contains(&first) && !rooms.contains(&own) {
            return Some(format!("`{first}` belongs to {}, not to `{own}`", listed(rooms)));
        }
    }
    let environment = import.path.starts_with(&["std".to_owned(), "env".to_owned()]);
    if environment && own != "cli" && own != "main" {
        return Some(format!("only `cli` reads arguments and environment, not `{own}`"));
    }
    if QUEUES.contains(&import.path.join("::").as_str()) {
        return Some("queues are bounded".to_owned());
    }
    let theirs = import.path.get(1).filter(|_| import.is_ours())?.as_str();
    if theirs == own {
        return None;
    }
    if WAYS.contains(&own) && WAYS.contains(&theirs) {
        return Some(format!("corridors never import each other: `{own}` imports `{theirs}`"));
    }
    if theirs == "app" && own != "cli" && own != "main" {
        return Some(format!("`app` wires all and is imported by none: `{own}` imports it"));
    }
    if CORE_ONLY.contains(&own) {
        return Some(format!("`{own}` imports nothing of ours but the core, and not `{theirs}`"));
    }
    let above = ["main", "cli", "app"].contains(&own) || CORRIDORS.contains(&own);
    if CORRIDORS.contains(&theirs) && !above {
        return Some(format!("rooms do not reach up to corridors: `{own}` imports `{theirs}`"));
    }
    None
}

fn listed(rooms: &[&str]) -> String {
    rooms.iter().map(|room| format!("`{room}`")).collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests;
