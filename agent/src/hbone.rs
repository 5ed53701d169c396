//! HBONE: application TCP streams as HTTP/2 CONNECT streams inside mutual TLS.
//!
//! HTTP/2 here carries CONNECT and nothing else, which makes it small and lets bytes pass with few
//! copies. Reading order: [`headers`] (what a CONNECT says), [`HboneStream`] (one tunnelled
//! connection), [`client`] and [`pool`] (the source side), [`server`] (the destination side); below
//! them `mux` (what the streams of a connection share), `windows` (what the peer lets us send),
//! `drive` (its socket), `frame` and `hpack` (RFC 9113 and RFC 7541 on the wire), and `keepalive`.
//!
//! # No stream stalls another
//!
//! A reader that stops reading may hold its own stream window, never its neighbours'.
//!
//! * What we receive: the connection window we advertise is [`Settings::max_streams`] stream
//!   windows, so that all streams of a connection can be full at once without exhausting it. That
//!   product bounds what one connection can make us hold: 128 × 512 KiB with the defaults.
//! * What we send: `windows` explains how connections to peers with a scarcer window are used.
//!
//! Absent on purpose: server push, extended CONNECT, trailers, padding, priorities.

use std::time::Duration;

pub mod client;
mod drive;
mod first;
mod frame;
pub mod headers;
mod hpack;
mod keepalive;
mod mux;
pub mod pool;
pub mod server;
mod stream;
mod windows;

pub use first::{First, Source};
pub use frame::Reason;
pub use headers::ConnectHeaders;
pub use mux::ConnectionError;
pub use mux::stream::Sink;
pub use pool::{Dialled, Pool, PoolKey};
pub use server::{Request, serve};
pub use stream::{HboneStream, StreamError, TransferError};

/// HTTP/2 and pool parameters of both roles.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes a peer may send on one stream before we consumed them
    /// (SETTINGS_INITIAL_WINDOW_SIZE).
    pub stream_window: u32,
    /// Streams a peer may have open on one connection (SETTINGS_MAX_CONCURRENT_STREAMS); times
    /// `stream_window` it is the connection's window.
    pub max_streams: u32,
    /// Streams we open on one connection at most, whatever the peer allows.
    pub streams_per_connection: usize,
    /// Connections to one next hop over which streams are spread so that none can stall another,
    /// before a peer with small windows gets its connections filled up.
    pub spread: usize,
    /// The largest frame we receive, in bytes (SETTINGS_MAX_FRAME_SIZE).
    pub max_frame: u32,
    /// Bytes of answer headers accepted by the client role (SETTINGS_MAX_HEADER_LIST_SIZE).
    pub client_header_list: u32,
    /// Bytes of request headers accepted by the server role.
    pub server_header_list: u32,
    /// Time between the establishment or a PONG and the next PING.
    pub ping_interval: Duration,
    /// Time a peer has to answer a PING.
    pub ping_timeout: Duration,
    /// Time after which a pooled connection without streams is closed.
    pub idle: Duration,
    /// Time a client has for the HTTP/2 preface after the TLS handshake.
    pub preface: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            stream_window: 512 << 10,
            max_streams: 128,
            streams_per_connection: 100,
            spread: 256,
            max_frame: 1 << 20,
            client_header_list: 16 << 10,
            server_header_list: 64 << 10,
            ping_interval: Duration::from_secs(10),
            ping_timeout: Duration::from_secs(20),
            idle: Duration::from_secs(300),
            preface: Duration::from_secs(10),
        }
    }
}

impl Settings {
    /// The connection window that lets every stream be full at once, within RFC 9113's maximum.
    fn connection_window(&self) -> u32 {
        let bytes = u64::from(self.stream_window) * u64::from(self.max_streams);
        u32::try_from(bytes).map_or(MAX_WINDOW, |bytes| bytes.min(MAX_WINDOW))
    }
}

/// RFC 9113 section 6.9.1.
const MAX_WINDOW: u32 = (1 << 31) - 1;

#[cfg(test)]
pub(crate) mod tests;
