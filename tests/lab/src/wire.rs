//! Eyes on the wire between two nodes: what went over it, and whether it was only TLS.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use crate::netns::Netns;
use crate::sys::PacketSocket;

mod ledger;
mod packet;

pub use ledger::{Clear, Ledger};

/// The port on which tunnels end, the only one that may carry payload between nodes.
pub const HBONE_PORT: u16 = 15008;

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
/// is missed.
fn record(socket: &PacketSocket, stop: &AtomicBool) -> Result<Ledger> {
    let mut ledger = Ledger::default();
    let mut buffer = vec![0; 1 << 18];
    let mut after_stop = 0;
    loop {
        match socket.receive(&mut buffer).context("reading packets")? {
            Some(packet) => ledger.note(packet),
            None if stop.load(Ordering::Relaxed) => break,
            None => {}
        }
        // A wire that never falls silent must not keep its reader for ever.
        after_stop += u32::from(stop.load(Ordering::Relaxed));
        if after_stop > 100_000 {
            break;
        }
    }
    ledger.dropped = socket.dropped().context("asking for lost packets")?;
    Ok(ledger)
}

#[cfg(test)]
mod tests;
