//! A relayed TCP connection that does not end cleanly by accident.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use super::scratch;
use crate::dial;
use crate::hbone::Source;

/// Asks whether reading has stopped at urgent data (tcp(7), asm-generic/sockios.h).
const SIOCATMARK: libc::c_ulong = 0x8905;
/// Asks how many bytes the peer has not acknowledged (tcp(7), linux/sockios.h).
const SIOCOUTQ: libc::c_ulong = libc::TIOCOUTQ;
/// Asks how many of those were not sent yet (linux/sockios.h).
const SIOCOUTQNSD: libc::c_ulong = 0x894b;

/// How long a reset waits for what was sent before it: two attempts, of which the second comes
/// after at least 200 ms (`TCP_RTO_MIN`).
const SETTLE_LIMIT: Duration = Duration::from_millis(500);
/// The first pause while waiting, and the longest.
const SETTLE_PAUSES: (Duration, Duration) = (Duration::from_micros(100), Duration::from_millis(5));

/// How long a peer may ask about a reset, which it does as soon as it has processed it.
const ANSWER_TIME: Duration = Duration::from_millis(500);

/// A connection that ends with a reset, unless it was declared finished: when dropped, and also
/// when the agent is killed. The kernel closes its sockets then, and by itself would send FIN.
pub struct Tcp {
    stream: TcpStream,
}

impl Source for Tcp {
    fn poll_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.stream.poll_read_ready(cx)
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match read(&self.stream, buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                (&*SockRef::from(&self.stream)).read(buffer)
            }
            read => read,
        }
    }
}

impl Tcp {
    pub fn new(stream: TcpStream) -> Self {
        // Without it the other side would see FIN; there is nobody to report a failure to.
        let _ = stream.set_zero_linger();
        // An urgent byte arrives in its place. Otherwise reading would leave it out.
        let _ = SockRef::from(&stream).set_out_of_band_inline(true);
        Self { stream }
    }

    /// One of a listener from which it has both.
    pub fn accepted(stream: TcpStream) -> Self {
        Self { stream }
    }

    pub(super) fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Resets the connection now.
    pub(super) fn reset(&self) {
        let nobody =
            libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
        let length = size_of_val(&nobody) as libc::socklen_t;
        // SAFETY: the kernel reads `length` bytes of `nobody`. It disconnects (tcp(7)).
        let _ = unsafe { libc::connect(self.stream.as_raw_fd(), &raw const nobody, length) };
    }

    /// Resets the connection after what was sent before, which it waits for with a bound, and sees
    /// to it that the peer learns of the reset even when it overtakes some of that.
    pub(super) async fn reset_last(&self) {
        if !keeps_address(&self.stream) {
            return self.reset();
        }
        self.settled().await;
        let all_arrived = unacknowledged(&self.stream) == Some((0, 0));
        let stand_in = if all_arrived { None } else { dial::stand_in(&self.stream).ok().flatten() };
        self.reset();
        if stand_in.is_some() {
            sleep(ANSWER_TIME).await;
        }
    }

    /// Waits, with a bound, until the peer has all that was sent, so that a reset cannot overtake it.
    async fn settled(&self) {
        let (begun, (mut pause, longest)) = (Instant::now(), SETTLE_PAUSES);
        let in_flight = || unacknowledged(&self.stream).is_some_and(|(in_flight, _)| in_flight > 0);
        while in_flight() && begun.elapsed() < SETTLE_LIMIT {
            sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    /// Both directions have ended cleanly: dropping closes in the ordinary way.
    pub(super) fn finished(&self) {
        let _ = SockRef::from(&self.stream).set_linger(None);
    }
}

/// Sends FIN. The peer may have reset the connection already, which shows elsewhere.
pub(super) fn shutdown_write(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).shutdown(Shutdown::Write)
}

/// Ready when the peer resets the connection, whether or not anyone reads or writes.
pub(super) async fn broken(stream: &TcpStream) -> io::Error {
    loop {
        if let Err(error) = stream.ready(Interest::ERROR).await {
            return error;
        }
        match stream.take_error() {
            Ok(Some(error)) | Err(error) => return error,
            Ok(None) => {
                let _ = stream.try_io(Interest::ERROR, || -> io::Result<()> {
                    Err(io::ErrorKind::WouldBlock.into())
                });
            }
        }
    }
}

/// Whether the socket may have an address of somebody else.
fn keeps_address(stream: &TcpStream) -> bool {
    let socket = SockRef::from(stream);
    let v4 = || socket.ip_transparent_v4().unwrap_or_default();
    v4() || socket.ip_transparent_v6().unwrap_or_default()
}

/// How many bytes were sent and not acknowledged, and how many wait to be sent.
fn unacknowledged(stream: &TcpStream) -> Option<(libc::c_int, libc::c_int)> {
    let unsent = ask(stream, SIOCOUTQNSD)?;
    Some((ask(stream, SIOCOUTQ)? - unsent, unsent))
}

/// Reads what is there. A short read ends the readiness without a second system call: with
/// edge-triggered epoll, what comes later raises it again. But one read never goes beyond the begin
/// of urgent data, which may have come earlier.
pub(super) fn read(stream: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
    let mut short = None;
    let read = stream.try_io(Interest::READABLE, || {
        let count = (&*SockRef::from(stream)).read(buffer)?;
        if count > 0 && count < buffer.len() && !is_at_mark(stream) {
            short = Some(count);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    });
    match short {
        Some(count) => Ok(count),
        None => read,
    }
}

/// Writes without asking whether there is room; `None` when nothing was taken.
pub(super) fn write_now(stream: &TcpStream, data: &[u8]) -> Option<usize> {
    (&*SockRef::from(stream)).write(data).ok().filter(|count| *count > 0)
}

/// Moves what there is, at most a buffer full. `None` when there is no more to move, or no room.
pub(super) fn move_now(from: &TcpStream, to: &TcpStream) -> Option<usize> {
    scratch::with(|buffer| {
        let count = read_now(from, buffer)?;
        write_now(to, buffer.get(..count).unwrap_or_default()).filter(|moved| *moved == count)
    })
}

/// Reads without asking whether there is something; `None` when there is nothing.
pub(super) fn read_now(stream: &TcpStream, buffer: &mut [u8]) -> Option<usize> {
    (&*SockRef::from(stream)).read(buffer).ok().filter(|count| *count > 0)
}

fn is_at_mark(stream: &TcpStream) -> bool {
    ask(stream, SIOCATMARK).is_some_and(|answer| answer != 0)
}

/// One of the requests above, each of which answers with a number.
fn ask(stream: &TcpStream, request: libc::c_ulong) -> Option<libc::c_int> {
    let mut answer: libc::c_int = 0;
    // SAFETY: all of these requests write one int, which lives across the call.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), request, &raw mut answer) };
    (result == 0).then_some(answer)
}
