//! Cases about the bytes themselves: none is lost, none comes before another, and none takes memory
//! without bound.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::stage::{Family, Pair, Stage, pause};
use super::{Fault, Seen, Trial, Tried};
use crate::capture::trial::{poll, receive};

pub(super) const TRIALS: &[Trial] = &[
    Trial {
        name: "order",
        expected: "48 MiB in pieces of many sizes arrive in their order",
        run: order,
    },
    Trial { name: "both ways at once", expected: "24 MiB each way arrive whole", run: both_ways },
    Trial {
        name: "stalled reader",
        expected: "who does not read takes no more memory than with TCP, and loses nothing",
        run: stalled,
    },
    Trial {
        name: "slow reader",
        expected: "order is kept while the reader stops and goes on",
        run: slow,
    },
    Trial {
        name: "MSG_WAITALL",
        expected: "order is kept, and a call returns all it was asked for",
        run: wait_all,
    },
    Trial { name: "sendfile", expected: "a file that is sent arrives whole", run: send_file },
    Trial {
        name: "short connections",
        expected: "3000 short connections of both families carry what was sent",
        run: short_connections,
    },
];

const SIZES: [usize; 9] = [1, 7, 100, 1_448, 4_096, 16_384, 65_536, 300_000, 31];
const MIB: u64 = 1 << 20;

/// Bytes that tell where they belong.
pub(super) struct Pattern(Vec<u8>);

impl Pattern {
    pub fn new(seed: u32) -> Pattern {
        // A prime number of bytes, so that no size of pieces falls into step with it.
        let mut state = seed | 1;
        let bytes = (0..1_048_573).map(|_| {
            // xorshift32
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            state as u8
        });
        Pattern(bytes.collect())
    }

    pub fn piece(&self, at: u64, length: usize) -> Vec<u8> {
        let start = (at % self.0.len() as u64) as usize;
        self.0.iter().cycle().skip(start).take(length).copied().collect()
    }

    pub fn check(&self, at: u64, bytes: &[u8]) -> Result<(), Fault> {
        let mut start = (at % self.0.len() as u64) as usize;
        let mut rest = bytes;
        while !rest.is_empty() {
            let expected = self.0.get(start..).unwrap_or_default();
            let length = expected.len().min(rest.len());
            let (now, later) = rest.split_at(length);
            if now != expected.get(..length).unwrap_or_default() {
                let differs = now.iter().zip(expected).take_while(|(a, b)| a == b).count();
                let place = at + (bytes.len() - rest.len() + differs) as u64;
                return Err(Fault::Lost(format!("byte {place} is another")));
            }
            (start, rest) = (0, later);
        }
        Ok(())
    }
}

/// Sends all of it in pieces of many sizes.
pub(super) fn send(mut to: &TcpStream, pattern: &Pattern, total: u64) -> io::Result<()> {
    let mut at = 0;
    for size in SIZES.into_iter().cycle() {
        let size = size.min(usize::try_from(total - at).unwrap_or(usize::MAX));
        if size == 0 {
            return Ok(());
        }
        to.write_all(&pattern.piece(at, size))?;
        at += size as u64;
    }
    Ok(())
}

/// Reads at least one byte, or the end; tries again where a call gives up without a reason, which is
/// another case's matter.
pub(super) fn read(mut from: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match from.read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                poll(from, libc::POLLIN, Duration::from_millis(100))?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read,
        }
    }
}

/// Reads up to the end, and expects all of it.
pub(super) fn expect(from: &TcpStream, pattern: &Pattern, total: u64) -> Result<(), Fault> {
    let mut buffer = vec![0; 256 << 10];
    let mut at = 0;
    loop {
        match read(from, &mut buffer)? {
            0 if at == total => return Ok(()),
            0 => return Err(Fault::Lost(format!("the end came after {at} of {total} bytes"))),
            count => {
                pattern.check(at, buffer.get(..count).unwrap_or_default())?;
                at += count as u64;
            }
        }
    }
}

