//! `cargo xtask bench scale`: a large mesh from a control plane, and changes while traffic flows.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::http;
use culvert_lab::lab::Attach;
use culvert_lab::mesh::{Mesh, Running};
use culvert_lab::place::Place;
use culvert_lab::process::Process;
use culvert_lab::wait;

use super::load::Outcome;
use super::report::median;
use crate::binary;
use crate::setup::{self, Purpose};
use crate::shell::{self, Steps};

/// Measure how fast and how small the agent takes over a large mesh, and follows its changes
#[derive(Debug, clap::Args)]
#[command(
    after_help = "CULVERT_PEER_ZTUNNEL names a ztunnel binary to put beside it: how fast it is \
ready with the same meshes, and its memory."
)]
pub struct Arguments {
    /// Numbers of workloads
    #[arg(long, value_delimiter = ',', default_value = "0,10000,100000")]
    workloads: Vec<usize>,
    /// Starts with each number of workloads, those of a peer and of Culvert in turn
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// Rounds of quiet and changes, at the last number of workloads
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Seconds of each
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Changed endpoints a second
    #[arg(long, default_value_t = 1_000)]
    changes: usize,
}

/// Long enough for the largest mesh on a loaded machine.
const READY: Duration = Duration::from_secs(60);
/// How long after it is ready that may be found.
const LOOK: Duration = Duration::from_millis(4);
const PORT: u16 = 7000;

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    setup::ensure(&steps, Purpose::Test)?;
    let agent = binary::release(&steps)?;
    let build = ["build", "--release", "--package", "culvert-tests", "--bin", "control-plane"];
    shell::run(shell::cargo().args(build))?;
    let plane = shell::target().join("release/control-plane");
    let peer = binary::peer()?;
    let (mut table, mut field) = (Table::default(), None);
    for count in &arguments.workloads {
        steps.heading(&format!("{count} workloads"));
        let mut starts = Starts::new(*count);
        for _ in 0..arguments.starts.max(1) {
            if let Some(peer) = &peer {
                steps.step("ztunnel", || {
                    let found = ready_peer(&plane, peer, *count)?;
                    let told = found.to_string();
                    starts.peer.push(found);
                    Ok(told)
                })?;
            }
            steps.step("Culvert", || {
                // One at a time on this machine.
                drop(field.take());
                let (made, found) = Field::start(&plane, &agent, *count)?;
                let told = found.to_string();
                starts.culvert.push(found);
                field = Some(made);
                Ok(told)
            })?;
        }
        table.push(starts);
    }
    let changed = arguments.workloads.last().is_some_and(|count| *count > 0);
    let mut change = None;
    if let (Some(field), true) = (&mut field, changed) {
        let title = format!("{} changed endpoints a second, beside traffic", arguments.changes);
        steps.step(&title, || {
            let told = field.alternate(arguments)?;
            change = Some(told.clone());
            Ok(told)
        })?;
    }
    println!("\n{table}");
    if let Some(change) = change {
        println!("{} changed endpoints a second: {change}", arguments.changes);
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let took = format!("{:.0} s, load average {load}", steps.elapsed().as_secs_f64());
    println!("{}", shell::dim(&took));
    Ok(())
}

/// All starts with one number of workloads, one after the other in turn.
struct Starts {
    workloads: usize,
    peer: Vec<Ready>,
    culvert: Vec<Ready>,
}

impl Starts {
    fn new(workloads: usize) -> Self {
        Self { workloads, peer: Vec::new(), culvert: Vec::new() }
    }
}

