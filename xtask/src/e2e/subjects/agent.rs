//! The agent itself restarted, killed and upgraded under load.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::disturb::Loads;
use crate::e2e::agents::{Agent, Kind};
use crate::e2e::manifest::{self, peer_authentication};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::Call;
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{PATHS, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "agent/restarted",
        covers: "each node's agent ended and started again: paths that do not touch it or that the kernel carries lose nothing, the others recover, and nothing goes in clear",
        run: restarted,
    },
    Scenario { name: "agent/killed", covers: "the same, ended by SIGKILL", run: killed },
    Scenario {
        name: "agent/upgraded",
        covers: "every agent replaced by its DaemonSet's rolling update, and back",
        run: upgraded,
    },
];

/// How long a node's new connections may fail while its agent is replaced.
const GAP_MS: u64 = 10_000;

/// Disturbs the agents of these nodes under load, with STRICT all around, so that nothing that was
/// answered can have come in clear.
fn under_load(
    town: &Town,
    nodes: &[usize],
    disturb: impl FnOnce() -> Result<()>,
) -> Result<Vec<Loss>> {
    let strict = peer_authentication(&town.mesh(), "strict", Value::Null, "STRICT", json!({}));
    town.with(&[strict], || {
        let stranger = town.pod(&town.plain(), "client", 0);
        let refused = [0, 1].map(|server| {
            Case::new(&stranger, Call::http(town.server(server).at(8080)), Want::Refusal)
        });
        let answered = PATHS.map(|(client, server)| {
            let call = Call::http(town.server(server).at(8080));
            Case::new(&town.client(client), call, Want::Answer)
        });
        town.settle(&refused)?;
        // The first call of each path goes by an agent.
        town.settle(&answered)?;
        let carried = [carried_by_kernel(town, 0)?, carried_by_kernel(town, 1)?];
        let loads = Loads::start(town)?;
        disturb()?;
        town.settle(&answered)?;
        town.settle(&refused)?;
        loads.further(20)?;
        let mut told = Vec::new();
        for ((client, server), report) in loads.stop()? {
            let path = format!("{} to {}", town.client(client).name, town.server(server).name);
            let touched = [client, server].iter().any(|end| nodes.contains(end));
            ensure!(
                touched || report.lost() == 0,
                "{path}, far from it: {report}: {}",
                report.first_losses()
            );
            // The first stream to its port went by the agent.
            let unhurt = report.lost_calls() == 0 && report.lost_streams() <= 1;
            ensure!(
                client != server || !carried[client] || unhurt,
                "{path}, carried by the kernel: {report}: {}",
                report.first_losses()
            );
            let gap = report.calls.longest_gap_ms;
            ensure!(
                gap <= GAP_MS,
                "{path}: no call was answered for {gap} ms: {}",
                report.first_losses()
            );
            if report.lost() > 0 {
                told.push((touches(town, nodes, client, server)?, format!("{path}: {report}")));
            }
        }
        Ok(told)
    })
}

/// Whether the kernel carries connections within a node by itself: an agent that comes or goes must not
/// show in them. Calls within the node were answered before.
fn carried_by_kernel(town: &Town, node: usize) -> Result<bool> {
    let agent = town.agent(node)?;
    if agent.kind == Kind::Ztunnel {
        return Ok(false);
    }
    town.until("the kernel's verdicts", || {
        let metrics = town.agents.metrics(&agent)?;
        let name = "culvert_direct_verdicts ";
        match metrics.lines().find_map(|line| line.strip_prefix(name)) {
            // This agent carries all of them itself.
            None => Ok(false),
            Some(verdicts) => {
                ensure!(verdicts != "0", "{} gives the kernel none", agent.pod);
                Ok(true)
            }
        }
    })
}

/// Whether an agent of ztunnel's was disturbed on a path, and what the path lost.
type Loss = (bool, String);

