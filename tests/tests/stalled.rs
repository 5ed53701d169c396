//! Readers that stop reading hold up themselves, and nobody else; in bounded memory.

#![allow(clippy::unwrap_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use culvert_lab::mesh::{Mesh, Running};
use culvert_lab::wait;
use culvert_tests::direct::through_agent;
use culvert_tests::{connect, echo, figures, serve};
use socket2::SockRef;

const ECHO: u16 = 8080;
const SOURCE: u16 = 9000;
const SINK: u16 = 9001;

/// More than all buffers between a client and a server hold.
const AMOUNT: u64 = 4 << 20;

/// Requests made while the readers are stalled.
const REQUESTS: usize = 20;

/// What one stalled stream may keep in each agent: its window of at most 1 MiB, and half as much for
/// a relay's block and what lies around the bytes.
const HELD: u64 = 3 << 19;

/// Memory that needs no reason: buffers of threads and tunnels, allocator slack.
const SLACK: u64 = 24 << 20;

/// Kernel buffers of the pods' sockets, the agent's among them: small, so that a stall shows soon.
const BUFFERS: &str = "4096 65536 262144";

/// Sends `AMOUNT` bytes that follow from the request's one byte; counts what it could send.
fn source(mut stream: TcpStream, sent: &AtomicU64) {
    let mut seed = [0];
    if stream.read_exact(&mut seed).is_err() {
        return;
    }
    let mut pattern = Pattern::new(seed[0]);
    let mut block = vec![0; 64 << 10];
    let mut left = AMOUNT;
    while left > 0 {
        pattern.fill(&mut block);
        if stream.write_all(&block).is_err() {
            return;
        }
        left -= block.len() as u64;
        sent.fetch_add(block.len() as u64, Ordering::Relaxed);
    }
    // The client ends it.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read(&mut seed);
}

/// Bytes in an order that nothing else has: what is lost, doubled or swapped shows.
struct Pattern(u64);

impl Pattern {
    fn new(seed: u8) -> Self {
        Self(u64::from(seed) << 32 | 1)
    }

    fn fill(&mut self, block: &mut [u8]) {
        for word in block.chunks_exact_mut(8) {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.copy_from_slice(&self.0.to_be_bytes());
        }
    }

    fn check(&mut self, stream: &mut TcpStream, amount: u64) {
        let mut wanted = vec![0; 64 << 10];
        let mut got = vec![0; wanted.len()];
        for at in (0..amount).step_by(wanted.len()) {
            self.fill(&mut wanted);
            stream.read_exact(&mut got).unwrap();
            assert!(got == wanted, "other bytes after {at}");
        }
    }
}

/// A gate that opens once: who waits at it stalls without using a processor.
#[derive(Clone, Default)]
struct Gate(Arc<(std::sync::Mutex<bool>, std::sync::Condvar)>);

impl Gate {
    fn pass(&self) {
        let opened = self.0.0.lock().unwrap();
        drop(self.0.1.wait_while(opened, |opened| !*opened).unwrap());
    }

    fn open(&self) {
        *self.0.0.lock().unwrap() = true;
        self.0.1.notify_all();
    }
}

