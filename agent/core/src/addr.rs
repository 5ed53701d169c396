//! Addresses, each typed by the role it plays.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

/// The port on which every workload of the mesh terminates HBONE.
pub const HBONE_PORT: u16 = 15008;
/// The port on which captured outbound connections arrive.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port on which captured inbound plaintext connections arrive.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// Where the agent answers a pod's questions for names.
pub const DNS_PORT: u16 = 15053;
/// Ports of the agent itself, never a valid destination through it (loop protection).
pub const RESERVED_PORTS: [u16; 4] = [HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, DNS_PORT];

macro_rules! role {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(SocketAddr);

        impl $name {
            /// IPv4-mapped IPv6 addresses become plain IPv4.
            pub fn new(addr: SocketAddr) -> Self {
                Self(SocketAddr::new(addr.ip().to_canonical(), addr.port()))
            }
            pub fn addr(self) -> SocketAddr {
                self.0
            }
            pub fn ip(self) -> IpAddr {
                self.0.ip()
            }
            pub fn port(self) -> u16 {
                self.0.port()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

role! {
    /// Where an application wanted to connect to, before capture changed it.
    OriginalDst
}
role! {
    /// The address an application connects from.
    ClientAddr
}
role! {
    /// Where a tunnel connection is dialled: a workload's, waypoint's or gateway's HBONE listener.
    HboneAddr
}
role! {
    /// Where an application is dialled in plain TCP.
    AppAddr
}

/// The target that a CONNECT request names (RFC 9113 section 8.5, `:authority`).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Authority {
    Addr(SocketAddr),
    Host { host: Arc<str>, port: u16 },
}

/// An `:authority` that is neither `IP:port` nor `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is neither IP:port nor host:port")]
pub struct InvalidAuthority(pub String);

impl Authority {
    pub fn port(&self) -> u16 {
        match self {
            Authority::Addr(addr) => addr.port(),
            Authority::Host { port, .. } => *port,
        }
    }
}

impl FromStr for Authority {
    type Err = InvalidAuthority;

    fn from_str(text: &str) -> Result<Self, InvalidAuthority> {
        if let Ok(addr) = text.parse::<SocketAddr>() {
            let ip = addr.ip().to_canonical();
            return Ok(Authority::Addr(SocketAddr::new(ip, addr.port())));
        }
        let invalid = || InvalidAuthority(text.chars().take(256).collect());
        let (host, port) = text.rsplit_once(':').ok_or_else(invalid)?;
        let decimal = !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
        let port = if decimal { port.parse().ok() } else { None };
        let host_is_plain = !host.is_empty()
            && host.len() <= 253
            && host.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._*".contains(&b));
        match (host_is_plain, port) {
            (true, Some(port)) => Ok(Authority::Host { host: host.into(), port }),
            (true, None) | (false, _) => Err(invalid()),
        }
    }
}

impl fmt::Display for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Authority::Addr(addr) => addr.fmt(f),
            Authority::Host { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// An address within one of the mesh's networks; the empty network is the default one.
/// Written `network/ip`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetworkAddress {
    pub network: Arc<str>,
    pub ip: IpAddr,
}

impl fmt::Display for NetworkAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.ip)
    }
}

/// A range of addresses within one network.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NetworkCidr {
    pub network: Arc<str>,
    pub cidr: IpNet,
}

/// The length of `::ffff:0:0/96`, in which IPv4-mapped addresses lie (RFC 4291 section 2.5.5.2).
const MAPPED_PREFIX: u8 = 96;

/// A range of IPv4-mapped addresses as the IPv4 range that it stands for; any other as it is.
///
/// Addresses are compared without their mapping, so that no connection would ever be in the range
/// as it was written. A wider range than `::ffff:0:0/96` is one of IPv6 and contains no IPv4.
pub fn canonical_range(cidr: IpNet) -> IpNet {
    let IpNet::V6(range) = cidr else { return cidr };
    let mapped = range.addr().to_ipv4_mapped().zip(range.prefix_len().checked_sub(MAPPED_PREFIX));
    mapped.and_then(|(addr, length)| Ipv4Net::new(addr, length).ok()).map_or(cidr, IpNet::V4)
}

/// A hostname as one namespace defines it; the key of a service. Written `namespace/hostname`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespacedHostname {
    pub namespace: Arc<str>,
    pub hostname: Arc<str>,
}

impl fmt::Display for NamespacedHostname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.hostname)
    }
}

impl FromStr for NamespacedHostname {
    type Err = InvalidNamespacedHostname;

    /// Splits at the first `/`.
    fn from_str(text: &str) -> Result<Self, InvalidNamespacedHostname> {
        let (namespace, hostname) =
            text.split_once('/').ok_or_else(|| InvalidNamespacedHostname(text.to_owned()))?;
        Ok(Self { namespace: namespace.into(), hostname: hostname.into() })
    }
}

/// A service key without the `/` between namespace and hostname.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not namespace/hostname")]
pub struct InvalidNamespacedHostname(pub String);

#[cfg(test)]
mod tests;
