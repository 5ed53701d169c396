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

fn counters(town: &Town) -> Result<Verdict> {
    const CALLS: usize = 5;
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let ends = [("source", &from), ("destination", &to)];
        let read = |name: &str| -> Result<Vec<f64>> {
            let of = |(reporter, at): (&str, &Pod)| {
                let metrics = town.agents.metrics(&town.agents.on(&at.node)?)?;
                Ok(sum(&metrics, name, &labels(reporter, &from, &to)))
            };
            ends.into_iter().map(of).collect()
        };
        let opened = read("istio_tcp_connections_opened_total")?;
        let (got, sent) =
            (read("istio_tcp_received_bytes_total")?, read("istio_tcp_sent_bytes_total")?);
        town.call_all(&from, &vec![Call::echo(to.at(9000), 1000); CALLS])?;
        town.until("both agents to have counted", || {
            let more = |before: &[f64], now: Vec<f64>| -> Vec<f64> {
                now.iter().zip(before).map(|(now, before)| now - before).collect()
            };
            let opened = more(&opened, read("istio_tcp_connections_opened_total")?);
            ensure!(opened == [5.0, 5.0], "opened at source and destination: {opened:?}");
            for (what, before) in
                [("istio_tcp_received_bytes_total", &got), ("istio_tcp_sent_bytes_total", &sent)]
            {
                let bytes = more(before, read(what)?);
                ensure!(bytes == [5000.0, 5000.0], "{what} at source and destination: {bytes:?}");
            }
            Ok(())
        })?;
    }
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
