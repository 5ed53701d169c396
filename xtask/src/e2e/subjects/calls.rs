//! Plain calls: by pod, service, headless service and name, in both IP families and all ways of
//! talking.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

use crate::e2e::agents::Kind;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, Outcome, at};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{Carried, PATHS, Pod, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "calls/pod",
        covers: "by pod address: HTTP, server first, half-closed, slow, a megabyte; the client's own address is seen",
        run: by_pod,
    },
    Scenario {
        name: "calls/service",
        covers: "by service address, to a pod of each node, with another target port",
        run: by_service,
    },
    Scenario {
        name: "calls/balanced",
        covers: "a service with pods on both nodes reaches both, one connection at a time",
        run: balanced,
    },
    Scenario { name: "calls/name", covers: "by short, middle and full service name", run: by_name },
    Scenario {
        name: "calls/headless",
        covers: "by the name of a headless service, to each pod",
        run: headless,
    },
    Scenario {
        name: "calls/dual-stack",
        covers: "by IPv6 pod and service address",
        run: dual_stack,
    },
    Scenario {
        name: "calls/itself",
        covers: "a pod calls itself, by its address and by its service",
        run: itself,
    },
    Scenario {
        name: "calls/many",
        covers: "two hundred connections at the same time, each answered",
        run: many,
    },
    Scenario {
        name: "calls/closed-port",
        covers: "a port where nobody listens, or only on loopback, fails and does not hang",
        run: closed_port,
    },
    Scenario {
        name: "calls/udp",
        covers: "datagrams pass as before, by pod and by service",
        run: datagrams,
    },
    Scenario {
        name: "calls/api-server",
        covers: "the API server answers to a pod in the mesh",
        run: api_server,
    },
];

/// Every way of talking, to the ports of a pod.
fn every_way(address: &str) -> Vec<(Call, u16)> {
    vec![
        (Call::http(at(address, 8080)), 8080),
        (Call::http(at(address, 8090)).with("times", 5), 8090),
        (Call::echo(at(address, 9000), 1_000_000), 9000),
        (Call::banner(at(address, 9001)), 9001),
        (Call::trickle(at(address, 9002), 5, 100), 9002),
        (Call::sum(at(address, 9003), 200_000), 9003),
    ]
}

/// Calls a pod in every way at one of its addresses; gives what the logs have to show.
fn call_pod(town: &Town, from: &Pod, to: &Pod, address: &str) -> Result<Vec<Carried>> {
    let (calls, ports): (Vec<Call>, Vec<u16>) = every_way(address).into_iter().unzip();
    let outcomes = town.call_all(from, &calls)?;
    for (outcome, port) in outcomes.iter().zip(&ports) {
        if !outcome.server().is_empty() {
            ensure!(outcome.server() == to.name, "port {port}: answered by {:?}", outcome.server());
        }
        let seen = outcome.seen_ip();
        ensure!(
            seen.is_empty() || from.ips.iter().any(|ip| ip == seen),
            "port {port} of {} saw {seen} as the client, not {:?}",
            to.name,
            from.ips
        );
    }
    Ok(outcomes
        .iter()
        .zip(ports)
        .map(|(outcome, port)| Carried::new(from, to, outcome, port))
        .collect())
}

fn by_pod(town: &Town) -> Result<Verdict> {
    let mut carried = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        carried.extend(call_pod(town, &from, &to, to.ip())?);
    }
    town.carried(&carried)?;
    Verdict::passed(format!(
        "{} calls, each in both access logs with both identities",
        carried.len()
    ))
}

fn by_service(town: &Town) -> Result<Verdict> {
    let mut carried = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let vip = town.vips(&to.namespace, &to.name)?.into_iter().next().context("no address")?;
        carried.extend(call_service(town, &from, &to, &vip)?);
    }
    town.carried(&carried)?;
    Verdict::passed(format!("{} calls", carried.len()))
}

fn call_service(town: &Town, from: &Pod, to: &Pod, host: &str) -> Result<Vec<Carried>> {
    let calls = [
        Call::http(at(host, 80)),
        Call::echo(at(host, 9000), 100_000),
        Call::banner(at(host, 9001)),
    ];
    let outcomes = town.call_all(from, &calls)?;
    let (http, banner) = (&outcomes[0], &outcomes[2]);
    for outcome in [http, banner] {
        ensure!(outcome.server() == to.name, "answered by {:?}", outcome.server());
        ensure!(
            from.ips.iter().any(|ip| ip == outcome.seen_ip()),
            "{} saw {} as the client",
            to.name,
            outcome.seen_ip()
        );
    }
    Ok(outcomes
        .iter()
        .zip([8080, 9000, 9001])
        .map(|(o, port)| Carried::new(from, to, o, port))
        .collect())
}

