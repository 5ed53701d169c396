//! Names: what the agent's DNS proxy answers by itself, and what it passes on.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::e2e::manifest::service_entry;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, Outcome};
use crate::e2e::town::Town;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "names/services",
        covers: "services by every form of their names, over UDP and TCP, in both families",
        run: services,
    },
    Scenario {
        name: "names/entry",
        covers: "a host that only a ServiceEntry knows has an address in the mesh, and none outside",
        run: entry,
    },
    Scenario {
        name: "names/passed-on",
        covers: "names that the mesh does not know are asked of the cluster's DNS",
        run: passed_on,
    },
];

/// Whether the nodes' CNI agents hand DNS to the node agents.
pub fn captured(town: &Town) -> Result<bool> {
    let namespace = &town.agents.namespace;
    let config = town.kubectl.json(&["get", "configmap", "istio-cni-config", "-n", namespace])?;
    Ok(config["data"]["AMBIENT_DNS_CAPTURE"] == "true")
}

const NOT_CAPTURED: &str = "istio-cni does not capture DNS here (AMBIENT_DNS_CAPTURE)";

/// The addresses of an answer.
fn addresses(outcome: &Outcome) -> Vec<String> {
    let answers = outcome.answer["answers"].as_array().into_iter().flatten();
    let addresses =
        answers.filter(|answer| ["A", "AAAA"].iter().any(|kind| answer["type"] == *kind));
    addresses.filter_map(|answer| answer["data"].as_str().map(ToOwned::to_owned)).collect()
}

fn services(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let vips = town.vips(&mesh, "server")?;
    for node in [0, 1] {
        let client = town.client(node);
        for record in ["A", "AAAA"] {
            let want: Vec<&String> =
                vips.iter().filter(|ip| ip.contains(':') == (record == "AAAA")).collect();
            let full = format!("server.{mesh}.svc.cluster.local");
            let calls = [Call::dns(&full, record), Call::dns(&full, record).with("tcp", true)];
            for outcome in town.call_all(&client, &calls)? {
                ensure!(outcome.answer["code"] == "No Error", "{}", outcome.answer);
                ensure!(
                    addresses(&outcome).iter().eq(want.iter().copied()),
                    "{record}: {} for {want:?}",
                    outcome.answer
                );
            }
        }
        let forms = [
            "server".to_owned(),
            format!("server.{mesh}"),
            format!("server.{mesh}.svc.cluster.local"),
        ];
        let calls: Vec<Call> =
            forms.iter().map(|name| Call::resolve(format!("{name}:80"))).collect();
        for outcome in town.call_all(&client, &calls)? {
            ensure!(
                vips.iter().any(|ip| outcome.answer.to_string().contains(ip.as_str())),
                "{}",
                outcome.answer
            );
        }
    }
    Verdict::passed("")
}

fn entry(town: &Town) -> Result<Verdict> {
    if !captured(town)? {
        return Verdict::skipped(NOT_CAPTURED);
    }
    let host = format!("{}.example", town.run);
    let spec = json!({
        "hosts": [host, format!("*.wild.{host}")], "location": "MESH_EXTERNAL", "resolution": "STATIC",
        "addresses": ["240.240.200.10"],
        "ports": [{ "number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080 }],
        "endpoints": [{ "address": town.pod(&town.plain(), "server", 1).ip() }],
    });
    town.with(&[service_entry(&town.mesh(), "named", spec)], || {
        for node in [0, 1] {
            let client = town.client(node);
            town.until("the name to be known", || {
                let calls = [
                    Call::dns(&host, "A"),
                    Call::dns(&host, "A").with("tcp", true),
                    Call::dns(format!("any.wild.{host}"), "A"),
                ];
                for outcome in town.call_all(&client, &calls)? {
                    ensure!(addresses(&outcome) == ["240.240.200.10"], "{}", outcome.answer);
                }
                // Known, so it has no IPv6 address; and that is not the same as an unknown name.
                let six = town.call_all(&client, &[Call::dns(&host, "AAAA")])?;
                ensure!(
                    six[0].answer["code"] == "No Error" && addresses(&six[0]).is_empty(),
                    "{}",
                    six[0].answer
                );
                Ok(())
            })?;
            let called = town.call_all(&client, &[Call::http(format!("{host}:80"))])?;
            ensure!(called[0].server() == "server-b", "answered by {:?}", called[0].server());
            let outside =
                town.calls(&town.pod(&town.plain(), "client", node), &[Call::dns(&host, "A")])?;
            ensure!(
                addresses(&outside[0]).is_empty(),
                "known outside of the mesh: {}",
                outside[0].answer
            );
        }
        Ok(())
    })?;
    Verdict::passed("")
}

fn passed_on(town: &Town) -> Result<Verdict> {
    for node in [0, 1] {
        let (client, outside) = (town.client(node), town.pod(&town.plain(), "client", node));
        let nowhere = format!("nowhere.{}.svc.cluster.local", town.mesh());
        let calls = [
            Call::dns(&nowhere, "A"),
            Call::dns(&nowhere, "A").with("tcp", true),
            Call::dns("kubernetes.default.svc.cluster.local", "SRV"),
            Call::dns("_http._tcp.server.nowhere.svc.cluster.local", "SRV"),
        ];
        let (ours, theirs) = (town.call_all(&client, &calls)?, town.call_all(&outside, &calls)?);
        for (own, other) in ours.iter().zip(&theirs) {
            let of = |outcome: &Outcome| -> (Value, usize) {
                (
                    outcome.answer["code"].clone(),
                    outcome.answer["answers"].as_array().map_or(0, Vec::len),
                )
            };
            ensure!(of(own) == of(other), "{} in the mesh, {} outside", own.answer, other.answer);
        }
    }
    Verdict::passed("as outside of the mesh")
}
