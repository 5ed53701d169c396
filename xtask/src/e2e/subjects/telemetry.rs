//! What the agents count.

use anyhow::{Context, Result, ensure};

use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, at};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{PATHS, Pod, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "telemetry/counters",
        covers: "connections and bytes are counted at both ends, by workload, identity and security",
        run: counters,
    },
    Scenario {
        name: "telemetry/scrape",
        covers: "the metrics of every agent can be read from pods in the mesh and outside",
        run: scrape,
    },
];

/// The sum of a counter's samples that carry all these labels.
fn sum(metrics: &str, name: &str, labels: &[String]) -> f64 {
    let samples = metrics.lines().filter(|line| {
        line.starts_with(name) && labels.iter().all(|label| line.contains(label.as_str()))
    });
    samples.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
}

fn labels(reporter: &str, from: &Pod, to: &Pod) -> Vec<String> {
    let label = |name: &str, value: &str| format!("{name}=\"{value}\"");
    vec![
        label("reporter", reporter),
        label("source_workload", &from.name),
        label("source_workload_namespace", &from.namespace),
        label("destination_workload", &to.name),
        label("connection_security_policy", "mutual_tls"),
        format!("source_principal=\"spiffe://{}", "").trim_end_matches('"').to_owned(),
    ]
}

/// What is counted of a path at its two ends, the source first.
const COUNTERS: [(&str, f64); 3] = [
    ("istio_tcp_connections_opened_total", CALLS as f64),
    ("istio_tcp_received_bytes_total", (CALLS * BYTES) as f64),
    ("istio_tcp_sent_bytes_total", (CALLS * BYTES) as f64),
];
const CALLS: usize = 5;
const BYTES: usize = 1000;

/// The counters of all paths as they stand: by path, counter and end.
fn read(town: &Town) -> Result<Vec<f64>> {
    let metrics = [0, 1].map(|node| town.agents.metrics(&town.agent(node)?));
    let [first, second] = metrics;
    let metrics = [first?, second?];
    let mut found = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        for (name, _) in COUNTERS {
            for (reporter, node) in [("source", client), ("destination", server)] {
                let text = metrics.get(node).map(String::as_str).unwrap_or_default();
                found.push(sum(text, name, &labels(reporter, &from, &to)));
            }
        }
    }
    Ok(found)
}

fn counters(town: &Town) -> Result<Verdict> {
    let before = read(town)?;
    for (client, server) in PATHS {
        let call = Call::echo(town.server(server).at(9000), BYTES);
        town.call_all(&town.client(client), &vec![call; CALLS])?;
    }
    let wanted: Vec<f64> = PATHS
        .iter()
        .flat_map(|_| COUNTERS.iter().flat_map(|(_, count)| [*count, *count]))
        .collect();
    town.until("both agents to have counted", || {
        let more: Vec<f64> =
            read(town)?.iter().zip(&before).map(|(now, before)| now - before).collect();
        ensure!(more == wanted, "by path, counter and end: {more:?}, not {wanted:?}");
        Ok(())
    })?;
    Verdict::passed(format!("{CALLS} calls on each of 4 paths, exactly"))
}

fn scrape(town: &Town) -> Result<Verdict> {
    for node in [0, 1] {
        let agent = town.agent(node)?;
        ensure!(!agent.ip.is_empty(), "{} has no address", agent.pod);
        let call = Call::http(at(&agent.ip, 15020)).with("path", "/metrics");
        let callers = [
            town.client(0),
            town.client(1),
            town.pod(&town.plain(), "client", 0),
            town.pod(&town.plain(), "client", 1),
        ];
        let cases = callers.map(|from| Case::new(&from, call.clone(), Want::Status(200)));
        for outcome in town.expect(&cases)? {
            let text = outcome.answer.as_str().context("no text")?;
            ensure!(text.contains("istio_build"), "not metrics: {text:.200}");
        }
    }
    Verdict::passed("")
}
