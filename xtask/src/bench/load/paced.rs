//! Requests at a fixed pace, alone or beside a stream of a fixed rate.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_lab::poll::{Interest, Poll};

use super::super::server::{KEEP, MESSAGE};
use super::{Arguments, Outcome, outcome, request};

/// Pieces in which the stream beside is written.
const PIECE: usize = 64 << 10;

/// The requests, with the stream beside them if one is wanted.
pub(super) fn beside(arguments: &Arguments, duration: Duration) -> Result<Outcome> {
    let Some(gigabits) = arguments.beside else { return requests(arguments, duration) };
    let to = SocketAddr::new(arguments.to.ip(), arguments.to.port() + 1);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| stream(to, gigabits * 1e9 / 8.0, &stop));
        let outcome = requests(arguments, duration);
        stop.store(true, Relaxed);
        let streamed = stream.join().unwrap_or_else(|_| bail!("the stream beside panicked"));
        let (outcome, bytes) = (outcome?, streamed.context("the stream beside")?);
        Ok(Outcome { bytes, ..outcome })
    })
}

/// Keeps to its rate as far as the connection lets it; gives how many bytes it wrote.
fn stream(to: SocketAddr, bytes_per_second: f64, stop: &AtomicBool) -> Result<u64> {
    let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(10))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let piece = vec![0x5a; PIECE];
    let start = Instant::now();
    let mut written = 0u64;
    while !stop.load(Relaxed) {
        let due = (start.elapsed().as_secs_f64() * bytes_per_second) as u64;
        if written >= due {
            std::thread::park_timeout(Duration::from_micros(100));
            continue;
        }
        stream.write_all(&piece)?;
        written += piece.len() as u64;
    }
    Ok(written)
}

/// One connection, which one thread asks on and another reads.
struct Line {
    stream: TcpStream,
    /// When the request under way was due.
    due: Mutex<Instant>,
}

/// Each request has its time; what it waits for a free connection counts as its latency.
fn requests(arguments: &Arguments, duration: Duration) -> Result<Outcome> {
    let mut poll = Poll::new()?;
    let count = arguments.connections.max(1);
    let mut lines = Vec::new();
    for key in 0..count {
        let stream = TcpStream::connect_timeout(&arguments.to, Duration::from_secs(10))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // Whatever is made lazily on the way is there before it counts.
        (&stream).write_all(&request(KEEP))?;
        (&stream).read_exact(&mut [0; MESSAGE])?;
        stream.set_nonblocking(true)?;
        poll.add(&stream, key, Interest::Read)?;
        lines.push(Line { stream, due: Mutex::new(Instant::now()) });
    }
    let (free, freed) = std::sync::mpsc::sync_channel(count);
    (0..count).try_for_each(|key| free.send(key))?;
    let total = (arguments.rate * duration.as_secs_f64()) as usize;
    let pause = Duration::from_secs_f64(1.0 / arguments.rate);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let lines = &lines;
        let asking = scope.spawn(move || ask(lines, &freed, start, pause, total));
        let read = read(&mut poll, lines, &free, total);
        drop(free);
        asking.join().unwrap_or_else(|_| bail!("the asking thread panicked"))?;
        Ok(outcome(start.elapsed(), read?))
    })
}

fn ask(
    lines: &[Line],
    freed: &Receiver<usize>,
    start: Instant,
    pause: Duration,
    total: usize,
) -> Result<()> {
    for number in 0..total {
        let due = start + pause.mul_f64(number as f64);
        while let Some(early) = due.checked_duration_since(Instant::now()) {
            std::thread::park_timeout(early);
        }
        // Without a reader there is nobody to ask for.
        let Ok(key) = freed.recv() else { return Ok(()) };
        let line = lines.get(key).context("no such connection")?;
        *line.due.lock().unwrap_or_else(PoisonError::into_inner) = due;
        (&line.stream).write_all(&request(KEEP)).context("asking")?;
    }
    Ok(())
}

fn read(
    poll: &mut Poll,
    lines: &[Line],
    free: &SyncSender<usize>,
    total: usize,
) -> Result<Vec<f64>> {
    let mut have = vec![0; lines.len()];
    let mut taken = Vec::with_capacity(total);
    while taken.len() < total {
        let mut silent = true;
        for key in poll.wait(Duration::from_secs(10))? {
            silent = false;
            let line = lines.get(key).context("no such connection")?;
            let got = match (&line.stream).read(&mut [0; MESSAGE]) {
                Ok(0) => bail!("the server closed a kept connection"),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error).context("reading an answer"),
            };
            let have = have.get_mut(key).context("no such connection")?;
            *have += got;
            if *have >= MESSAGE {
                *have = 0;
                let due = *line.due.lock().unwrap_or_else(PoisonError::into_inner);
                taken.push(due.elapsed().as_secs_f64());
                // The last answers come when nothing more is asked.
                let _ = free.send(key);
            }
        }
        if silent {
            bail!("no answer within 10 s");
        }
    }
    Ok(taken)
}
