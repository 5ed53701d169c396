//! Moves the bytes of one connection, between TCP and a tunnel or between TCP and TCP.
//!
//! What holds for all of them:
//!
//! * The two directions are independent; a clean end (FIN, END_STREAM) of one ends only that one.
//! * An abnormal end stays abnormal: a reset, a broken tunnel connection or a failed write on one
//!   side promptly becomes a reset on the other (TCP RST; RST_STREAM with CONNECT_ERROR, RFC 9113
//!   section 8.5), also while that direction is idle or blocked. Dropping a relay before its end,
//!   even one that was never polled, resets both sides.
//! * Nothing is read before it can be passed on, so no queue grows; a connection without traffic
//!   keeps no buffer.

use std::future::Future;
use std::io;
use std::sync::Arc;

use tokio::net::TcpStream;

use crate::hbone::{HboneStream, StreamError};
use tunnel::Side;

pub use tcp::Tcp;
pub use tunnel::TunnelRelay;

mod plain;
mod scratch;
mod splice;
mod tcp;
mod tunnel;

/// Counts payload bytes while they are moved.
pub trait Counters {
    /// `bytes` went from the side that opened the connection to the other.
    fn received(&self, bytes: u64);
    /// `bytes` went back to the side that opened the connection.
    fn sent(&self, bytes: u64);
}

/// Why a relay ended before both directions had finished; `C` is the reason for closing it.
#[derive(Debug, thiserror::Error)]
pub enum RelayError<C> {
    /// The TCP connection of the side that opened the relayed connection.
    #[error("connection of the client failed: {0}")]
    Client(io::Error),
    /// The TCP connection towards the server.
    #[error("connection to the server failed: {0}")]
    Server(io::Error),
    #[error(transparent)]
    Tunnel(StreamError),
    /// The `closing` future was ready.
    #[error("closed: {0}")]
    Closed(C),
}

impl<C> RelayError<C> {
    /// Whether an endpoint of the connection reset it, which is no failure of the mesh.
    pub fn is_reset(&self) -> bool {
        match self {
            RelayError::Client(error) | RelayError::Server(error) => matches!(
                error.kind(),
                io::ErrorKind::ConnectionReset
                    | io::ErrorKind::BrokenPipe
                    | io::ErrorKind::NotConnected
                    | io::ErrorKind::UnexpectedEof
            ),
            RelayError::Tunnel(StreamError::Reset(_)) => true,
            RelayError::Tunnel(_) | RelayError::Closed(_) => false,
        }
    }
}

/// Relays an application's connection into a tunnel (the source side).
pub fn tcp_hbone<K: Counters + Send + Sync + 'static>(
    client: Tcp,
    tunnel: HboneStream,
    counters: Arc<K>,
) -> TunnelRelay<K> {
    TunnelRelay::new(client, Side::Client, tunnel, counters)
}

/// Relays a tunnel to an application that was dialled for it (the destination side).
pub fn hbone_tcp<K: Counters + Send + Sync + 'static>(
    tunnel: HboneStream,
    server: TcpStream,
    counters: Arc<K>,
) -> TunnelRelay<K> {
    TunnelRelay::new(Tcp::new(server), Side::Server, tunnel, counters)
}

/// Relays between two TCP connections.
///
/// When `closing` is ready, both are reset.
pub fn tcp_tcp<C>(
    client: TcpStream,
    server: TcpStream,
    counters: &impl Counters,
    closing: impl Future<Output = C>,
) -> impl Future<Output = Result<(), RelayError<C>>> {
    plain::relay(Tcp::new(client), Tcp::new(server), counters, closing)
}

#[cfg(test)]
mod tests;