/// Its name, where it is found, and how many decimals are told of it.
type Measure = (&'static str, fn(&Ready) -> f64, usize);

/// Medians of all starts, and the ratios of the medians.
#[derive(Default)]
struct Table(Vec<Starts>);

impl Table {
    fn push(&mut self, starts: Starts) {
        self.0.push(starts);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = ["workloads", "measure", "ztunnel", "Culvert", "ratio"];
        let [count, measure, peer, culvert, ratio] = head;
        write!(f, "{count:>9}  {measure:<18} {peer:>8} {culvert:>8} {ratio:>6}")?;
        let measures: [Measure; 4] = [
            ("ready, seconds", |it| it.seconds, 2),
            ("processor, seconds", |it| it.processor, 2),
            ("resident then, MB", |it| it.resident, 0),
            ("at most, MB", |it| it.peak, 0),
        ];
        for starts in &self.0 {
            for (measure, of, digits) in measures {
                let count = starts.workloads;
                let culvert = median(starts.culvert.iter().map(of));
                let peer = median(starts.peer.iter().map(of));
                let (peer, ratio) = match starts.peer.is_empty() {
                    true => ("–".to_owned(), "–".to_owned()),
                    false => (format!("{peer:.digits$}"), format!("{:.2}", culvert / peer)),
                };
                let culvert = format!("{culvert:.digits$}");
                write!(f, "\n{count:>9}  {measure:<18} {peer:>8} {culvert:>8} {ratio:>6}")?;
            }
        }
        Ok(())
    }
}

/// From the start of the process to its readiness, with its memory then and at most until then.
struct Ready {
    seconds: f64,
    /// Of all its threads.
    processor: f64,
    resident: f64,
    peak: f64,
}

impl std::fmt::Display for Ready {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { seconds, processor, resident, peak } = self;
        write!(f, "ready in {seconds:.2} s, {processor:.2} s of a processor, ")?;
        write!(f, "{resident:.0} MB, at most {peak:.0} MB")
    }
}

impl Ready {
    /// Waits for the answer of the process in `place`.
    fn of(pid: u32, place: &Place, started: Instant) -> Result<Self> {
        let at = SocketAddr::from(([127, 0, 0, 1], 15021));
        wait::until_some_within("readiness", READY, LOOK, || {
            let answer = place.run(|| http::get(at, "/healthz/ready", Duration::from_secs(5)))?;
            match answer.status {
                200 => Ok(()),
                _ => Err(anyhow::anyhow!("{}", answer.body.trim())),
            }
        })?;
        let (seconds, processor) = (started.elapsed().as_secs_f64(), processor(pid)?);
        let mut last = 0.0;
        wait::until("the memory to settle", READY, || {
            let now = memory(pid, "VmRSS:").unwrap_or_default();
            let settled = (now - last).abs() < 0.1;
            last = now;
            settled
        })?;
        Ok(Self { seconds, processor, resident: last, peak: memory(pid, "VmHWM:")? })
    }
}

/// What all threads of a process took, also those that have ended, in seconds.
fn processor(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // The second field may have anything in its parentheses; user and system time are the 14th and
    // 15th, in hundredths of a second (proc_pid_stat(5)).
    let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
    let hundredths: Vec<f64> = fields.skip(11).take(2).flat_map(str::parse).collect();
    match *hundredths {
        [user, system] => Ok((user + system) / 100.0),
        _ => bail!("no times in {path}"),
    }
}

/// In megabytes.
fn memory(pid: u32, field: &str) -> Result<f64> {
    let path = format!("/proc/{pid}/status");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    let kilobytes = line.and_then(|line| line.trim().split(' ').next()?.parse::<f64>().ok());
    Ok(kilobytes.with_context(|| format!("no {field} in {path}"))? * 1024.0 / 1e6)
}

/// The control plane's process.
struct Plane {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
    /// What points an agent to it.
    environment: Vec<(String, String)>,
}

