//! The mesh that is measured, and its twin without Culvert.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path as FilePath;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::lab::{Attach, Pod};
use culvert_lab::mesh::{Mesh, PodSpec, Running};
use culvert_lab::process::Process;
use culvert_lab::wait;

use super::load::Outcome;
use super::measure::resident;

/// Where the server is, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Path {
    /// On the same node
    Same,
    /// On the same node, with bytes that go past TCP
    Accelerated,
    /// On another node
    Cross,
}

/// With or without Culvert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Plain,
    Culvert,
}

impl Side {
    pub const ALL: [Self; 2] = [Self::Plain, Self::Culvert];
}

impl Path {
    pub fn name(self) -> &'static str {
        match self {
            Self::Same => "same",
            Self::Accelerated => "accelerated",
            Self::Cross => "cross",
        }
    }

    pub fn title(self) -> &'static str {
        match self {
            Self::Same => "Same node",
            Self::Accelerated => "Same node, accelerated",
            Self::Cross => "Across nodes",
        }
    }
}

const PORT: u16 = 7000;
/// Connections that the kernel carried.
const DIRECT: &[&str] = &["result=\"direct\""];

/// How the agent says that it accelerates connections, and that it is finding out whether it may.
const ON: &str = "on";
const TRYING: &str = "the machine is being tried";

/// The pods of one side in which a server runs.
const SERVERS: [&str; 4] = ["near", "far", "other-near", "other-far"];
/// The server of connections that are accelerated.
const SWIFT: &str = "swift-near";

/// Two nodes with agents, two just like them without, and one whose agent accelerates.
pub struct Field {
    agents: Vec<Agent>,
    /// Why no connection is accelerated, if none is.
    pub unaccelerated: Option<String>,
    /// What the agents hold when nobody has connected yet, in megabytes.
    pub fresh: Vec<f64>,
    _servers: Vec<Process>,
    mesh: Running,
}

impl Field {
    pub fn start(binary: &FilePath) -> Result<Self> {
        let plain = |name: &str| PodSpec::unknown(&format!("plain-{name}"));
        // Each agent attaches at its own node, so that the plain pods meet none of its programs.
        let mesh = Mesh::new()
            .attach(Attach::Node)
            .node("a")
            .pod("client", "bench", "client")
            .pod("near", "bench", "server")
            .pod("other", "bench", "other")
            .pod("other-near", "bench", "other-server")
            .node("b")
            .pod("far", "bench", "server")
            .pod("other-far", "bench", "other-server")
            .node("c")
            .pod_with(plain("client"))
            .pod_with(plain("near"))
            .pod_with(plain("other"))
            .pod_with(plain("other-near"))
            .node("d")
            .pod_with(plain("far"))
            .pod_with(plain("other-far"))
            .node("e")
            .pod("swift-client", "swift", "client")
            .pod(SWIFT, "swift", "server")
            .start()?;
        let own = std::env::current_exe().context("finding this program")?;
        let mut servers = Vec::new();
        let names = SERVERS.iter().flat_map(|name| [(*name).to_owned(), format!("plain-{name}")]);
        for name in names.chain([SWIFT.to_owned()]) {
            let place = mesh.pod(&name).place();
            let mut command = place.command(&own)?;
            command.args(["bench-server", "--port", &PORT.to_string()]);
            servers.push(place.start(&format!("server-{name}"), &mut command)?);
        }
        let mut agents = vec![mesh.agent("a", binary)?, mesh.agent("b", binary)?];
        let pids: Vec<u32> = agents.iter().map(Agent::pid).collect();
        let fresh = pids.iter().map(|pid| resident(&[*pid])).collect::<Result<_>>()?;
        let options = AgentOptions {
            environment: vec![("CULVERT_ACCELERATE".into(), "swift".into())],
            ..AgentOptions::new(binary, &mesh.config())
        };
        agents.push(mesh.agent_with("e", &options)?);
        let unaccelerated = standing(&agents[2])?;
        let field = Self { agents, unaccelerated, fresh, _servers: servers, mesh };
        for path in [Path::Same, Path::Accelerated, Path::Cross] {
            for side in Side::ALL {
                field.wait_for(path, side)?;
            }
        }
        field.warm();
        Ok(field)
    }

    /// Lets the kernel carry what it may within the node. An agent that carries it itself, as older
    /// ones do, is measured as it is.
    fn warm(&self) {
        for (path, agent, kind) in [
            (Path::Same, 0, "requests"),
            (Path::Same, 0, "bulk"),
            (Path::Accelerated, 2, "requests"),
            (Path::Accelerated, 2, "bulk"),
        ] {
            let direct = || self.agents[agent].metric("culvert_direct_connections_total", DIRECT);
            let goes_straight = || {
                let before = direct().unwrap_or_default();
                let arguments = ["--kind", kind, "--seconds", "0.05"];
                let ran = self.load(path, Side::Culvert, &arguments).is_ok();
                ran && direct().unwrap_or_default() > before
            };
            if wait::until("the kernel's path", Duration::from_secs(5), goes_straight).is_err() {
                println!("    the agent carries {kind} within the node itself");
            }
        }
    }

