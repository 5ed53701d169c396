//! Cases about waiting: whoever waits for bytes hears of them.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::bytes::{joined, read};
use super::stage::{Family, Pair, Stage};
use super::{Fault, Seen, Trial, Tried};
use crate::capture::trial::{poll, receive};

pub(super) const TRIALS: &[Trial] = &[
    Trial {
        name: "blocking receive",
        expected: "a blocking call returns bytes, the end or an error, and never EAGAIN",
        run: blocking,
    },
    Trial { name: "poll", expected: "poll(2) wakes up when bytes come", run: polled },
    Trial {
        name: "epoll",
        expected: "an edge-triggered epoll(7) wakes up when bytes come",
        run: edges,
    },
    Trial {
        name: "receive time-out",
        expected: "a call with SO_RCVTIMEO waits for as long",
        run: time_out,
    },
];

/// A wake-up that takes longer is lost.
const WAKE_LIMIT: Duration = Duration::from_secs(5);

fn echo(server: &TcpStream) -> Result<(), Fault> {
    let mut buffer = [0; 4096];
    loop {
        match read(server, &mut buffer)? {
            0 => return Ok(()),
            count => (&mut &*server).write_all(buffer.get(..count).unwrap_or_default())?,
        }
    }
}

/// Requests and answers, messages in one direction, and connections whose client ends its sending
/// before it waits: read by calls that wait.
fn blocking(stage: &Stage) -> Tried {
    const TIMES: usize = 5_000;
    let mut without = 0;
    let Pair { client, server, .. } = stage.pair()?;
    thread::scope(|scope| {
        let answering = scope.spawn(|| echo(&server));
        let mut buffer = [0; 256];
        for _ in 0..TIMES {
            (&client).write_all(&[1; 64])?;
            let mut missing = 64;
            while missing > 0 {
                match receive(&client, &mut buffer, 0) {
                    Ok(0) => return Err(Fault::Lost("the end came too early".to_owned())),
                    Ok(count) => missing -= count.min(missing),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => without += 1,
                    Err(error) => return Err(error.into()),
                }
            }
        }
        client.shutdown(Shutdown::Write)?;
        joined(answering)
    })?;
    let Pair { client, server, .. } = stage.pair()?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<(), Fault> {
            for _ in 0..4 * TIMES {
                (&client).write_all(&[1; 200])?;
            }
            Ok(client.shutdown(Shutdown::Write)?)
        });
        let mut buffer = [0; 200];
        let mut missing = 4 * TIMES * 200;
        while missing > 0 {
            match receive(&server, &mut buffer, 0) {
                Ok(0) => return Err(Fault::Lost("the end came too early".to_owned())),
                Ok(count) => missing -= count.min(missing),
                Err(error) if error.kind() == ErrorKind::WouldBlock => without += 1,
                Err(error) => return Err(error.into()),
            }
        }
        joined(sending)
    })?;
    without += halves(stage)?;
    Ok(match without {
        0 => Seen::AsWithTcp,
        count => {
            Seen::Otherwise(format!("EAGAIN {count} times in {} messages", 5 * TIMES + HALVES))
        }
    })
}

const HALVES: usize = 1_600;

/// Many at once, so that what wakes a call comes at any time.
fn halves(stage: &Stage) -> Result<usize, Fault> {
    const LANES: usize = 8;
    thread::scope(|scope| {
        let (mut answering, mut asking) = (Vec::new(), Vec::new());
        for _ in 0..LANES {
            let (listener, to) = stage.listen(Family::V4)?;
            answering.push(scope.spawn(move || -> Result<(), Fault> {
                for _ in 0..HALVES / LANES {
                    let (server, _) = listener.accept()?;
                    scope.spawn(move || echo(&server));
                }
                Ok(())
            }));
            asking.push(scope.spawn(move || -> Result<usize, Fault> {
                (0..HALVES / LANES).map(|_| halve(stage, to)).sum()
            }));
        }
        answering.into_iter().try_for_each(joined)?;
        asking.into_iter().map(joined).sum()
    })
}

fn halve(stage: &Stage, to: SocketAddr) -> Result<usize, Fault> {
    let client = stage.connect(to)?;
    (&client).write_all(&[1; 64])?;
    client.shutdown(Shutdown::Write)?;
    let mut without = 0;
    loop {
        match receive(&client, &mut [0; 256], 0) {
            Ok(0) => return Ok(without),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => without += 1,
            Err(error) => return Err(error.into()),
        }
    }
}

fn polled(stage: &Stage) -> Tried {
    const TIMES: usize = 1_000;
    let Pair { client, server, .. } = stage.pair()?;
    thread::scope(|scope| {
        let answering = scope.spawn(|| -> Result<(), Fault> {
            let mut buffer = [0; 256];
            for number in 0..TIMES {
                if poll(&server, libc::POLLIN, WAKE_LIMIT)? & libc::POLLIN == 0 {
                    return Err(Fault::Lost(format!("message {number} woke nobody")));
                }
                read(&server, &mut buffer)?;
                (&server).write_all(&[2; 8])?;
            }
            Ok(())
        });
        let mut buffer = [0; 256];
        for number in 0..TIMES {
            (&client).write_all(&[1; 8])?;
            if poll(&client, libc::POLLIN, WAKE_LIMIT)? & libc::POLLIN == 0 {
                return Err(Fault::Lost(format!("answer {number} woke nobody")));
            }
            read(&client, &mut buffer)?;
        }
        joined(answering)
    })?;
    Ok(Seen::AsWithTcp)
}

/// The runtime's sockets are registered once, for edges.
fn edges(stage: &Stage) -> Tried {
    const TIMES: usize = 1_000;
    let Pair { client, server, .. } = stage.pair()?;
    thread::scope(|scope| {
        let answering = scope.spawn(|| echo(&server));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            client.set_nonblocking(true)?;
            let mut client = tokio::net::TcpStream::from_std(client)?;
            let mut buffer = [0; 64];
            for number in 0..TIMES {
                client.write_all(&[1; 64]).await?;
                match tokio::time::timeout(WAKE_LIMIT, client.read_exact(&mut buffer)).await {
                    Ok(read) => read?,
                    Err(_) => return Err(Fault::Lost(format!("answer {number} woke nobody"))),
                };
            }
            Ok::<(), Fault>(())
        })?;
        joined(answering)
    })?;
    Ok(Seen::AsWithTcp)
}

fn time_out(stage: &Stage) -> Tried {
    const TIME: Duration = Duration::from_millis(80);
    let Pair { client, server, .. } = stage.pair()?;
    // Something was there before.
    (&client).write_all(&[1; 8])?;
    read(&server, &mut [0; 8])?;
    server.set_read_timeout(Some(TIME))?;
    let began = Instant::now();
    let waited = match receive(&server, &mut [0; 8], 0) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => began.elapsed(),
        Ok(count) => return Err(Fault::Lost(format!("{count} bytes that nobody sent"))),
        Err(error) => return Err(error.into()),
    };
    Ok(match waited < TIME / 2 {
        false => Seen::AsWithTcp,
        true => {
            Seen::Otherwise(format!("it waited {} ms of {}", waited.as_millis(), TIME.as_millis()))
        }
    })
}
