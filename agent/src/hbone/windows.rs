//! What the peer of one connection lets us send, and how streams share it.
//!
//! # Sharing a scarce connection window
//!
//! Let `W` be the peer's stream window and `C` its connection window. A stream whose reader has
//! stalled keeps what it sent, up to `W`, out of `C`. With `C` below the sum of all stream windows
//! (ztunnel: 16 MiB over 4 MiB; RFC defaults: 64 KiB over 64 KiB) a few such streams use up `C`,
//! and every other stream of the connection stands still.
//!
//! A sender cannot tell a stalled reader from one whose acknowledgement has not come yet: receivers
//! announce new window late, after a third of it (ztunnel's library), a half (nghttp2), or when less than half
//! is left (Envoy's oghttp2). A stream must therefore be let to send somewhat more than `W / 2`
//! unacknowledged bytes, or a healthy one could wait for ever; and this much, here `5 W / 8`, is
//! what a stalled stream costs. nghttp2 also reports only every `C / 2` consumed bytes of the
//! connection, so stalled streams together must leave half of `C` alone. Then any number of streams
//! up to
//!
//! > `n = 1 + (C / 2) / (5 W / 8)`
//!
//! can share a connection and none of them can stop another ([`PeerWindows::safe_streams`]): 4 for
//! ztunnel's windows, 1 for the defaults, as many as we like for our own. The pool puts further
//! streams on further connections. As the destination side we cannot choose where streams go; there
//! a connection whose window is held by stalled streams is retired with a graceful GOAWAY, so that
//! new streams go elsewhere (`server`).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

/// Stream and connection window before any SETTINGS or WINDOW_UPDATE (RFC 9113 section 6.9.2).
pub(super) const INITIAL_WINDOW: u32 = 65_535;

/// The peer's announcements on one connection.
#[derive(Debug)]
pub(super) struct PeerWindows {
    /// Our own stream window.
    own_stream: u32,
    /// Streams that we would like to have on one connection.
    wanted_streams: usize,
    /// The peer's SETTINGS_INITIAL_WINDOW_SIZE.
    stream: AtomicU32,
    /// The largest connection window seen.
    connection: AtomicU64,
    /// The first connection window and all its WINDOW_UPDATEs.
    granted: AtomicU64,
    /// DATA bytes sent on all streams.
    sent: AtomicU64,
    max_streams: AtomicU32,
    settings: AtomicBool,
    /// Nothing more is expected to change the picture of a fresh connection.
    settled: AtomicBool,
    going_away: AtomicBool,
}

impl PeerWindows {
    pub(super) fn new(own_stream: u32, wanted_streams: usize) -> Arc<Self> {
        Arc::new(Self {
            own_stream,
            wanted_streams: wanted_streams.max(1),
            stream: AtomicU32::new(INITIAL_WINDOW),
            connection: AtomicU64::new(INITIAL_WINDOW.into()),
            granted: AtomicU64::new(INITIAL_WINDOW.into()),
            sent: AtomicU64::new(0),
            max_streams: AtomicU32::new(u32::MAX),
            settings: AtomicBool::new(false),
            settled: AtomicBool::new(false),
            going_away: AtomicBool::new(false),
        })
    }

    /// How many streams may share this connection so that none can stall another.
    pub(super) fn safe_streams(&self) -> usize {
        let stream = u64::from(self.stream.load(Relaxed)).max(1);
        let connection = self.connection.load(Relaxed);
        let wanted = self.wanted_streams as u64;
        if connection >= wanted.saturating_mul(stream) {
            return self.wanted_streams;
        }
        let others = (connection / 2) / held_by_stalled(stream);
        usize::try_from(others.saturating_add(1).min(wanted)).unwrap_or(1)
    }

    /// Whether the peer's connection window is smaller than all stream windows together.
    pub(super) fn is_scarce(&self) -> bool {
        self.safe_streams() < self.wanted_streams
    }

    /// Streams the peer allows on the connection, as of its last SETTINGS.
    pub(super) fn max_streams(&self) -> usize {
        usize::try_from(self.max_streams.load(Relaxed)).unwrap_or(usize::MAX)
    }

    /// Unacknowledged bytes that one stream may have, or `None` if its own window is the limit.
    pub(super) fn unacknowledged_limit(&self) -> Option<u64> {
        let safe = self.safe_streams();
        let limited = safe > 1 && safe < self.wanted_streams;
        limited.then(|| held_by_stalled(self.stream.load(Relaxed).into()))
    }

    /// Received bytes whose window may be returned to the peer together: few enough that a peer
    /// that counts on a third of the window is not kept waiting.
    pub(super) fn returned_together(&self) -> u32 {
        self.own_stream / 4
    }

    pub(super) fn is_settled(&self) -> bool {
        self.settled.load(Relaxed)
    }

    pub(super) fn is_going_away(&self) -> bool {
        self.going_away.load(Relaxed)
    }

    pub(super) fn note_sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }

    /// SETTINGS arrived, with these values in it.
    pub(super) fn note_settings(&self, stream_window: Option<u32>, max_streams: Option<u32>) {
        if let Some(window) = stream_window {
            self.stream.store(window, Relaxed);
        }
        if let Some(max) = max_streams {
            self.max_streams.store(max, Relaxed);
        }
        self.settings.store(true, Relaxed);
    }

    /// WINDOW_UPDATE for the connection. It follows the first SETTINGS of a peer that wants more
    /// than the default, so it settles the connection.
    pub(super) fn note_connection_update(&self, increment: u32) {
        let granted = self.granted.fetch_add(increment.into(), Relaxed) + u64::from(increment);
        let open = granted.saturating_sub(self.sent.load(Relaxed));
        self.connection.fetch_max(open, Relaxed);
        if self.settings.load(Relaxed) {
            self.settle();
        }
    }

    /// The peer has answered something after its SETTINGS.
    pub(super) fn note_answer(&self) {
        if self.settings.load(Relaxed) {
            self.settle();
        }
    }

    pub(super) fn note_goaway(&self) {
        self.going_away.store(true, Relaxed);
    }

    fn settle(&self) {
        self.settled.store(true, Relaxed);
    }
}

/// What a stalled stream may keep of the connection's window, for a stream window of `stream`.
fn held_by_stalled(stream: u64) -> u64 {
    stream / 8 * 5 + stream % 8 + 1
}

#[cfg(test)]
mod tests;
