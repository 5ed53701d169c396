//! What would happen to a connection, told by the functions that decide on real ones.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use culvert_core::addr::{AppAddr, Authority, NamespacedHostname, OriginalDst};
use culvert_core::admit::{self, Inbound};
use culvert_core::authorization::Connection;
use culvert_core::authorize::authorize;
use culvert_core::route::{self, Outbound, Route, Routed, Tunnel};
use culvert_core::snapshot::Snapshot;
use culvert_core::workload::Workload;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::enrolment::PodTable;
use crate::admin::{ExplainError, ExplainStep, Explanation, Outcome};
use crate::capture::PodSpec;
use crate::decide::decide;
use crate::node::Node;

/// Explains a connection from `src` (address, uid or `namespace/name`) to `dst` (`IP:port` or
/// `host:port`), if the source were enrolled. Where endpoints are drawn, one of them is shown.
pub(super) async fn explain(
    node: &Node,
    pods: &PodTable,
    src: &str,
    dst: &str,
) -> Result<Explanation, ExplainError> {
    let snapshot = node.mesh.snapshot();
    let source = find_source(node, &snapshot, src)?;
    let mut story = Story::new(src, dst, pods.clone());
    let target = find_destination(node, &snapshot, &source, dst, &mut story)?;
    let client = client_address(&source, src, target.ip());
    story.step("source", source.uid.to_string(), format!("identity {}", source.identity()));
    if let Some(because) = story.left_alone(&source, target) {
        story.leave_alone(node, &snapshot, client, target, because);
        return Ok(story.told);
    }
    let request = Outbound { source: &source, client, destination: target };
    let routed = decide(node, |view| route::route(view, &request, &mut SmallRng::seed_from_u64(0)));
    match routed.await {
        Ok(routed) => story.follow(node, &source, (client, target), routed).await,
        Err(no_route) => story.refused("route", &no_route.to_string(), "no route"),
    }
    Ok(story.told)
}

fn find_source(node: &Node, snapshot: &Snapshot, src: &str) -> Result<Arc<Workload>, ExplainError> {
    let unknown = || ExplainError::UnknownSource(src.to_owned());
    if let Ok(ip) = src.parse::<IpAddr>() {
        return snapshot.workload_at(&node.network, ip).cloned().ok_or_else(unknown);
    }
    if let Some(workload) = snapshot.workload(src) {
        return Ok(workload.clone());
    }
    match src.split_once('/') {
        Some((namespace, name)) => {
            snapshot.workloads_of_pod(namespace, name).next().cloned().ok_or_else(unknown)
        }
        None => Err(ExplainError::Source(src.to_owned())),
    }
}

/// The address that an application would connect to.
fn find_destination(
    node: &Node,
    snapshot: &Snapshot,
    source: &Workload,
    dst: &str,
    story: &mut Story,
) -> Result<OriginalDst, ExplainError> {
    let invalid = || ExplainError::Destination(dst.to_owned());
    let (host, port) = match dst.parse::<Authority>().map_err(|_| invalid())? {
        Authority::Addr(addr) => return Ok(OriginalDst::new(addr)),
        Authority::Host { host, port } => (host, port),
    };
    let service = snapshot.service_named(&host, Some(&source.namespace));
    let vips = service.iter().flat_map(|service| &service.vips);
    let own = vips.filter(|vip| vip.network == node.network).map(|vip| vip.ip);
    if let Some(ip) = own.min_by_key(IpAddr::is_ipv6) {
        story.step("resolve", ip.to_string(), format!("address of service {host}"));
        return Ok(OriginalDst::new(SocketAddr::new(ip, port)));
    }
    let name = NamespacedHostname { namespace: source.namespace.clone(), hostname: host };
    let workload = snapshot.workload_named(&name);
    let ip = workload.and_then(|workload| workload.addresses.first().copied());
    let ip = ip.ok_or_else(invalid)?;
    story.step("resolve", ip.to_string(), format!("address of workload {}", name.hostname));
    Ok(OriginalDst::new(SocketAddr::new(ip, port)))
}

fn client_address(source: &Workload, src: &str, towards: IpAddr) -> IpAddr {
    let same_family = |ip: &&IpAddr| ip.is_ipv4() == towards.is_ipv4();
    src.parse()
        .ok()
        .or_else(|| source.addresses.iter().find(same_family).copied())
        .or_else(|| source.addresses.first().copied())
        .unwrap_or(towards)
}

struct Story {
    told: Explanation,
    pods: PodTable,
}

