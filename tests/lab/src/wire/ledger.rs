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

impl Clear {
    fn note(&mut self, payload: &[u8]) {
        self.segments += 1;
        self.bytes += payload.len() as u64;
        if self.sample.is_empty() {
            self.sample = payload.iter().copied().take(32).collect();
        }
    }
}

/// How much of one direction is held back while a packet before it has not been seen. Packets of
/// two processors may be seen in another order than they were sent.
const HELD_BYTES: usize = 4 << 20;

/// One direction of a connection to or from the HBONE port.
#[derive(Debug, Default)]
struct Stream {
    /// The sequence numbers of the first byte and of the one that comes next; `None` before the
    /// SYN was seen.
    place: Option<Place>,
    /// Segments that came before their turn, and their bytes in all.
    held: Vec<(u32, Vec<u8>)>,
    held_bytes: usize,
    /// Bytes left of the TLS record that is passing by.
    left: usize,
    /// The beginning of a record header that was cut by a segment's end.
    header: Vec<u8>,
    lost: bool,
}

#[derive(Clone, Copy, Debug)]
struct Place {
    first: u32,
    next: u32,
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
            let port = segment.from.port().min(segment.to.port());
            self.clear.entry(port).or_default().note(segment.payload);
        }
    }

    /// Ends the account: what still waits for a packet before it will not be checked any more.
    pub fn close(&mut self) {
        for stream in self.streams.values_mut() {
            let given_up = stream.give_up();
            self.tunnel_bytes += given_up;
            self.unchecked_bytes += given_up;
        }
    }

    fn tunnel(&mut self, segment: &Segment<'_>) {
        let stream = self.streams.entry((segment.from, segment.to)).or_default();
        let mut given_up = 0;
        if segment.syn {
            let first = segment.sequence.wrapping_add(1);
            match stream.place {
                Some(place) if place.first == first => {}
                Some(_) => {
                    given_up = stream.give_up();
                    *stream = Stream::at(first);
                }
                None => stream.place = Some(Place { first, next: first }),
            }
        } else if !segment.payload.is_empty() {
            stream.held_bytes += segment.payload.len();
            stream.held.push((segment.sequence, segment.payload.to_vec()));
        }
        while let Some(fresh) = stream.due() {
            self.tunnel_bytes += fresh.len() as u64;
            if stream.lost {
                self.unchecked_bytes += fresh.len() as u64;
                continue;
            }
            match stream.walk(&fresh) {
                Ok(records) => self.tls_records += records,
                Err(NotTls) => {
                    stream.lost = true;
                    let port = segment.from.port().min(segment.to.port());
                    self.clear.entry(port).or_default().note(&fresh);
                }
            }
        }
        if stream.held_bytes > HELD_BYTES {
            given_up += stream.give_up();
        }
        self.tunnel_bytes += given_up;
        self.unchecked_bytes += given_up;
    }
}

struct NotTls;

impl Stream {
    fn at(first: u32) -> Self {
        Self { place: Some(Place { first, next: first }), ..Self::default() }
    }

    /// The bytes whose turn it is, without those that have passed by before.
    fn due(&mut self) -> Option<Vec<u8>> {
        let place = self.place.as_mut()?;
        let early = |sequence: u32| sequence.wrapping_sub(place.next) as i32;
        let index = self.held.iter().position(|(sequence, _)| early(*sequence) <= 0)?;
        let (sequence, bytes) = self.held.swap_remove(index);
        self.held_bytes -= bytes.len();
        let old = early(sequence).unsigned_abs() as usize;
        let fresh = bytes.get(old..).unwrap_or_default().to_vec();
        place.next = place.next.wrapping_add(fresh.len() as u32);
        Some(fresh)
    }

    /// Goes on behind what was missed; gives how much cannot be checked.
    fn give_up(&mut self) -> u64 {
        let bytes = std::mem::take(&mut self.held_bytes) as u64;
        if let Some((sequence, last)) = std::mem::take(&mut self.held).last() {
            let end = sequence.wrapping_add(last.len() as u32);
            self.lost = true;
            let first = self.place.map_or(end, |place| place.first);
            self.place = Some(Place { first, next: end });
        }
        bytes
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
