//! HTTP/2 frames: their headers, the small ones whole, and where each begins in a byte stream.

use std::fmt;

/// What a client sends first (RFC 9113 section 3.4).
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes of a frame's header (RFC 9113 section 4.1).
pub(super) const HEAD: usize = 9;

/// The frame size that every endpoint accepts, and that holds until SETTINGS says otherwise.
pub(super) const LEAST_MAX_FRAME: u32 = 1 << 14;

/// Frame types of RFC 9113 section 6.
pub(super) mod kind {
    pub(in crate::hbone) const DATA: u8 = 0;
    pub(in crate::hbone) const HEADERS: u8 = 1;
    pub(in crate::hbone) const PRIORITY: u8 = 2;
    pub(in crate::hbone) const RST_STREAM: u8 = 3;
    pub(in crate::hbone) const SETTINGS: u8 = 4;
    pub(in crate::hbone) const PUSH_PROMISE: u8 = 5;
    pub(in crate::hbone) const PING: u8 = 6;
    pub(in crate::hbone) const GOAWAY: u8 = 7;
    pub(in crate::hbone) const WINDOW_UPDATE: u8 = 8;
    pub(in crate::hbone) const CONTINUATION: u8 = 9;
}

/// Flags of RFC 9113 section 6.
pub(super) mod flag {
    pub(in crate::hbone) const ACK: u8 = 1;
    pub(in crate::hbone) const END_STREAM: u8 = 1;
    pub(in crate::hbone) const END_HEADERS: u8 = 4;
    pub(in crate::hbone) const PADDED: u8 = 8;
    pub(in crate::hbone) const PRIORITY: u8 = 32;
}

/// Settings of RFC 9113 section 6.5.2.
pub(super) mod setting {
    pub(in crate::hbone) const HEADER_TABLE_SIZE: u16 = 1;
    pub(in crate::hbone) const ENABLE_PUSH: u16 = 2;
    pub(in crate::hbone) const MAX_CONCURRENT_STREAMS: u16 = 3;
    pub(in crate::hbone) const INITIAL_WINDOW_SIZE: u16 = 4;
    pub(in crate::hbone) const MAX_FRAME_SIZE: u16 = 5;
    pub(in crate::hbone) const MAX_HEADER_LIST_SIZE: u16 = 6;
}

/// Why a stream or a connection ends (RFC 9113 section 7).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Reason(u32);

impl Reason {
    pub const NO_ERROR: Self = Self(0);
    pub const PROTOCOL_ERROR: Self = Self(1);
    pub const INTERNAL_ERROR: Self = Self(2);
    pub const FLOW_CONTROL_ERROR: Self = Self(3);
    pub const STREAM_CLOSED: Self = Self(5);
    pub const FRAME_SIZE_ERROR: Self = Self(6);
    pub const REFUSED_STREAM: Self = Self(7);
    pub const CANCEL: Self = Self(8);
    pub const COMPRESSION_ERROR: Self = Self(9);
    pub const CONNECT_ERROR: Self = Self(10);
    pub const ENHANCE_YOUR_CALM: Self = Self(11);

    /// The names of all codes, by number.
    const NAMES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
}

