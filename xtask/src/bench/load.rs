//! The load: one process in the client's pod, which prints its figures as JSON.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use culvert_lab::poll::{Interest, Poll};
use culvert_lab::sys::connect_without_waiting;
use serde::{Deserialize, Serialize};

use super::server::{CLOSE, KEEP, MESSAGE};

mod paced;

/// Put load on a benchmark's server
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(long)]
    to: SocketAddr,
    #[arg(long, value_enum)]
    kind: Load,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Requests a second, where they keep a pace
    #[arg(long, default_value_t = 1_000.0)]
    rate: f64,
    /// Beside them a stream to the next port, in gigabits a second
    #[arg(long)]
    beside: Option<f64>,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Load {
    /// Requests over kept connections
    Requests,
    /// Requests over kept connections at a fixed pace, whether or not the last was answered
    Paced,
    /// One request per connection
    Connections,
    /// Bytes in bulk
    Bulk,
    /// Open connections and hold them until the input ends
    Idle,
}

/// What came of it. Times are in seconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// How long it took.
    pub seconds: f64,
    /// Requests answered, or connections served.
    pub count: u64,
    /// Bytes that arrived at the server.
    pub bytes: u64,
    pub p50: f64,
    pub p99: f64,
    pub p999: f64,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    culvert_lab::sys::raise_open_files_limit()?;
    let duration = Duration::from_secs_f64(arguments.seconds);
    let outcome = match arguments.kind {
        Load::Requests => requests(arguments.to, arguments.connections, duration)?,
        Load::Paced => paced::beside(arguments, duration)?,
        Load::Connections => connections(arguments.to, arguments.connections, duration)?,
        Load::Bulk => bulk(arguments.to, arguments.connections, duration)?,
        Load::Idle => return idle(arguments.to, arguments.connections),
    };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

fn request(first: u8) -> [u8; MESSAGE] {
    let mut request = [b'.'; MESSAGE];
    request[0] = first;
    request
}

/// A connection that carries one request at a time.
struct Asker {
    stream: TcpStream,
    have: usize,
    asked: Instant,
}

impl Asker {
    fn open(to: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))
            .with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self { stream, have: 0, asked: Instant::now() })
    }

    fn ask(&mut self, first: u8) -> io::Result<()> {
        self.have = 0;
        self.asked = Instant::now();
        self.stream.write_all(&request(first))
    }

    fn read(&mut self) -> io::Result<Reading> {
        let mut buffer = [0; MESSAGE];
        match self.stream.read(&mut buffer) {
            Ok(0) => Ok(Reading::End),
            Ok(got) => {
                self.have += got;
                Ok(if self.have >= MESSAGE { Reading::Answer } else { Reading::Part })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Reading::Part),
            Err(error) => Err(error),
        }
    }
}

enum Reading {
    Part,
    Answer,
    End,
}

fn requests(to: SocketAddr, count: usize, duration: Duration) -> Result<Outcome> {
    let mut poll = Poll::new()?;
    let mut askers = Vec::new();
    for key in 0..count {
        let asker = Asker::open(to)?;
        poll.add(&asker.stream, key, Interest::Read)?;
        askers.push(asker);
    }
    // Connections made lazily on the way are not what is measured here.
    for phase in [duration / 10, duration] {
        let mut taken = Vec::with_capacity(1 << 16);
        let start = Instant::now();
        for asker in &mut askers {
            asker.ask(KEEP)?;
        }
        let mut asking = count;
        while asking > 0 {
            let mut silent = true;
            for key in poll.wait(Duration::from_secs(10))? {
                silent = false;
                let Some(asker) = askers.get_mut(key) else { continue };
                match asker.read().context("reading an answer")? {
                    Reading::Part => {}
                    Reading::End => bail!("the server closed a kept connection"),
                    Reading::Answer => {
                        taken.push(asker.asked.elapsed().as_secs_f64());
                        if start.elapsed() < phase {
                            asker.ask(KEEP)?;
                        } else {
                            asking -= 1;
                        }
                    }
                }
            }
            if silent {
                bail!("no answer within 10 s");
            }
        }
        if phase == duration {
            return Ok(outcome(start.elapsed(), taken));
        }
    }
    bail!("nothing was measured")
}

fn outcome(took: Duration, mut taken: Vec<f64>) -> Outcome {
    taken.sort_by(f64::total_cmp);
    let at = |part: f64| {
        let index = (part * taken.len() as f64) as usize;
        taken.get(index.min(taken.len().saturating_sub(1))).copied().unwrap_or_default()
    };
    let (p50, p99, p999) = (at(0.5), at(0.99), at(0.999));
    Outcome { seconds: took.as_secs_f64(), count: taken.len() as u64, bytes: 0, p50, p99, p999 }
}

