//! How fast it is, beside the same paths without Culvert.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde_json::Value;

use super::town::{IPERF, PING, Town};
use crate::bench::load::Outcome;
use crate::shell::{self, Steps};

/// Throughput by iperf3 and latency of small requests, plain and through Culvert.
pub fn compare(steps: &Steps, town: &Town) -> Result<()> {
    steps.heading("Beside the same paths without Culvert");
    for (path, pod) in [("same node", "near"), ("across nodes", "server")] {
        steps.step(&format!("throughput, {path} (iperf3)"), || {
            let plain = throughput(town, "plain-client", &format!("plain-{pod}"))?;
            let culvert = throughput(town, "client", pod)?;
            let ratio = culvert / plain;
            Ok(format!("plain {plain:.1}, Culvert {culvert:.1} Gbit/s, ratio {ratio:.2}"))
        })?;
        steps.step(&format!("request on a kept connection, {path}"), || {
            let plain = latency(town, "plain-client", &format!("plain-{pod}"))?;
            let culvert = latency(town, "client", pod)?;
            let ratio = culvert / plain;
            Ok(format!("median plain {plain:.0}, Culvert {culvert:.0} µs, ratio {ratio:.1}"))
        })?;
    }
    Ok(())
}

/// In Gbit/s, as the receiver counted it.
fn throughput(town: &Town, from: &str, to: &str) -> Result<f64> {
    let iperf = shell::find("iperf3").context("iperf3 is not installed")?;
    let iperf = iperf.to_str().context("iperf3's path is not text")?;
    let server = town.mesh.pod(to).v4().to_string();
    let port = IPERF.to_string();
    let arguments = ["-c", &server, "-p", &port, "-t", "2", "-O", "1", "-J"];
    let printed = town.mesh.pod(from).place().output(iperf, &arguments)?;
    let report: Value = serde_json::from_str(&printed).context("reading iperf3's report")?;
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64);
    Ok(rate.with_context(|| format!("iperf3 measured nothing: {printed}"))? / 1e9)
}

/// The median, in microseconds.
fn latency(town: &Town, from: &str, to: &str) -> Result<f64> {
    let own = std::env::current_exe().context("finding this program")?;
    let server = SocketAddr::new(town.mesh.pod(to).v4().into(), PING).to_string();
    let arguments = ["bench-load", "--to", &server, "--kind", "requests", "--seconds", "1"];
    let printed = town.mesh.pod(from).place().output(own, &arguments)?;
    let outcome: Outcome = serde_json::from_str(&printed).context("reading the load's report")?;
    Ok(outcome.p50 * 1e6)
}
