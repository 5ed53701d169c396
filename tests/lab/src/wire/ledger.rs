//! The account of a recording.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;

use super::HBONE_PORT;
use super::packet::{Packet, Segment, parse};

type ByPort<T> = BTreeMap<u16, T>;

/// Everything that was seen on a wire.
#[derive(Debug, Default)]
pub struct Ledger {
    /// All packets, of any kind.
    pub packets: u64,
    /// Bytes of TCP payload on connections to the HBONE port, retransmissions not counted.
    pub tunnel_bytes: u64,
    /// Whole TLS records seen on them.
    pub tls_records: u64,
    /// Bytes on them that could not be checked, because a packet before them was missed.
    pub unchecked_bytes: u64,
    /// Payload that is not TLS on the HBONE port, or on any other port, by the lower of both ports.
    pub clear: ByPort<Clear>,
    /// Attempts to connect (SYN without ACK) by destination port, repeated ones counted once.
    pub attempts: ByPort<u64>,
    /// Packets of IP protocols other than TCP, by number.
    pub other: BTreeMap<u8, u64>,
    /// Packets that are not IP.
    pub not_ip: u64,
    /// Packets lost before they could be looked at. Nothing can be said about them.
    pub dropped: u32,
    streams: HashMap<(SocketAddr, SocketAddr), Stream>,
    begun: HashSet<(SocketAddr, SocketAddr, u32)>,
}

/// Payload that was readable on the wire.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Clear {
    /// Segments with payload.
    pub segments: u64,
    /// Bytes of payload.
    pub bytes: u64,
    /// How the first of it began.
    pub sample: Vec<u8>,
}

/// One direction of a connection to or from the HBONE port.
#[derive(Debug)]
struct Stream {
    next: u32,
    /// Bytes left of the TLS record that is passing by.
    left: usize,
    /// The beginning of a record header that was cut by a segment's end.
    header: Vec<u8>,
    lost: bool,
}

impl Ledger {
    /// Whether all TCP payload was TLS on the HBONE port, and there was some.
    pub fn only_tls(&self) -> bool {
        self.clear.is_empty() && self.tls_records > 0
    }

    /// Takes one packet into account, given from its network header on.
    pub fn note(&mut self, packet: &[u8]) {
        self.packets += 1;
        match parse(packet) {
            Packet::Tcp(segment) => self.tcp(&segment),
            Packet::Other(protocol) => *self.other.entry(protocol).or_default() += 1,
            Packet::NotIp => self.not_ip += 1,
        }
    }

    fn tcp(&mut self, segment: &Segment<'_>) {
        let attempt = (segment.from, segment.to, segment.sequence);
        if segment.syn && !segment.ack && self.begun.insert(attempt) {
            *self.attempts.entry(segment.to.port()).or_default() += 1;
        }
        let tunnel = segment.to.port() == HBONE_PORT || segment.from.port() == HBONE_PORT;
        if tunnel {
            self.tunnel(segment);
        } else if !segment.payload.is_empty() {
            self.in_clear(segment, segment.payload);
        }
    }

    fn in_clear(&mut self, segment: &Segment<'_>, payload: &[u8]) {
        let port = segment.from.port().min(segment.to.port());
        let clear = self.clear.entry(port).or_default();
        clear.segments += 1;
        clear.bytes += payload.len() as u64;
        if clear.sample.is_empty() {
            clear.sample = payload.iter().copied().take(32).collect();
        }
    }

    fn tunnel(&mut self, segment: &Segment<'_>) {
        let key = (segment.from, segment.to);
        if segment.syn {
            let next = segment.sequence.wrapping_add(1);
            self.streams.insert(key, Stream { next, left: 0, header: Vec::new(), lost: false });
            return;
        }
        if segment.payload.is_empty() {
            return;
        }
        // A stream whose beginning was not seen cannot be cut into records.
        let unseen = Stream { next: segment.sequence, left: 0, header: Vec::new(), lost: true };
        let stream = self.streams.entry(key).or_insert(unseen);
        let fresh = stream.fresh(segment);
        self.tunnel_bytes += fresh.len() as u64;
        if stream.lost {
            self.unchecked_bytes += fresh.len() as u64;
            return;
        }
        match stream.walk(fresh) {
            Ok(records) => self.tls_records += records,
            Err(NotTls) => {
                stream.lost = true;
                self.in_clear(segment, fresh);
            }
        }
    }
}

struct NotTls;

impl Stream {
    /// The part of a segment that has not passed by before. A gap makes the stream a lost one.
    fn fresh<'p>(&mut self, segment: &Segment<'p>) -> &'p [u8] {
        let ahead = segment.sequence.wrapping_sub(self.next) as i32;
        let old = if ahead > 0 {
            self.lost = true;
            0
        } else {
            ahead.unsigned_abs() as usize
        };
        let fresh = segment.payload.get(old..).unwrap_or_default();
        if !fresh.is_empty() {
            let end = segment.sequence.wrapping_add(segment.payload.len() as u32);
            self.next = end;
        }
        fresh
    }

    /// Follows record headers (RFC 8446 section 5.1) through `bytes`; gives the records ended.
    fn walk(&mut self, mut bytes: &[u8]) -> Result<u64, NotTls> {
        let mut records = 0;
        while !bytes.is_empty() {
            if self.left == 0 {
                let missing = 5 - self.header.len().min(5);
                let (header, rest) = bytes.split_at(missing.min(bytes.len()));
                self.header.extend_from_slice(header);
                bytes = rest;
                match self.header.as_slice() {
                    [20..=23, 3, 1 | 3, high, low] => {
                        self.left = usize::from(u16::from_be_bytes([*high, *low]));
                        self.header.clear();
                    }
                    [20..=23, 3, 1 | 3, _] | [20..=23, 3, 1 | 3] | [20..=23, 3] | [20..=23] => {}
                    _ => return Err(NotTls),
                }
                continue;
            }
            let passed = self.left.min(bytes.len());
            self.left -= passed;
            bytes = bytes.split_at(passed).1;
            records += u64::from(self.left == 0);
        }
        Ok(records)
    }
}

impl fmt::Display for Ledger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} packets, {} TLS records in {} bytes on port {HBONE_PORT}",
            self.packets, self.tls_records, self.tunnel_bytes
        )?;
        for (port, clear) in &self.clear {
            let sample = String::from_utf8_lossy(&clear.sample).escape_debug().to_string();
            write!(f, "; {} readable bytes on port {port}: {sample}", clear.bytes)?;
        }
        if self.unchecked_bytes > 0 {
            write!(f, "; {} bytes could not be checked", self.unchecked_bytes)?;
        }
        if self.dropped > 0 {
            write!(f, "; {} packets missed", self.dropped)?;
        }
        Ok(())
    }
}
