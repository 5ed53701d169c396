//! What is kept of a scenario that failed.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::carried;
use super::kubectl::head;
use super::town::Town;
use crate::shell;

/// Access-log lines of each agent that are shown at once.
const SHOWN: usize = 6;

/// Shows the last of both agents' access logs, and writes everything else into a folder.
pub fn tell(town: &Town, scenario: &str) {
    match gather(town, scenario) {
        Ok(folder) => println!("    more in {}", folder.display()),
        Err(error) => println!("    no evidence: {error:#}"),
    }
}

fn gather(town: &Town, scenario: &str) -> Result<PathBuf> {
    let folder = shell::target().join("e2e").join(&town.run).join(scenario.replace('/', "-"));
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let write = |name: &str, text: &str| {
        fs::write(folder.join(name), text).with_context(|| format!("writing {name}"))
    };
    for agent in town.agents.all()?.iter().filter(|agent| town.nodes.contains(&agent.node)) {
        let log =
            town.agents.log(agent, town.window()).unwrap_or_else(|error| format!("{error:#}"));
        write(&format!("{}-{}.log", agent.node, agent.kind), &log)?;
        let lines = carried::lines(&log);
        let ours = lines.iter().filter(|line| line.whole().contains(&town.run));
        let ours: Vec<_> = ours.collect();
        println!("    the last of {} on {}:", agent.kind, agent.node);
        for line in ours.iter().skip(ours.len().saturating_sub(SHOWN)) {
            println!("      {}", head(&line.short(), 500));
        }
    }
    let (mesh, istio) = (town.mesh(), town.agents.namespace.clone());
    let asked: [(&str, &[&str]); 5] = [
        ("pods.txt", &["get", "pods", "-A", "-o", "wide"]),
        ("events.txt", &["get", "events", "-A", "--sort-by=.lastTimestamp"]),
        ("town.txt", &["describe", "pods", "-n", &mesh]),
        ("agents.txt", &["describe", "pods", "-n", &istio]),
        ("istiod.log", &["logs", "-n", &istio, "-l", "app=istiod", "--tail=400"]),
    ];
    for (name, arguments) in asked {
        let said = town.kubectl.run(arguments).unwrap_or_else(|error| format!("{error:#}"));
        write(name, &said)?;
    }
    Ok(folder)
}
