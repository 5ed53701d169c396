//! The mesh that is measured, and its twin without Culvert.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path as FilePath;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::lab::Attach;
use culvert_lab::mesh::{Mesh, PodSpec, Running};
use culvert_lab::place::Place;
use culvert_lab::process::Process;
use culvert_lab::wait;

use super::load::Outcome;
use super::measure::resident;
use super::peer::{Peer, Programs};

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

/// Without agents, or with whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Plain,
    Culvert,
    Peer,
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

/// Two nodes with agents, two just like them without, and one whose agent accelerates. There may be
/// two more with a peer's agents.
pub struct Field {
    agents: Vec<Agent>,
    /// Why no connection is accelerated, if none is.
    pub unaccelerated: Option<String>,
    fresh: Vec<f64>,
    servers: Vec<Process>,
    peer: Option<Peer>,
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
        let mut servers = Vec::new();
        let names = SERVERS.iter().flat_map(|name| [(*name).to_owned(), format!("plain-{name}")]);
        for name in names.chain([SWIFT.to_owned()]) {
            servers.push(serve(mesh.pod(&name).place(), &name)?);
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
        let field = Self { agents, unaccelerated, fresh, servers, peer: None, mesh };
        for path in [Path::Same, Path::Accelerated, Path::Cross] {
            for side in field.sides(path) {
                field.wait_for(path, *side)?;
            }
        }
        field.warm();
        Ok(field)
    }

    /// Puts the peer's nodes beside these.
    pub fn add_peer(&mut self, programs: &Programs) -> Result<()> {
        let peer = self.peer.insert(Peer::start(programs, &self.mesh.lab().logs())?);
        for name in SERVERS {
            let (place, _) = peer.pod(name)?;
            self.servers.push(serve(place, &format!("peer-{name}"))?);
        }
        for path in [Path::Same, Path::Cross] {
            self.wait_for(path, Side::Peer)?;
        }
        Ok(())
    }

    /// What there is to measure on this path. The peer accelerates nothing.
    pub fn sides(&self, path: Path) -> &'static [Side] {
        match (path, &self.peer) {
            (Path::Same | Path::Cross, Some(_)) => &[Side::Plain, Side::Culvert, Side::Peer],
            (Path::Accelerated, _) | (_, None) => &[Side::Plain, Side::Culvert],
        }
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
        let all: Vec<u32> = match side {
            Side::Plain => Vec::new(),
            Side::Culvert => self.agents.iter().map(Agent::pid).collect(),
            Side::Peer => self.peer.as_ref().map(Peer::pids).unwrap_or_default(),
        };
        let passed = match path {
            Path::Same => 0..1,
            Path::Cross => 0..2,
            Path::Accelerated => 2..3,
        };
        all.get(passed).unwrap_or_default().to_vec()
    }

    /// What each agent of a side held when nobody had connected yet, in megabytes.
    pub fn fresh(&self, side: Side) -> &[f64] {
        match side {
            Side::Plain => &[],
            Side::Culvert => &self.fresh,
            Side::Peer => self.peer.as_ref().map(|peer| peer.fresh.as_slice()).unwrap_or_default(),
        }
    }

    /// Starts a load of another pod of the client's node, towards a server of its own.
    pub fn flood(&self, path: Path, side: Side, arguments: &[&str]) -> Result<Flooding> {
        let mut command = self.command(path, side, "other-", arguments)?;
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(Flooding(command.spawn().context("starting the flood")?))
    }

    /// Runs one load to its end.
    pub fn load(&self, path: Path, side: Side, arguments: &[&str]) -> Result<Outcome> {
        let mut command = self.command(path, side, "", arguments)?;
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
        let mut command = self.command(path, side, "", &arguments)?;
        let (held, line) = Held::start(&mut command).context("starting the load")?;
        if line.trim() != "holding" {
            bail!("the connections could not be opened\n{}", self.logs(8));
        }
        Ok(held)
    }

    /// How the agents' logs end.
    pub fn logs(&self, lines: usize) -> String {
        let own = self.agents.iter().map(Agent::log);
        let names = ["agent a", "agent b", "agent e", "ztunnel a", "ztunnel b"];
        let tails = names.iter().zip(own.chain(self.peer.iter().flat_map(Peer::logs)));
        let tail = |(name, log): (_, String)| {
            format!("{name}:\n{}", crate::shell::last_lines(&log, lines))
        };
        tails.map(tail).collect::<Vec<_>>().join("\n")
    }

    fn wait_for(&self, path: Path, side: Side) -> Result<()> {
        wait::until_some(format!("{path:?} {side:?} to answer"), Duration::from_secs(20), || {
            self.load(path, side, &["--kind", "requests", "--seconds", "0.05"])
        })
        .map(drop)
    }

    /// A load from the client that is measured, or with `other-` from the one beside it.
    fn command(&self, path: Path, side: Side, which: &str, arguments: &[&str]) -> Result<Command> {
        // Bytes in bulk have a port of their own.
        let port = if arguments.contains(&"bulk") { PORT + 1 } else { PORT };
        let (client, server) = self.ends(path, side, which)?;
        let to = SocketAddr::new(server.into(), port).to_string();
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = client.command(own)?;
        command.args(["bench-load", "--to", &to]).args(arguments);
        Ok(command)
    }

    /// Where the client is, and the server's address.
    fn ends(&self, path: Path, side: Side, which: &str) -> Result<(&Place, Ipv4Addr)> {
        let prefix = match (side, path) {
            (Side::Plain, _) => "plain-",
            (Side::Culvert, Path::Accelerated) => "swift-",
            (Side::Culvert | Side::Peer, _) => "",
        };
        let client = if which.is_empty() { "client" } else { "other" };
        let server = match path {
            Path::Same | Path::Accelerated => "near",
            Path::Cross => "far",
        };
        let (client, server) = (format!("{prefix}{client}"), format!("{prefix}{which}{server}"));
        match side {
            Side::Plain | Side::Culvert => {
                Ok((self.mesh.pod(&client).place(), self.mesh.pod(&server).v4()))
            }
            Side::Peer => {
                let peer = self.peer.as_ref().context("no peer")?;
                Ok((peer.pod(&client)?.0, peer.pod(&server)?.1))
            }
        }
    }
}

/// Starts a server in a pod.
fn serve(place: &Place, name: &str) -> Result<Process> {
    let own = std::env::current_exe().context("finding this program")?;
    let mut command = place.command(own)?;
    command.args(["bench-server", "--port", &PORT.to_string()]);
    place.start(&format!("server-{name}"), &mut command)
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

/// A process that holds what it made, such as open connections, until its input ends.
pub struct Held {
    input: Option<ChildStdin>,
    child: Child,
}

impl Held {
    /// Starts it, and gives the line that it prints when it has made it.
    pub fn start(command: &mut Command) -> Result<(Self, String)> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (input, printed) = (child.stdin.take(), child.stdout.take());
        let held = Self { input, child };
        let mut line = String::new();
        BufReader::new(printed.context("no output")?).read_line(&mut line)?;
        Ok((held, line))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.input.take());
        // A failure leaves the process to the lab's end.
        let _ = self.child.wait();
    }
}
