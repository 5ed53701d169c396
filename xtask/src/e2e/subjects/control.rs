//! The control plane away, and istio-cni restarted, while the mesh goes on.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disturb::{self, Loads};
use crate::e2e::manifest::{self, peer_authentication};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::Call;
use crate::e2e::town::Town;
use crate::e2e::town::cases::{Case, Want};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "control/istiod-away",
        covers: "istiod is away: old and new connections go on, and news arrives when it is back",
        run: istiod_away,
    },
    Scenario {
        name: "control/cni-restarted",
        covers: "istio-cni restarts under load: nothing is lost, and new pods are enrolled",
        run: cni_restarted,
    },
];

/// Ends all loads, of which none may have lost anything.
pub fn none_lost(loads: Loads<'_>) -> Result<String> {
    let (mut calls, mut streams) = (0, 0);
    for ((client, server), report) in loads.stop()? {
        ensure!(
            report.lost() == 0,
            "from node {client} to node {server}: {report}: {}",
            report.first_losses()
        );
        calls += report.calls.made;
        streams += report.streams.opened;
    }
    Ok(format!("{calls} calls and {streams} streams, none lost"))
}

/// Waits until `time` has gone by while the loads go on.
pub fn endure(loads: &Loads<'_>, time: std::time::Duration) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < time {
        loads.further(10)?;
    }
    Ok(())
}

fn istiod_away(town: &Town) -> Result<Verdict> {
    let namespace = town.agents.namespace.clone();
    let set = town.kubectl.items(&["get", "deployments", "-n", &namespace, "-l", "app=istiod"])?;
    let set = set.first().context("istiod has no Deployment here")?;
    let name = format!("deployment/{}", set["metadata"]["name"].as_str().unwrap_or_default());
    let count = set["spec"]["replicas"].as_u64().unwrap_or(1).max(1);
    let back = format!("--replicas={count}");
    let loads = Loads::start(town)?;
    let step = town.undo.remember(&["scale", &name, "-n", &namespace, &back]);
    town.kubectl.run(&["scale", &name, "-n", &namespace, "--replicas=0"])?;
    town.kubectl.run(&[
        "wait",
        "--for=delete",
        "pod",
        "-l",
        "app=istiod",
        "-n",
        &namespace,
        "--timeout=90s",
    ])?;
    endure(&loads, town.options.istiod_away)?;
    let ready = town.agents.all()?.into_iter().all(|agent| agent.ready);
    town.undo.now(step)?;
    town.kubectl.run(&["rollout", "status", &name, "-n", &namespace, "--timeout=120s"])?;
    ensure!(ready, "an agent was not ready while istiod was away");
    let strict = peer_authentication(&town.mesh(), "strict", Value::Null, "STRICT", json!({}));
    town.with(&[strict], || {
        let stranger = town.pod(&town.plain(), "client", 0);
        town.settle(&[0, 1].map(|server| {
            Case::new(&stranger, Call::http(town.server(server).at(8080)), Want::Refusal)
        }))
    })?;
    let note = none_lost(loads)?;
    Verdict::passed(format!(
        "{:.0} s without istiod, {note}",
        town.options.istiod_away.as_secs_f64()
    ))
}

fn cni_restarted(town: &Town) -> Result<Verdict> {
    let namespace = town.agents.namespace.clone();
    let sets = town.kubectl.items(&[
        "get",
        "daemonsets",
        "-n",
        &namespace,
        "-l",
        "k8s-app=istio-cni-node",
    ])?;
    let name = sets
        .first()
        .and_then(|set| set["metadata"]["name"].as_str())
        .context("no istio-cni DaemonSet")?;
    let name = format!("daemonset/{name}");
    let loads = Loads::start(town)?;
    town.kubectl.run(&["rollout", "restart", &name, "-n", &namespace])?;
    town.kubectl.run(&["rollout", "status", &name, "-n", &namespace, "--timeout=180s"])?;
    loads.further(30)?;
    let mesh = town.mesh();
    for index in [0, 1] {
        let pod = town.unique("after-cni");
        let objects = [
            manifest::account(&mesh, &pod),
            manifest::pod(&town.spec(&mesh, &pod, index, json!({}))),
        ];
        town.with(&objects, || {
            town.wait_ready(&mesh)?;
            let new = town
                .pods_of(&mesh)?
                .into_iter()
                .find(|other| other.name == pod)
                .context("the new pod is gone")?;
            disturb::pod_enrolled(town, &new, true)?;
            town.settle(&[Case::new(
                &new,
                Call::http(town.server(1 - index).at(8080)),
                Want::Answer,
            )])
        })?;
    }
    Verdict::passed(none_lost(loads)?)
}
