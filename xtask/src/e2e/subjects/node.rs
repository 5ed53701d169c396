//! A node that loses power.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::disturb::Loads;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::town::Town;
use crate::shell;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "node/rebooted",
    covers: "a node reboots: the others lose nothing, and its pods are back in the mesh",
    run: rebooted,
}];

fn rebooted(town: &Town) -> Result<Verdict> {
    let Some(command) = &town.options.reboot else {
        return Verdict::skipped("tell with --reboot-cmd how to reboot a node");
    };
    if town.nodes[0] == town.nodes[1] {
        return Verdict::skipped("there is only one node");
    }
    let node = &town.nodes[1];
    let before = restarts(town)?;
    let loads = Loads::start(town)?;
    shell::quietly(Command::new("sh").args(["-c", &command.replace("{}", node)]))?;
    let far = loads.on((0, 0))?;
    town.until("the node's pods to have started again", || {
        let now = restarts(town)?;
        ensure!(now > before, "{now} restarts, {before} before");
        Ok(())
    })?;
    town.kubectl.run(&[
        "wait",
        "--for=condition=Ready",
        &format!("node/{node}"),
        "--timeout=180s",
    ])?;
    for namespace in [town.mesh(), town.plain(), town.other()] {
        town.wait_ready(&namespace)?;
    }
    town.until("the agent to be ready", || {
        let agent = town.agents.on(node)?;
        ensure!(agent.ready, "{} is not", agent.pod);
        Ok(())
    })?;
    let after = loads.on((0, 0))?;
    ensure!(after.lost() == 0, "on the other node: {after}: {}", after.first_losses());
    ensure!(after.calls.made > far.calls.made, "the load on the other node stood still");
    town.renew()?;
    super::calm(town).context("after the reboot")?;
    Verdict::passed(format!("on the other node {after}"))
}

/// How often the containers of the second node's server have started again.
fn restarts(town: &Town) -> Result<u64> {
    let server = town.server(1);
    let pod = town.kubectl.json(&["get", "pod", &server.name, "-n", &server.namespace])?;
    Ok(pod["status"]["containerStatuses"][0]["restartCount"].as_u64().unwrap_or(0))
}
