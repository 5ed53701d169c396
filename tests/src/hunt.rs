//! A hunt for connections that are served though it is certain that they are denied.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use culvert_lab::mesh::Running;
use socket2::SockRef;

use crate::LIMIT;

/// Clients that connect without end, and compare what they get with what is known of the policy.
#[derive(Debug)]
pub struct Hunt {
    watch: Arc<Watch>,
    hammers: Vec<JoinHandle<Tally>>,
}

impl Hunt {
    /// One client in `pod` for each of `to`, where [`answer_one`] serves.
    pub fn start(mesh: &Running, pod: &str, to: &[(IpAddr, u16)]) -> Self {
        let watch = Arc::new(Watch::default());
        let hammers = to.iter().map(|to| hammer(mesh, pod, (*to).into(), &watch)).collect();
        Self { watch, hammers }
    }

    /// From now on it is certain that all of them are denied.
    pub fn denied(&self) {
        let before = self.watch.flip.fetch_add(1, Ordering::SeqCst);
        assert_eq!(before % 2, 0, "it was certain before");
    }

    /// From now on it is not.
    pub fn undone(&self) {
        let before = self.watch.flip.fetch_add(1, Ordering::SeqCst);
        assert_eq!(before % 2, 1, "it was not certain before");
    }

    pub fn end(self) -> Tally {
        self.watch.stop.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        self.hammers.into_iter().for_each(|hammer| tally += hammer.join().expect("a client"));
        tally
    }
}

/// A server's part: one byte for one byte.
pub fn answer_one(mut stream: TcpStream, _peer: SocketAddr) {
    if let Ok(1) = stream.read(&mut [0]) {
        // It may have been cut off.
        let _ = stream.write_all(b"y");
        let _ = stream.read(&mut [0]);
    }
}

/// What is known of the policy: the number of the flip, odd while it is certain that it denies.
#[derive(Debug, Default)]
struct Watch {
    flip: AtomicU64,
    stop: AtomicBool,
}

/// Connections, by what was known from their beginning to their end.
#[derive(Debug, Default)]
pub struct Tally {
    /// From before their beginning until after their end.
    pub denied: u64,
    /// Of these: what must never happen.
    pub served_though_denied: u64,
    pub others: u64,
    /// Of the others.
    pub served: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.denied += other.denied;
        self.served_though_denied += other.served_though_denied;
        self.others += other.others;
        self.served += other.served;
    }
}

/// One connection, which counts as served when the application has answered.
fn is_served(to: SocketAddr) -> bool {
    let once = || -> io::Result<bool> {
        let mut stream = TcpStream::connect_timeout(&to, LIMIT)?;
        stream.set_read_timeout(Some(LIMIT))?;
        // Nothing is left waiting, or the ports would not last.
        SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
        stream.write_all(b"x")?;
        Ok(stream.read(&mut [0])? == 1)
    };
    once().unwrap_or(false)
}

fn hammer(mesh: &Running, pod: &str, to: SocketAddr, watch: &Arc<Watch>) -> JoinHandle<Tally> {
    let (netns, watch) = (mesh.pod(pod).place().netns().clone(), watch.clone());
    std::thread::spawn(move || {
        netns.run(|| {
            let mut tally = Tally::default();
            while !watch.stop.load(Ordering::Relaxed) {
                let before = watch.flip.load(Ordering::SeqCst);
                let served = is_served(to);
                let denied = before % 2 == 1 && watch.flip.load(Ordering::SeqCst) == before;
                if denied {
                    tally.denied += 1;
                    tally.served_though_denied += u64::from(served);
                } else {
                    tally.others += 1;
                    tally.served += u64::from(served);
                }
            }
            tally
        })
    })
}
