//! Connections within a node that the kernel carries: waiting for them, and streams that tell loss.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::Running;
use culvert_lab::place::Place;
use culvert_lab::wait;
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};

use crate::expect::answer;
use crate::{LIMIT, binary, call, connect};

/// How an agent is started that carries everything within the node itself.
pub fn through_agent(mesh: &Running) -> AgentOptions {
    with(mesh, &[("CULVERT_SAME_NODE", "agent")])
}

/// How an agent is started with these settings.
pub fn with(mesh: &Running, settings: &[(&str, &str)]) -> AgentOptions {
    let environment = settings.iter().map(|(name, value)| ((*name).into(), (*value).into()));
    let options = AgentOptions::new(&binary(), &mesh.config());
    AgentOptions { environment: environment.collect(), ..options }
}

/// Calls `to` until the kernel has a verdict on it for `pod`.
pub fn warm(mesh: &Running, agent: &Agent, pod: &str, to: (IpAddr, u16)) -> Result<()> {
    let source = format!("{}/{pod}", mesh.spec(pod).namespace);
    wait::until_some(format!("a verdict for {pod} to {to:?}"), wait::SOON, || {
        call(mesh, pod, to, "").map_err(|error| anyhow!("called: {error}"))?;
        match verdict(agent, &source, to)? {
            Verdict::Given => Ok(()),
            Verdict::Missing(because) => bail!("{because}"),
        }
    })
}

/// What the agent says of the kernel's verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    Given,
    /// Why, or that there could be one.
    Missing(String),
}

/// The verdict on connections of `source` (`namespace/pod`).
pub fn verdict(agent: &Agent, source: &str, to: (IpAddr, u16)) -> Result<Verdict> {
    // No process is started for it: until a child has become another program, it holds what the test
    // has open, and what is closed meanwhile does not end.
    let to = SocketAddr::from(to).to_string().replace('[', "%5B").replace(']', "%5D");
    let told = answer(agent, &format!("/culvert/explain?src={source}&dst={to}"))?;
    let steps = told.get("steps").and_then(Value::as_array).context("no steps")?;
    let carry = steps.iter().find(|step| step["decision"] == "carry");
    let because = carry.and_then(|step| step["because"].as_str()).unwrap_or("not within the node");
    match because.starts_with("verdict ") {
        true => Ok(Verdict::Given),
        false => Ok(Verdict::Missing(because.to_owned())),
    }
}

/// Waits until nobody listens at an address any more. A process that this one starts meanwhile holds
/// what is open here, until it has become another program.
pub fn closed(place: &Place, at: SocketAddr) -> Result<()> {
    wait::until_some(format!("nobody to listen at {at}"), wait::SOON, || {
        let any = if at.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        let socket = place.run(|| Socket::new(any, Type::STREAM, Some(Protocol::TCP)))?;
        // Beside connections that have ended, and beside no listener.
        socket.set_reuse_address(true)?;
        socket.bind(&at.into())
    })
}

/// Reads at least a byte, or the end, from a blocking socket whose calls may give up without a reason,
/// as those of accelerated connections.
pub fn read(mut from: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let began = Instant::now();
    loop {
        match from.read(buffer) {
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock && began.elapsed() < LIMIT / 2 => {}
            read => return read,
        }
    }
}

/// The same for all of it.
pub fn read_exact(from: &TcpStream, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match read(from, buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => buffer = &mut buffer[count..],
        }
    }
    Ok(())
}

/// How many connections went straight so far.
pub fn opened(agent: &Agent) -> Result<f64> {
    agent.metric("culvert_direct_connections_total", &["result=\"direct\""])
}

/// Waits until so many more have gone straight.
pub fn straight_again(agent: &Agent, count: u32) -> Result<()> {
    let before = opened(agent)?;
    wait::until_some(format!("{count} connections to go straight"), wait::SOON, || {
        let more = opened(agent)? - before;
        if more >= f64::from(count) { Ok(()) } else { Err(anyhow!("{more} have")) }
    })
}

/// How long after a publication connections ended that it no longer permits.
#[derive(Debug)]
pub struct Lateness {
    pub count: f64,
    /// What is promised.
    pub within_100_ms: f64,
    /// What holds on a machine that has other things to do.
    pub within_a_second: f64,
}

impl Lateness {
    pub fn of(agent: &Agent) -> Result<Self> {
        let name = "culvert_direct_revocation_seconds";
        let within =
            |bound: &str| agent.metric(&format!("{name}_bucket"), &[&format!("le=\"{bound}\"")]);
        Ok(Self {
            count: agent.metric(&format!("{name}_count"), &[])?,
            within_100_ms: within("0.1")?,
            within_a_second: within("1.0")?,
        })
    }
}

/// A connection to an echo server over which bytes go both ways without end, each of them checked.
#[derive(Debug)]
pub struct Stream {
    shared: Arc<Shared>,
    thread: JoinHandle<io::Result<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    rounds: AtomicU64,
}

const BLOCK: usize = 16 << 10;

impl Stream {
    pub fn start(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> Result<Self> {
        let stream = connect(mesh, pod, to)?;
        let shared = Arc::new(Shared::default());
        let watched = shared.clone();
        let thread = std::thread::spawn(move || watched.run(stream));
        Ok(Self { shared, thread })
    }

    /// Waits until so many more blocks have come back.
    pub fn wait(&self, rounds: u64) -> Result<()> {
        let before = self.rounds();
        wait::until(format!("{rounds} blocks on a stream"), wait::SOON * 2, || {
            self.rounds() >= before + rounds || self.thread.is_finished()
        })?;
        if self.thread.is_finished() { bail!("the stream has ended") } else { Ok(()) }
    }

    pub fn rounds(&self) -> u64 {
        self.shared.rounds.load(Ordering::Relaxed)
    }

    /// Whether it has ended, by which error.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it cleanly, or says by which error it had ended.
    pub fn stop(self) -> io::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Shared {
    fn run(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut number: u64 = 0;
        let mut back = vec![0; BLOCK];
        while !self.stop.load(Ordering::Relaxed) {
            let block: Vec<u8> =
                (0..BLOCK as u64).map(|at| ((number * 31 + at * 7) % 251) as u8).collect();
            stream.write_all(&block)?;
            read_exact(&stream, &mut back)?;
            if back != block {
                return Err(io::Error::other(format!("block {number} came back as another")));
            }
            number += 1;
            self.rounds.fetch_add(1, Ordering::Relaxed);
        }
        stream.shutdown(std::net::Shutdown::Write)?;
        match stream.read(&mut back)? {
            0 => Ok(()),
            count => Err(io::Error::other(format!("{count} bytes too many"))),
        }
    }
}
