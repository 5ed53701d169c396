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

/// Calls of ten a second that a path may lose whenever one of its pods enters the mesh.
///
/// Into a running pod istio-cni puts its rules before it tells the agent of the pod, so that for the
/// time of one `ip6tables-restore` these lead to ports where nobody can listen yet, and the kernel
/// refuses. No agent can change that, so that both are allowed the same.
const EACH_ENTRY: u64 = 1;

/// Every path's losses: no stream, and of the calls only what the pods' `entries` explain. More than
/// that is known of the peer, unless `strict` says of a path's ends that it would be Culvert's.
fn judge(
    town: &Town,
    loads: Loads<'_>,
    entries: u64,
    strict: impl Fn(usize, usize) -> bool,
) -> Result<Verdict> {
    let (mut known, mut told, mut made, mut lost) = (Vec::new(), Vec::new(), 0, 0);
    for ((client, server), report) in loads.stop()? {
        let path = format!("{} to {}", town.client(client).name, town.server(server).name);
        let excused = report.lost_streams() == 0 && report.lost_calls() <= entries * EACH_ENTRY;
        if !excused && strict(client, server) {
            anyhow::bail!("{path}: {report}: {}", report.first_losses());
        }
        if !excused {
            known.push(format!("{path}: {report}"));
        }
        made += report.calls.made;
        lost += report.lost_calls();
        told.extend(report.tell_losses());
    }
    if known.is_empty() {
        return Verdict::passed(format!(
            "no stream and {lost} of {made} calls lost on 4 paths{}",
            told.concat()
        ));
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
    judge(town, loads, 3 * 2, |client, server| {
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
    judge(town, loads, 2, |_, server| kinds.get(server) == Some(&Kind::Culvert))
}