/// Why the kernel programs let a connection of an enrolled pod go its plain way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LeftAlone {
    Own,
    ExcludedPort,
    ExcludedNetwork,
}

impl Story {
    fn new(src: &str, dst: &str, pods: PodTable) -> Self {
        let told = Explanation {
            source: src.to_owned(),
            destination: dst.to_owned(),
            steps: Vec::new(),
            outcome: Outcome::Unknown,
            policy: None,
            rule: None,
            path: None,
            via: None,
            authority: None,
        };
        Self { told, pods }
    }

    /// How a pod of this node is captured.
    fn spec(&self, workload: &Workload) -> Option<PodSpec> {
        let pods = self.pods.lock();
        let mut rows = pods.values();
        rows.find(|row| row.claim.is_of(workload))?.spec.clone()
    }

    fn left_alone(&self, source: &Workload, target: OriginalDst) -> Option<LeftAlone> {
        let ip = target.ip();
        if ip.is_loopback() || ip.is_unspecified() || source.addresses.contains(&ip) {
            return Some(LeftAlone::Own);
        }
        let spec = self.spec(source)?;
        if spec.exclude_outbound_ports.contains(&target.port()) {
            return Some(LeftAlone::ExcludedPort);
        }
        let excluded = spec.exclude_outbound_cidrs.iter().any(|net| net.contains(&ip));
        excluded.then_some(LeftAlone::ExcludedNetwork)
    }

    fn leave_alone(
        &mut self,
        node: &Node,
        snapshot: &Snapshot,
        client: IpAddr,
        target: OriginalDst,
        because: LeftAlone,
    ) {
        let text = match because {
            LeftAlone::Own => "the pod speaks to itself",
            LeftAlone::ExcludedPort => "excluded outbound port",
            LeftAlone::ExcludedNetwork => "excluded outbound network",
        };
        self.step("capture", "left alone".to_owned(), text.to_owned());
        self.told.via = Some(target.to_string());
        self.told.outcome = Outcome::Allowed;
        if because == LeftAlone::Own {
            return;
        }
        let to = AppAddr::new(target.addr());
        if let Some(service) = snapshot.service_at(&node.network, target.ip(), None) {
            let because = format!("address of service {}", service.hostname);
            self.step("route", "decided outside of the mesh".to_owned(), because);
            self.told.outcome = Outcome::Unknown;
        } else if let Some(workload) = snapshot.workload_at(&node.network, target.ip()) {
            self.arrive_in_plain(node, workload, client, to);
        }
    }

    fn step(&mut self, decision: &str, result: String, because: String) {
        self.told.steps.push(ExplainStep { decision: decision.to_owned(), result, because });
    }

    fn refused(&mut self, decision: &str, result: &str, because: &str) {
        self.step(decision, result.to_owned(), because.to_owned());
        self.told.outcome = Outcome::Refused;
    }

    async fn follow(
        &mut self,
        node: &Node,
        source: &Workload,
        (client, original): (IpAddr, OriginalDst),
        routed: Routed,
    ) {
        let because = match &routed.service {
            Some(service) => format!("{} {}", routed.because, service.hostname),
            None => routed.because.to_string(),
        };
        match routed.route {
            Route::Passthrough { to } => self.plain("passthrough", to, because),
            Route::Direct { to, workload } => {
                self.plain("direct", to, because);
                self.arrive_in_plain(node, &workload, client, to);
            }
            Route::Local { to, workload } => {
                self.told.path = Some("local".to_owned());
                self.step("route", format!("local to {to} ({})", workload.uid), because);
                self.judge(node, source, client, to.addr(), &Authority::Addr(to.addr()), &workload)
                    .await;
                self.tell_kernel(node, source, original);
            }
            Route::Tunnel { tunnel, next_hop } => {
                self.tunnel(&tunnel, &next_hop, because);
                self.tell_share(node, source, original);
                let Authority::Addr(target) = &tunnel.authority else { return };
                if next_hop.addresses.contains(&target.ip()) && tunnel.inner.is_none() {
                    self.judge(node, source, client, *target, &tunnel.authority, &next_hop).await;
                } else {
                    let why = "the waypoint applies its own policies and goes on by itself";
                    self.step(
                        "waypoint",
                        format!("decides on {}", tunnel.authority),
                        why.to_owned(),
                    );
                }
            }
        }
    }

