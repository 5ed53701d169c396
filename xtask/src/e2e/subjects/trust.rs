//! Certificates that are renewed while connections live.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::control::{endure, none_lost};
use super::disturb::Loads;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::town::Town;

mod roots;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "trust/certificates",
        covers: "certificates of a minute's life are renewed under load, and nothing is lost",
        run: certificates,
    },
    Scenario {
        name: "trust/roots",
        covers: "the mesh moves to another root under load, and nothing is lost",
        run: roots::run,
    },
];

/// Gives all agents' certificates this life for the time of `work`.
pub fn with_life<T>(town: &Town, seconds: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let namespace = town.agents.namespace.clone();
    let mut sets: Vec<String> = Vec::new();
    for agent in town.agents.all()? {
        let set = format!("daemonset/{}", agent.set);
        if !sets.contains(&set) {
            sets.push(set);
        }
    }
    let roll = |setting: &str| -> Result<()> {
        for set in &sets {
            town.kubectl.run(&["set", "env", set, "-n", &namespace, setting])?;
        }
        for set in &sets {
            town.kubectl.run(&["rollout", "status", set, "-n", &namespace, "--timeout=300s"])?;
        }
        Ok(())
    };
    let steps: Vec<_> = sets
        .iter()
        .map(|set| town.undo.remember(&["set", "env", set, "-n", &namespace, "SECRET_TTL-"]))
        .collect();
    let done = roll(&format!("SECRET_TTL={seconds}s")).and_then(|()| work());
    for step in steps {
        town.undo.forget(step);
    }
    let undone = roll("SECRET_TTL-");
    let done = done?;
    undone?;
    Ok(done)
}

/// The serial numbers of the leaves that the agent of a node holds, by identity.
fn serials(town: &Town, node: usize) -> Result<BTreeMap<String, String>> {
    let dump = town.agents.dump(&town.agent(node)?)?;
    let certificates = dump["certificates"].as_array().into_iter().flatten();
    let of = certificates.filter_map(|certificate| {
        let serial = certificate["certChain"][0]["serialNumber"].as_str()?;
        Some((certificate["identity"].as_str()?.to_owned(), serial.to_owned()))
    });
    Ok(of.filter(|(identity, _)| identity.contains(&town.mesh())).collect())
}

fn certificates(town: &Town) -> Result<Verdict> {
    const LIFE: u64 = 60;
    with_life(town, LIFE, || {
        super::calm(town)?;
        let loads = Loads::start(town)?;
        let before = [serials(town, 0)?, serials(town, 1)?];
        endure(&loads, Duration::from_secs(LIFE + LIFE / 2))?;
        for (node, before) in before.iter().enumerate() {
            ensure!(!before.is_empty(), "node {node} holds no certificate of the test's pods");
            let now = serials(town, node)?;
            for (identity, serial) in before {
                ensure!(
                    now.get(identity) != Some(serial),
                    "{identity} on node {node} was not renewed"
                );
            }
        }
        none_lost(loads)
    })
    .map(Verdict::Passed)
}
