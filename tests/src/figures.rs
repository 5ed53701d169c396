//! What an agent holds: descriptors, memory, connections and entries of kernel maps.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use culvert_lab::agent::Agent;
use culvert_lab::wait;

/// Maps whose entries are those of pods and connections.
const MAPS: [&str; 7] = [
    "cv_pods",
    "cv_addresses",
    "cv_excl_ports",
    "cv_excl_nets",
    "cv_pod_flows",
    "cv_probes",
    "cv_listeners",
];

/// What must be back at its start figure when all is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Figures {
    /// Open descriptors of the process.
    pub descriptors: usize,
    /// Connections that it carries: inbound and outbound.
    pub connections: [u64; 2],
    /// Entries of its kernel maps, by their names.
    pub entries: BTreeMap<String, usize>,
}

impl Figures {
    /// The figures of now.
    pub fn of(agent: &Agent) -> Result<Self> {
        let descriptors = descriptors(agent)?;
        let mut entries = BTreeMap::new();
        // Where packet rules lead connections to the agent, it has no maps.
        for map in MAPS.into_iter().filter(|_| agent.pin_path().exists()) {
            let path = agent.pin_path().join("maps").join(map);
            entries.insert(map.to_owned(), map_entries(&path)?);
        }
        let status = status(agent)?;
        let number = |path: &str| status.pointer(path).and_then(serde_json::Value::as_u64);
        let flows = number("/kernel/flowEntries").context("no flow entries in the status")?;
        entries.insert("flows".to_owned(), usize::try_from(flows)?);
        let connections = ["/connections/inbound", "/connections/outbound"].map(number);
        let [Some(inbound), Some(outbound)] = connections else {
            anyhow::bail!("no connections in the status {status}");
        };
        Ok(Self { descriptors, connections: [inbound, outbound], entries })
    }

    /// Waits until `agent` holds no more than these.
    pub fn wait_back(&self, agent: &Agent) -> Result<()> {
        wait::until_some("the start figures", wait::SOON * 2, || {
            let now = Figures::of(agent)?;
            let back = now.descriptors <= self.descriptors
                && now.connections == self.connections
                && now.entries == self.entries;
            if back { Ok(()) } else { Err(anyhow::anyhow!("{now:?} instead of {self:?}")) }
        })
    }
}

/// The status that the agent tells of itself.
pub fn status(agent: &Agent) -> Result<serde_json::Value> {
    let answer = agent.admin("/culvert/status")?;
    serde_json::from_str(&answer.body).context("reading the status")
}

/// The uids of the pods that the agent says are enrolled.
pub fn enrolled(agent: &Agent) -> Result<Vec<String>> {
    let answer = agent.admin("/culvert/pods")?;
    let pods: Vec<serde_json::Value> = serde_json::from_str(&answer.body)?;
    let field = |pod: &serde_json::Value, name: &str| {
        pod.get(name).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
    };
    let enrolled = pods.iter().filter(|pod| field(pod, "state").eq_ignore_ascii_case("enrolled"));
    Ok(enrolled.map(|pod| field(pod, "workload")).collect())
}

/// The serial number of the leaf that the agent holds for an identity; `None` while it has none.
pub fn serial(agent: &Agent, identity: &str) -> Result<Option<String>> {
    let answer = agent.admin("/config_dump")?;
    let dump: serde_json::Value = serde_json::from_str(&answer.body)?;
    let certificates = dump.get("certificates").and_then(serde_json::Value::as_array);
    let mine = certificates.into_iter().flatten().find(|certificate| {
        certificate.get("identity").and_then(serde_json::Value::as_str) == Some(identity)
    });
    let serial = mine.and_then(|mine| mine.pointer("/certChain/0/serialNumber"));
    Ok(serial.and_then(serde_json::Value::as_str).map(ToOwned::to_owned))
}

/// Open descriptors of the agent's process.
pub fn descriptors(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent.pid()))?.count())
}

/// Bytes of memory that the agent's process has resident.
pub fn resident(agent: &Agent) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid()))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kilobytes.context("no VmRSS in the process's status")? << 10)
}

/// How many entries the pinned map has, as `bpftool` counts them.
fn map_entries(path: &Path) -> Result<usize> {
    let dump = bpftool(&["map", "dump", "pinned", &path.to_string_lossy()])?;
    Ok(dump.as_array().map_or(0, Vec::len))
}

/// What `bpftool` answers, as JSON.
pub fn bpftool(arguments: &[&str]) -> Result<serde_json::Value> {
    let output = Command::new("bpftool").arg("-j").args(arguments).output();
    let output = output.context("starting bpftool")?;
    let printed = String::from_utf8_lossy(&output.stdout);
    let answer: serde_json::Value = serde_json::from_str(printed.trim())
        .with_context(|| format!("bpftool {}: {printed}", arguments.join(" ")))?;
    if let Some(error) = answer.get("error") {
        anyhow::bail!("bpftool {}: {error}", arguments.join(" "));
    }
    Ok(answer)
}