    /// Who carries a connection within the node.
    fn tell_kernel(&mut self, node: &Node, source: &Workload, original: OriginalDst) {
        let Some(direct) = &node.direct else {
            let because = "the kernel admits nothing by itself here".to_owned();
            return self.step("carry", "through the agent".to_owned(), because);
        };
        let (result, because) = match direct.explain(&node.mesh, &source.uid, original.addr()) {
            Ok(Some(id)) => ("by the kernel", format!("verdict {id}")),
            Ok(None) => ("by the kernel", "once a first one went through the agent".to_owned()),
            Err(because) => ("through the agent", because.to_string()),
        };
        self.step("carry", result.to_owned(), because);
    }

    /// The endpoint that is shown is elsewhere; another one may not be.
    fn tell_share(&mut self, node: &Node, source: &Workload, original: OriginalDst) {
        let Some(direct) = &node.direct else { return };
        if let Ok(Some(id)) = direct.explain(&node.mesh, &source.uid, original.addr()) {
            let result = "by the kernel to endpoints of this node".to_owned();
            self.step("carry", result, format!("verdict {id}"));
        }
    }

    fn plain(&mut self, path: &str, to: AppAddr, because: String) {
        self.told.path = Some(path.to_owned());
        self.told.via = Some(to.to_string());
        self.told.outcome = Outcome::Allowed;
        self.step("route", format!("plain TCP to {to}"), because);
    }

    fn tunnel(&mut self, tunnel: &Tunnel, next_hop: &Workload, because: String) {
        self.told.path = Some("tunnel".to_owned());
        self.told.via = Some(tunnel.via.to_string());
        self.told.authority = Some(tunnel.authority.to_string());
        self.step("route", format!("HBONE to {} ({})", tunnel.via, next_hop.uid), because);
        let expect: Vec<_> = tunnel.expect.iter().map(ToString::to_string).collect();
        self.step("identity", expect.join(" or "), "what the next hop must prove".to_owned());
    }

    /// The destination's side of a connection with an identity.
    async fn judge(
        &mut self,
        node: &Node,
        source: &Workload,
        client: IpAddr,
        target: SocketAddr,
        authority: &Authority,
        local: &Workload,
    ) {
        let identity = source.identity();
        let inbound = Inbound {
            local,
            addressed: target.ip(),
            peer: SocketAddr::new(client, 0),
            identity: &identity,
            authority,
            forwarded_host: None,
            header_to: node.options.header_to,
        };
        match decide(node, |view| admit::admit(view, &inbound)).await {
            Err(refusal) => self.refused("admit", &refusal.to_string(), "destination agent"),
            Ok(admission) => {
                self.step(
                    "admit",
                    format!("deliver to {}", admission.to),
                    "destination agent".into(),
                );
                self.authorize(node, local, &admission.connection);
            }
        }
    }

    /// The destination's side of a connection without an identity, if the pod is captured.
    fn arrive_in_plain(&mut self, node: &Node, local: &Workload, client: IpAddr, to: AppAddr) {
        let is_elsewhere = local.node != node.name;
        let spec = self.spec(local);
        if !is_elsewhere && spec.is_none() {
            return;
        }
        if spec.is_some_and(|spec| spec.exclude_inbound_ports.contains(&to.port())) {
            let because = "excluded inbound port".to_owned();
            return self.step("capture", "delivered without policy".to_owned(), because);
        }
        let connection =
            Connection { source: client, identity: None, destination: to.ip(), port: to.port() };
        self.authorize(node, local, &connection);
        if is_elsewhere && self.told.outcome == Outcome::Refused {
            let result = format!("decided by node {}", local.node);
            let because = "whether it captures the pod is not known here";
            self.step("capture", result, because.to_owned());
            self.told.outcome = Outcome::Unknown;
        }
    }

    fn authorize(&mut self, node: &Node, local: &Workload, connection: &Connection) {
        let judgement = authorize(&node.mesh.snapshot(), local, connection);
        for dry_run in &judgement.dry_run {
            self.step("dry run", dry_run.to_string(), "not enforced".to_owned());
        }
        for policy in &judgement.missing {
            self.step("policy", format!("{policy} is not known"), "skipped".to_owned());
        }
        let (policy, rule) = match &judgement.verdict {
            Ok(permit) => {
                self.told.outcome = Outcome::Allowed;
                self.step("authorize", "allowed".to_owned(), permit.to_string());
                (permit.policy(), permit.rule())
            }
            Err(denied) => {
                self.refused("authorize", "refused", &denied.to_string());
                (denied.policy(), denied.rule())
            }
        };
        self.told.policy = policy.map(ToString::to_string);
        self.told.rule = rule;
    }
}