impl Plane {
    fn start(mut command: Command, root: &Path, count: usize) -> Result<Self> {
        command.arg(root).arg(count.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("starting the control plane")?;
        let input = child.stdin.take();
        let mut output = BufReader::new(child.stdout.take().context("no output")?);
        let mut address = String::new();
        output.read_line(&mut address)?;
        let root = root.to_str().context("the lab's folder is not text")?;
        let environment = [
            ("XDS_ADDRESS", address.trim()),
            ("XDS_ROOT_CA", root),
            ("AUTH_TOKEN", "a-token"),
            ("ISTIO_META_DNS_CAPTURE", "false"),
        ];
        let environment =
            environment.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
        Ok(Self { child, input, output, environment })
    }

    fn order(&mut self, line: &str) -> Result<()> {
        writeln!(self.input.as_mut().context("no input")?, "{line}")?;
        Ok(())
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            bail!("the control plane has ended");
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Plane {
    fn drop(&mut self) {
        drop(self.input.take());
        // A failure leaves the process to the lab's end.
        let _ = self.child.wait();
    }
}

/// Two nodes; the agent of the first knows the large mesh.
struct Field {
    _agents: [Agent; 2],
    _server: Process,
    plane: Plane,
    mesh: Running,
}

impl Field {
    fn start(plane: &Path, binary: &Path, count: usize) -> Result<(Self, Ready)> {
        let mesh = Mesh::new()
            .attach(Attach::Node)
            .node("a")
            .pod("client", "bench", "client")
            .node("b")
            .pod("far", "bench", "server")
            .start()?;
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = mesh.pod("far").place().command(&own)?;
        command.args(["bench-server", "--port", &PORT.to_string()]);
        let server = mesh.pod("far").place().start("server", &mut command)?;
        let far = mesh.agent("b", binary)?;
        let root = mesh.lab().state().join("control-plane.pem");
        let plane = Plane::start(mesh.node("a").place().command(plane)?, &root, count)?;
        let mut options = AgentOptions::new(binary, &mesh.config());
        options.environment = plane.environment.clone();
        let started = Instant::now();
        let mut agent = mesh.start_agent("a", &options)?;
        let ready = Ready::of(agent.pid(), mesh.node("a").place(), started)
            .with_context(|| agent.process().log_tail(10))?;
        let field = Self { _agents: [agent, far], _server: server, plane, mesh };
        wait::until_some("the server to answer", wait::SOON, || field.load(0.05))?;
        Ok((field, ready))
    }

    fn load(&self, seconds: f64) -> Result<Outcome> {
        let to = SocketAddr::new(self.mesh.pod("far").v4().into(), PORT).to_string();
        let own = std::env::current_exe().context("finding this program")?;
        let mut command = self.mesh.pod("client").place().command(own)?;
        command.args(["bench-load", "--to", &to, "--kind", "requests", "--connections", "8"]);
        let output = command.args(["--seconds", &seconds.to_string()]).output()?;
        if !output.status.success() {
            bail!("the load: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        serde_json::from_slice(&output.stdout).context("reading what the load printed")
    }

    /// Quiet and changing in turn: the ratios of the latencies.
    fn alternate(&mut self, arguments: &Arguments) -> Result<String> {
        let (mut medians, mut tails, mut lags) = (Vec::new(), Vec::new(), Vec::new());
        let (mut quiet_tails, mut changing_tails) = (Vec::new(), Vec::new());
        for _ in 0..arguments.rounds.max(1) {
            let quiet = self.load(arguments.seconds)?;
            self.plane.order(&format!("churn {} {}", arguments.changes, arguments.seconds))?;
            let changing = self.load(arguments.seconds)?;
            let answer = self.plane.answer()?;
            let lag = answer.split(' ').nth(1).and_then(|lag| lag.parse::<f64>().ok());
            lags.push(lag.with_context(|| format!("the control plane said {answer:?}"))?);
            medians.push(changing.p50 / quiet.p50);
            tails.push(changing.p99 / quiet.p99);
            quiet_tails.push(quiet.p99);
            changing_tails.push(changing.p99);
        }
        let median = |values: Vec<f64>| median(values.into_iter());
        Ok(format!(
            "p50 {:.2} and p99 {:.2} times those of quiet (p99 {:.0} and {:.0} µs), last change \
             taken over after {:.0} ms",
            median(medians),
            median(tails),
            median(quiet_tails) * 1e6,
            median(changing_tails) * 1e6,
            median(lags) * 1e3,
        ))
    }
}

/// The peer without pods, in a namespace of its own.
fn ready_peer(plane: &Path, binary: &Path, count: usize) -> Result<Ready> {
    let mesh = Mesh::new().node("a").start()?;
    let place = mesh.node("a").place();
    let root = mesh.lab().state().join("control-plane.pem");
    let plane = Plane::start(place.command(plane)?, &root, count)?;
    let mut command = place.command(binary)?;
    command.envs(plane.environment.iter().map(|(name, value)| (name, value)));
    let address = plane.environment.iter().find(|(name, _)| name == "XDS_ADDRESS");
    command.envs(address.map(|(_, address)| ("CA_ADDRESS", address)));
    command.env("CA_ROOT_CA", &root);
    // On its own, without istio-cni. The certificate authority is not asked for anything.
    command.env("NODE_NAME", "a").env("RUST_LOG", "warn").env("PROXY_MODE", "dedicated");
    command.env("PROXY_WORKLOAD_INFO", "ns-0/app-0/app-0");
    let started = Instant::now();
    let process = place.start("ztunnel", &mut command)?;
    Ready::of(process.pid(), place, started).with_context(|| process.log_tail(10))
}
