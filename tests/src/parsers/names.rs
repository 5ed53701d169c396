//! Names of single things: authorities and identities.

use culvert_core::addr::{Authority, HboneAddr, NamespacedHostname};
use culvert_core::identity::Identity;

pub(super) fn authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = text.parse::<NamespacedHostname>() {
        assert_eq!(name.to_string(), text);
    }
    let Ok(authority) = text.parse::<Authority>() else { return };
    assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
    match &authority {
        Authority::Addr(addr) => {
            assert_eq!(*addr, HboneAddr::new(*addr).addr(), "an address is in one form only");
        }
        Authority::Host { host, .. } => {
            assert!(!host.is_empty() && host.len() <= 253);
            assert!(host.parse::<std::net::Ipv4Addr>().is_err(), "{host} is an address");
        }
    }
}

pub(super) fn identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(identity) = text.parse::<Identity>() else { return };
    assert!(identity.is_complete());
    assert_eq!(identity.to_string(), text);
    assert_eq!(text.strip_prefix("spiffe://"), Some(identity.principal().as_str()));
}
