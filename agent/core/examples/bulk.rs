//! Measures what a large mesh costs a snapshot: `cargo run --release -p culvert-core --example bulk`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement for a terminal")]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_core::addr::{NamespacedHostname, NetworkAddress};
use culvert_core::balance::{self, Mode};
use culvert_core::service::{IpFamilies, Service, Visibility};
use culvert_core::snapshot::{Change, Snapshot};
use culvert_core::workload::{Health, Locality, NetworkMode, PortMap, TunnelProtocol, Workload};
use rand::SeedableRng;
use rand::rngs::SmallRng;

fn main() {
    let count = std::env::args().nth(1).map_or(100_000, |text| text.parse().unwrap());
    let services = count / 10;
    let mut texts = Texts::default();
    let made = Instant::now();
    let mut changes = Vec::with_capacity(count + services);
    changes.extend((0..services).map(|number| Change::Service(service(&mut texts, number))));
    changes
        .extend((0..count).map(|number| Change::Workload(workload(&mut texts, number, services))));
    tell("values made", made.elapsed());
    let one = std::mem::size_of::<Workload>();
    println!("{count} workloads of {one} bytes, {services} services: {:.1} MB", resident());

    let loaded = Instant::now();
    let snapshot = Snapshot::default().with(changes);
    tell("bulk load", loaded.elapsed());
    println!("resident with indexes: {:.1} MB", resident());

    let mut current = snapshot.clone();
    let changed = Instant::now();
    for number in 0..1_000 {
        let mut next = workload(&mut texts, number * 7 % count, services);
        next.status = Health::Unhealthy;
        current = current.with([Change::Workload(next)]);
    }
    tell("one change", changed.elapsed() / 1_000);

    let large: Vec<Change> = (0..10_000)
        .map(|number| {
            let member = workload(&mut texts, number, services);
            let ports: PortMap = [(80, 8080)].into_iter().collect();
            let services = [(key(&mut texts, 0), ports)].into_iter().collect();
            Change::Workload(Workload { services, ..member })
        })
        .collect();
    let large = snapshot.with(large);
    let source = workload(&mut texts, 1, services);
    let service = large.service(&key(&mut texts, 0)).unwrap().clone();
    let mut random = SmallRng::seed_from_u64(1);
    let choose = |snapshot: &Snapshot, random: &mut SmallRng| {
        balance::choose_endpoint(snapshot, &source, &service, 80, Mode::Standard, random).unwrap();
    };
    choose(&large, &mut random);
    let chosen = Instant::now();
    (0..1_000).for_each(|_| choose(&large, &mut random));
    tell("one choice among 10,000 endpoints", chosen.elapsed() / 1_000);
    let mut current = large;
    let changed = Instant::now();
    for number in 0..1_000 {
        let mut next = workload(&mut texts, number, services);
        next.services = [(key(&mut texts, 0), PortMap::default())].into_iter().collect();
        current = current.with([Change::Workload(next)]);
    }
    tell("one change of one of 10,000 endpoints", changed.elapsed() / 1_000);
}

/// Each text once, as the sources of the mesh keep them.
#[derive(Default)]
struct Texts(std::collections::HashSet<Arc<str>>);

impl Texts {
    fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.0.get(text) {
            return known.clone();
        }
        let new: Arc<str> = text.into();
        self.0.insert(new.clone());
        new
    }
}

fn key(texts: &mut Texts, number: usize) -> NamespacedHostname {
    NamespacedHostname {
        namespace: texts.get(&format!("ns-{}", number % 100)),
        hostname: texts.get(&format!("svc-{number}.ns-{}.svc.cluster.local", number % 100)),
    }
}

fn service(texts: &mut Texts, number: usize) -> Service {
    let NamespacedHostname { namespace, hostname } = key(texts, number);
    let ip = Ipv4Addr::from(0x0a60_0000 + number as u32).into();
    Service {
        name: format!("svc-{number}").into(),
        namespace,
        hostname,
        vips: vec![NetworkAddress { network: texts.get(""), ip }],
        cidr_vips: Vec::new(),
        ports: [(80, 8080)].into_iter().collect(),
        subject_alt_names: Vec::new(),
        waypoint: None,
        weighted_waypoints: Vec::new(),
        load_balancer: None,
        ip_families: IpFamilies::Ipv4Only,
        canonical: true,
        visibility: Visibility::Public,
        fixed_endpoints: Default::default(),
    }
}

fn workload(texts: &mut Texts, number: usize, services: usize) -> Workload {
    let service = number % services;
    let namespace = texts.get(&format!("ns-{}", service % 100));
    let owner = texts.get(&format!("app-{service}"));
    let name = format!("app-{service}-7c9d8b6f5-{number:05}");
    let ports: PortMap = [(80, 8080)].into_iter().collect();
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace,
        trust_domain: texts.get("cluster.local"),
        service_account: owner.clone(),
        addresses: vec![Ipv4Addr::from(0x0b00_0000 + number as u32).into()],
        hostname: texts.get(""),
        network: texts.get(""),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        node: texts.get(&format!("node-{}", number % 1000)),
        cluster_id: texts.get("Kubernetes"),
        locality: Locality {
            region: texts.get("region"),
            zone: texts.get(&format!("zone-{}", number % 3)),
            subzone: texts.get(""),
        },
        native_tunnel: false,
        application_tunnel: None,
        services: [(key(texts, service), ports)].into_iter().collect(),
        authorization_policies: Vec::new(),
        status: Health::Healthy,
        capacity: 1,
        workload_name: owner.clone(),
        workload_type: texts.get("deployment"),
        canonical_name: owner,
        canonical_revision: texts.get("latest"),
    }
}

fn tell(what: &str, took: Duration) {
    println!("{what}: {:.1} µs", took.as_secs_f64() * 1e6);
}

/// Resident memory of this process in megabytes.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().split(' ').next().unwrap().parse::<f64>().unwrap() / 1024.0
}
