//! The table of open connections, with names in place of addresses.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::answers::Connection;
use super::dump::Dump;
use super::table::{Table, age, bytes};

/// Who has an address, as `name.namespace`; none are known by default.
#[derive(Debug, Default)]
pub(super) struct Names {
    by_address: HashMap<IpAddr, String>,
    by_uid: HashMap<String, String>,
}

impl Names {
    /// A service's addresses count for more than a workload's.
    pub(super) fn of(dump: &Dump) -> Names {
        let mut names = Names::default();
        for workload in dump.workloads.iter().map(|entry| &entry.it) {
            let name = format!("{}.{}", workload.name, workload.namespace);
            for ip in workload.workload_ips.iter().filter_map(|ip| ip.parse().ok()) {
                names.by_address.insert(ip, name.clone());
            }
            names.by_uid.insert(workload.uid.clone(), name);
        }
        for service in dump.services.iter().map(|entry| &entry.it) {
            for ip in service.addresses().filter_map(|ip| ip.parse().ok()) {
                names.by_address.insert(ip, format!("{}.{}", service.name, service.namespace));
            }
        }
        names
    }

    /// `name.namespace:port`, or the text as it is.
    fn socket(&self, text: &str) -> String {
        let addr = text.parse::<SocketAddr>().ok();
        let named = addr.and_then(|addr| Some((self.by_address.get(&addr.ip())?, addr.port())));
        match named {
            Some((name, port)) => format!("{name}:{port}"),
            None => text.to_owned(),
        }
    }

    fn workload(&self, uid: &str) -> String {
        self.by_uid.get(uid).cloned().unwrap_or_else(|| uid.to_owned())
    }
}

pub(super) fn table(mut connections: Vec<Connection>, names: &Names) -> Table {
    let mut table = Table::new(&[
        "WORKLOAD",
        "DIRECTION",
        "LOCAL",
        "REMOTE",
        "REMOTE TARGET",
        "PROTOCOL",
        "PEER",
        "PERMITTED BY",
        "AGE",
        "RECEIVED",
        "SENT",
    ]);
    connections.sort_by(|a, b| {
        (&a.workload, &a.direction, &a.src).cmp(&(&b.workload, &b.direction, &b.src))
    });
    for connection in connections {
        let inbound = connection.direction.eq_ignore_ascii_case("inbound");
        let (local, remote, peer) = match inbound {
            true => (&connection.target, &connection.src, connection.src_identity),
            false => (&connection.src, &connection.target, connection.dst_identity),
        };
        let asked = match (connection.dst, connection.service) {
            (Some(dst), _) => names.socket(&dst),
            (None, service) => service.unwrap_or_default(),
        };
        let peer = peer.unwrap_or_default();
        table.row(vec![
            names.workload(&connection.workload),
            if inbound { "Inbound" } else { "Outbound" }.to_owned(),
            names.socket(local),
            names.socket(remote),
            asked,
            connection.protocol,
            peer.strip_prefix("spiffe://").unwrap_or(&peer).to_owned(),
            connection.policy.unwrap_or_default(),
            age(Duration::from_secs(connection.opened_seconds_ago)),
            bytes(connection.received),
            bytes(connection.sent),
        ]);
    }
    table
}
