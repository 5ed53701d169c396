//! The measured nodes once more, with the peer's agents. A program of `tests` keeps them, because
//! what such agents need to be told of their mesh is there.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use culvert_lab::netns::Netns;
use culvert_lab::place::Place;
use serde::Deserialize;

use super::field::Held;
use super::measure::resident;
use crate::binary;
use crate::shell::{self, Steps};

/// The nodes with their pods; the client is on the first.
const NODES: [&str; 2] = ["a=client,near,other,other-near", "b=far,other-far"];

/// The peer's, and ours that keeps its nodes.
pub struct Programs {
    peer: PathBuf,
    keeper: PathBuf,
}

impl Programs {
    /// None where no peer is named.
    pub fn of(steps: &Steps) -> Result<Option<Self>> {
        let Some(peer) = binary::peer()? else { return Ok(None) };
        steps.heading("Building what keeps ztunnel's nodes");
        let build = ["build", "--package", "culvert-tests", "--bin", "peer-mesh"];
        shell::run(shell::cargo().args(build))?;
        Ok(Some(Self { peer, keeper: shell::target().join("debug/peer-mesh") }))
    }
}

/// Two nodes with the peer's agents.
pub struct Peer {
    _kept: Held,
    agents: Vec<Agent>,
    pods: BTreeMap<String, (Place, Ipv4Addr)>,
    /// What the agents hold when nobody has connected yet, in megabytes.
    pub fresh: Vec<f64>,
}

/// What the keeper prints once all agents are ready.
#[derive(Deserialize)]
struct Told {
    /// In the order of the nodes.
    agents: Vec<Agent>,
    pods: BTreeMap<String, Pod>,
}

#[derive(Deserialize)]
struct Agent {
    pid: u32,
    log: PathBuf,
}

#[derive(Deserialize)]
struct Pod {
    netns: String,
    cgroup: PathBuf,
    address: Ipv4Addr,
}

impl Peer {
    /// Starts them; what runs in their pods leaves its output in `logs`.
    pub fn start(programs: &Programs, logs: &Path) -> Result<Self> {
        let mut command = Command::new(&programs.keeper);
        command.arg(&programs.peer).args(NODES);
        let (kept, line) = Held::start(&mut command).context("starting what keeps the nodes")?;
        let told: Told = serde_json::from_str(&line).context("the peer's nodes have ended")?;
        let mut pods = BTreeMap::new();
        for (name, pod) in told.pods {
            let place = Place::new(Netns::open(&pod.netns)?, pod.cgroup, logs.to_owned())?;
            pods.insert(name, (place, pod.address));
        }
        let fresh =
            told.agents.iter().map(|agent| resident(&[agent.pid])).collect::<Result<_>>()?;
        Ok(Self { _kept: kept, agents: told.agents, pods, fresh })
    }

    /// The agents' process ids, in the order of the nodes.
    pub fn pids(&self) -> Vec<u32> {
        self.agents.iter().map(|agent| agent.pid).collect()
    }

    /// Where a pod is, and its address.
    pub fn pod(&self, name: &str) -> Result<(&Place, Ipv4Addr)> {
        let found = self.pods.get(name).map(|(place, address)| (place, *address));
        found.with_context(|| format!("the peer's nodes have no pod {name}"))
    }

    /// The agents' logs.
    pub fn logs(&self) -> Vec<String> {
        let log = |agent: &Agent| std::fs::read(&agent.log).unwrap_or_default();
        let text = |log: Vec<u8>| String::from_utf8_lossy(&log).into_owned();
        self.agents.iter().map(log).map(text).collect()
    }
}
