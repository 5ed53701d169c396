//! Pods that are not in the mesh: they call into it and are called from it, in clear.

use anyhow::{Result, ensure};
use serde_json::json;

use crate::e2e::carried;
use crate::e2e::manifest::{self, MODE};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, at};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{PATHS, Pod, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "outside/inwards",
        covers: "a pod outside of the mesh calls pods and services inside",
        run: inwards,
    },
    Scenario {
        name: "outside/outwards",
        covers: "a pod in the mesh calls pods and services outside",
        run: outwards,
    },
    Scenario {
        name: "outside/opted-out",
        covers: "a pod that is labelled out of its namespace's mesh is left alone",
        run: opted_out,
    },
    Scenario {
        name: "outside/host-network",
        covers: "a pod in its node's network calls pods in the mesh",
        run: host_network,
    },
    Scenario {
        name: "outside/unknown-address",
        covers: "an address that the mesh does not know is reached as before",
        run: unknown_address,
    },
];

fn inwards(town: &Town) -> Result<Verdict> {
    let (mesh, plain) = (town.mesh(), town.plain());
    for (client, server) in PATHS {
        let (from, to) = (town.pod(&plain, "client", client), town.server(server));
        let calls = [
            Call::http(to.at(8080)),
            Call::echo(to.at(9000), 300_000),
            Call::banner(to.at(9001)),
            Call::http(at(&format!("{}.{mesh}", to.name), 80)),
        ];
        for outcome in town.call_all(&from, &calls)? {
            let seen = outcome.seen_ip();
            ensure!(
                seen.is_empty() || from.ips.iter().any(|ip| ip == seen),
                "{} saw {seen}",
                to.name
            );
        }
        in_clear(town, &from, &to)?;
    }
    Verdict::passed("in clear, and told so by the destination's agent")
}

/// The destination's agent tells of calls from a pod without an identity.
fn in_clear(town: &Town, from: &Pod, to: &Pod) -> Result<()> {
    town.until("the destination's agent to tell of the calls", || {
        let agent = town.agents.on(&to.node)?;
        let lines = carried::lines(&town.agents.log(&agent, town.window())?);
        let mine = lines.iter().filter(|line| {
            let ends =
                line.field("src.workload") == from.name && line.field("dst.workload") == to.name;
            ends && line.field("src.namespace") == from.namespace
                && line.field("direction") == "inbound"
        });
        let mine: Vec<_> = mine.collect();
        ensure!(!mine.is_empty(), "no line about {} and {}", from.name, to.name);
        for line in mine {
            ensure!(line.field("src.identity").is_empty(), "with an identity: {}", line.whole());
        }
        Ok(())
    })
}

fn outwards(town: &Town) -> Result<Verdict> {
    let plain = town.plain();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.pod(&plain, "server", server));
        let calls = [
            Call::http(to.at(8080)),
            Call::echo(to.at(9000), 300_000),
            Call::banner(to.at(9001)),
            Call::sum(to.at(9003), 10_000),
            Call::http(at(&format!("{}.{plain}", to.name), 80)),
        ];
        for outcome in town.call_all(&from, &calls)? {
            let seen = outcome.seen_ip();
            ensure!(
                seen.is_empty() || from.ips.iter().any(|ip| ip == seen),
                "{} saw {seen}",
                to.name
            );
        }
    }
    Verdict::passed("")
}

fn opted_out(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let name = town.unique("opted-out");
    let spec = town.spec(&mesh, &name, 1, json!({ MODE: "none" }));
    let objects = [manifest::account(&mesh, &name), manifest::pod(&spec)];
    town.with(&objects, || {
        town.wait_ready(&mesh)?;
        let out = town.pods_of(&mesh)?.into_iter().find(|pod| pod.name == name);
        let out = out.ok_or_else(|| anyhow::anyhow!("{name} is gone"))?;
        let strict =
            manifest::peer_authentication(&mesh, "strict", json!(null), "STRICT", json!({}));
        // It has no identity, and so is refused where one is wanted; and it is not itself guarded.
        town.with(&[strict], || {
            let mut cases = vec![
                Case::new(&out, Call::http(town.server(0).at(8080)), Want::Refusal),
                Case::new(&out, Call::http(town.server(1).at(8080)), Want::Refusal),
            ];
            cases.extend(
                [0, 1].map(|node| {
                    Case::new(&town.client(node), Call::http(out.at(8080)), Want::Answer)
                }),
            );
            cases.push(Case::new(
                &town.pod(&town.plain(), "client", 0),
                Call::http(out.at(8080)),
                Want::Answer,
            ));
            town.settle(&cases)
        })
    })?;
    Verdict::passed("")
}

fn host_network(town: &Town) -> Result<Verdict> {
    let plain = town.plain();
    let mut objects = Vec::new();
    let names: Vec<String> = [0, 1].iter().map(|_| town.unique("host")).collect();
    for (index, name) in names.iter().enumerate() {
        let spec = town.spec(&plain, name, index, json!({}));
        let mut pod = manifest::pod(&spec);
        pod["spec"]["hostNetwork"] = true.into();
        pod["spec"]["dnsPolicy"] = "ClusterFirstWithHostNet".into();
        // Nothing of its own is to listen on the node.
        pod["spec"]["containers"][0]["command"] = json!(["culvert-app", "wait"]);
        if let Some(container) = pod["spec"]["containers"][0].as_object_mut() {
            container.remove("readinessProbe");
        }
        objects.extend([manifest::account(&plain, name), pod]);
    }
    town.with(&objects, || {
        town.wait_ready(&plain)?;
        let mut cases = Vec::new();
        for host in town.pods_of(&plain)?.iter().filter(|pod| names.contains(&pod.name)) {
            for server in [0, 1] {
                cases.push(Case::new(host, Call::http(town.server(server).at(8080)), Want::Answer));
                let vip = town.vips(&town.mesh(), &town.server(server).name)?;
                let vip = vip.first().map(String::as_str).unwrap_or_default();
                cases.push(Case::new(host, Call::echo(at(vip, 9000), 1000), Want::Answer));
            }
        }
        ensure!(cases.len() == 8, "{} calls", cases.len());
        town.expect(&cases)
    })?;
    Verdict::passed("")
}

fn unknown_address(town: &Town) -> Result<Verdict> {
    // The API server's own address is no workload of the mesh.
    let slices =
        ["get", "endpointslices", "-n", "default", "-l", "kubernetes.io/service-name=kubernetes"];
    let slices = town.kubectl.items(&slices)?;
    let slice = slices.first().ok_or_else(|| anyhow::anyhow!("the API server has no address"))?;
    let address = slice["endpoints"][0]["addresses"][0].as_str().unwrap_or_default();
    let port =
        slice["ports"][0]["port"].as_u64().and_then(|port| u16::try_from(port).ok()).unwrap_or(443);
    let call = Call::http(at(address, port));
    let cases = [0, 1].map(|node| Case::new(&town.client(node), call.clone(), Want::Status(400)));
    town.expect(&cases)?;
    Verdict::passed(at(address, port))
}