    /// The agents that a connection passes on this path.
    pub fn agents(&self, path: Path, side: Side) -> Vec<u32> {
        let passed = match (side, path) {
            (Side::Plain, _) => &[][..],
            (Side::Culvert, Path::Same) => &self.agents[..1],
            (Side::Culvert, Path::Cross) => &self.agents[..2],
            (Side::Culvert, Path::Accelerated) => &self.agents[2..],
        };
        passed.iter().map(Agent::pid).collect()
    }

    /// Starts a load of another pod of the client's node, towards a server of its own.
    pub fn flood(&self, path: Path, side: Side, arguments: &[&str]) -> Result<Flooding> {
        let (client, server) = self.ends(path, side, "other-");
        let mut command = self.command(client, server, arguments)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Flooding(command.spawn().context("starting the flood")?))
    }

    /// Runs one load to its end.
    pub fn load(&self, path: Path, side: Side, arguments: &[&str]) -> Result<Outcome> {
        let (client, server) = self.ends(path, side, "");
        let mut command = self.command(client, server, arguments)?;
        let output = command.output().context("starting the load")?;
        if !output.status.success() {
            let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            bail!("{} over {side:?}: {error}\n{}", arguments.join(" "), self.logs(8));
        }
        serde_json::from_slice(&output.stdout).context("reading what the load printed")
    }

    /// Opens connections and holds them for as long as the result lives.
    pub fn hold(&self, path: Path, side: Side, count: usize) -> Result<Held> {
        let count = count.to_string();
        let arguments = ["--kind", "idle", "--connections", &count];
        let (client, server) = self.ends(path, side, "");
        let mut command = self.command(client, server, &arguments)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting the load")?;
        let printed = child.stdout.take().context("no output")?;
        let mut line = String::new();
        BufReader::new(printed).read_line(&mut line)?;
        let held = Held { input: child.stdin.take(), child };
        if line.trim() != "holding" {
            bail!("the connections could not be opened\n{}", self.logs(8));
        }
        Ok(held)
    }

    /// How the agents' logs end.
    pub fn logs(&self, lines: usize) -> String {
        let tails = ["a", "b", "e"].iter().zip(&self.agents).map(|(node, agent)| {
            let log = agent.log();
            format!("agent {node}:\n{}", crate::shell::last_lines(&log, lines))
        });
        tails.collect::<Vec<_>>().join("\n")
    }

    fn wait_for(&self, path: Path, side: Side) -> Result<()> {
        wait::until_some(format!("{path:?} {side:?} to answer"), Duration::from_secs(20), || {
            self.load(path, side, &["--kind", "requests", "--seconds", "0.05"])
        })
        .map(drop)
    }

    fn command(&self, client: &Pod, server: &Pod, arguments: &[&str]) -> Result<Command> {
        // Bytes in bulk have a port of their own.
        let port = if arguments.contains(&"bulk") { PORT + 1 } else { PORT };
        let to = SocketAddr::new(server.v4().into(), port).to_string();
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = client.place().command(own)?;
        command.args(["bench-load", "--to", &to]).args(arguments);
        Ok(command)
    }

    /// Client and server: the ones that are measured, or with `other-` those beside them.
    fn ends(&self, path: Path, side: Side, which: &str) -> (&Pod, &Pod) {
        let prefix = match side {
            Side::Culvert => "",
            Side::Plain => "plain-",
        };
        if (path, side) == (Path::Accelerated, Side::Culvert) {
            return (self.mesh.pod("swift-client"), self.mesh.pod(SWIFT));
        }
        let server = match path {
            Path::Same | Path::Accelerated => "near",
            Path::Cross => "far",
        };
        let client = if which.is_empty() { "client" } else { "other" };
        let pod = |name: &str| self.mesh.pod(&format!("{prefix}{name}"));
        (pod(client), pod(&format!("{which}{server}")))
    }
}

/// A load that runs beside another.
pub struct Flooding(Child);

impl Flooding {
    /// Waits for its end.
    pub fn wait(self) -> Result<()> {
        let output = self.0.wait_with_output().context("waiting for the flood")?;
        if !output.status.success() {
            bail!("the flood: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(())
    }
}

/// Waits until an agent knows whether it may accelerate; why not, if so.
fn standing(agent: &Agent) -> Result<Option<String>> {
    let limit = Duration::from_secs(120);
    let told = wait::until_some("the machine to be tried", limit, || {
        let answer = agent.admin("/culvert/status")?;
        let status: serde_json::Value = serde_json::from_str(&answer.body)?;
        let told = status["kernel"]["acceleration"].as_str().unwrap_or("not known here").to_owned();
        if told == TRYING { bail!("{told}") } else { Ok(told) }
    })?;
    Ok(Some(told).filter(|told| !told.starts_with(ON)))
}

/// Connections held open by a process.
pub struct Held {
    input: Option<ChildStdin>,
    child: std::process::Child,
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.input.take());
        // A failure leaves the process to the lab's end.
        let _ = self.child.wait();
    }
}