fn balanced(town: &Town) -> Result<Verdict> {
    let mut carried = Vec::new();
    for node in [0, 1] {
        let from = town.client(node);
        let calls = vec![Call::http(at("server", 80)); 24];
        let outcomes = town.call_all(&from, &calls)?;
        let servers: BTreeSet<&str> = outcomes.iter().map(Outcome::server).collect();
        ensure!(servers.len() == 2, "24 calls from {} reached only {servers:?}", from.name);
        for outcome in &outcomes {
            carried.push(Carried::new(&from, &town.named(outcome)?, outcome, 8080));
        }
    }
    town.carried(&carried)?;
    Verdict::passed(format!("{} calls", carried.len()))
}

fn by_name(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let mut carried = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let hosts = [
            to.name.clone(),
            format!("{}.{mesh}", to.name),
            format!("{}.{mesh}.svc.cluster.local", to.name),
        ];
        let calls: Vec<Call> = hosts.iter().map(|host| Call::http(at(host, 80))).collect();
        for outcome in town.call_all(&from, &calls)? {
            ensure!(outcome.server() == to.name, "answered by {:?}", outcome.server());
            carried.push(Carried::new(&from, &to, &outcome, 8080));
        }
    }
    town.carried(&carried)?;
    Verdict::passed(format!("{} calls", carried.len()))
}

fn headless(town: &Town) -> Result<Verdict> {
    let mut carried = Vec::new();
    for node in [0, 1] {
        let from = town.client(node);
        let found = town.call_all(&from, &[Call::resolve(at("headless", 8080))])?;
        let addresses: BTreeSet<&str> = found[0]
            .answer
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|address| address.as_str())
            .collect();
        for server in [town.server(0), town.server(1)] {
            ensure!(
                addresses.contains(server.at(8080).as_str()),
                "{} is not among {addresses:?}",
                server.name
            );
        }
        // A headless service has no port of its own: what is called is the pod's.
        for outcome in town.call_all(&from, &vec![Call::http(at("headless", 8080)); 6])? {
            carried.push(Carried::new(&from, &town.named(&outcome)?, &outcome, 8080));
        }
    }
    town.carried(&carried)?;
    Verdict::passed(format!("{} calls", carried.len()))
}

fn dual_stack(town: &Town) -> Result<Verdict> {
    let mut carried = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let Some(address) = to.v6() else {
            return Verdict::skipped("the pods have no IPv6 addresses");
        };
        carried.extend(call_pod(town, &from, &to, address)?);
        match town.vips(&to.namespace, &to.name)?.iter().find(|ip| ip.contains(':')) {
            Some(vip) => carried.extend(call_service(town, &from, &to, vip)?),
            None => return Verdict::skipped("services have no IPv6 addresses"),
        }
    }
    town.carried(&carried)?;
    Verdict::passed(format!("{} calls", carried.len()))
}

fn itself(town: &Town) -> Result<Verdict> {
    for node in [0, 1] {
        let pod = town.server(node);
        // Its bare name is its own hostname, which `/etc/hosts` knows.
        let service = format!("{}.{}", pod.name, pod.namespace);
        let calls =
            [Call::http(pod.at(8080)), Call::http("127.0.0.1:8080"), Call::http(at(&service, 80))];
        for outcome in town.call_all(&pod, &calls)? {
            ensure!(outcome.server() == pod.name, "answered by {:?}", outcome.server());
        }
    }
    Verdict::passed("by its address, loopback and its service")
}

fn many(town: &Town) -> Result<Verdict> {
    for node in [0, 1] {
        let calls = vec![Call::trickle(at("server", 9002), 4, 50); 100];
        town.call_all(&town.client(node), &calls)?;
    }
    Verdict::passed("")
}

fn closed_port(town: &Town) -> Result<Verdict> {
    let (mut worse, mut told) = (Vec::new(), 0);
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let calls = [
            Call::http(to.at(7999)),
            Call::echo(to.at(9009), 10),
            Call::echo(at(&to.name, 9009), 10),
        ];
        let cases: Vec<Case> =
            calls.iter().map(|call| Case::new(&from, call.clone(), Want::Refusal)).collect();
        for (outcome, call) in town.expect(&cases)?.iter().zip(&calls) {
            told += 1;
            // A clean end where there was nothing would look like an empty answer.
            if outcome.kind == "cut" {
                ensure!(
                    town.kind(client)? == Kind::Ztunnel,
                    "a clean end came from {}: {outcome}",
                    call.told()
                );
                worse.push(format!("{} {}", from.name, call.told()));
            }
        }
    }
    if worse.is_empty() {
        return Verdict::passed(format!("{told} calls"));
    }
    Ok(Verdict::Known(format!("a clean end in place of a reset, {} of {told} calls", worse.len())))
}

fn datagrams(town: &Town) -> Result<Verdict> {
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        let calls = [Call::udp(to.at(9004)), Call::udp(at(&to.name, 9004))];
        town.until("datagrams to come back", || town.call_all(&from, &calls))?;
    }
    Verdict::passed("")
}

fn api_server(town: &Town) -> Result<Verdict> {
    // HTTP to its HTTPS port: it says so, and that it could be reached.
    let call = Call::http("kubernetes.default.svc:443");
    let cases = [0, 1].map(|node| Case::new(&town.client(node), call.clone(), Want::Status(400)));
    town.expect(&cases)?;
    Verdict::passed("")
}
