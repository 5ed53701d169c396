//! Small workloads, services and policies for tests, and a notation for policy rules.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::addr::{NamespacedHostname, NetworkAddress};
use crate::authorization::*;
use crate::service::*;
use crate::snapshot::{Change, Snapshot};
use crate::workload::*;

/// An HBONE pod with the given addresses, whose service account is named as itself.
pub fn pod(namespace: &str, name: &str, addresses: &[&str]) -> Workload {
    Workload {
        uid: format!("c1//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace: namespace.into(),
        trust_domain: "cluster.local".into(),
        service_account: name.into(),
        addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        hostname: "".into(),
        network: "n1".into(),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        node: "".into(),
        cluster_id: "c1".into(),
        locality: Arc::default(),
        native_tunnel: false,
        application_tunnel: None,
        services: Memberships::default(),
        authorization_policies: Vec::new(),
        status: Health::Healthy,
        capacity: 1,
        workload_name: name.into(),
        workload_type: "deployment".into(),
        canonical_name: name.into(),
        canonical_revision: "".into(),
    }
}

/// A service of network `n1`, with the hostname `<name>.<namespace>`.
pub fn service(namespace: &str, name: &str, vips: &[&str], ports: &[(u16, u16)]) -> Service {
    Service {
        name: name.into(),
        namespace: namespace.into(),
        hostname: format!("{name}.{namespace}").into(),
        vips: vips
            .iter()
            .map(|ip| NetworkAddress { network: "n1".into(), ip: ip.parse().unwrap() })
            .collect(),
        cidr_vips: Vec::new(),
        ports: ports.iter().copied().collect(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families: IpFamilies::Automatic,
        canonical: false,
        visibility: Visibility::Public,
        fixed_endpoints: BTreeMap::new(),
    }
}

pub fn balancer(mode: BalanceMode, routing_preferences: &[Scope]) -> LoadBalancer {
    LoadBalancer {
        routing_preferences: routing_preferences.to_vec(),
        mode,
        health_policy: HealthPolicy::OnlyHealthy,
    }
}

/// `namespace/hostname`, to be reached on port 15008.
pub fn by_hostname(name: &str) -> Arc<GatewayAddress> {
    let destination = GatewayDestination::Hostname(key(name));
    Arc::new(GatewayAddress { destination, hbone_mtls_port: 15008 })
}

/// An address on a network, to be reached on port 15008.
pub fn by_address(network: &str, ip: &str) -> Arc<GatewayAddress> {
    let at = NetworkAddress { network: network.into(), ip: ip.parse().unwrap() };
    let destination = GatewayDestination::Address(at);
    Arc::new(GatewayAddress { destination, hbone_mtls_port: 15008 })
}

pub fn key(name: &str) -> NamespacedHostname {
    name.parse().unwrap()
}

impl Workload {
    /// As an endpoint of `namespace/hostname`.
    pub fn behind(mut self, service: &str, ports: &[(u16, u16)]) -> Self {
        self.services.insert(key(service), ports.iter().copied().collect());
        self
    }
}

pub fn snapshot(
    workloads: impl IntoIterator<Item = Workload>,
    services: impl IntoIterator<Item = Service>,
) -> Snapshot {
    let workloads = workloads.into_iter().map(Change::workload);
    Snapshot::default().with(workloads.chain(services.into_iter().map(Change::service)))
}

/// A policy of scope GLOBAL. Each rule is in the notation of [`rule`].
pub fn policy(namespace: &str, name: &str, action: Action, rules: &[&str]) -> Authorization {
    Authorization {
        name: name.into(),
        namespace: namespace.into(),
        scope: PolicyScope::Global,
        action,
        rules: rules.iter().map(|text| rule(text)).collect(),
        dry_run: false,
    }
}

/// Clauses joined by ` and `, each of matches joined by ` or `, each of fields joined by a space:
/// `N=a|b` namespaces exactly a or b, `N^=` prefix, `N$=` suffix, `N?` presence; likewise `P`
/// (principals); `SA=ns/sa`, `SIP=`, `DIP=`, `PORT=`; `!` before a field negates it. `{}` is a
/// match without fields, `any` a clause without matches, the empty text a rule without clauses.
pub fn rule(text: &str) -> Rule {
    let clauses = text.split(" and ").filter(|clause| !clause.is_empty());
    let clause = |text: &str| {
        let matches = text.split(" or ").filter(|m| *m != "any");
        Clause { matches: matches.map(parse_match).collect() }
    };
    Rule { clauses: clauses.map(clause).collect() }
}

fn parse_match(text: &str) -> Match {
    let mut m = Match::default();
    for field in text.split(' ').filter(|field| *field != "{}") {
        let (negative, field) = match field.strip_prefix('!') {
            Some(rest) => (true, rest),
            None => (false, field),
        };
        let (name, values) = field.split_once('=').unwrap_or((field, ""));
        let values: Vec<&str> = values.split('|').collect();
        let strings = |kind: fn(Arc<str>) -> StringMatch| {
            values.iter().map(|value| kind((*value).into())).collect::<Vec<_>>()
        };
        let strings = match name.chars().last() {
            Some('^') => strings(StringMatch::Prefix),
            Some('$') => strings(StringMatch::Suffix),
            Some('?') => strings(|_| StringMatch::Presence),
            _ => strings(StringMatch::Exact),
        };
        match (name.trim_end_matches(['^', '$', '?']), negative) {
            ("N", false) => m.namespaces = strings,
            ("N", true) => m.not_namespaces = strings,
            ("P", false) => m.principals = strings,
            ("P", true) => m.not_principals = strings,
            ("SA", false) => m.service_accounts = accounts(&values),
            ("SA", true) => m.not_service_accounts = accounts(&values),
            ("SIP", false) => m.source_ips = parsed(&values),
            ("SIP", true) => m.not_source_ips = parsed(&values),
            ("DIP", false) => m.destination_ips = parsed(&values),
            ("DIP", true) => m.not_destination_ips = parsed(&values),
            ("PORT", false) => m.destination_ports = parsed(&values),
            ("PORT", true) => m.not_destination_ports = parsed(&values),
            (other, _) => panic!("unknown field {other}"),
        }
    }
    m
}

fn accounts(values: &[&str]) -> Vec<ServiceAccountMatch> {
    let account = |value: &&str| {
        let (namespace, service_account) = value.split_once('/').unwrap();
        ServiceAccountMatch { namespace: namespace.into(), service_account: service_account.into() }
    };
    values.iter().map(account).collect()
}

fn parsed<T: std::str::FromStr<Err: std::fmt::Debug>>(values: &[&str]) -> Vec<T> {
    values.iter().map(|value| value.parse().unwrap()).collect()
}

/// A plaintext connection from 10.2.0.3 to port 8080 of 10.1.0.7.
pub fn plaintext() -> Connection {
    Connection {
        source: "10.2.0.3".parse().unwrap(),
        identity: None,
        destination: "10.1.0.7".parse().unwrap(),
        port: 8080,
    }
}

/// The same by a client with this principal.
pub fn authenticated(principal: &str) -> Connection {
    let identity = format!("spiffe://{principal}").parse().unwrap();
    Connection { identity: Some(identity), ..plaintext() }
}
