//! Eyes on the wire between two nodes: what went over it, and whether it was only TLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use crate::netns::Netns;
use crate::sys::PacketSocket;

mod ledger;
mod packet;

pub use ledger::{Clear, Ledger};

/// The port on which tunnels end, the only one that may carry payload between nodes.
pub const HBONE_PORT: u16 = 15008;

/// How long a reader that is to stop goes on with a wire that is never silent: enough to read what
/// its socket had queued.
const LAST_PACKETS: Duration = Duration::from_millis(500);

/// A recording in progress.
#[derive(Debug)]
pub struct Wire {
    stop: Arc<AtomicBool>,
    reader: Option<JoinHandle<Result<Ledger>>>,
}

impl Wire {
    /// Records every packet on `interface`, both ways.
    pub fn tap(netns: &Netns, interface: &str) -> Result<Self> {
        let socket = netns.run(|| PacketSocket::open(interface));
        let socket = socket.with_context(|| format!("listening on {interface}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let reader = std::thread::Builder::new()
            .name("wire".to_owned())
            .spawn(move || record(&socket, &stopped))
            .context("starting a thread")?;
        Ok(Self { stop, reader: Some(reader) })
    }

    /// Ends the recording and gives what was seen.
    pub fn finish(mut self) -> Result<Ledger> {
        self.stop.store(true, Ordering::Relaxed);
        let reader = self.reader.take().context("the recording ended before")?;
        reader.join().map_err(|_| anyhow!("the recording thread panicked"))?
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Runs until it was told to stop and then found the wire silent, so that nothing sent before
/// is missed. A wire that never falls silent keeps its reader a little longer only.
fn record(socket: &PacketSocket, stop: &AtomicBool) -> Result<Ledger> {
    let mut ledger = Ledger::default();
    let mut buffer = vec![0; 1 << 18];
    let mut stopped: Option<Instant> = None;
    loop {
        if stopped.is_none() && stop.load(Ordering::Relaxed) {
            stopped = Some(Instant::now());
        }
        match socket.receive(&mut buffer).context("reading packets")? {
            Some(packet) => ledger.note(packet),
            None if stopped.is_some() => break,
            None => {}
        }
        if stopped.is_some_and(|stopped| stopped.elapsed() > LAST_PACKETS) {
            break;
        }
    }
    ledger.close();
    ledger.dropped = socket.dropped().context("asking for lost packets")?;
    Ok(ledger)
}

#[cfg(test)]
mod tests;
