//! A control plane with a large mesh, for `cargo xtask bench scale`: tells where it listens, and then
//! does what it reads on its standard input.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "it talks with the benchmark through its output")]

use std::io::BufRead;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use culvert_proto::envoy::service::discovery::v3::{DeltaDiscoveryResponse, Resource};
use culvert_proto::istio::security::{Action, Authorization, Scope};
use culvert_proto::istio::workload::{
    Address, NetworkAddress, Port, PortList, Service, TunnelProtocol, Workload, WorkloadStatus,
    address,
};
use culvert_proto::{ADDRESS_TYPE_URL, AUTHORIZATION_TYPE_URL};
use culvert_tests::control::world::is_ack;
use culvert_tests::control::{Behaviour, ControlPlane, Listen, Prepared, World};
use prost::Message;
use prost_types::Any;

/// How often changes are sent.
const PUSHES_PER_SECOND: usize = 20;
/// How long the client may take to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// Arguments: a file to write the root certificate to, and how many workloads there are. Lines of the
/// input: `churn <changes a second> <seconds>`, answered by `<changes sent> <seconds until the last
/// was acknowledged>`.
fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let root = arguments.next().context("no file for the root certificate")?;
    let count: usize = arguments.next().context("no number of workloads")?.parse()?;
    let plane = ControlPlane::start(Listen::Loopback)?;
    std::fs::write(Path::new(&root), plane.pki.root()).context("writing the root certificate")?;
    plane.world.behave(Behaviour::Silent);
    let mesh = Prepared::new(&addresses(count));
    let policies = Prepared::new(&policies(if count == 0 { 0 } else { 1_000 }));
    println!("{}", plane.address());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(first_answers(&plane.world, mesh, policies))?;
    let mut pushed = 0;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["churn", rate, seconds] = words.as_slice() else { bail!("cannot {line:?}") };
        let (rate, seconds) = (rate.parse()?, seconds.parse::<f64>()?);
        runtime.block_on(churn(&plane.world, count, rate, seconds, &mut pushed))?;
    }
    Ok(())
}

/// Answers the first request of each type with everything there is.
async fn first_answers(world: &Arc<World>, mesh: Prepared, policies: Prepared) -> Result<()> {
    for (url, response) in [(ADDRESS_TYPE_URL, mesh), (AUTHORIZATION_TYPE_URL, policies)] {
        world.request("the first of a type", |it| it.request.type_url == url).await?;
        world.send_prepared(response);
    }
    Ok(())
}

async fn churn(
    world: &Arc<World>,
    count: usize,
    rate: usize,
    seconds: f64,
    pushed: &mut usize,
) -> Result<()> {
    let pushes = (seconds * PUSHES_PER_SECOND as f64) as usize;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / PUSHES_PER_SECOND as u32);
    let (mut sent, mut nonce) = (0, String::new());
    for _ in 0..pushes {
        ticks.tick().await;
        *pushed += 1;
        let each = rate / PUSHES_PER_SECOND;
        let changed = (0..each).map(|number| {
            // Another address each time.
            let place = (*pushed * each + number) * 7919 % count.max(1);
            resource(address::Type::Workload(workload(place, services(count), *pushed)))
        });
        nonce = format!("churn-{pushed}");
        let response = response(ADDRESS_TYPE_URL, &nonce, changed.collect());
        sent += each;
        world.send_prepared(Prepared::new(&response));
    }
    let last = Instant::now();
    let is_last = |nonce: &str, it: &str| nonce == it;
    let answered = world
        .request("the answer to the last change", |it| is_last(&nonce, &it.request.response_nonce));
    let answered = tokio::time::timeout(LIMIT, answered).await.context("no answer in time")??;
    if !is_ack(&answered.request) {
        bail!("not accepted: {:?}", answered.request.error_detail);
    }
    println!("{sent} {}", last.elapsed().as_secs_f64());
    Ok(())
}

