//! A Culvert agent running on a node of the lab.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::http::{self, Response};
use crate::lab::{Lab, Node};
use crate::place::Place;
use crate::process::Process;
use crate::wait;

/// How to start an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// The `culvert` binary.
    pub binary: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// Directives for its log.
    pub log: String,
    /// Further arguments of `culvert run`.
    pub arguments: Vec<String>,
    /// Further variables of its environment.
    pub environment: Vec<(String, String)>,
}

impl AgentOptions {
    /// The ordinary way.
    pub fn new(binary: &Path, config: &Path) -> Self {
        let (binary, config) = (binary.to_owned(), config.to_owned());
        let (arguments, environment) = (Vec::new(), Vec::new());
        Self { binary, config, log: "info".to_owned(), arguments, environment }
    }
}

/// A running agent. Dropping it kills it, and leaves its pinned programs to the lab's end.
#[derive(Debug)]
pub struct Agent {
    process: Process,
    place: Place,
    binary: PathBuf,
    pin_path: PathBuf,
}

impl Agent {
    /// Starts an agent on `node`, without waiting for it to be ready.
    pub fn start(lab: &Lab, node: &Node, options: &AgentOptions) -> Result<Self> {
        let place = node.place().within("agent")?;
        let state = lab.state().join(node.name());
        let pin_path = lab.pin_path(node.name());
        let mut command = place.command(&options.binary)?;
        command.args(["run", "--node", node.name(), "--admin", "127.0.0.1:15000"]);
        command.args(["--stats", "[::]:15020", "--readiness", "[::]:15021"]);
        command.arg("--config").arg(&options.config);
        command.arg("--state-dir").arg(&state);
        command.arg("--pin-path").arg(&pin_path);
        command.arg("--cgroup").arg(lab.attach_cgroup(node)?);
        command.args(["--log", &options.log]).args(&options.arguments);
        // What the tests' surroundings say must not reach the agent.
        for name in ["RUST_LOG", "LOG_FORMAT", "CULVERT_CONFIG", "LOCAL_XDS_PATH", "NODE_NAME"] {
            command.env_remove(name);
        }
        command.envs(options.environment.iter().map(|(name, value)| (name, value)));
        let process = place.start(&format!("agent-{}", node.name()), &mut command)?;
        Ok(Self { process, place, binary: options.binary.clone(), pin_path })
    }

    /// Waits until the agent says that it is ready, or says why it ended.
    pub fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        let name = self.process.name().to_owned();
        let place = self.place.clone();
        let mut ended = None;
        let waited = wait::until_some(format!("{name} to be ready"), limit, || {
            ended = self.process.ended();
            if ended.is_some() {
                return Ok(());
            }
            match place.run(|| http::get(READINESS, "/healthz/ready", ANSWER)) {
                Ok(response) if response.status == 200 => Ok(()),
                Ok(response) => Err(anyhow::anyhow!("{}", response.body.trim())),
                Err(error) => Err(error),
            }
        });
        if let Some(status) = ended {
            bail!("{name} ended with {status}:\n{}", self.process.log_tail(20));
        }
        waited.with_context(|| format!("its log ends with:\n{}", self.process.log_tail(20)))
    }

    /// The process itself: its id, log, signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// All it logged so far.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Where it keeps its programs and maps.
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Asks the admin address for `path`.
    pub fn admin(&self, path: &str) -> Result<Response> {
        self.place.run(|| http::get(ADMIN, path, ANSWER))
    }

    /// All metrics, as text.
    pub fn metrics(&self) -> Result<String> {
        let response = self.place.run(|| http::get(STATS, "/metrics", ANSWER))?;
        Ok(response.body)
    }

    /// The sum of all samples called `name` whose labels contain each of `labels`.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum(&self.metrics()?, name, labels))
    }

    /// Runs `culvert` with these arguments on the agent's node and gives what it printed.
    pub fn cli(&self, arguments: &[&str]) -> Result<String> {
        self.place.output(&self.binary, arguments)
    }

    /// Removes the agent's programs from the kernel, after its end.
    pub fn detach(&self) -> Result<String> {
        let pin_path = self.pin_path.to_str().context("the pin path is not text")?;
        self.cli(&["detach", "--pin-path", pin_path])
    }
}

const ADMIN: SocketAddr = loopback(15000);
const STATS: SocketAddr = loopback(15020);
const READINESS: SocketAddr = loopback(15021);
const ANSWER: Duration = Duration::from_secs(20);

const fn loopback(port: u16) -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), port)
}

/// The sum of all samples called `name` whose labels contain each of `labels`.
pub fn sum(metrics: &str, name: &str, labels: &[&str]) -> f64 {
    let of_this_name = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let whole = rest.starts_with('{') || rest.starts_with(' ');
        (whole && labels.iter().all(|label| rest.contains(label))).then_some(rest)
    });
    of_this_name.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

#[cfg(test)]
mod tests;
