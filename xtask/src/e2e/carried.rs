//! Who carried a call: what both agents' access logs say of it.
//!
//! An answer alone proves nothing, for it may have come in clear. A call counts as carried by the
//! mesh when the agents of both ends tell of it with both identities.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::talk::ip;

/// One line of an access log: the fields that matter here, by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    fields: BTreeMap<String, String>,
    whole: String,
}

impl Line {
    pub fn field(&self, name: &str) -> &str {
        self.fields.get(name).map(String::as_str).unwrap_or_default()
    }

    /// The line as the agent wrote it.
    pub fn whole(&self) -> &str {
        &self.whole
    }

    /// The line without what tells nothing about one call.
    pub fn short(&self) -> String {
        let told = [
            "src.addr",
            "src.workload",
            "src.identity",
            "dst.addr",
            "dst.hbone_addr",
            "dst.workload",
            "dst.identity",
            "error",
        ];
        let told = told.iter().filter(|name| self.fields.contains_key(**name));
        let told: Vec<String> = told.map(|name| format!("{name}={}", self.field(name))).collect();
        format!("{} {}", self.field("direction"), told.join(" "))
    }

    /// Whether both ends are named with their identities, as only mutual TLS proves them.
    pub fn has_identities(&self) -> bool {
        ["src.identity", "dst.identity"]
            .iter()
            .all(|name| self.field(name).starts_with("spiffe://"))
    }

    fn is(&self, direction: &str, source: &str) -> bool {
        self.field("direction") == direction && self.field("src.workload") == source
    }
}

/// The access-log lines of an agent's log, in either of its formats.
pub fn lines(log: &str) -> Vec<Line> {
    log.lines().filter_map(line).collect()
}

fn line(text: &str) -> Option<Line> {
    let fields = if text.starts_with('{') { from_json(text)? } else { from_text(text)? };
    Some(Line { fields, whole: text.to_owned() })
}

fn from_json(text: &str) -> Option<BTreeMap<String, String>> {
    let object: serde_json::Map<String, Value> = serde_json::from_str(text).ok()?;
    if object.get("scope")? != "access" {
        return None;
    }
    let fields = object.into_iter().map(|(name, value)| match value {
        Value::String(text) => (name, text),
        other => (name, other.to_string()),
    });
    Some(fields.collect())
}

/// `time level scope message fields`, with tabs in between; fields are `name=value`, where the
/// value may be in quotes.
fn from_text(text: &str) -> Option<BTreeMap<String, String>> {
    let mut parts = text.splitn(5, '\t');
    let (scope, fields) = (parts.nth(2)?, parts.nth(1)?);
    if scope != "access" {
        return None;
    }
    let (mut found, mut rest) = (BTreeMap::new(), fields);
    while let Some((name, after)) = rest.split_once('=') {
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted_value(quoted),
            None => {
                after.split_once(' ').map_or((after.to_owned(), ""), |(v, n)| (v.to_owned(), n))
            }
        };
        found.insert(name.trim().to_owned(), value);
        rest = next;
    }
    Some(found)
}

fn quoted_value(text: &str) -> (String, &str) {
    let (mut value, mut escaped) = (String::new(), false);
    for (index, letter) in text.char_indices() {
        match letter {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return (value, text.get(index + 1..).unwrap_or_default()),
            _ => {
                escaped = false;
                value.push(letter);
            }
        }
    }
    (value, "")
}

/// A call as it should appear in the logs.
#[derive(Clone, Debug)]
pub struct Expected {
    /// The calling pod.
    pub source: String,
    /// The pod that answered.
    pub destination: String,
    /// The caller's own `address:port`.
    pub local: String,
    /// The port that the destination serves.
    pub port: u16,
    pub through: Through,
}

/// How a call should have travelled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Through {
    /// With both identities, told by both agents.
    Mesh,
    /// The caller's agent took it to a waypoint.
    Waypoint,
}

/// Looks for a call in the log of the caller's agent and in that of the destination's; says what
/// is missing.
///
/// Where packet rules capture, the kernel gives a connection another port when its own is in use by
/// one to another address, and the agent knows no other. `taken` are the addresses that belong to a
/// call; a line that counts for this one although its port is another joins them.
pub fn check(
    call: &Expected,
    leaving: &[Line],
    arriving: &[Line],
    taken: &mut BTreeSet<String>,
) -> Result<(), String> {
    let told = format!("{} ({}) to {}", call.source, call.local, call.destination);
    let mine =
        |line: &&Line| line.is("outbound", &call.source) && line.field("src.addr") == call.local;
    // A port may serve another call, to another address, at the same time.
    let wanted = |line: &&Line| {
        (line.field("dst.workload") == call.destination) == (call.through == Through::Mesh)
    };
    let found = leaving.iter().filter(mine).find(wanted).or_else(|| leaving.iter().find(mine));
    let translated = |line: &&Line| {
        let from = line.field("src.addr");
        line.is("outbound", &call.source) && ip(from) == ip(&call.local) && !taken.contains(from)
    };
    let Some(out) = found.or_else(|| leaving.iter().filter(translated).find(wanted)) else {
        return Err(format!("{told}: the caller's agent does not tell of it"));
    };
    taken.insert(out.field("src.addr").to_owned());
    if !out.has_identities() {
        return Err(format!("{told}: left without both identities:\n      {}", out.whole()));
    }
    if call.through == Through::Waypoint {
        return if out.field("dst.workload") == call.destination {
            Err(format!("{told}: went past the waypoint:\n      {}", out.whole()))
        } else {
            Ok(())
        };
    }
    if out.field("dst.workload") != call.destination {
        return Err(format!("{told}: went elsewhere:\n      {}", out.whole()));
    }
    let ours = |line: &&Line| {
        let client =
            line.is("inbound", &call.source) && line.field("dst.workload") == call.destination;
        client && ip(line.field("src.addr")) == ip(&call.local) && names_port(line, call.port)
    };
    let Some(inbound) = arriving.iter().rev().find(ours) else {
        return Err(format!("{told}: the destination's agent does not tell of it"));
    };
    if inbound.has_identities() {
        Ok(())
    } else {
        Err(format!("{told}: arrived without both identities:\n      {}", inbound.whole()))
    }
}

/// Whether the application's port is named: as tunnelled to, or as joined on the same node.
fn names_port(line: &Line, port: u16) -> bool {
    let tail = format!(":{port}");
    ["dst.hbone_addr", "dst.addr"].iter().any(|name| line.field(name).ends_with(&tail))
}

#[cfg(test)]
mod tests;
