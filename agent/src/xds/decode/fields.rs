//! What workloads and services have in common.

use std::net::IpAddr;
use std::sync::Arc;

use culvert_core::addr::NetworkAddress;
use culvert_core::intern::Interner;
use culvert_core::workload::{GatewayAddress, GatewayDestination, PortMap};
use culvert_proto::istio::workload as proto;

use super::Rejection;

/// 4 or 16 bytes in network order.
pub(super) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        _ => None,
    }
}

pub(super) fn address(field: &'static str, bytes: &[u8]) -> Result<IpAddr, Rejection> {
    let invalid = || {
        let length = format!("an address of {} bytes", bytes.len());
        Rejection::invalid(field, length, "is neither IPv4 nor IPv6")
    };
    ip(bytes).ok_or_else(invalid)
}

/// Service port to target port. Peers truncate each to 16 bits; of several for one service port
/// the last counts. `app_protocol` is absent: a proxy of bytes does not look into them.
pub(super) fn ports(ports: Vec<proto::Port>) -> PortMap {
    ports.into_iter().map(|port| (port.service_port as u16, port.target_port as u16)).collect()
}

pub(super) fn port(field: &'static str, port: u32) -> Result<u16, Rejection> {
    u16::try_from(port).map_err(|_| Rejection::invalid(field, port, "is not a port"))
}

pub(super) fn gateway(
    field: &'static str,
    gateway: proto::GatewayAddress,
    interner: &mut Interner,
) -> Result<Arc<GatewayAddress>, Rejection> {
    use proto::gateway_address::Destination;
    let destination = match gateway.destination {
        None => return Err(Rejection::invalid(field, "reference", "has no destination")),
        Some(Destination::Hostname(name)) => {
            GatewayDestination::Hostname(interner.hostname(&name.namespace, &name.hostname))
        }
        // A length has no meaning here: a gateway has one address.
        Some(Destination::Address(at)) => GatewayDestination::Address(NetworkAddress {
            network: interner.text(&at.network),
            ip: address(field, &at.address)?.to_canonical(),
        }),
    };
    let hbone_mtls_port = port(field, gateway.hbone_mtls_port)?;
    Ok(interner.gateway(GatewayAddress { destination, hbone_mtls_port }))
}
