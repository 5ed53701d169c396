//! Pods that enter and leave the mesh while they talk.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::disturb::{self, Loads};
use crate::e2e::agents::Kind;
use crate::e2e::manifest::{self, MODE, peer_authentication};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, Outcome};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{PATHS, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "enrolment/first-call",
        covers: "a new pod's very first call has its identity already",
        run: first_call,
    },
    Scenario {
        name: "enrolment/namespace",
        covers: "a namespace taken out and in three times under load: no stream is cut",
        run: namespace,
    },
    Scenario {
        name: "enrolment/pod",
        covers: "a server's pod taken out and in under load",
        run: pod,
    },
];

fn first_call(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let strict = peer_authentication(&mesh, "strict", Value::Null, "STRICT", json!({}));
    let calls = json!([
        Call::http("server-a:80").plan(),
        Call::http("server-b:80").plan(),
        Call::http("server:80").plan(),
    ]);
    let names: Vec<String> = (0..10).map(|_| town.unique("newcomer")).collect();
    let mut objects = Vec::new();
    for (index, name) in names.iter().enumerate() {
        let mut pod =
            manifest::pod(&town.spec(&mesh, name, index % 2, json!({ "role": "newcomer" })));
        pod["spec"]["restartPolicy"] = "Never".into();
        let container = &mut pod["spec"]["containers"][0];
        container["command"] = json!(["culvert-app", "call", calls.to_string()]);
        if let Some(container) = container.as_object_mut() {
            container.remove("readinessProbe");
        }
        objects.extend([manifest::account(&mesh, name), pod]);
    }
    town.with(&[strict], || {
        // Only when strangers are refused does an answer prove an identity.
        let stranger = town.pod(&town.plain(), "client", 0);
        town.settle(&[0, 1].map(|server| {
            Case::new(&stranger, Call::http(town.server(server).at(8080)), Want::Refusal)
        }))?;
        town.with(&objects, || {
            for name in &names {
                let pod = format!("pod/{name}");
                town.kubectl.run(&[
                    "wait",
                    "--for=jsonpath={.status.phase}=Succeeded",
                    &pod,
                    "-n",
                    &mesh,
                    "--timeout=90s",
                ])?;
                let said = town.kubectl.run(&["logs", name, "-n", &mesh])?;
                let outcomes: Vec<Outcome> = serde_json::from_str(&said)?;
                for outcome in outcomes {
                    ensure!(outcome.ok, "{name}: {outcome}");
                }
            }
            Ok(())
        })
    })?;
    Verdict::passed(format!("{} pods", names.len()))
}

/// Calls that may be lost with each change, of ten a second: istio-cni lays its rules in a running pod
/// before it tells the agent, and what comes in between is refused by the kernel. A ztunnel that calls
/// also loses what it was about to send through a tunnel that is being closed.
const EACH_CHANGE: u64 = 1;

/// Every path's losses: where `strict` says so of its ends' nodes, no stream, and of the calls only
/// what `changes` of the pods' enrolment explain.
fn judge(
    town: &Town,
    loads: Loads<'_>,
    changes: u64,
    strict: impl Fn(usize, usize) -> bool,
) -> Result<Verdict> {
    let (mut known, mut told) = (Vec::new(), Vec::new());
    for ((client, server), report) in loads.stop()? {
        let path = format!("{} to {}", town.client(client).name, town.server(server).name);
        let excused = report.lost_streams() == 0 && report.lost_calls() <= changes * EACH_CHANGE;
        if report.lost() == 0 || (excused && strict(client, server)) {
            told.push((report.calls.made, report.lost_calls()));
        } else if strict(client, server) {
            anyhow::bail!("{path}: {report}: {}", report.first_losses());
        } else {
            known.push(format!("{path}: {report}"));
        }
    }
    if known.is_empty() {
        let (made, lost) = told.iter().fold((0, 0), |sum, path| (sum.0 + path.0, sum.1 + path.1));
        return Verdict::passed(format!("no stream and {lost} of {made} calls lost on 4 paths"));
    }
    Ok(Verdict::Known(known.join("; ")))
}

fn namespace(town: &Town) -> Result<Verdict> {
    let kinds = [town.kind(0)?, town.kind(1)?];
    let loads = Loads::start(town)?;
    let namespace = format!("namespace/{}", town.mesh());
    for _ in 0..3 {
        town.labelled("", &namespace, (MODE, None), || {
            disturb::enrolled(town, false)?;
            loads.further(20)
        })?;
        disturb::enrolled(town, true)?;
        loads.further(20)?;
    }
    judge(town, loads, 6 * 2, |client, server| {
        [client, server].iter().all(|end| kinds.get(*end) == Some(&Kind::Culvert))
    })
}

fn pod(town: &Town) -> Result<Verdict> {
    let kinds = [town.kind(0)?, town.kind(1)?];
    let loads = Loads::start(town)?;
    let mesh = town.mesh();
    for _ in 0..2 {
        for (_, server) in PATHS.iter().take(2) {
            let name = format!("pod/{}", town.server(*server).name);
            town.labelled(&mesh, &name, (MODE, Some("none")), || {
                disturb::pod_enrolled(town, &town.server(*server), false)?;
                loads.further(20)
            })?;
            disturb::pod_enrolled(town, &town.server(*server), true)?;
            loads.further(20)?;
        }
    }
    judge(town, loads, 4, |_, server| kinds.get(server) == Some(&Kind::Culvert))
}
