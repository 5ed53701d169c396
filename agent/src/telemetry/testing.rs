//! What tests tell of.
#![allow(clippy::unwrap_used)]

use culvert_core::service::{IpFamilies, Service, Visibility};

use super::{ConnectionContext, Reporter};

/// A tunnel that arrived at 10.1.0.7, of whose ends nothing is known.
pub(crate) fn stranger() -> ConnectionContext {
    ConnectionContext {
        reporter: Reporter::Destination,
        source: None,
        source_identity: None,
        baggage: None,
        destination: None,
        destination_identity: None,
        service: None,
        src: "10.2.0.3:40112".parse().unwrap(),
        dst: "10.1.0.7:15008".parse().unwrap(),
        hbone_addr: None,
        mutual_tls: true,
    }
}

/// A service with a name, and nothing more.
pub(crate) fn service(name: &str, namespace: &str) -> Service {
    Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}.svc.cluster.local").into(),
        vips: Vec::new(),
        cidr_vips: Vec::new(),
        ports: Default::default(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families: IpFamilies::Automatic,
        canonical: true,
        visibility: Visibility::Public,
        fixed_endpoints: Default::default(),
    }
}
