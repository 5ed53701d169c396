//! Values written as text, each parsed while it is deserialised so that errors know their line.

use std::fmt;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::time::Duration;

use culvert_core::addr::{NamespacedHostname, NetworkAddress};
use culvert_core::authorization::{Action, PolicyScope};
use culvert_core::service::{BalanceMode, HealthPolicy, IpFamilies, Scope, Visibility};
use culvert_core::workload::{
    ApplicationTunnelProtocol, GatewayDestination, Health, NetworkMode, TunnelProtocol,
};
use ipnet::IpNet;
use serde::de::{Deserialize, Deserializer, Error, Visitor};

/// A value with a written form.
pub(super) trait Written: Sized {
    /// What the written form is, for the library's own messages about other YAML kinds.
    const FORM: &'static str;

    /// The error is a whole clause: what was written, and what it is not.
    fn read(text: &str) -> Result<Self, String>;
}

/// Deserialises from a YAML scalar through [`Written`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Text<T>(pub(super) T);

impl<'de, T: Written> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read<T>(PhantomData<T>);

        impl<T: Written> Visitor<'_> for Read<T> {
            type Value = Text<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(T::FORM)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Text<T>, E> {
                T::read(text).map(Text).map_err(E::custom)
            }
        }

        deserializer.deserialize_str(Read(PhantomData))
    }
}

impl Written for IpAddr {
    const FORM: &'static str = "an IP address";

    fn read(text: &str) -> Result<Self, String> {
        match text.parse::<IpAddr>() {
            Ok(ip) => Ok(ip.to_canonical()),
            Err(_) => Err(format!("{text:?} is not an IP address")),
        }
    }
}

impl Written for IpNet {
    const FORM: &'static str = "a CIDR range";

    fn read(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| {
            format!("{text:?} is not a CIDR range; the prefix length is needed, as in 10.0.0.1/32")
        })
    }
}

impl Written for NetworkAddress {
    const FORM: &'static str = "<network>/<ip>";

    fn read(text: &str) -> Result<Self, String> {
        let parts = text.split_once('/').and_then(|(network, ip)| {
            let ip = ip.parse::<IpAddr>().ok()?.to_canonical();
            Some(NetworkAddress { network: network.into(), ip })
        });
        parts.ok_or_else(|| {
            format!("{text:?} is not <network>/<ip>; in the empty network that is /10.0.0.1")
        })
    }
}

impl Written for GatewayDestination {
    const FORM: &'static str = "<network>/<ip> or <namespace>/<hostname>";

    /// The address form is tried first.
    fn read(text: &str) -> Result<Self, String> {
        if let Ok(address) = NetworkAddress::read(text) {
            return Ok(GatewayDestination::Address(address));
        }
        match text.parse::<NamespacedHostname>() {
            Ok(hostname) => Ok(GatewayDestination::Hostname(hostname)),
            Err(_) => Err(format!("{text:?} is neither <network>/<ip> nor <namespace>/<hostname>")),
        }
    }
}

/// The name of a service among the keys of a workload's `services`.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ServiceKey(pub(super) NamespacedHostname);

impl Written for ServiceKey {
    const FORM: &'static str = "a key <namespace>/<hostname>";

    fn read(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(key) => Ok(ServiceKey(key)),
            Err(_) => Err(format!("key {text:?} is not <namespace>/<hostname>")),
        }
    }
}

impl Written for Duration {
    const FORM: &'static str = "a duration, as 24h";

    fn read(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map_err(|error| format!("{text:?} is not a duration, as 90s or 24h: {error}"))
    }
}

/// Reads an enum from the exact words that stand for its values.
macro_rules! words {
    ($type:ty, $form:literal, { $($word:literal => $value:expr),+ $(,)? }) => {
        impl Written for $type {
            const FORM: &'static str = $form;

            fn read(text: &str) -> Result<Self, String> {
                match text {
                    $($word => Ok($value),)+
                    _ => Err(format!(
                        "{text:?} is not one of {}",
                        [$($word),+].join(", "),
                    )),
                }
            }
        }
    };
}

words!(TunnelProtocol, "HBONE or TCP", {
    "HBONE" => TunnelProtocol::Hbone,
    "TCP" => TunnelProtocol::None,
});
words!(NetworkMode, "Standard or HostNetwork", {
    "Standard" => NetworkMode::Standard,
    "HostNetwork" => NetworkMode::HostNetwork,
});
words!(ApplicationTunnelProtocol, "PROXY or NONE", {
    "PROXY" => ApplicationTunnelProtocol::Proxy,
    "NONE" => ApplicationTunnelProtocol::None,
});
words!(Health, "Healthy or Unhealthy", {
    "Healthy" => Health::Healthy,
    "Unhealthy" => Health::Unhealthy,
});
words!(Scope, "a routing preference", {
    "Region" => Scope::Region,
    "Zone" => Scope::Zone,
    "Subzone" => Scope::Subzone,
    "Node" => Scope::Node,
    "Cluster" => Scope::Cluster,
    "Network" => Scope::Network,
});
words!(BalanceMode, "a load balancing mode", {
    "Standard" => BalanceMode::Standard,
    "Strict" => BalanceMode::Strict,
    "Failover" => BalanceMode::Failover,
    "Passthrough" => BalanceMode::Passthrough,
});
words!(HealthPolicy, "OnlyHealthy or AllowAll", {
    "OnlyHealthy" => HealthPolicy::OnlyHealthy,
    "AllowAll" => HealthPolicy::AllowAll,
});
words!(IpFamilies, "IPv4, IPv6 or Dual", {
    "IPv4" => IpFamilies::Ipv4Only,
    "IPv6" => IpFamilies::Ipv6Only,
    "Dual" => IpFamilies::Dual,
});
words!(Visibility, "Public or Namespace", {
    "Public" => Visibility::Public,
    "Namespace" => Visibility::Namespace,
});
words!(PolicyScope, "a policy scope", {
    "Global" => PolicyScope::Global,
    "Namespace" => PolicyScope::Namespace,
    "WorkloadSelector" => PolicyScope::WorkloadSelector,
});
words!(Action, "Allow or Deny", {
    "Allow" => Action::Allow,
    "Deny" => Action::Deny,
});
