//! Cases about what else an application may ask of its socket.

use std::io::Write;
use std::time::Duration;

use socket2::SockRef;

use super::bytes::{Pattern, joined, read};
use super::stage::{Pair, Stage, pause};
use super::{Fault, Seen, Trial, Tried};
use crate::capture::trial::{poll, receive, set_low_water, splice, unread};

pub(super) const TRIALS: &[Trial] = &[
    Trial {
        name: "SO_RCVLOWAT",
        expected: "a call returns no fewer bytes than were set",
        run: low_water,
    },
    Trial { name: "MSG_PEEK", expected: "what is looked at stays to be read", run: peek },
    Trial { name: "FIONREAD", expected: "it tells how many bytes wait", run: unread_count },
    Trial {
        name: "splice",
        expected: "splice(2) from the socket moves what poll(2) says is there",
        run: spliced,
    },
    Trial {
        name: "urgent data",
        expected: "a byte sent with MSG_OOB is not among the others",
        run: urgent,
    },
];

const SOON: Duration = Duration::from_secs(5);

fn low_water(stage: &Stage) -> Tried {
    const MARK: usize = 10_000;
    let Pair { client, server, .. } = stage.pair()?;
    // Accelerated before it was set.
    (&client).write_all(&[1; 8])?;
    read(&server, &mut [0; 8])?;
    set_low_water(&server, MARK as i32)?;
    let pattern = Pattern::new(40);
    let shortest = std::thread::scope(|scope| {
        let sending = scope.spawn(|| -> Result<(), Fault> {
            for number in 0..200 {
                (&client).write_all(&pattern.piece(number * 1_000, 1_000))?;
                pause(Duration::from_micros(200));
            }
            Ok(client.shutdown(std::net::Shutdown::Write)?)
        });
        let mut buffer = vec![0; 64 << 10];
        let (mut at, mut shortest) = (0, usize::MAX);
        while at < 200_000 {
            match receive(&server, &mut buffer, 0) {
                Ok(0) => return Err(Fault::Lost(format!("the end came after {at} bytes"))),
                Ok(count) => {
                    pattern.check(at, buffer.get(..count).unwrap_or_default())?;
                    at += count as u64;
                    if at < 200_000 {
                        shortest = shortest.min(count);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => shortest = 0,
                Err(error) => return Err(error.into()),
            }
        }
        joined(sending)?;
        Ok::<usize, Fault>(shortest)
    })?;
    Ok(match shortest {
        MARK.. => Seen::AsWithTcp,
        count => Seen::Otherwise(format!("a call returned {count} bytes of {MARK}")),
    })
}

fn peek(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(41);
    (&client).write_all(&pattern.piece(0, 1_000))?;
    poll(&server, libc::POLLIN, SOON)?;
    let mut buffer = [0; 1_000];
    for _ in 0..3 {
        let count = receive(&server, &mut buffer, libc::MSG_PEEK)?;
        pattern.check(0, buffer.get(..count).unwrap_or_default())?;
    }
    let count = read(&server, &mut buffer)?;
    pattern.check(0, buffer.get(..count).unwrap_or_default())?;
    match count {
        1_000 => Ok(Seen::AsWithTcp),
        count => Err(Fault::Lost(format!("{count} of 1000 bytes were left"))),
    }
}

fn unread_count(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    (&client).write_all(&[1; 1_000])?;
    poll(&server, libc::POLLIN, SOON)?;
    Ok(match unread(&server)? {
        1_000 => Seen::AsWithTcp,
        count => Seen::Otherwise(format!("it told {count} of 1000 bytes")),
    })
}

fn spliced(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(42);
    (&client).write_all(&pattern.piece(0, 1_000))?;
    poll(&server, libc::POLLIN, SOON)?;
    server.set_nonblocking(true)?;
    let (mut out, into) = std::io::pipe()?;
    match splice(&server, &into, 1_000) {
        Ok(0) => Ok(Seen::Otherwise("it told of an end that is none".to_owned())),
        Ok(count) => {
            let mut buffer = vec![0; count];
            std::io::Read::read_exact(&mut out, &mut buffer)?;
            pattern.check(0, &buffer)?;
            Ok(Seen::AsWithTcp)
        }
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(Seen::Otherwise(
            "EAGAIN: these bytes are for read(2) only, and later ones may come before them"
                .to_owned(),
        )),
        Err(error) => Err(error.into()),
    }
}

fn urgent(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    (&client).write_all(b"ab")?;
    SockRef::from(&client).send_out_of_band(b"!")?;
    (&client).write_all(b"cd")?;
    client.shutdown(std::net::Shutdown::Write)?;
    let mut arrived = Vec::new();
    let mut buffer = [0; 16];
    loop {
        match read(&server, &mut buffer)? {
            0 => break,
            count => arrived.extend_from_slice(buffer.get(..count).unwrap_or_default()),
        }
    }
    let text = String::from_utf8_lossy(&arrived).into_owned();
    match text.as_str() {
        "abcd" => Ok(Seen::AsWithTcp),
        "ab!cd" => Ok(Seen::Otherwise("it was among the others".to_owned())),
        _ => Err(Fault::Lost(format!("{text:?} arrived"))),
    }
}
