//! The server: one port for each way in which applications talk.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use crate::control;
use crate::place::{Greeting, Place};

mod http;
mod tcp;

/// The ports, and what answers there.
pub mod port {
    /// HTTP: tells who asked and what it sent.
    pub const HTTP: u16 = 8080;
    /// The kubelet's probes.
    pub const HEALTH: u16 = 8081;
    /// The same as [`HTTP`], on another port.
    pub const HTTP_TOO: u16 = 8090;
    /// Sends back what it reads.
    pub const ECHO: u16 = 9000;
    /// Speaks first, then sends back what it reads.
    pub const BANNER: u16 = 9001;
    /// Sends numbered lines, as many and as slowly as asked.
    pub const TRICKLE: u16 = 9002;
    /// Reads until the caller has ended, then answers.
    pub const SUM: u16 = 9003;
    /// UDP: who asked, and what.
    pub const DATAGRAM: u16 = 9004;
    /// The same as [`ECHO`], on the loopback address alone.
    pub const LOOPBACK: u16 = 9009;
}

#[derive(Clone, Debug, clap::Args)]
pub struct Arguments {
    /// How long to go on accepting after having been told to stop, while others still learn of it
    #[arg(long, default_value_t = 3.0)]
    linger: f64,
    /// How long to wait then for open connections
    #[arg(long, default_value_t = 15.0)]
    grace: f64,
}

/// What all ports share.
#[derive(Debug)]
pub struct Shared {
    place: Place,
    ready: AtomicBool,
    open: AtomicUsize,
}

impl Shared {
    fn greeting(&self, stream: &TcpStream, remote: SocketAddr) -> Greeting {
        let plain = |address: SocketAddr| {
            SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
        };
        let local = stream.local_addr().map(plain).unwrap_or_default();
        Greeting { place: self.place.clone(), remote: plain(remote), local }
    }
}

/// Counts a connection while it lives.
struct Open(Arc<Shared>);

impl Open {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(shared))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits for SIGTERM, which the first process of a container would otherwise not even notice.
pub async fn told_to_stop() -> Result<()> {
    let mut stop = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    stop.recv().await;
    Ok(())
}

pub async fn run(arguments: Arguments) -> Result<()> {
    let mut stop = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
    let shared = Arc::new(Shared {
        place: Place::here(),
        ready: AtomicBool::new(true),
        open: AtomicUsize::new(0),
    });
    let (accepting, closed) = watch::channel(true);
    for port in [port::HTTP, port::HTTP_TOO, port::HEALTH] {
        listen(any(port), &shared, &closed, http::serve)?;
    }
    listen(any(port::ECHO), &shared, &closed, tcp::echo)?;
    listen(any(port::BANNER), &shared, &closed, tcp::banner)?;
    listen(any(port::TRICKLE), &shared, &closed, tcp::trickle)?;
    listen(any(port::SUM), &shared, &closed, tcp::sum)?;
    listen(SocketAddr::from(([127, 0, 0, 1], port::LOOPBACK)), &shared, &closed, tcp::echo)?;
    datagrams(&shared).await?;
    control::serve()?;
    eprintln!("serving");
    stop.recv().await;
    shared.ready.store(false, Ordering::Relaxed);
    sleep(Duration::from_secs_f64(arguments.linger)).await;
    // The tasks that accept end with this, and with them their sockets.
    let _ = accepting.send(false);
    let end = Instant::now() + Duration::from_secs_f64(arguments.grace);
    while shared.open.load(Ordering::Relaxed) > 0 && Instant::now() < end {
        sleep(Duration::from_millis(50)).await;
    }
    eprintln!("ended with {} connections open", shared.open.load(Ordering::Relaxed));
    Ok(())
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::from(([0u16; 8], port))
}

/// Accepts at `at`, and serves each connection in a task of its own.
fn listen<F, Done>(
    at: SocketAddr,
    shared: &Arc<Shared>,
    accepting: &watch::Receiver<bool>,
    each: F,
) -> Result<()>
where
    F: Fn(TcpStream, SocketAddr, Arc<Shared>) -> Done + Copy + Send + 'static,
    Done: Future<Output = ()> + Send + 'static,
{
    let listener = listener(at).with_context(|| format!("listening at {at}"))?;
    let (shared, mut accepting) = (Arc::clone(shared), accepting.clone());
    tokio::spawn(async move {
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = accepting.changed() => return,
            };
            let Ok((stream, remote)) = accepted else {
                // Out of descriptors, most likely: some will be free again.
                sleep(Duration::from_millis(10)).await;
                continue;
            };
            // Numbered lines of a few bytes must not wait for each other.
            let _ = stream.set_nodelay(true);
            let (open, shared) = (Open::new(&shared), Arc::clone(&shared));
            tokio::spawn(async move {
                each(stream, remote, shared).await;
                drop(open);
            });
        }
    });
    Ok(())
}

fn listener(at: SocketAddr) -> std::io::Result<TcpListener> {
    let bound = |at: SocketAddr| {
        let socket = if at.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(at)?;
        socket.listen(1024)
    };
    // A machine without IPv6 has the other family still.
    bound(at).or_else(|_| bound(SocketAddr::from(([0, 0, 0, 0], at.port()))))
}

async fn datagrams(shared: &Arc<Shared>) -> Result<()> {
    let socket = match UdpSocket::bind(any(port::DATAGRAM)).await {
        Ok(socket) => socket,
        Err(_) => UdpSocket::bind(("0.0.0.0", port::DATAGRAM)).await.context("listening (UDP)")?,
    };
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let mut buffer = [0; 2048];
        loop {
            let Ok((count, from)) = socket.recv_from(&mut buffer).await else { continue };
            let text = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default());
            let from_ip = SocketAddr::new(from.ip().to_canonical(), from.port());
            let answer = serde_json::json!({
                "pod": shared.place.pod, "node": shared.place.node,
                "remote": from_ip.to_string(), "text": text,
            });
            // Datagrams may be lost.
            let _ = socket.send_to(answer.to_string().as_bytes(), from).await;
        }
    });
    Ok(())
}

/// Writes one line of JSON.
async fn line(stream: &mut TcpStream, value: &impl serde::Serialize) -> std::io::Result<()> {
    let mut text = serde_json::to_string(value).map_err(std::io::Error::other)?;
    text.push('\n');
    stream.write_all(text.as_bytes()).await
}
