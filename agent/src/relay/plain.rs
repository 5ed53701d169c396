//! Between two TCP connections.
//!
//! Small reads are copied through the thread's buffer; after a read that fills it the direction
//! turns to splice(2), until the source runs dry.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::task::{Context, Poll, ready};

use tokio::net::TcpStream;

use super::scratch::{self, SCRATCH};
use super::splice::Splice;
use super::tcp::{self, Tcp};
use super::{Counters, RelayError};

/// Rounds that one direction may make before others get their turn.
const TURN: usize = 16;

pub(super) async fn relay<C>(
    client: Tcp,
    server: Tcp,
    counters: &impl Counters,
    closing: impl Future<Output = C>,
) -> Result<(), RelayError<C>> {
    let mut there = Direction::new(client.stream(), server.stream());
    let mut back = Direction::new(server.stream(), client.stream());
    let mut closing = pin!(closing);
    let mut client_broken = pin!(tcp::broken(client.stream()));
    let mut server_broken = pin!(tcp::broken(server.stream()));
    let result = std::future::poll_fn(|cx| {
        if let Poll::Ready(reason) = closing.as_mut().poll(cx) {
            return Poll::Ready(Err(RelayError::Closed(reason)));
        }
        let there = there.poll(cx, |bytes| counters.received(bytes)).map_err(|end| match end {
            End::Read(error) => RelayError::Client(error),
            End::Write(error) => RelayError::Server(error),
        })?;
        let back = back.poll(cx, |bytes| counters.sent(bytes)).map_err(|end| match end {
            End::Read(error) => RelayError::Server(error),
            End::Write(error) => RelayError::Client(error),
        })?;
        if there.is_ready() && back.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if let Poll::Ready(error) = client_broken.as_mut().poll(cx) {
            return Poll::Ready(Err(RelayError::Client(error)));
        }
        server_broken.as_mut().poll(cx).map(|error| Err(RelayError::Server(error)))
    })
    .await;
    match &result {
        Ok(()) => {
            client.finished();
            server.finished();
        }
        Err(RelayError::Client(_)) => {
            there.pass_on_rest(|bytes| counters.received(bytes));
            server.reset_last().await;
        }
        Err(RelayError::Server(_)) => {
            back.pass_on_rest(|bytes| counters.sent(bytes));
            client.reset_last().await;
        }
        Err(RelayError::Tunnel(_) | RelayError::Closed(_)) => {
            client.reset();
            server.reset_last().await;
        }
    }
    result
}

enum End {
    Read(io::Error),
    Write(io::Error),
}

struct Direction<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    state: State,
}

enum State {
    Copy,
    /// What the target did not take of a copied read, from an offset on.
    Rest(Vec<u8>, usize),
    Splice(Splice),
    Finished,
}

impl<'a> Direction<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream) -> Self {
        Self { from, to, state: State::Copy }
    }

    fn poll(&mut self, cx: &mut Context<'_>, count: impl Fn(u64)) -> Poll<Result<(), End>> {
        for _ in 0..TURN {
            let next = match &mut self.state {
                State::Finished => return Poll::Ready(Ok(())),
                State::Copy => ready!(poll_copy(cx, self.from, self.to, &count))?,
                State::Rest(rest, written) => {
                    let waiting = rest.get(*written..).unwrap_or_default();
                    let n = ready!(poll_write(cx, self.to, || self.to.try_write(waiting)))?;
                    count(n as u64);
                    *written += n;
                    if *written < rest.len() {
                        continue;
                    }
                    State::Copy
                }
                State::Splice(splice) if splice.is_empty() => match splice.fill(self.from) {
                    // The pipe goes back until there is bulk again.
                    Ok(0) => State::Copy,
                    Ok(_) => continue,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => State::Copy,
                    // Told once only: the next read would find a clean end.
                    Err(error) => return Poll::Ready(Err(End::Read(error))),
                },
                State::Splice(splice) => {
                    let n = ready!(poll_write(cx, self.to, || splice.drain(self.to)))?;
                    count(n as u64);
                    continue;
                }
            };
            self.state = match next {
                State::Finished => self.finish()?,
                other => other,
            };
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Passes on what the source sent before it failed, as far as the target takes it at once. That
    /// may have come together with the failure, which was noticed first.
    fn pass_on_rest(mut self, count: impl Fn(u64)) {
        for _ in 0..TURN {
            let moved = match &mut self.state {
                State::Finished => return,
                State::Copy => tcp::move_now(self.from, self.to),
                State::Rest(rest, written) => {
                    let waiting = rest.get(*written..).unwrap_or_default();
                    let moved = tcp::write_now(self.to, waiting);
                    *written += moved.unwrap_or_default();
                    moved.filter(|_| *written == rest.len())
                }
                State::Splice(splice) if splice.is_empty() => Some(0),
                State::Splice(splice) => splice.drain(self.to).ok().filter(|_| splice.is_empty()),
            };
            let Some(moved) = moved else { return };
            count(moved as u64);
            self.state = State::Copy;
        }
    }

    fn finish(&self) -> Result<State, End> {
        match tcp::shutdown_write(self.to) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(End::Write(error)),
            _ => Ok(State::Finished),
        }
    }
}

fn poll_copy(
    cx: &mut Context<'_>,
    from: &TcpStream,
    to: &TcpStream,
    count: impl Fn(u64),
) -> Poll<Result<State, End>> {
    ready!(from.poll_read_ready(cx)).map_err(End::Read)?;
    scratch::with(|buffer| {
        let n = match tcp::read(from, buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Poll::Ready(Ok(State::Copy));
            }
            Err(error) => return Poll::Ready(Err(End::Read(error))),
        };
        if n == 0 {
            return Poll::Ready(Ok(State::Finished));
        }
        let data = buffer.get(..n).unwrap_or_default();
        let written = match to.try_write(data) {
            Ok(written) => written,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
            Err(error) => return Poll::Ready(Err(End::Write(error))),
        };
        count(written as u64);
        if written < n {
            let rest = data.get(written..).unwrap_or_default();
            return Poll::Ready(Ok(State::Rest(rest.to_vec(), 0)));
        }
        if n < SCRATCH {
            return Poll::Ready(Ok(State::Copy));
        }
        // Without a pipe (no descriptors left, say) copying goes on.
        Poll::Ready(Ok(Splice::new().map_or(State::Copy, State::Splice)))
    })
}

fn poll_write(
    cx: &mut Context<'_>,
    to: &TcpStream,
    mut write: impl FnMut() -> io::Result<usize>,
) -> Poll<Result<usize, End>> {
    loop {
        match write() {
            Ok(n) => return Poll::Ready(Ok(n)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ready!(to.poll_write_ready(cx)).map_err(End::Write)?;
            }
            Err(error) => return Poll::Ready(Err(End::Write(error))),
        }
    }
}