/// The middle one of `REQUESTS` round trips, each on a connection of its own.
fn median(mesh: &Running, to: IpAddr) -> Duration {
    let mut times: Vec<Duration> = (0..REQUESTS)
        .map(|_| {
            let begun = Instant::now();
            let mut stream = connect(mesh, "client", (to, ECHO)).unwrap();
            stream.write_all(&[7; 1024]).unwrap();
            let mut answer = [0; 1024];
            stream.read_exact(&mut answer).unwrap();
            begun.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[REQUESTS / 2]
}

/// Waits until `moved` has not moved for a while, and is short of `whole`.
fn wait_stalled(moved: impl Fn() -> u64, whole: u64) {
    let mut last = (moved(), Instant::now());
    wait::until("all to be stalled", wait::SOON * 6, || {
        let now = moved();
        if now != last.0 {
            last = (now, Instant::now());
        }
        last.0 > 0 && last.1.elapsed() > Duration::from_millis(300)
    })
    .unwrap();
    assert!(last.0 < whole, "nothing is stalled: {} of {whole} bytes went through", last.0);
}

fn shrink(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.set_send_buffer_size(64 << 10).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
}

fn mesh() -> Running {
    let mesh = Mesh::new()
        .node("a")
        .pod("client", "web", "client")
        .pod("near", "shop", "near")
        .node("b")
        .pod("far", "shop", "far")
        .start()
        .unwrap();
    for pod in ["client", "near", "far"] {
        for setting in ["net/ipv4/tcp_rmem", "net/ipv4/tcp_wmem"] {
            mesh.pod(pod).place().netns().sysctl(setting, BUFFERS).unwrap();
        }
    }
    mesh
}

/// Clients that do not read, in growing numbers, and then do.
fn stalled_clients(server: &str) {
    let mesh = mesh();
    let sent = Arc::new(AtomicU64::new(0));
    let counted = sent.clone();
    serve(&mesh, server, ECHO, echo).unwrap();
    serve(&mesh, server, SOURCE, move |stream, _| source(stream, &counted)).unwrap();
    let options = through_agent(&mesh);
    let agents = ["a", "b"].map(|node| mesh.agent_with(node, &options).unwrap());
    let to = mesh.pod(server).addresses();
    // The first ones find no tunnel yet.
    median(&mesh, to[0]);
    median(&mesh, to[1]);
    let quiet = median(&mesh, to[0]).max(median(&mesh, to[1]));
    let before = agents.each_ref().map(|agent| figures::resident(agent).unwrap());
    let mut stalled: Vec<(TcpStream, u8)> = Vec::new();
    for count in [1, 4, 8, 100u8] {
        while stalled.len() < usize::from(count) {
            let seed = stalled.len() as u8;
            // All through one pair of addresses, so that they share what there is to share.
            let mut stream = connect(&mesh, "client", (to[0], SOURCE)).unwrap();
            shrink(&stream);
            stream.write_all(&[seed]).unwrap();
            stalled.push((stream, seed));
        }
        wait_stalled(|| sent.load(Ordering::Relaxed), AMOUNT * u64::from(count));
        assert_as_quick(&mesh, to[0], quiet, count);
        for (agent, before) in agents.iter().zip(before) {
            let grown = figures::resident(agent).unwrap().saturating_sub(before);
            let bound = SLACK + HELD * u64::from(count);
            assert!(grown <= bound, "{count} stalled: {} MiB more resident", grown >> 20);
        }
    }
    std::thread::scope(|scope| {
        for (stream, seed) in &mut stalled {
            scope.spawn(|| {
                Pattern::new(*seed).check(stream, AMOUNT);
                assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
            });
        }
    });
    assert_eq!(sent.load(Ordering::Relaxed), AMOUNT * stalled.len() as u64);
}

/// Requests to `to` are answered as when all was quiet, by a generous factor. Something else may keep
/// the machine busy for a while, so there are many attempts; what is stalled stays so.
fn assert_as_quick(mesh: &Running, to: IpAddr, quiet: Duration, stalled: u8) {
    let bound = quiet * 10 + Duration::from_millis(20);
    let what = format!("quick answers beside {stalled} stalled, quiet {quiet:?}");
    wait::until_some(what, wait::SOON, || match median(mesh, to) {
        loaded if loaded < bound => Ok(()),
        loaded => Err(format!("{loaded:?}")),
    })
    .unwrap();
}

#[test]
fn clients_that_do_not_read_hold_up_nobody_across_nodes() {
    stalled_clients("far");
}

#[test]
fn clients_that_do_not_read_hold_up_nobody_on_one_node() {
    stalled_clients("near");
}

/// Servers that do not read what clients send them, in growing numbers, and then do.
fn stalled_servers(server: &str) {
    let mesh = mesh();
    let gate = Gate::default();
    let waiting = gate.clone();
    let taken = Arc::new(AtomicU64::new(0));
    let counted = taken.clone();
    serve(&mesh, server, ECHO, echo).unwrap();
    serve(&mesh, server, SINK, move |mut stream, _| {
        shrink(&stream);
        waiting.pass();
        let mut seed = [0];
        stream.read_exact(&mut seed).unwrap();
        Pattern::new(seed[0]).check(&mut stream, AMOUNT);
        counted.fetch_add(AMOUNT, Ordering::Relaxed);
    })
    .unwrap();
    let options = through_agent(&mesh);
    let agents = ["a", "b"].map(|node| mesh.agent_with(node, &options).unwrap());
    let to = mesh.pod(server).addresses();
    // The first ones find no tunnel yet.
    median(&mesh, to[0]);
    median(&mesh, to[1]);
    let quiet = median(&mesh, to[0]).max(median(&mesh, to[1]));
    let before = agents.each_ref().map(|agent| figures::resident(agent).unwrap());
    let sent = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let mut streams = 0;
        for count in [1, 4, 8, 100u8] {
            for seed in streams..count {
                let mut stream = connect(&mesh, "client", (to[1], SINK)).unwrap();
                shrink(&stream);
                let sent = &sent;
                scope.spawn(move || {
                    stream.write_all(&[seed]).unwrap();
                    let (mut pattern, mut block) = (Pattern::new(seed), vec![0; 64 << 10]);
                    for _ in (0..AMOUNT).step_by(block.len()) {
                        pattern.fill(&mut block);
                        stream.write_all(&block).unwrap();
                        sent.fetch_add(block.len() as u64, Ordering::Relaxed);
                    }
                    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
                });
            }
            streams = count;
            wait_stalled(|| sent.load(Ordering::Relaxed), AMOUNT * u64::from(count));
            assert_as_quick(&mesh, to[1], quiet, count);
            for (agent, before) in agents.iter().zip(before) {
                let grown = figures::resident(agent).unwrap().saturating_sub(before);
                let bound = SLACK + HELD * u64::from(count);
                assert!(grown <= bound, "{count} stalled: {} MiB more resident", grown >> 20);
            }
        }
        gate.open();
    });
    assert_eq!(taken.load(Ordering::Relaxed), AMOUNT * 100);
}

#[test]
fn servers_that_do_not_read_hold_up_nobody_across_nodes() {
    stalled_servers("far");
}

#[test]
fn servers_that_do_not_read_hold_up_nobody_on_one_node() {
    stalled_servers("near");
}
