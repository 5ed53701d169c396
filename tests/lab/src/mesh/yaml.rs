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
            workload(&mut out, mesh, spec, pod);
        }
    }
    out.line(0, "services:");
    for (service, addresses) in mesh.services.iter().zip(&facts.addresses) {
        write_service(&mut out, service, addresses);
    }
    out.line(0, "policies:");
    for policy in &mesh.policies {
        write_policy(&mut out, policy);
    }
    culvert(&mut out, mesh, facts);
    out.0
}

fn workload(out: &mut Text, mesh: &Mesh, spec: &PodSpec, pod: &Pod) {
    out.line(2, &format!("- uid: {}", quoted(&spec.uid())));
    out.pair(4, "name", &quoted(&spec.name));
    out.pair(4, "namespace", &quoted(&spec.namespace));
    out.pair(4, "serviceAccount", &quoted(&spec.service_account));
    out.pair(4, "trustDomain", TRUST_DOMAIN);
    out.pair(4, "clusterId", "Kubernetes");
    out.pair(4, "workloadIps", &list(pod.addresses().iter().map(|ip| quoted(&ip.to_string()))));
    out.pair(4, "protocol", if spec.hbone { "HBONE" } else { "TCP" });
    out.pair(4, "node", &quoted(&spec.node));
    out.pair(4, "workloadName", &quoted(&spec.name));
    out.pair(4, "workloadType", "deployment");
    out.pair(4, "canonicalName", &quoted(&spec.name));
    out.pair(4, "canonicalRevision", "v1");
    waypoint(out, spec.waypoint.as_deref());
    if !spec.policies.is_empty() {
        out.pair(4, "authorizationPolicies", &list(spec.policies.iter().map(|key| quoted(key))));
    }
    let behind: Vec<&ServiceSpec> =
        mesh.services.iter().filter(|service| service.endpoints.contains(&spec.name)).collect();
    if behind.is_empty() {
        out.line(4, "services: {}");
        return;
    }
    out.line(4, "services:");
    for service in behind {
        out.pair(6, &quoted(&service.key()), &ports(service));
    }
}

fn write_service(out: &mut Text, service: &ServiceSpec, addresses: &[String; 2]) {
    out.line(2, &format!("- name: {}", quoted(&service.name)));
    out.pair(4, "namespace", &quoted(&service.namespace));
    out.pair(4, "hostname", &quoted(&service.hostname()));
    out.pair(4, "vips", &list(addresses.iter().map(|ip| quoted(&format!("/{ip}")))));
    out.pair(4, "ports", &ports(service));
    waypoint(out, service.waypoint.as_deref());
    if let Some(load_balancer) = &service.load_balancer {
        out.pair(4, "loadBalancer", load_balancer);
    }
}

fn waypoint(out: &mut Text, destination: Option<&str>) {
    if let Some(destination) = destination {
        let reference = format!("{{destination: {}, hboneMtlsPort: 15008}}", quoted(destination));
        out.pair(4, "waypoint", &reference);
    }
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

    fn pair(&mut self, indent: usize, key: &str, value: &str) {
        self.line(indent, &format!("{key}: {value}"));
    }
}
