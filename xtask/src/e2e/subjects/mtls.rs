//! Who must prove an identity: PeerAuthentication for the mesh, a namespace, a workload, a port.

use anyhow::Result;
use serde_json::{Value, json};

use crate::e2e::manifest::peer_authentication;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, at};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{Carried, PATHS, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "mtls/strict",
        covers: "STRICT in a namespace: the mesh is answered, strangers are not",
        run: strict,
    },
    Scenario {
        name: "mtls/permissive",
        covers: "PERMISSIVE and DISABLE in a namespace: both are answered",
        run: permissive,
    },
    Scenario {
        name: "mtls/workload",
        covers: "STRICT for one workload, and PERMISSIVE for one under STRICT",
        run: workload,
    },
    Scenario {
        name: "mtls/port",
        covers: "one port with a mode of its own, both ways round",
        run: port,
    },
    Scenario {
        name: "mtls/mesh",
        covers: "STRICT for the whole mesh, with a namespace that is PERMISSIVE",
        run: mesh,
    },
];

/// Calls from inside are answered, and from outside as `stranger` says, at one server's port.
fn at_port(town: &Town, server: usize, port: u16, stranger: &Want) -> Vec<Case> {
    let to = town.server(server);
    let mut cases = Vec::new();
    for client in [0, 1] {
        cases.push(Case::new(
            &town.client(client),
            Call::http(to.at(port)),
            Want::By(to.name.clone()),
        ));
        cases.push(Case::new(
            &town.pod(&town.plain(), "client", client),
            Call::http(to.at(port)),
            stranger.clone(),
        ));
    }
    cases
}

fn strict(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    town.with(&[peer_authentication(&mesh, "strict", Value::Null, "STRICT", json!({}))], || {
        let mut cases = Vec::new();
        for (client, server) in PATHS {
            let (to, stranger) = (town.server(server), town.pod(&town.plain(), "client", client));
            let host = at(&format!("{}.{mesh}", to.name), 80);
            cases.push(Case::new(
                &town.client(client),
                Call::http(to.at(8080)),
                Want::By(to.name.clone()),
            ));
            cases.push(Case::new(
                &town.client(client),
                Call::http(&host),
                Want::By(to.name.clone()),
            ));
            for call in [Call::http(to.at(8080)), Call::http(&host), Call::echo(to.at(9000), 10)] {
                cases.push(Case::new(&stranger, call, Want::Refusal));
            }
            if let Some(v6) = to.v6() {
                cases.push(Case::new(
                    &town.client(client),
                    Call::http(at(v6, 8080)),
                    Want::By(to.name.clone()),
                ));
                cases.push(Case::new(&stranger, Call::http(at(v6, 8080)), Want::Refusal));
            }
        }
        let outcomes = town.settle(&cases)?;
        let answered = cases.iter().zip(&outcomes).filter(|(_, outcome)| outcome.ok);
        let carried: Result<Vec<Carried>> = answered
            .map(|(case, outcome)| {
                Ok(Carried::new(&case.from, &town.named(outcome)?, outcome, 8080))
            })
            .collect();
        town.carried(&carried?)
    })?;
    Verdict::passed("")
}

fn permissive(town: &Town) -> Result<Verdict> {
    for mode in ["PERMISSIVE", "DISABLE"] {
        town.with(
            &[peer_authentication(&town.mesh(), "mode", Value::Null, mode, json!({}))],
            || {
                town.settle(
                    &[at_port(town, 0, 8080, &Want::Answer), at_port(town, 1, 8080, &Want::Answer)]
                        .concat(),
                )
            },
        )?;
    }
    Verdict::passed("")
}

fn workload(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    for index in [0, 1] {
        let only = json!({ "app": town.server(index).name });
        town.with(
            &[peer_authentication(&mesh, "one-strict", only.clone(), "STRICT", json!({}))],
            || {
                let others = at_port(town, 1 - index, 8080, &Want::Answer);
                town.settle(&[at_port(town, index, 8080, &Want::Refusal), others].concat())
            },
        )?;
        let objects = [
            peer_authentication(&mesh, "all-strict", Value::Null, "STRICT", json!({})),
            peer_authentication(&mesh, "one-open", only, "PERMISSIVE", json!({})),
        ];
        town.with(&objects, || {
            let others = at_port(town, 1 - index, 8080, &Want::Refusal);
            town.settle(&[at_port(town, index, 8080, &Want::Answer), others].concat())
        })?;
    }
    Verdict::passed("")
}

fn port(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    for (mode, other, at_mode, at_other) in [
        ("STRICT", "PERMISSIVE", Want::Refusal, Want::Answer),
        ("PERMISSIVE", "STRICT", Want::Answer, Want::Refusal),
        ("STRICT", "DISABLE", Want::Refusal, Want::Answer),
    ] {
        for index in [0, 1] {
            let only = json!({ "app": town.server(index).name });
            let object = peer_authentication(&mesh, "port", only, mode, json!({ "8090": other }));
            town.with(&[object], || {
                town.settle(
                    &[at_port(town, index, 8080, &at_mode), at_port(town, index, 8090, &at_other)]
                        .concat(),
                )
            })?;
        }
    }
    Verdict::passed("")
}

fn mesh(town: &Town) -> Result<Verdict> {
    if !town.options.mesh_wide {
        return Verdict::skipped("changes the whole mesh: ask for it with --mesh-wide");
    }
    let whole =
        peer_authentication(&town.agents.namespace, "default", Value::Null, "STRICT", json!({}));
    town.with(&[whole], || {
        let cases =
            [at_port(town, 0, 8080, &Want::Refusal), at_port(town, 1, 8080, &Want::Refusal)]
                .concat();
        town.settle(&cases)?;
        town.with(
            &[peer_authentication(&town.mesh(), "open", Value::Null, "PERMISSIVE", json!({}))],
            || {
                town.settle(
                    &[at_port(town, 0, 8080, &Want::Answer), at_port(town, 1, 8080, &Want::Answer)]
                        .concat(),
                )
            },
        )?;
        town.settle(&cases)
    })?;
    Verdict::passed("")
}
