//! The nodes of the cluster, and the agent that carries the mesh on each.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use culvert_lab::http;
use serde_json::Value;

use super::kubectl::Kubectl;

/// Which program carries the mesh on a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Culvert,
    Ztunnel,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Culvert => "Culvert",
            Self::Ztunnel => "ztunnel",
        })
    }
}

/// One node's agent.
#[derive(Clone, Debug)]
pub struct Agent {
    pub node: String,
    pub kind: Kind,
    pub pod: String,
    /// The DaemonSet that runs it.
    pub set: String,
    pub container: String,
    pub ip: String,
    pub restarts: u64,
    pub ready: bool,
}

/// How agents are found.
#[derive(Clone, Debug)]
pub struct Agents {
    kubectl: Kubectl,
    /// Istio's namespace.
    pub namespace: String,
    /// Nodes said to run Culvert; empty: told by the image.
    pub culvert: Vec<String>,
}

impl Agents {
    pub fn new(kubectl: Kubectl, namespace: String, culvert: Vec<String>) -> Self {
        Self { kubectl, namespace, culvert }
    }

    /// The nodes that take pods, by name.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let nodes = self.kubectl.items(&["get", "nodes"])?;
        let takes_pods = |node: &&Value| {
            let taints = node["spec"]["taints"].as_array();
            let cordoned = node["spec"]["unschedulable"].as_bool() == Some(true);
            !cordoned && !taints.into_iter().flatten().any(|taint| taint["effect"] == "NoSchedule")
        };
        let names =
            nodes.iter().filter(takes_pods).filter_map(|node| node["metadata"]["name"].as_str());
        let mut names: Vec<String> = names.map(ToOwned::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// The agent on `node`, as it is now.
    pub fn on(&self, node: &str) -> Result<Agent> {
        let all = self.all()?;
        let mut here: Vec<Agent> = all.into_iter().filter(|agent| agent.node == node).collect();
        // While one replaces another, the one that is ready counts.
        here.sort_by_key(|agent| agent.ready);
        here.pop().with_context(|| format!("no agent runs on {node}"))
    }

    /// All agents that have not been told to end.
    pub fn all(&self) -> Result<Vec<Agent>> {
        let pods = self.kubectl.items(&["get", "pods", "-n", &self.namespace])?;
        let live = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        Ok(live.filter_map(|pod| self.agent(pod)).collect())
    }

    fn agent(&self, pod: &Value) -> Option<Agent> {
        let (meta, spec) = (&pod["metadata"], &pod["spec"]);
        let name = meta["name"].as_str()?;
        let label = |key: &str| meta["labels"][key].as_str().unwrap_or_default();
        let ours = ["ztunnel", "culvert"];
        let named = ours.contains(&label("app")) || ours.contains(&label("app.kubernetes.io/name"));
        if !named && !ours.iter().any(|ours| name.starts_with(ours)) {
            return None;
        }
        let owner = meta["ownerReferences"]
            .as_array()?
            .iter()
            .find(|owner| owner["kind"] == "DaemonSet")?;
        let node = spec["nodeName"].as_str()?.to_owned();
        let container = spec["containers"].as_array()?.first()?;
        let image = container["image"].as_str().unwrap_or_default();
        let culvert = if self.culvert.is_empty() {
            image.contains("culvert") || name.starts_with("culvert")
        } else {
            self.culvert.contains(&node)
        };
        let status = pod["status"]["containerStatuses"].as_array().and_then(|all| all.first());
        Some(Agent {
            node,
            kind: if culvert { Kind::Culvert } else { Kind::Ztunnel },
            pod: name.to_owned(),
            set: owner["name"].as_str()?.to_owned(),
            container: container["name"].as_str()?.to_owned(),
            ip: pod["status"]["podIP"].as_str().unwrap_or_default().to_owned(),
            restarts: status.and_then(|status| status["restartCount"].as_u64()).unwrap_or(0),
            ready: status.is_some_and(|status| status["ready"] == true),
        })
    }

    /// What the agent logged in the last `time`.
    pub fn log(&self, agent: &Agent, time: Duration) -> Result<String> {
        let since = format!("--since={}s", time.as_secs().max(1));
        let (namespace, container) = (self.namespace.as_str(), agent.container.as_str());
        self.kubectl.run(&["logs", "-n", namespace, &agent.pod, "-c", container, &since])
    }

    /// The agent's metrics.
    pub fn metrics(&self, agent: &Agent) -> Result<String> {
        self.ask(agent, 15020, "/metrics")
    }

    /// What the agent knows.
    pub fn dump(&self, agent: &Agent) -> Result<Value> {
        let text = self.ask(agent, 15000, "/config_dump")?;
        serde_json::from_str(&text).context("reading a config dump")
    }

    fn ask(&self, agent: &Agent, port: u16, path: &str) -> Result<String> {
        let forward = Forward::open(&self.kubectl, &self.namespace, &agent.pod, port)?;
        let response = http::get(forward.local, path, Duration::from_secs(30))?;
        ensure!(response.status == 200, "{path} of {} answered {}", agent.pod, response.status);
        Ok(response.body)
    }
}

/// A port of a pod on this machine's loopback address, while it lives.
struct Forward {
    child: Child,
    /// Held open: kubectl writes to it with every connection.
    said: Option<BufReader<ChildStdout>>,
    local: SocketAddr,
}

impl Forward {
    fn open(kubectl: &Kubectl, namespace: &str, pod: &str, port: u16) -> Result<Self> {
        let ports = format!(":{port}");
        let target = format!("pod/{pod}");
        let mut command = kubectl.command(&[
            "port-forward",
            "-n",
            namespace,
            "--address",
            "127.0.0.1",
            &target,
            &ports,
        ]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().context("starting kubectl port-forward")?;
        let stdout = child.stdout.take().context("no output of kubectl port-forward")?;
        let local = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut forward = Self { child, said: None, local };
        let (mut line, mut reader) = (String::new(), BufReader::new(stdout));
        reader.read_line(&mut line).context("reading from kubectl port-forward")?;
        forward.said = Some(reader);
        // Forwarding from 127.0.0.1:40001 -> 15000
        let local = line.split_whitespace().find_map(|word| word.parse::<SocketAddr>().ok());
        match local {
            Some(local) => forward.local = local,
            None => bail!("port {port} of {pod} cannot be reached: {:?}", line.trim()),
        }
        Ok(forward)
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
