//! What istioctl reads from the agents.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::e2e::load::{Load, Plan};
use crate::e2e::manifest::policy;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::town::Town;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "istioctl/ztunnel-config",
    covers: "all, workload, service, policy, certificate, connections and log, of each node's agent",
    run: config,
}];

fn config(town: &Town) -> Result<Verdict> {
    let Some(program) = &town.options.istioctl else {
        return Verdict::skipped("name an istioctl with --istioctl");
    };
    let ask = |words: &[&str]| -> Result<String> {
        let mut command = Command::new(program);
        if let Some(config) = town.kubectl.config() {
            command.arg("--kubeconfig").arg(config);
        }
        command
            .args(["-i", &town.agents.namespace, "ztunnel-config"])
            .args(words)
            .stdin(Stdio::null());
        let output = command.output().with_context(|| format!("starting {}", program.display()))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if !output.status.success() {
            bail!("istioctl ztunnel-config {}: {}", words.join(" "), text(&output.stderr).trim());
        }
        Ok(text(&output.stdout))
    };
    let shown = policy(
        &town.mesh(),
        "shown",
        json!({ "action": "DENY", "rules": [{ "to": [{ "operation": { "ports": ["7"] } }] }] }),
    );
    town.with(&[shown], || town.until("the agents to know all", || tables(town, &ask)))?;
    Verdict::passed("")
}

/// What every table and every dump must show.
fn tables(town: &Town, ask: &impl Fn(&[&str]) -> Result<String>) -> Result<()> {
    let streams = Some((town.server(1).at(9001), 1));
    let load = Load::start(town, &town.client(0), &Plan { calls: None, streams })?;
    for index in [0, 1] {
        let node = town.nodes.get(index).map(String::as_str).unwrap_or_default();
        let (client, mesh) = (town.client(index), town.mesh());
        let identity = format!("spiffe://{}", client.identity().trim_start_matches('/'));
        let tail = identity.rsplit("//").next().unwrap_or_default().to_owned();
        let wanted: [(&str, Vec<String>); 5] = [
            ("workload", vec![mesh.clone(), "server-a".to_owned(), "HBONE".to_owned()]),
            (
                "service",
                vec![
                    mesh.clone(),
                    "headless".to_owned(),
                    town.vips(&mesh, "server")?.swap_remove(0),
                ],
            ),
            ("policy", vec!["shown".to_owned()]),
            ("certificate", vec![tail, "Available".to_owned()]),
            ("connections", vec![if index == 0 { "client-a" } else { "server-b" }.to_owned()]),
        ];
        for (what, texts) in wanted {
            let table = ask(&[what, "--node", node])?;
            for text in texts {
                ensure!(
                    table.contains(&text),
                    "istioctl ztunnel-config {what} --node {node} does not show {text:?}:\n{table}"
                );
            }
            let list: Value = serde_json::from_str(&ask(&[what, "--node", node, "-o", "json"])?)
                .with_context(|| format!("reading the JSON of {what}"))?;
            ensure!(
                list.as_array().is_some_and(|list| !list.is_empty()) || list.is_object(),
                "{what}: {list}"
            );
        }
        ensure!(
            ask(&["all", "--node", node])?.contains("CERTIFICATE"),
            "`all` shows no certificates"
        );
        let dump: Value = serde_json::from_str(&ask(&["all", "--node", node, "-o", "json"])?)
            .context("reading a dump")?;
        ensure!(
            dump["workloads"].is_array() || dump["workloads"].is_object(),
            "no workloads in the dump"
        );
        let agent = town.agent(index)?;
        let levels = ask(&["log", &format!("{}.{}", agent.pod, town.agents.namespace)])?;
        ensure!(levels.contains("current log level"), "log: {levels}");
    }
    load.stop().map(drop)
}
