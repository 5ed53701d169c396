//! Accepting connections on a pod's listeners, until the pod leaves or the agent drains.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use futures_util::FutureExt;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};

use crate::config::Keepalive;
use crate::drain::{DrainWatch, Queued};
use crate::pods::Pod;

/// How long to wait after an error that only time can mend, such as too many open files.
const PAUSE: Duration = Duration::from_millis(50);

/// Ready when the listeners of `pod` are to accept no more; says whose their queues are then.
pub async fn ended(pod: &Pod, mut drain: DrainWatch) -> Queued {
    tokio::select! {
        _ = drain.begun() => drain.queued(),
        () = pod.is_closed() => Queued::Taken,
    }
}

/// Hands each connection of `listener` to `each`, until `end` is ready; then what is queued, unless
/// that is another agent's, so that no connection that the kernel has completed is lost.
pub async fn accept_until(
    listener: &TcpListener,
    end: impl Future<Output = Queued>,
    mut each: impl FnMut(TcpStream, SocketAddr),
) {
    let mut end = std::pin::pin!(end);
    let queued = loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            queued = &mut end => break queued,
        };
        if let Some(pause) = take(accepted, &mut each) {
            tokio::time::sleep(pause).await;
        }
    };
    if queued == Queued::Left {
        return;
    }
    while let Some(accepted) = listener.accept().now_or_never() {
        if take(accepted, &mut each).is_some() {
            break;
        }
    }
}

/// Gives the time to wait when accepting failed for want of something.
fn take(
    accepted: io::Result<(TcpStream, SocketAddr)>,
    each: &mut impl FnMut(TcpStream, SocketAddr),
) -> Option<Duration> {
    match accepted {
        Ok((stream, peer)) => {
            each(stream, SocketAddr::new(peer.ip().to_canonical(), peer.port()));
            None
        }
        Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => None,
        Err(error) => {
            tracing::warn!(%error, "cannot accept a connection");
            Some(PAUSE)
        }
    }
}

/// Readies a listener whose connections are relayed: the kernel gives what it has to each that it
/// accepts, as it does with the linger that it was opened with.
pub fn prepare(listener: &TcpListener, keepalive: Option<Keepalive>) {
    tune(listener, keepalive);
    // An urgent byte arrives in its place. Otherwise reading would leave it out.
    let _ = SockRef::from(listener).set_out_of_band_inline(true);
}

/// No delay for small segments, and kernel keepalive where wanted (tcp(7)).
pub fn tune(socket: &impl AsFd, keepalive: Option<Keepalive>) {
    let socket = SockRef::from(socket);
    // Both are refinements: a socket that refuses them still carries bytes.
    let _ = socket.set_tcp_nodelay(true);
    if let Some(keepalive) = keepalive {
        let keepalive = TcpKeepalive::new()
            .with_time(keepalive.time)
            .with_interval(keepalive.interval)
            .with_retries(keepalive.retries);
        let _ = socket.set_tcp_keepalive(&keepalive);
    }
}

/// Ends a connection so that its other side reads a reset, never an end of file.
pub fn reset(stream: TcpStream) {
    let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
}
