//! Reads the headers of HTTP/2 frames as they pass, without keeping their payloads.

use crate::hbone::windows::PeerWindows;

/// RFC 9113 section 6.
const HEADERS: u8 = 0x1;
const SETTINGS: u8 = 0x4;
const GOAWAY: u8 = 0x7;
const WINDOW_UPDATE: u8 = 0x8;
const ACK: u8 = 0x1;
const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 0x3;
const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 0x4;

/// Of the frames that are read, the longest unit kept: a frame's header.
const KEPT: usize = 9;

/// A position in the peer's bytes. Whether they are valid HTTP/2 is for `h2` to judge; nonsense
/// here yields at most nonsense windows of the peer's own connection.
#[derive(Debug)]
pub(super) struct Scanner {
    kept: [u8; KEPT],
    filled: usize,
    state: State,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Payload that is of no interest; this many bytes are left of it.
    Skip(u64),
    Header,
    /// SETTINGS entries of 6 bytes each; bytes left.
    Settings(u32),
    /// The 4 bytes of a WINDOW_UPDATE.
    Update {
        stream: u32,
    },
}

impl Scanner {
    pub(super) fn new(preface: u64) -> Self {
        Self { kept: [0; KEPT], filled: 0, state: State::Skip(preface) }
    }

    pub(super) fn scan(&mut self, mut bytes: &[u8], peer: &PeerWindows) {
        loop {
            let wanted = match self.state {
                State::Skip(left) => {
                    let skipped = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    bytes = bytes.get(skipped..).unwrap_or_default();
                    match left.saturating_sub(skipped as u64) {
                        0 => self.state = State::Header,
                        left => {
                            self.state = State::Skip(left);
                            return;
                        }
                    }
                    continue;
                }
                State::Header => KEPT,
                State::Settings(_) => 6,
                State::Update { .. } => 4,
            };
            let taken = bytes.len().min(wanted - self.filled);
            let (now, later) = bytes.split_at(taken);
            for (slot, byte) in self.kept.iter_mut().skip(self.filled).zip(now) {
                *slot = *byte;
            }
            self.filled += taken;
            bytes = later;
            if self.filled < wanted {
                return;
            }
            self.filled = 0;
            self.state = self.next(peer);
        }
    }

    /// What follows the unit that has just been completed.
    fn next(&self, peer: &PeerWindows) -> State {
        match self.state {
            State::Skip(_) => State::Header,
            State::Header => self.begin_frame(peer),
            State::Settings(left) => {
                let [k0, k1, v0, v1, v2, v3, ..] = self.kept;
                let value = Some(u32::from_be_bytes([v0, v1, v2, v3]));
                match u16::from_be_bytes([k0, k1]) {
                    SETTINGS_INITIAL_WINDOW_SIZE => peer.note_settings(value, None),
                    SETTINGS_MAX_CONCURRENT_STREAMS => peer.note_settings(None, value),
                    _ => {}
                }
                match left.saturating_sub(6) {
                    left if left >= 6 => State::Settings(left),
                    left => State::Skip(left.into()),
                }
            }
            State::Update { stream } => {
                let [a, b, c, d, ..] = self.kept;
                let increment = u32::from_be_bytes([a, b, c, d]) & 0x7fff_ffff;
                match stream {
                    0 => peer.note_connection_update(increment),
                    id => peer.note_stream_update(id, increment),
                }
                State::Header
            }
        }
    }

    fn begin_frame(&self, peer: &PeerWindows) -> State {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = self.kept;
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        let stream = u32::from_be_bytes([s0, s1, s2, s3]) & 0x7fff_ffff;
        match kind {
            SETTINGS if flags & ACK == 0 => {
                peer.note_settings(None, None);
                if length >= 6 { State::Settings(length) } else { State::Skip(length.into()) }
            }
            WINDOW_UPDATE if length == 4 => State::Update { stream },
            GOAWAY => {
                peer.note_goaway();
                State::Skip(length.into())
            }
            HEADERS => {
                peer.note_answer();
                State::Skip(length.into())
            }
            _ => State::Skip(length.into()),
        }
    }
}
