//! The header that tells an application whose connection it gets (PROXY protocol version 2).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use crate::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
/// TCP over IPv4 and TCP over IPv6.
const TCP4: u8 = 0x11;
const TCP6: u8 = 0x21;
/// Type of the value that holds the peer's SPIFFE URI.
const TLV_IDENTITY: u8 = 0xD0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyHeader {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub identity: Option<Identity>,
}

impl ProxyHeader {
    /// The bytes to send. With addresses of both families, IPv4 is mapped into IPv6.
    pub fn to_bytes(&self) -> Vec<u8> {
        let source = self.source.ip().to_canonical();
        let destination = self.destination.ip().to_canonical();
        let mut content = Vec::new();
        let family = match (source, destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                content.extend(source.octets());
                content.extend(destination.octets());
                TCP4
            }
            (source, destination) => {
                content.extend(mapped(source).octets());
                content.extend(mapped(destination).octets());
                TCP6
            }
        };
        content.extend(self.source.port().to_be_bytes());
        content.extend(self.destination.port().to_be_bytes());
        if let Some(identity) = &self.identity {
            let uri = identity.to_string();
            // Certificates bound the URI's length far below this.
            if let Ok(length) = u16::try_from(uri.len())
                && usize::from(length) + content.len() + 3 <= usize::from(u16::MAX)
            {
                content.push(TLV_IDENTITY);
                content.extend(length.to_be_bytes());
                content.extend(uri.as_bytes());
            }
        }
        let length = u16::try_from(content.len()).expect("bounded where the identity is added");
        let mut bytes = Vec::from(SIGNATURE);
        bytes.extend([VERSION_AND_COMMAND, family]);
        bytes.extend(length.to_be_bytes());
        bytes.extend(content);
        bytes
    }
}

fn mapped(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

#[cfg(test)]
mod tests;