fn response(url: &str, nonce: &str, resources: Vec<Resource>) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        resources,
        type_url: url.to_owned(),
        nonce: nonce.to_owned(),
        ..DeltaDiscoveryResponse::default()
    }
}

fn services(count: usize) -> usize {
    (count / 10).max(1)
}

fn addresses(count: usize) -> DeltaDiscoveryResponse {
    let services = if count == 0 { 0 } else { services(count) };
    let resources =
        (0..services).map(|number| resource(address::Type::Service(service(number)))).chain(
            (0..count)
                .map(|number| resource(address::Type::Workload(workload(number, services, 0)))),
        );
    response(ADDRESS_TYPE_URL, "first-addresses", resources.collect())
}

fn policies(count: usize) -> DeltaDiscoveryResponse {
    let resources = (0..count).map(|number| {
        let policy = Authorization {
            name: format!("policy-{number}"),
            namespace: format!("ns-{}", number % 100),
            scope: Scope::Namespace.into(),
            action: Action::Deny.into(),
            ..Authorization::default()
        };
        Resource {
            name: format!("{}/{}", policy.namespace, policy.name),
            resource: Some(Any {
                type_url: AUTHORIZATION_TYPE_URL.to_owned(),
                value: policy.encode_to_vec(),
            }),
            ..Resource::default()
        }
    });
    response(AUTHORIZATION_TYPE_URL, "first-policies", resources.collect())
}

fn resource(kind: address::Type) -> Resource {
    let (name, version) = match &kind {
        address::Type::Workload(workload) => (workload.uid.clone(), "7f3a9c52d1e804b6"),
        address::Type::Service(service) => {
            (format!("{}/{}", service.namespace, service.hostname), "02c81de94fb65a37")
        }
    };
    let value = Address { r#type: Some(kind) }.encode_to_vec();
    let any = Any { type_url: ADDRESS_TYPE_URL.to_owned(), value };
    Resource { name, version: version.to_owned(), resource: Some(any), ..Resource::default() }
}

fn hostname(number: usize) -> (String, String) {
    let namespace = format!("ns-{}", number % 100);
    let hostname = format!("svc-{number}.{namespace}.svc.cluster.local");
    (namespace, hostname)
}

fn ports() -> Vec<Port> {
    vec![Port { service_port: 80, target_port: 8080, ..Port::default() }]
}

fn service(number: usize) -> Service {
    let (namespace, hostname) = hostname(number);
    let address = Ipv4Addr::from(0x0a60_8000 + number as u32).octets().to_vec();
    Service {
        name: format!("svc-{number}"),
        namespace,
        hostname,
        addresses: vec![NetworkAddress { address, ..NetworkAddress::default() }],
        ports: ports(),
        canonical: true,
        ..Service::default()
    }
}

fn workload(number: usize, services: usize, round: usize) -> Workload {
    let service = number % services.max(1);
    let (namespace, host) = hostname(service);
    let owner = format!("app-{service}");
    let name = format!("{owner}-7c9d8b6f5-{number:05}");
    // Nobody's, and far from those of the benchmark's own pods.
    let address = Ipv4Addr::from(0x0b00_0000 + (round % 64 * 131_072 + number) as u32);
    Workload {
        uid: format!("Kubernetes//Pod/{namespace}/{name}"),
        name,
        service_account: owner.clone(),
        addresses: vec![address.octets().to_vec()],
        tunnel_protocol: TunnelProtocol::Hbone.into(),
        node: format!("node-{}", number % 1_000),
        workload_name: owner.clone(),
        canonical_name: owner,
        canonical_revision: "latest".to_owned(),
        status: WorkloadStatus::Healthy.into(),
        cluster_id: "Kubernetes".to_owned(),
        services: [(format!("{namespace}/{host}"), PortList { ports: ports() })].into(),
        namespace,
        ..Workload::default()
    }
}
