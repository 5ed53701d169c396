//! A mesh as the text of a configuration file.

use std::fmt::Write;
use std::path::Path;

use super::{Mesh, PodSpec, PolicySpec, ServiceSpec, TRUST_DOMAIN};
use crate::lab::Pod;

/// What the description alone does not say.
pub(super) struct Facts<'f> {
    pub(super) pods: &'f [Pod],
    pub(super) ca: &'f Path,
    pub(super) addresses: Vec<[String; 2]>,
}

/// The whole file: the peer's format, and Culvert's section after it.
pub(super) fn print(mesh: &Mesh, facts: &Facts<'_>) -> String {
    let mut out = Text::default();
    out.line(0, "workloads:");
    for spec in mesh.pods.iter().filter(|spec| spec.known) {
        let running = facts.pods.iter().find(|pod| pod.name() == spec.name);
        if let Some(pod) = running {
            out.item(workload(mesh, spec, pod), &spec.fields);
        }
    }
    for workload in &mesh.workloads {
        out.line(2, &format!("- {workload}"));
    }
    out.line(0, "services:");
    for (service, addresses) in mesh.services.iter().zip(&facts.addresses) {
        out.item(write_service(mesh, service, addresses), &service.fields);
    }
    out.line(0, "policies:");
    for policy in &mesh.policies {
        write_policy(&mut out, policy);
    }
    culvert(&mut out, mesh, facts);
    out.0
}

type Fields = Vec<(&'static str, String)>;

fn workload(mesh: &Mesh, spec: &PodSpec, pod: &Pod) -> Fields {
    let behind: Vec<String> = mesh
        .services
        .iter()
        .filter(|service| service.endpoints.contains(&spec.name))
        .map(|service| format!("{}: {}", quoted(&service.key()), ports(service)))
        .collect();
    let mut fields = vec![
        ("uid", quoted(&spec.uid())),
        ("name", quoted(&spec.name)),
        ("namespace", quoted(&spec.namespace)),
        ("serviceAccount", quoted(&spec.service_account)),
        ("trustDomain", TRUST_DOMAIN.to_owned()),
        ("clusterId", "Kubernetes".to_owned()),
        ("network", quoted(&mesh.network)),
        ("workloadIps", list(pod.addresses().iter().map(|ip| quoted(&ip.to_string())))),
        ("protocol", if spec.hbone { "HBONE" } else { "TCP" }.to_owned()),
        ("node", quoted(&spec.node)),
        ("workloadName", quoted(&spec.name)),
        ("workloadType", "deployment".to_owned()),
        ("canonicalName", quoted(&spec.name)),
        ("canonicalRevision", "v1".to_owned()),
    ];
    fields.extend(spec.waypoint.as_deref().map(waypoint));
    if !spec.policies.is_empty() {
        let policies = list(spec.policies.iter().map(|key| quoted(key)));
        fields.push(("authorizationPolicies", policies));
    }
    fields.push(("services", format!("{{{}}}", behind.join(", "))));
    fields
}

fn write_service(mesh: &Mesh, service: &ServiceSpec, addresses: &[String; 2]) -> Fields {
    let vips = addresses.iter().map(|ip| quoted(&format!("{}/{ip}", mesh.network)));
    let mut fields = vec![
        ("name", quoted(&service.name)),
        ("namespace", quoted(&service.namespace)),
        ("hostname", quoted(&service.hostname())),
        ("vips", list(vips)),
        ("ports", ports(service)),
    ];
    fields.extend(service.waypoint.as_deref().map(waypoint));
    fields.extend(service.load_balancer.clone().map(|balancer| ("loadBalancer", balancer)));
    fields
}

fn waypoint(destination: &str) -> (&'static str, String) {
    ("waypoint", format!("{{destination: {}, hboneMtlsPort: 15008}}", quoted(destination)))
}

fn ports(service: &ServiceSpec) -> String {
    let ports: Vec<String> =
        service.ports.iter().map(|(port, target)| format!("{port}: {target}")).collect();
    format!("{{{}}}", ports.join(", "))
}

fn write_policy(out: &mut Text, policy: &PolicySpec) {
    out.line(2, &format!("- name: {}", quoted(&policy.name)));
    out.pair(4, "namespace", &quoted(&policy.namespace));
    out.pair(4, "scope", policy.scope);
    out.pair(4, "action", policy.action);
    out.pair(4, "dryRun", &policy.dry_run.to_string());
    let rules = policy.rules.iter().map(|rule| {
        list(rule.iter().map(|clause| {
            list(clause.iter().map(|one| {
                let fields: Vec<String> =
                    one.0.iter().map(|(name, value)| format!("{name}: {value}")).collect();
                format!("{{{}}}", fields.join(", "))
            }))
        }))
    });
    out.pair(4, "rules", &list(rules));
}

fn culvert(out: &mut Text, mesh: &Mesh, facts: &Facts<'_>) {
    out.line(0, "culvert:");
    let ttl = mesh.certificate_ttl.as_secs();
    let directory = quoted(&facts.ca.to_string_lossy());
    out.pair(2, "ca", &format!("{{directory: {directory}, ttl: {ttl}s}}"));
    if !mesh.network.is_empty() {
        out.pair(2, "network", &quoted(&mesh.network));
    }
    out.pair(2, "requireWaypoint", &mesh.require_waypoint);
    let enrolled: Vec<(&PodSpec, &Pod)> = mesh
        .pods
        .iter()
        .filter(|spec| mesh.enrols && spec.enrolled && spec.known)
        .filter_map(|spec| Some((spec, facts.pods.iter().find(|pod| pod.name() == spec.name)?)))
        .collect();
    out.line(2, if enrolled.is_empty() { "pods: []" } else { "pods:" });
    for (spec, pod) in enrolled {
        out.line(4, &format!("- workload: {}", quoted(&spec.uid())));
        out.pair(6, "netns", &quoted(&pod.place().netns().path().to_string_lossy()));
        let numbers = |ports: &[u16]| list(ports.iter().map(u16::to_string));
        if !spec.exclude_outbound_ports.is_empty() {
            out.pair(6, "excludeOutboundPorts", &numbers(&spec.exclude_outbound_ports));
        }
        if !spec.exclude_outbound_cidrs.is_empty() {
            let cidrs = list(spec.exclude_outbound_cidrs.iter().map(|cidr| quoted(cidr)));
            out.pair(6, "excludeOutboundCidrs", &cidrs);
        }
        if !spec.exclude_inbound_ports.is_empty() {
            out.pair(6, "excludeInboundPorts", &numbers(&spec.exclude_inbound_ports));
        }
    }
}

fn list(items: impl Iterator<Item = String>) -> String {
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

/// A double-quoted YAML string.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

#[derive(Default)]
struct Text(String);

impl Text {
    fn line(&mut self, indent: usize, text: &str) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "{:indent$}{text}", "");
    }

    /// An element of a list, with fields added or replaced.
    fn item(&mut self, fields: Fields, changed: &[(String, String)]) {
        let own = fields.iter().map(|(name, value)| (*name, value.as_str()));
        let is_kept = |name: &str| !changed.iter().any(|(other, _)| other == name);
        let changed = changed.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let all = own.filter(|(name, _)| is_kept(name)).chain(changed);
        for (place, (name, value)) in all.enumerate() {
            self.line(
                if place == 0 { 2 } else { 4 },
                &match place {
                    0 => format!("- {name}: {value}"),
                    _ => format!("{name}: {value}"),
                },
            );
        }
    }

    fn pair(&mut self, indent: usize, key: &str, value: &str) {
        self.line(indent, &format!("{key}: {value}"));
    }
}
