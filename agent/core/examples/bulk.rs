//! Measures what a large mesh costs a snapshot: `cargo run --release -p culvert-core --example bulk`.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a measurement for a terminal")]

use std::net::Ipv4Addr;
use std::time::Duration;

use culvert_core::addr::{NamespacedHostname, NetworkAddress};
use culvert_core::balance::{self, Mode};
use culvert_core::intern::Interner;
use culvert_core::service::{IpFamilies, Service, Visibility};
use culvert_core::snapshot::{Change, Snapshot};
use culvert_core::workload::{Health, Locality, NetworkMode, PortMap, TunnelProtocol, Workload};
use rand::SeedableRng;
use rand::rngs::SmallRng;

fn main() {
    let count = std::env::args().nth(1).map_or(100_000, |text| text.parse().unwrap());
    let services = count / 10;
    let mut texts = Interner::default();
    let made = processor();
    let mut changes = Vec::with_capacity(count + services);
    changes.extend((0..services).map(|number| Change::service(service(&mut texts, number))));
    changes
        .extend((0..count).map(|number| Change::workload(workload(&mut texts, number, services))));
    tell("values made", processor() - made);
    let one = std::mem::size_of::<Workload>();
    println!("{count} workloads of {one} bytes, {services} services: {:.1} MB", resident());

    let loaded = processor();
    let snapshot = Snapshot::default().with(changes);
    tell("bulk load", processor() - loaded);
    println!("resident with indexes: {:.1} MB", resident());

    let mut current = snapshot.clone();
    let changed = processor();
    for number in 0..1_000 {
        let mut next = workload(&mut texts, number * 7 % count, services);
        next.status = Health::Unhealthy;
        current = current.with([Change::workload(next)]);
    }
    tell("one change", (processor() - changed) / 1_000);

    let large: Vec<Change> = (0..10_000)
        .map(|number| {
            let member = workload(&mut texts, number, services);
            let ports: PortMap = [(80, 8080)].into_iter().collect();
            let services = [(key(&mut texts, 0), ports)].into_iter().collect();
            Change::workload(Workload { services, ..member })
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
    let chosen = processor();
    (0..1_000).for_each(|_| choose(&large, &mut random));
    tell("one choice among 10,000 endpoints", (processor() - chosen) / 1_000);
    let mut current = large;
    let changed = processor();
    for number in 0..1_000 {
        let mut next = workload(&mut texts, number, services);
        next.services = [(key(&mut texts, 0), PortMap::default())].into_iter().collect();
        current = current.with([Change::workload(next)]);
    }
    tell("one change of one of 10,000 endpoints", (processor() - changed) / 1_000);
}

fn key(texts: &mut Interner, number: usize) -> NamespacedHostname {
    let namespace = format!("ns-{}", number % 100);
    texts.hostname(&namespace, &format!("svc-{number}.{namespace}.svc.cluster.local"))
}

fn service(texts: &mut Interner, number: usize) -> Service {
    let NamespacedHostname { namespace, hostname } = key(texts, number);
    let ip = Ipv4Addr::from(0x0a60_0000 + number as u32).into();
    Service {
        name: format!("svc-{number}").into(),
        namespace,
        hostname,
        vips: vec![NetworkAddress { network: texts.text(""), ip }],
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

fn workload(texts: &mut Interner, number: usize, services: usize) -> Workload {
    let service = number % services;
    let namespace = texts.text(&format!("ns-{}", service % 100));
    let owner = texts.text(&format!("app-{service}"));
    let name = format!("app-{service}-7c9d8b6f5-{number:05}");
    let ports = texts.ports([(80, 8080)].into());
    let services = [(key(texts, service), ports)].into();
    let zone = texts.text(&format!("zone-{}", number % 3));
    let locality = Locality { region: texts.text("region"), zone, subzone: texts.text("") };
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}").into(),
        name: name.into(),
        namespace,
        trust_domain: texts.text("cluster.local"),
        service_account: owner.clone(),
        addresses: vec![Ipv4Addr::from(0x0b00_0000 + number as u32).into()],
        hostname: texts.text(""),
        network: texts.text(""),
        tunnel_protocol: TunnelProtocol::Hbone,
        network_mode: NetworkMode::Standard,
        waypoint: None,
        network_gateway: None,
        node: texts.text(&format!("node-{}", number % 1000)),
        cluster_id: texts.text("Kubernetes"),
        locality: texts.locality(locality),
        native_tunnel: false,
        application_tunnel: None,
        services: texts.memberships(services),
        authorization_policies: Vec::new(),
        status: Health::Healthy,
        capacity: 1,
        workload_name: owner.clone(),
        workload_type: texts.text("deployment"),
        canonical_name: owner,
        canonical_revision: texts.text("latest"),
    }
}

/// Processor time of this process, so that others on the machine do not count.
fn processor() -> Duration {
    let times = std::fs::read_to_string("/proc/self/schedstat").unwrap();
    Duration::from_nanos(times.split(' ').next().unwrap().parse().unwrap())
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
