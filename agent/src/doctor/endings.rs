//! Cases about the end of a connection.

use std::io::{ErrorKind, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use socket2::SockRef;

use super::bytes::{Pattern, expect, read, send};
use super::stage::{Pair, Stage};
use super::{Fault, Seen, Trial, Tried};
use crate::capture::direct;
use crate::capture::trial::poll;

pub(super) const TRIALS: &[Trial] = &[
    Trial {
        name: "half-close",
        expected: "after the end of one direction the other goes on; writing after the end fails",
        run: half_close,
    },
    Trial {
        name: "end with data queued",
        expected: "what was sent before the end arrives before the end",
        run: end_behind_data,
    },
    Trial {
        name: "ended by the agent",
        expected: "nothing goes through a connection that was taken away",
        run: taken_away,
    },
    Trial { name: "reset", expected: "the other end sees ECONNRESET", run: reset },
    Trial {
        name: "closed unread",
        expected: "who closes without having read resets the other end",
        run: closed_unread,
    },
];

const SOON: Duration = Duration::from_secs(5);

fn half_close(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    let pattern = Pattern::new(20);
    let total = 40_000;
    send(&client, &pattern, total)?;
    client.shutdown(Shutdown::Write)?;
    if (&client).write(&[1; 8]).is_ok() {
        return Err(Fault::Lost("bytes after the end were taken".to_owned()));
    }
    expect(&server, &pattern, total)?;
    std::thread::scope(|scope| {
        let answering = scope.spawn(|| -> Result<(), Fault> {
            send(&server, &pattern, 50 * total)?;
            Ok(server.shutdown(Shutdown::Write)?)
        });
        expect(&client, &pattern, 50 * total)?;
        super::bytes::joined(answering)
    })?;
    Ok(Seen::AsWithTcp)
}

fn end_behind_data(stage: &Stage) -> Tried {
    for number in 0..50 {
        let Pair { client, server, .. } = stage.pair()?;
        let pattern = Pattern::new(21 + number);
        let total = 30_000;
        send(&client, &pattern, total)?;
        drop(client);
        // The end is there, before anything was read.
        poll(&server, libc::POLLRDHUP, SOON)?;
        expect(&server, &pattern, total)?;
    }
    Ok(Seen::AsWithTcp)
}

fn taken_away(stage: &Stage) -> Tried {
    let Pair { client, server, cookie } = stage.pair()?;
    (&client).write_all(&[1; 8])?;
    read(&server, &mut [0; 8])?;
    let flows = stage.kernel().flows(stage.client.cookie())?;
    let found = flows.into_iter().find(|flow| flow.socket == cookie);
    let flow = found.ok_or_else(|| Fault::Lost("the connection is not listed".to_owned()))?;
    direct::destroy(&flow, Some(&stage.client), Some(&stage.server))?;
    let taken = |from: &TcpStream| {
        let mut from = from;
        (0..20).filter(|_| matches!(from.write(&[1; 8]), Ok(1..))).count()
    };
    match taken(&client) + taken(&server) {
        0 => Ok(Seen::AsWithTcp),
        count => Err(Fault::Lost(format!("{count} messages went through"))),
    }
}

/// What a read says after the other end has gone.
fn after_end(of: &TcpStream) -> Tried {
    poll(of, libc::POLLIN, SOON)?;
    match read(of, &mut [0; 8]) {
        Err(error) if error.kind() == ErrorKind::ConnectionReset => Ok(Seen::AsWithTcp),
        Err(error) => Ok(Seen::Otherwise(format!("the other end saw: {error}"))),
        Ok(0) => Ok(Seen::Otherwise("the other end saw an ordinary end".to_owned())),
        Ok(count) => Err(Fault::Lost(format!("{count} bytes that nobody sent"))),
    }
}

fn reset(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    (&client).write_all(&[1; 8])?;
    read(&server, &mut [0; 8])?;
    SockRef::from(&server).set_linger(Some(Duration::ZERO))?;
    drop(server);
    after_end(&client)
}

fn closed_unread(stage: &Stage) -> Tried {
    let Pair { client, server, .. } = stage.pair()?;
    (&client).write_all(&[1; 8])?;
    poll(&server, libc::POLLIN, SOON)?;
    drop(server);
    after_end(&client)
}
