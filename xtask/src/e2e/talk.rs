//! Calls from pods: what is asked of the test application, and what it answers.

use std::fmt;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use super::kubectl::{Kubectl, head};

/// One call, as the test application takes it.
#[derive(Clone, Debug, PartialEq)]
pub struct Call(Value);

impl Call {
    /// HTTP, on a connection of its own.
    pub fn http(to: impl fmt::Display) -> Self {
        Self(json!({ "kind": "http", "to": to.to_string() }))
    }

    /// This many bytes there and back.
    pub fn echo(to: impl fmt::Display, bytes: usize) -> Self {
        Self(json!({ "kind": "echo", "to": to.to_string(), "bytes": bytes }))
    }

    /// The server speaks first.
    pub fn banner(to: impl fmt::Display) -> Self {
        Self(json!({ "kind": "banner", "to": to.to_string() }))
    }

    /// The answer comes after the caller has ended its side.
    pub fn sum(to: impl fmt::Display, bytes: usize) -> Self {
        Self(json!({ "kind": "sum", "to": to.to_string(), "bytes": bytes }))
    }

    /// A line at a time.
    pub fn trickle(to: impl fmt::Display, lines: u32, pause_ms: u64) -> Self {
        Self(
            json!({ "kind": "trickle", "to": to.to_string(), "lines": lines, "pause_ms": pause_ms }),
        )
    }

    /// A datagram.
    pub fn udp(to: impl fmt::Display) -> Self {
        Self(json!({ "kind": "udp", "to": to.to_string() }))
    }

    /// The system's resolver; `to` is `name:port`.
    pub fn resolve(to: impl fmt::Display) -> Self {
        Self(json!({ "kind": "resolve", "to": to.to_string() }))
    }

    /// A DNS message to the pod's name server.
    pub fn dns(name: impl fmt::Display, record: &str) -> Self {
        Self(json!({ "kind": "dns", "to": name.to_string(), "record": record }))
    }

    /// The same with one more field.
    pub fn with(mut self, field: &str, value: impl Into<Value>) -> Self {
        self.0[field] = value.into();
        self
    }

    /// How it is told.
    pub fn told(&self) -> String {
        let text = |field: &str| self.0[field].as_str().unwrap_or_default();
        format!("{} {}", text("kind"), text("to"))
    }

    /// The call as JSON.
    pub fn plan(&self) -> &Value {
        &self.0
    }
}

/// What became of a call.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Outcome {
    pub ok: bool,
    /// One word: refused, reset, cut, timeout, name, wrong, other.
    pub kind: String,
    pub error: String,
    /// The caller's own end, as it sees it.
    pub local: String,
    pub remote: String,
    pub status: Option<u16>,
    pub answer: Value,
    pub took_ms: u64,
}

impl Outcome {
    /// Which pod answered.
    pub fn server(&self) -> &str {
        self.answer["pod"].as_str().unwrap_or_default()
    }

    /// The caller's address, as the server saw it, without the port.
    pub fn seen_ip(&self) -> &str {
        ip(self.answer["remote"].as_str().unwrap_or_default())
    }

    /// A header that the server got.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.answer["headers"][name].as_str()
    }

    /// Whether an HTTP proxy was in between: Envoy gives every request an id.
    pub fn by_waypoint(&self) -> bool {
        self.header("x-request-id").is_some()
    }

    /// Broken or refused, and not merely slow: so does a policy end a connection.
    pub fn is_refusal(&self) -> bool {
        !self.ok && ["refused", "reset", "cut"].contains(&self.kind.as_str())
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.ok {
            let by = if self.by_waypoint() { " through a waypoint" } else { "" };
            return write!(f, "answered by {:?}{by} in {} ms", self.server(), self.took_ms);
        }
        write!(f, "{} ({}) after {} ms", self.kind, self.error, self.took_ms)?;
        if !self.answer.is_null() {
            write!(f, ", answer {}", head(&self.answer.to_string(), 200))?;
        }
        Ok(())
    }
}

/// The address of `address:port`.
pub fn ip(with_port: &str) -> &str {
    let address = with_port.rsplit_once(':').map_or(with_port, |(address, _)| address);
    address.trim_start_matches('[').trim_end_matches(']')
}

/// `address:port`, with brackets where they are needed.
pub fn at(address: &str, port: u16) -> String {
    if address.contains(':') { format!("[{address}]:{port}") } else { format!("{address}:{port}") }
}

/// Makes all calls from one pod, and gives the outcomes in the same order.
pub fn calls(
    kubectl: &Kubectl,
    namespace: &str,
    pod: &str,
    calls: &[Call],
) -> Result<Vec<Outcome>> {
    if calls.is_empty() {
        return Ok(Vec::new());
    }
    let list = Value::from_iter(calls.iter().map(|call| call.0.clone())).to_string();
    let text = kubectl.exec(namespace, pod, &["culvert-app", "call", &list])?;
    let outcomes: Vec<Outcome> = serde_json::from_str(&text)
        .with_context(|| format!("reading the outcomes of calls from {namespace}/{pod}"))?;
    ensure!(outcomes.len() == calls.len(), "{} outcomes of {} calls", outcomes.len(), calls.len());
    Ok(outcomes)
}

/// Gives an order to the load of a pod, and its report.
pub fn load(kubectl: &Kubectl, namespace: &str, pod: &str, order: &Value) -> Result<Value> {
    let text = kubectl.exec(namespace, pod, &["culvert-app", "load", &order.to_string()])?;
    let report: Value = serde_json::from_str(&text).context("reading the report of a load")?;
    if report["calls"].is_null() {
        bail!("not a report: {text}");
    }
    Ok(report)
}

#[cfg(test)]
mod tests;