/// Sends, then ends the sending.
fn send_and_end(to: &TcpStream, pattern: &Pattern, total: u64) -> Result<(), Fault> {
    send(to, pattern, total)?;
    Ok(to.shutdown(Shutdown::Write)?)
}

/// What a thread of a case came to.
pub(super) fn joined<T>(
    handle: thread::ScopedJoinHandle<'_, Result<T, Fault>>,
) -> Result<T, Fault> {
    handle.join().unwrap_or_else(|_| Err(Fault::Lost("a thread of the case panicked".to_owned())))
}

fn order(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(1);
    thread::scope(|scope| {
        let sending = scope.spawn(|| send_and_end(&client, &pattern, 48 * MIB));
        expect(&server, &pattern, 48 * MIB)?;
        joined(sending)
    })?;
    Ok(Seen::AsWithTcp)
}

fn both_ways(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let (there, back) = (Pattern::new(2), Pattern::new(3));
    let total = 24 * MIB;
    thread::scope(|scope| {
        let sending = [
            scope.spawn(|| send_and_end(&client, &there, total)),
            scope.spawn(|| send_and_end(&server, &back, total)),
        ];
        let reading = scope.spawn(|| expect(&client, &back, total));
        expect(&server, &there, total)?;
        joined(reading)?;
        sending.into_iter().try_for_each(joined)
    })?;
    Ok(Seen::AsWithTcp)
}

/// What both buffers of a TCP connection can grow to together, twice.
fn most_in_flight() -> u64 {
    let largest = |setting: &str| {
        let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{setting}")).ok()?;
        text.split_whitespace().last()?.parse::<u64>().ok()
    };
    let [receive, send] = ["tcp_rmem", "tcp_wmem"].map(|it| largest(it).unwrap_or(8 * MIB));
    2 * (receive + send)
}

