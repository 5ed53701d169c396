//! TCP segments out of IP packets; pure and free of panics on any bytes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What a packet is, as far as the ledger cares.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Packet<'p> {
    Tcp(Segment<'p>),
    /// Another IP protocol (its number), such as ICMPv6's neighbour discovery.
    Other(u8),
    /// Not IP, such as ARP.
    NotIp,
}

/// One TCP segment.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Segment<'p> {
    pub(super) from: SocketAddr,
    pub(super) to: SocketAddr,
    pub(super) sequence: u32,
    pub(super) syn: bool,
    pub(super) ack: bool,
    pub(super) payload: &'p [u8],
}

/// Reads a packet from its network header on.
pub(super) fn parse(packet: &[u8]) -> Packet<'_> {
    let parsed = match packet.first().map(|byte| byte >> 4) {
        Some(4) => v4(packet),
        Some(6) => v6(packet),
        _ => None,
    };
    parsed.unwrap_or(Packet::NotIp)
}

fn v4(packet: &[u8]) -> Option<Packet<'_>> {
    let header = usize::from(packet.first()? & 0xf) * 4;
    let total = usize::from(u16_at(packet, 2)?);
    let protocol = *packet.get(9)?;
    let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
    let destination: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
    // Segmentation offload leaves the length zero when the packet is larger than it can say.
    let end = if total == 0 { packet.len() } else { total.min(packet.len()) };
    let body = packet.get(header..end)?;
    transport(protocol, Ipv4Addr::from(source).into(), Ipv4Addr::from(destination).into(), body)
}

fn v6(packet: &[u8]) -> Option<Packet<'_>> {
    let length = usize::from(u16_at(packet, 4)?);
    let protocol = *packet.get(6)?;
    let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
    let destination: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    let end = if length == 0 { packet.len() } else { (40 + length).min(packet.len()) };
    let body = packet.get(40..end)?;
    transport(protocol, Ipv6Addr::from(source).into(), Ipv6Addr::from(destination).into(), body)
}

fn transport(protocol: u8, from: IpAddr, to: IpAddr, body: &[u8]) -> Option<Packet<'_>> {
    if protocol != libc::IPPROTO_TCP as u8 {
        return Some(Packet::Other(protocol));
    }
    let flags = *body.get(13)?;
    let header = usize::from(*body.get(12)? >> 4) * 4;
    Some(Packet::Tcp(Segment {
        from: SocketAddr::new(from, u16_at(body, 0)?),
        to: SocketAddr::new(to, u16_at(body, 2)?),
        sequence: u32::from_be_bytes(body.get(4..8)?.try_into().ok()?),
        syn: flags & 0x02 != 0,
        ack: flags & 0x10 != 0,
        payload: body.get(header..)?,
    }))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}