impl From<u32> for Reason {
    fn from(code: u32) -> Self {
        Self(code)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match Self::NAMES.get(self.0 as usize) {
            Some(name) => f.write_str(name),
            None => write!(f, "error code {}", self.0),
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reason({self})")
    }
}

/// The header of a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Head {
    pub(super) length: u32,
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl Head {
    pub(super) fn parse(bytes: [u8; HEAD]) -> Self {
        let [l0, l1, l2, kind, flags, s0, s1, s2, s3] = bytes;
        let length = u32::from_be_bytes([0, l0, l1, l2]);
        let stream = u32::from_be_bytes([s0 & 0x7f, s1, s2, s3]);
        Self { length, kind, flags, stream }
    }

    pub(super) fn bytes(self) -> [u8; HEAD] {
        let [_, l0, l1, l2] = self.length.to_be_bytes();
        let [s0, s1, s2, s3] = self.stream.to_be_bytes();
        [l0, l1, l2, self.kind, self.flags, s0, s1, s2, s3]
    }

    pub(super) fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Appends a frame.
pub(super) fn put(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&Head { length, kind, flags, stream }.bytes());
    out.extend_from_slice(payload);
}

pub(super) fn put_window_update(out: &mut Vec<u8>, stream: u32, increment: u32) {
    put(out, kind::WINDOW_UPDATE, 0, stream, &increment.to_be_bytes());
}

pub(super) fn put_reset(out: &mut Vec<u8>, stream: u32, reason: Reason) {
    put(out, kind::RST_STREAM, 0, stream, &reason.0.to_be_bytes());
}

pub(super) fn put_goaway(out: &mut Vec<u8>, last: u32, reason: Reason) {
    let payload = [last.to_be_bytes(), reason.0.to_be_bytes()].concat();
    put(out, kind::GOAWAY, 0, 0, &payload);
}

pub(super) fn put_settings(out: &mut Vec<u8>, settings: &[(u16, u32)]) {
    let mut payload = Vec::with_capacity(settings.len() * 6);
    for (name, value) in settings {
        payload.extend_from_slice(&name.to_be_bytes());
        payload.extend_from_slice(&value.to_be_bytes());
    }
    put(out, kind::SETTINGS, 0, 0, &payload);
}

/// Appends a header block, in as many frames as the peer's largest frame makes necessary.
pub(super) fn put_headers(out: &mut Vec<u8>, stream: u32, end: bool, block: &[u8], max: u32) {
    let mut kind = kind::HEADERS;
    let mut flags = if end { flag::END_STREAM } else { 0 };
    let mut rest = block;
    loop {
        let (part, after) = rest.split_at(rest.len().min(max as usize));
        if after.is_empty() {
            flags |= flag::END_HEADERS;
        }
        put(out, kind, flags, stream, part);
        if after.is_empty() {
            return;
        }
        (kind, flags, rest) = (kind::CONTINUATION, 0, after);
    }
}

/// What the bytes of a connection hold next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// A part of a DATA frame's payload, padding included; `rest` bytes of it follow.
    Data { head: Head, part: &'a [u8], rest: u32 },
    /// Any other frame, whole.
    Frame { head: Head, payload: &'a [u8] },
}

/// Cuts a byte stream into frames. DATA is passed on as it comes; other frames are kept until they
/// are whole.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    head: [u8; HEAD],
    have: usize,
    /// The frame whose payload comes now, and how much of that is missing.
    current: Option<(Head, u32)>,
    kept: Vec<u8>,
}

/// A frame larger than was allowed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLarge;

impl Cutter {
    /// Takes the next piece off the begin of `bytes`; `None` when it takes more bytes to tell. The
    /// bytes that it took are no longer in `bytes`. DATA frames may be as long as `max_frame`, others
    /// also no longer than `max_whole`.
    pub(super) fn next<'a, 'b: 'a>(
        &'a mut self,
        bytes: &mut &'b [u8],
        max_frame: u32,
        max_whole: u32,
    ) -> Result<Option<Piece<'a>>, TooLarge> {
        let (head, missing) = match self.current {
            Some(current) => current,
            None => {
                self.kept = Vec::new();
                let wanted = HEAD - self.have;
                let (taken, after) = bytes.split_at(wanted.min(bytes.len()));
                let end = self.have + taken.len();
                if let Some(room) = self.head.get_mut(self.have..end) {
                    room.copy_from_slice(taken);
                }
                (self.have, *bytes) = (end, after);
                if end < HEAD {
                    return Ok(None);
                }
                self.have = 0;
                let head = Head::parse(self.head);
                let is_data = head.kind == kind::DATA;
                if head.length > max_frame || !is_data && head.length > max_whole {
                    return Err(TooLarge);
                }
                (head, head.length)
            }
        };
        let (part, after) = bytes.split_at(bytes.len().min(missing as usize));
        let rest = missing - u32::try_from(part.len()).unwrap_or(missing);
        *bytes = after;
        self.current = (rest > 0).then_some((head, rest));
        if head.kind == kind::DATA {
            // Nothing is told of a frame whose payload has not begun to come.
            let told = !part.is_empty() || head.length == 0;
            return Ok(told.then_some(Piece::Data { head, part, rest }));
        }
        if rest > 0 {
            self.kept.extend_from_slice(part);
            return Ok(None);
        }
        if self.kept.is_empty() {
            return Ok(Some(Piece::Frame { head, payload: part }));
        }
        self.kept.extend_from_slice(part);
        Ok(Some(Piece::Frame { head, payload: &self.kept }))
    }
}

#[cfg(test)]
mod tests;
