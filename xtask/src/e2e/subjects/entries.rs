//! ServiceEntries: hosts and addresses that no Kubernetes service stands for.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::e2e::manifest::{labelled, object, service_entry};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::Call;
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{Carried, Town};

use super::names;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "entries/static",
        covers: "endpoints written into the entry, inside and outside of the mesh's borders",
        run: written,
    },
    Scenario {
        name: "entries/workloads",
        covers: "WorkloadEntries chosen by their labels, coming and going",
        run: workloads,
    },
    Scenario {
        name: "entries/pods",
        covers: "pods outside of the mesh chosen by their labels",
        run: pods,
    },
    Scenario {
        name: "entries/meshed-pods",
        covers: "pods in the mesh chosen by their labels are reached through it",
        run: meshed_pods,
    },
    Scenario {
        name: "entries/dns",
        covers: "an endpoint that is a name is resolved by the agent",
        run: by_name,
    },
    Scenario {
        name: "entries/assigned",
        covers: "a host without an address gets one, and is called by name",
        run: assigned,
    },
    Scenario {
        name: "entries/visibility",
        covers: "an entry that only its namespace may see is hidden from others",
        run: visibility,
    },
];

const ADDRESS: &str = "240.240.200.20";

fn entry(town: &Town, resolution: &str, location: &str, more: &Value) -> Value {
    let mut spec = json!({
        "hosts": [host(town)], "addresses": [ADDRESS], "resolution": resolution, "location": location,
        "ports": [{ "number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080 }],
    });
    for (key, value) in more.as_object().into_iter().flatten() {
        spec[key] = value.clone();
    }
    spec
}

fn host(town: &Town) -> String {
    format!("entry.{}.example", town.run)
}

/// Calls to the entry's address from both clients.
fn cases(town: &Town, want: &Want) -> Vec<Case> {
    [0, 1]
        .iter()
        .map(|node| {
            Case::new(&town.client(*node), Call::http(format!("{ADDRESS}:80")), want.clone())
        })
        .collect()
}

fn written(town: &Town) -> Result<Verdict> {
    for (index, location) in [(0, "MESH_INTERNAL"), (1, "MESH_EXTERNAL")] {
        let to = town.pod(&town.plain(), "server", index);
        // A service of its own port, unlike the pod's.
        let endpoints = json!({ "endpoints": [{ "address": to.ip(), "ports": { "http": 8090 } }] });
        let spec = entry(town, "STATIC", location, &endpoints);
        town.with(&[service_entry(&town.mesh(), "static", spec)], || {
            town.settle(&cases(town, &Want::By(to.name.clone())))
        })?;
    }
    Verdict::passed("")
}

fn workloads(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let spec = entry(
        town,
        "STATIC",
        "MESH_INTERNAL",
        &json!({ "workloadSelector": { "labels": { "machine": "yes" } } }),
    );
    let machine = |name: &str, node| {
        let ip = town.pod(&town.plain(), "server", node).ip().to_owned();
        let labels = json!({ "machine": "yes" });
        let spec =
            json!({ "spec": { "address": ip, "labels": labels, "serviceAccount": "server-a" } });
        labelled(object("networking.istio.io/v1", "WorkloadEntry", &mesh, name, spec), &labels)
    };
    town.with(&[service_entry(&mesh, "workloads", spec)], || {
        town.with(&[machine("one", 0)], || {
            town.settle(&cases(town, &Want::By("server-a".to_owned())))
        })?;
        town.with(&[machine("other", 1)], || {
            town.settle(&cases(town, &Want::By("server-b".to_owned())))
        })?;
        // With none left, calls are refused, and not sent elsewhere.
        town.settle(&cases(town, &Want::Refusal))
    })?;
    Verdict::passed("")
}

fn pods(town: &Town) -> Result<Verdict> {
    let plain = town.plain();
    for (node, location) in [(0, "MESH_INTERNAL"), (1, "MESH_EXTERNAL")] {
        let name = town.pod(&plain, "server", node).name;
        let selector = json!({ "workloadSelector": { "labels": { "app": name } } });
        let spec = entry(town, "STATIC", location, &selector);
        town.with(&[service_entry(&plain, "pods", spec)], || {
            town.settle(&cases(town, &Want::By(name.clone())))
        })?;
    }
    Verdict::passed("")
}

fn meshed_pods(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let mut carried = Vec::new();
    for index in [0, 1] {
        let to = town.server(index);
        let selector = json!({ "workloadSelector": { "labels": { "app": to.name } } });
        let spec = entry(town, "STATIC", "MESH_INTERNAL", &selector);
        let cases = cases(town, &Want::By(to.name.clone()));
        let outcomes =
            town.with(&[service_entry(&mesh, "meshed", spec)], || town.settle(&cases))?;
        carried.extend(
            cases
                .iter()
                .zip(&outcomes)
                .map(|(case, outcome)| Carried::new(&case.from, &to, outcome, 8080)),
        );
    }
    town.carried(&carried)?;
    Verdict::passed("")
}

fn by_name(town: &Town) -> Result<Verdict> {
    let name = format!("server-a.{}.svc.cluster.local", town.plain());
    // The name is a service's, whose port is the one that answers.
    let more = json!({
        "endpoints": [{ "address": name }],
        "ports": [{ "number": 80, "name": "http", "protocol": "HTTP" }],
    });
    let spec = entry(town, "DNS", "MESH_EXTERNAL", &more);
    town.with(&[service_entry(&town.mesh(), "dns", spec)], || {
        town.settle(&cases(town, &Want::By("server-a".to_owned())))
    })?;
    Verdict::passed("")
}

fn assigned(town: &Town) -> Result<Verdict> {
    if !names::captured(town)? {
        return Verdict::skipped("istio-cni does not capture DNS here (AMBIENT_DNS_CAPTURE)");
    }
    let to = town.pod(&town.plain(), "server", 1);
    let mut spec =
        entry(town, "STATIC", "MESH_EXTERNAL", &json!({ "endpoints": [{ "address": to.ip() }] }));
    if let Some(spec) = spec.as_object_mut() {
        spec.remove("addresses");
    }
    town.with(&[service_entry(&town.mesh(), "assigned", spec)], || {
        let call = Call::http(format!("{}:80", host(town)));
        let cases = [0, 1]
            .map(|node| Case::new(&town.client(node), call.clone(), Want::By(to.name.clone())));
        town.settle(&cases)?;
        let found =
            town.call_all(&town.client(0), &[Call::resolve(format!("{}:80", host(town)))])?;
        ensure!(found[0].answer.to_string().contains("240.240."), "{}", found[0].answer);
        Ok(())
    })?;
    Verdict::passed("")
}

fn visibility(town: &Town) -> Result<Verdict> {
    if !town.options.mesh_wide {
        return Verdict::skipped("changes the whole mesh: ask for it with --mesh-wide");
    }
    let namespace = &town.agents.namespace;
    let config = town.kubectl.json(&["get", "configmap", "istio", "-n", namespace])?;
    let before = config["data"]["mesh"].as_str().unwrap_or_default();
    let patch = |mesh: &str| json!({ "data": { "mesh": mesh } }).to_string();
    let back = patch(before);
    let line = |patch: &'_ str| {
        ["patch", "configmap", "istio", "-n", namespace, "--type=merge", "-p", patch]
            .map(ToOwned::to_owned)
    };
    let undo = line(&back);
    let step = town.undo.remember(&undo.each_ref().map(String::as_str));
    let hidden =
        format!("{}\nserviceEntryVisibility:\n  defaultVisibility: NAMESPACE\n", before.trim_end());
    let to = town.pod(&town.plain(), "server", 0);
    let spec =
        entry(town, "STATIC", "MESH_EXTERNAL", &json!({ "endpoints": [{ "address": to.ip() }] }));
    let done = town.kubectl.run(&line(&patch(&hidden))).and_then(|_| {
        town.with(&[service_entry(&town.mesh(), "hidden", spec)], || {
            let mut cases = cases(town, &Want::By(to.name.clone()));
            // To others the address means nothing, and nothing is there.
            let call = Call::http(format!("{ADDRESS}:80")).with("timeout_ms", 2000);
            let stranger = town.pod(&town.other(), "client", 0);
            town.settle(&cases)?;
            cases.clear();
            town.until("the entry to be hidden", || {
                let outcome = town.calls(&stranger, std::slice::from_ref(&call))?;
                ensure!(
                    !outcome[0].ok,
                    "another namespace is answered by {:?}",
                    outcome[0].server()
                );
                Ok(())
            })
        })
    });
    let undone = town.undo.now(step);
    done?;
    undone?;
    Verdict::passed("")
}