fn touches(town: &Town, nodes: &[usize], client: usize, server: usize) -> Result<bool> {
    for node in nodes.iter().filter(|node| [client, server].contains(node)) {
        if town.kind(*node)? == Kind::Ztunnel {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Losses are told; where a ztunnel was disturbed they are known of it.
fn verdict(told: Vec<Loss>) -> Result<Verdict> {
    if told.is_empty() {
        return Verdict::passed("nothing lost");
    }
    let peer = told.iter().any(|(peer, _)| *peer);
    let told = told
        .into_iter()
        .map(|(peer, loss)| format!("{}{loss}", if peer { "" } else { "by Culvert's node: " }));
    let told = told.collect::<Vec<_>>().join("; ");
    Ok(if peer { Verdict::Known(told) } else { Verdict::Passed(told) })
}

/// Both nodes' indexes, or the only one.
fn nodes(town: &Town) -> Vec<usize> {
    if town.nodes[0] == town.nodes[1] { vec![0] } else { vec![0, 1] }
}

fn each(town: &Town, disturb: impl Fn(usize, &Agent) -> Result<()>) -> Result<Verdict> {
    let mut told = Vec::new();
    for index in nodes(town) {
        let before = town.agent(index)?;
        let touched = if town.nodes[0] == town.nodes[1] { vec![0, 1] } else { vec![index] };
        told.extend(under_load(town, &touched, || {
            disturb(index, &before)?;
            let now = town.until("a new agent that is ready", || {
                let now = town.agent(index)?;
                let new = now.pod != before.pod || now.restarts > before.restarts;
                ensure!(
                    new && now.ready,
                    "{} is {}",
                    now.pod,
                    if now.ready { "the old one" } else { "not ready" }
                );
                Ok(now)
            })?;
            gone(town, &before, &now)
        })?);
    }
    verdict(told)
}

/// Waits until the agent before has ended: until then what it carried goes on.
fn gone(town: &Town, before: &Agent, now: &Agent) -> Result<()> {
    if before.pod == now.pod {
        return Ok(());
    }
    let (pod, namespace) = (format!("pod/{}", before.pod), town.agents.namespace.as_str());
    town.kubectl.run(&["wait", "--for=delete", &pod, "-n", namespace, "--timeout=180s"]).map(drop)
}

fn restarted(town: &Town) -> Result<Verdict> {
    each(town, |_, agent| {
        town.kubectl
            .run(&["delete", "pod", &agent.pod, "-n", &town.agents.namespace, "--wait=false"])
            .map(drop)
    })
}

fn killed(town: &Town) -> Result<Verdict> {
    let plain = town.plain();
    let killers: Vec<String> = nodes(town).iter().map(|_| town.unique("killer")).collect();
    let mut objects = Vec::new();
    for (index, name) in killers.iter().enumerate() {
        let mut pod = manifest::pod(&town.spec(&plain, name, index, json!({})));
        pod["spec"]["hostPID"] = true.into();
        pod["spec"]["containers"][0]["securityContext"] =
            json!({ "privileged": true, "runAsUser": 0 });
        objects.extend([manifest::account(&plain, name), pod]);
    }
    let mut verdict = Verdict::passed("");
    town.with(&objects, || {
        town.wait_ready(&plain)?;
        verdict = each(town, |index, agent| {
            let killer = killers.get(index).context("no pod to kill from")?;
            let name = match agent.kind {
                Kind::Culvert => "culvert",
                Kind::Ztunnel => "ztunnel",
            };
            town.kubectl.exec(&plain, killer, &["culvert-app", "kill", name, "9"]).map(drop)
        });
        Ok(())
    })?;
    verdict
}

fn upgraded(town: &Town) -> Result<Verdict> {
    let namespace = town.agents.namespace.clone();
    let mut sets: Vec<(String, String, Kind)> = Vec::new();
    for agent in town.agents.all()? {
        let set = (format!("daemonset/{}", agent.set), agent.container, agent.kind);
        if !sets.contains(&set) {
            sets.push(set);
        }
    }
    let told = under_load(town, &[0, 1], || {
        for (set, container, kind) in &sets {
            let now = town.kubectl.json(&["get", set, "-n", &namespace])?;
            let containers =
                now["spec"]["template"]["spec"]["containers"].as_array().into_iter().flatten();
            let mut images = containers.filter(|other| other["name"] == container.as_str());
            let image =
                images.next().and_then(|found| found["image"].as_str()).context("no image")?;
            let roll = |image: &str| -> Result<()> {
                let image = format!("{container}={image}");
                town.kubectl.run(&["set", "image", set, "-n", &namespace, &image])?;
                town.kubectl
                    .run(&["rollout", "status", set, "-n", &namespace, "--timeout=300s"])
                    .map(drop)
            };
            let same = |_: &str| -> Result<()> {
                town.kubectl.run(&["rollout", "restart", set, "-n", &namespace])?;
                town.kubectl
                    .run(&["rollout", "status", set, "-n", &namespace, "--timeout=300s"])
                    .map(drop)
            };
            match &town.options.upgrade {
                // The image is one of Culvert.
                Some(new) if *kind == Kind::Culvert => {
                    let back = format!("{container}={image}");
                    let step = town.undo.remember(&["set", "image", set, "-n", &namespace, &back]);
                    let done = roll(new);
                    town.undo.forget(step);
                    let back = roll(image);
                    done.and(back)?;
                }
                Some(_) | None => same(image)?,
            }
        }
        Ok(())
    })?;
    verdict(told)
}