/// Keeps `count` connections going, each closed by the server after one answer, so that no
/// client port is left waiting.
fn connections(to: SocketAddr, count: usize, duration: Duration) -> Result<Outcome> {
    let mut poll = Poll::new()?;
    let mut slots = Vec::new();
    for key in 0..count {
        slots.push(Some(begin(&poll, to, key)?));
    }
    let mut taken = Vec::with_capacity(1 << 16);
    let mut failures = 0u64;
    let start = Instant::now();
    let mut open = count;
    while open > 0 {
        let mut silent = true;
        for key in poll.wait(Duration::from_secs(10))? {
            silent = false;
            let Some(place) = slots.get_mut(key) else { continue };
            let Some(slot) = place else { continue };
            match slot.advance(&poll, key) {
                Ok(false) => continue,
                Ok(true) => taken.push(slot.asker.asked.elapsed().as_secs_f64()),
                Err(_) => failures += 1,
            }
            if failures > 20 && failures * 50 > taken.len() as u64 {
                bail!("{failures} of {} connections failed", taken.len() as u64 + failures);
            }
            if start.elapsed() < duration {
                *place = Some(begin(&poll, to, key)?);
            } else {
                *place = None;
                open -= 1;
            }
        }
        if silent {
            bail!("a connection made no progress within 10 s");
        }
    }
    Ok(outcome(start.elapsed(), taken))
}

struct Slot {
    asker: Asker,
    connected: bool,
}

fn begin(poll: &Poll, to: SocketAddr, key: usize) -> Result<Slot> {
    let stream = connect_without_waiting(to).with_context(|| format!("connecting to {to}"))?;
    poll.add(&stream, key, Interest::Write)?;
    Ok(Slot { asker: Asker { stream, have: 0, asked: Instant::now() }, connected: false })
}

impl Slot {
    /// True when the connection has served its purpose.
    fn advance(&mut self, poll: &Poll, key: usize) -> Result<bool> {
        if !self.connected {
            if let Some(error) = self.asker.stream.take_error()? {
                return Err(error.into());
            }
            self.connected = true;
            let asked = self.asker.asked;
            self.asker.ask(CLOSE)?;
            self.asker.asked = asked;
            poll.change(&self.asker.stream, key, Interest::Read)?;
            return Ok(false);
        }
        match self.asker.read()? {
            Reading::Part | Reading::Answer => Ok(false),
            Reading::End if self.asker.have == MESSAGE => Ok(true),
            Reading::End => bail!("cut off after {} bytes", self.asker.have),
        }
    }
}

fn bulk(to: SocketAddr, count: usize, duration: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let totals: Vec<Result<u64>> = std::thread::scope(|scope| {
        let streams: Vec<_> = (0..count).map(|_| scope.spawn(|| pour(to, duration))).collect();
        streams
            .into_iter()
            .map(|stream| stream.join().unwrap_or_else(|_| bail!("a stream panicked")))
            .collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let bytes = totals.into_iter().sum::<Result<u64>>()?;
    Ok(Outcome { seconds, bytes, ..Outcome::default() })
}

/// Writes as fast as it can, and gives how much the server says that it got.
fn pour(to: SocketAddr, duration: Duration) -> Result<u64> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let block = vec![0x5a; 128 << 10];
    let start = Instant::now();
    while start.elapsed() < duration {
        stream.write_all(&block).context("writing a stream")?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut total = [0; 8];
    read_whole(&mut stream, &mut total).context("reading what arrived")?;
    Ok(u64::from_be_bytes(total))
}

/// Blocking calls may give up on accelerated connections, long before their time is over.
fn read_whole(stream: &mut TcpStream, mut buffer: &mut [u8]) -> io::Result<()> {
    let start = Instant::now();
    while !buffer.is_empty() {
        match stream.read(buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(got) => buffer = buffer.get_mut(got..).unwrap_or_default(),
            Err(error)
                if error.kind() == io::ErrorKind::WouldBlock
                    && start.elapsed() < Duration::from_secs(20) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn idle(to: SocketAddr, count: usize) -> Result<()> {
    let mut held = Vec::new();
    for number in 0..count {
        let mut asker = Asker::open(to).with_context(|| format!("after {number} connections"))?;
        asker.stream.set_nonblocking(false)?;
        asker.stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        asker.ask(KEEP)?;
        let mut answer = [0; MESSAGE];
        asker.stream.read_exact(&mut answer)?;
        held.push(asker);
    }
    println!("holding");
    let mut input = Vec::new();
    io::stdin().read_to_end(&mut input).context("waiting for the input's end")?;
    Ok(())
}
