//! Tables of what the agent knows; columns as `istioctl ztunnel-config` has them.

use std::time::SystemTime;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::answers::Pod;
use super::dump::{Dump, Gateway, Link};
use super::table::Table;

pub(super) fn workloads(dump: &Dump) -> Table {
    let mut table =
        Table::new(&["NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"]);
    let mut workloads: Vec<_> = dump.workloads.iter().map(|entry| &entry.it).collect();
    workloads.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    for workload in workloads {
        let address = match workload.workload_ips.as_slice() {
            [] => workload.hostname.clone(),
            addresses => addresses.join(","),
        };
        table.row(vec![
            workload.namespace.clone(),
            workload.name.clone(),
            address,
            workload.node.clone(),
            waypoint(dump, workload.waypoint.as_ref()),
            workload.protocol.clone(),
        ]);
    }
    table
}

/// The waypoint's service; `NA` when the dump has none for it.
fn waypoint(dump: &Dump, gateway: Option<&Gateway>) -> String {
    match gateway {
        None => "None".to_owned(),
        Some(gateway) => {
            let name = dump.service_names.get(&gateway.destination);
            name.cloned().unwrap_or_else(|| "NA".to_owned())
        }
    }
}

pub(super) fn services(dump: &Dump) -> Table {
    let mut table =
        Table::new(&["NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"]);
    let mut services: Vec<_> = dump.services.iter().map(|entry| &entry.it).collect();
    services.sort_by(|a, b| {
        (&a.namespace, &a.name, &a.hostname).cmp(&(&b.namespace, &b.name, &b.hostname))
    });
    for service in services {
        let endpoints: Vec<&str> = service.endpoints().collect();
        let healthy = |uid: &&&str| dump.healthy.get(**uid).copied().unwrap_or(false);
        table.row(vec![
            service.namespace.clone(),
            service.name.clone(),
            service.addresses().collect::<Vec<_>>().join(","),
            waypoint(dump, service.waypoint.as_ref()),
            format!("{}/{}", endpoints.iter().filter(healthy).count(), endpoints.len()),
        ]);
    }
    table
}

pub(super) fn policies(dump: &Dump) -> Table {
    let mut table =
        Table::new(&["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE", "RULES", "DRY RUN"]);
    let mut policies: Vec<_> = dump.policies.iter().map(|entry| &entry.it).collect();
    policies.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    for policy in policies {
        table.row(vec![
            policy.namespace.clone(),
            policy.name.clone(),
            policy.action.clone(),
            policy.scope.clone(),
            policy.rules.len().to_string(),
            policy.dry_run.to_string(),
        ]);
    }
    table
}

pub(super) fn certificates(dump: &Dump, now: SystemTime) -> Table {
    let mut table = Table::new(&[
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ]);
    let now = OffsetDateTime::from(now);
    for certificate in dump.certificates.iter().map(|entry| &entry.it) {
        let state = match certificate.state.contains("Unavailable") {
            true => "Unavailable".to_owned(),
            false => certificate.state.clone(),
        };
        let mut row = |kind: &str, link: &Link| {
            table.row(vec![
                certificate.identity.clone(),
                kind.to_owned(),
                state.clone(),
                valid(link, now).to_string(),
                hexadecimal(&link.serial_number),
                link.expiration_time.clone(),
                link.valid_from.clone(),
            ]);
        };
        // Without roots of its own the chain ends with the root.
        let (chain, root) =
            match (certificate.root_certs.as_slice(), certificate.cert_chain.as_slice()) {
                ([], [chain @ .., root]) if !chain.is_empty() => {
                    (chain, std::slice::from_ref(root))
                }
                (roots, chain) => (chain, roots),
            };
        for (position, link) in chain.iter().enumerate() {
            row(if position == 0 { "Leaf" } else { "Intermediate" }, link);
        }
        for link in root {
            row("Root", link);
        }
        if chain.is_empty() && root.is_empty() {
            table.row(vec![
                certificate.identity.clone(),
                "Leaf".to_owned(),
                state,
                "false".to_owned(),
                String::new(),
                String::new(),
                String::new(),
            ]);
        }
    }
    table
}

fn valid(link: &Link, now: OffsetDateTime) -> bool {
    let from = OffsetDateTime::parse(&link.valid_from, &Rfc3339);
    let to = OffsetDateTime::parse(&link.expiration_time, &Rfc3339);
    matches!((from, to), (Ok(from), Ok(to)) if from <= now && now <= to)
}

/// Serial numbers have up to 20 bytes (RFC 5280 section 4.1.2.2); what is not decimal stays.
fn hexadecimal(decimal: &str) -> String {
    let digits = decimal.bytes().all(|digit| digit.is_ascii_digit());
    if !digits || decimal.is_empty() || decimal.len() > 64 {
        return decimal.to_owned();
    }
    let mut bytes: Vec<u8> = Vec::new();
    for digit in decimal.bytes() {
        let mut carry = u16::from(digit - b'0');
        for byte in &mut bytes {
            carry += u16::from(*byte) * 10;
            *byte = carry.to_le_bytes()[0];
            carry >>= 8;
        }
        if carry > 0 {
            bytes.push(carry.to_le_bytes()[0]);
        }
    }
    let text: String = bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect();
    match text.trim_start_matches('0') {
        "" => "0".to_owned(),
        text => text.to_owned(),
    }
}

pub(super) fn pods(pods: &[Pod]) -> Table {
    let mut table = Table::new(&[
        "NAMESPACE",
        "POD NAME",
        "SERVICE ACCOUNT",
        "ADDRESS",
        "STATE",
        "CERTIFICATE",
        "INBOUND",
        "OUTBOUND",
        "VERDICTS",
        "NETNS",
    ]);
    for pod in pods {
        let name = if pod.name.is_empty() { &pod.workload } else { &pod.name };
        table.row(vec![
            pod.namespace.clone(),
            name.clone(),
            pod.service_account.clone(),
            pod.addresses.join(","),
            pod.state.clone(),
            pod.certificate.clone().unwrap_or_default(),
            pod.connections.inbound.to_string(),
            pod.connections.outbound.to_string(),
            pod.verdicts.to_string(),
            pod.netns.clone(),
        ]);
    }
    table
}