fn stalled(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(4);
    let bound = most_in_flight();
    client.set_nonblocking(true)?;
    let mut at = 0;
    loop {
        match (&client).write(&pattern.piece(at, 64 << 10)) {
            Ok(count) => at += count as u64,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Full is what stays full for a while.
                if poll(&client, libc::POLLOUT, Duration::from_millis(300))? & libc::POLLOUT == 0 {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
        if at > bound {
            return Err(Fault::Lost(format!("{at} bytes were taken, and nobody read")));
        }
    }
    client.shutdown(Shutdown::Write)?;
    expect(&server, &pattern, at)?;
    Ok(Seen::AsWithTcp)
}

fn slow(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(5);
    let total = 32 * MIB;
    thread::scope(|scope| {
        let sending = scope.spawn(|| send_and_end(&client, &pattern, total));
        let mut buffer = vec![0; 100_000];
        let (mut at, mut next_stop) = (0, 0);
        loop {
            let count = read(&server, &mut buffer)?;
            pattern.check(at, buffer.get(..count).unwrap_or_default())?;
            at += count as u64;
            if count == 0 {
                break;
            }
            if at >= next_stop {
                // Long enough for the sender to run into full buffers.
                pause(Duration::from_millis(15));
                next_stop = at + MIB;
            }
        }
        if at != total {
            return Err(Fault::Lost(format!("the end came after {at} of {total} bytes")));
        }
        joined(sending)
    })?;
    Ok(Seen::AsWithTcp)
}

fn wait_all(stage: &Stage) -> Tried {
    const WANTED: usize = 60_000;
    const TIMES: usize = 300;
    let mut cut_short = 0;
    // The second time buffers are full at first, so that bytes go both ways round.
    for full in [false, true] {
        let Pair { client, server, .. } = stage.pair()?;
        let pattern = Pattern::new(6);
        let total = (WANTED * TIMES) as u64;
        let sent = AtomicU64::new(0);
        thread::scope(|scope| {
            let sending = scope.spawn(|| -> Result<(), Fault> {
                let mut at = 0;
                while at < total {
                    let size = 9_000.min(usize::try_from(total - at).unwrap_or(usize::MAX));
                    (&client).write_all(&pattern.piece(at, size))?;
                    at += size as u64;
                    sent.store(at, Ordering::Relaxed);
                    // The reader shall wait in the middle of a call.
                    if at / 60_000 % 4 == 0 {
                        pause(Duration::from_micros(100));
                    }
                }
                Ok(client.shutdown(Shutdown::Write)?)
            });
            if full {
                // Full is when something was sent, and no more is.
                let mut before = 0;
                loop {
                    pause(Duration::from_millis(50));
                    let now = sent.load(Ordering::Relaxed);
                    if now > 0 && now == before {
                        break;
                    }
                    before = now;
                }
            }
            let mut buffer = vec![0; WANTED];
            let mut at = 0;
            while at < total {
                match receive(&server, &mut buffer, libc::MSG_WAITALL) {
                    Ok(0) => return Err(Fault::Lost(format!("the end came after {at} bytes"))),
                    Ok(count) => {
                        cut_short += usize::from(count < WANTED && at + (count as u64) < total);
                        pattern.check(at, buffer.get(..count).unwrap_or_default())?;
                        at += count as u64;
                    }
                    Err(error) if error.kind() == ErrorKind::WouldBlock => cut_short += 1,
                    Err(error) => return Err(error.into()),
                }
            }
            joined(sending)
        })?;
    }
    Ok(match cut_short {
        0 => Seen::AsWithTcp,
        count => Seen::Otherwise(format!("{count} calls returned less")),
    })
}

fn send_file(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let most = 8 * MIB;
    // Any file will do, and this one is there.
    let file = fs::File::open("/proc/self/exe")?;
    let total = file.metadata()?.len().min(most);
    let mut expected = Vec::new();
    fs::File::open("/proc/self/exe")?.take(total).read_to_end(&mut expected)?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<(), Fault> {
            // The library uses sendfile(2) or splice(2) for it.
            io::copy(&mut file.take(total), &mut &client)?;
            Ok(client.shutdown(Shutdown::Write)?)
        });
        let mut arrived = Vec::new();
        let mut buffer = vec![0; 256 << 10];
        loop {
            match read(&server, &mut buffer)? {
                0 => break,
                count => arrived.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            }
        }
        if arrived != expected {
            let same = arrived.iter().zip(&expected).take_while(|(a, b)| a == b).count();
            return Err(Fault::Lost(format!("byte {same} is another")));
        }
        joined(sending)
    })?;
    Ok(Seen::AsWithTcp)
}

fn short_connections(stage: &Stage) -> Tried {
    const EACH: usize = 750;
    const LANES: [Family; 4] = [Family::V4, Family::V6, Family::V4, Family::V6];
    let before = stage.kernel().counts()?.joined;
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (lane, family) in LANES.into_iter().enumerate() {
            let (listener, to) = stage.listen(family)?;
            threads.push(scope.spawn(move || -> Result<(), Fault> {
                for _ in 0..EACH {
                    let (server, _) = listener.accept()?;
                    let mut buffer = [0; 4096];
                    loop {
                        match read(&server, &mut buffer)? {
                            0 => break,
                            count => {
                                (&server).write_all(buffer.get(..count).unwrap_or_default())?;
                            }
                        }
                    }
                }
                Ok(())
            }));
            threads.push(scope.spawn(move || -> Result<(), Fault> {
                let pattern = Pattern::new(7 + lane as u32);
                for number in 0..EACH {
                    let client = stage.connect(to)?;
                    let total = (number * 7 % 3_000 + 1) as u64;
                    (&client).write_all(&pattern.piece(0, total as usize))?;
                    client.shutdown(Shutdown::Write)?;
                    expect(&client, &pattern, total)?;
                }
                Ok(())
            }));
        }
        threads.into_iter().try_for_each(joined)
    })?;
    let wanted = (EACH * LANES.len()) as u64;
    match stage.kernel().counts()?.joined - before {
        joined if joined * 10 >= wanted * 9 => Ok(Seen::AsWithTcp),
        joined => Ok(Seen::Otherwise(format!("only {joined} of {wanted} were accelerated"))),
    }
}
