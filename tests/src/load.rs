//! A load of short connections from a pod, each of them accounted for.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Result;
use culvert_lab::mesh::Running;
use culvert_lab::wait;

use crate::LIMIT;

/// What every connection sends and, from an echo server, wants back.
pub const TEXT: &[u8] = b"not to be read on any wire";

/// Threads that open one connection after another until told to stop.
#[derive(Debug)]
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    answered: AtomicU64,
    refused: AtomicU64,
    reset: AtomicU64,
    cut: AtomicU64,
    others: Mutex<Vec<String>>,
}

/// How the connections of a load ended so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The whole text came back, then a clean end.
    pub answered: u64,
    /// `connect` failed with ECONNREFUSED.
    pub refused: u64,
    /// Connected, and then ended with a reset.
    pub reset: u64,
    /// Ended cleanly before the whole text was back: the worst there is.
    pub cut: u64,
    /// Anything else, such as a time-out.
    pub others: Vec<String>,
}

impl Tally {
    /// Connections that did not get their answer.
    pub fn failed(&self) -> u64 {
        self.refused + self.reset + self.cut + self.others.len() as u64
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, refused, reset, cut, others } = self;
        write!(f, "{answered} answered, {refused} refused, {reset} reset, {cut} cut off")?;
        match others.as_slice() {
            [] => Ok(()),
            [first, ..] => write!(f, ", {} other: {first}", others.len()),
        }
    }
}

impl Load {
    /// Starts `threads` threads in `pod`, each calling the echo servers `to` in turn.
    pub fn start(mesh: &Running, pod: &str, to: &[(IpAddr, u16)], threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let to: Vec<SocketAddr> = to.iter().copied().map(SocketAddr::from).collect();
        let threads = (0..threads)
            .map(|_| {
                let (netns, shared) = (mesh.pod(pod).place().netns().clone(), shared.clone());
                let to = to.clone();
                std::thread::spawn(move || netns.run(|| shared.run(&to)))
            })
            .collect();
        Self { shared, threads }
    }

    /// What happened so far.
    pub fn tally(&self) -> Tally {
        self.shared.tally()
    }

    /// Waits until `enough` says so of the tally.
    pub fn wait(&self, what: &str, enough: impl Fn(&Tally) -> bool) -> Result<Tally> {
        wait::until_some(what, wait::SOON * 2, || {
            let tally = self.tally();
            if enough(&tally) { Ok(tally) } else { Err(tally.to_string()) }
        })
    }

    /// Waits until `count` more connections got their answer.
    pub fn wait_answered(&self, count: u64) -> Result<Tally> {
        let before = self.tally().answered;
        self.wait("answers under load", |tally| tally.answered >= before + count)
    }

    /// Ends the load; connections that are open are finished first.
    pub fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.tally()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

impl Shared {
    fn run(&self, to: &[SocketAddr]) {
        for to in to.iter().cycle() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            match once(*to) {
                Ok(true) => count(&self.answered),
                Ok(false) => count(&self.cut),
                Err(error) => self.failed(&error, *to),
            }
        }
    }

    fn failed(&self, error: &io::Error, to: SocketAddr) {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => count(&self.refused),
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => count(&self.reset),
            _ => {
                let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
                others.push(format!("{to}: {error}"));
            }
        }
        // What is refused is refused at once: a load must not become a spinning one.
        std::thread::park_timeout(Duration::from_millis(1));
    }

    fn tally(&self) -> Tally {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Tally {
            answered: get(&self.answered),
            refused: get(&self.refused),
            reset: get(&self.reset),
            cut: get(&self.cut),
            others: self.others.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Whether the whole text came back before the end.
fn once(to: SocketAddr) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    stream.write_all(TEXT)?;
    // The other side may have reset the connection in between; the read tells.
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::with_capacity(TEXT.len());
    stream.read_to_end(&mut answer)?;
    Ok(answer == TEXT)
}
