//! AuthorizationPolicy as an agent judges it: by identity, namespace, account, address and port.

use std::time::Duration;

use anyhow::{Result, ensure};
use culvert_lab::wait;
use serde_json::{Value, json};

use crate::e2e::agents::Kind;
use crate::e2e::load::{Load, Plan};
use crate::e2e::manifest::policy;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::Call;
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{Pod, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "policy/principal",
        covers: "ALLOW by principal: exact, prefix and presence",
        run: principal,
    },
    Scenario { name: "policy/namespace", covers: "ALLOW and DENY by namespace", run: namespace },
    Scenario { name: "policy/account", covers: "ALLOW by service account", run: account },
    Scenario {
        name: "policy/address",
        covers: "ALLOW and DENY by the client's address",
        run: address,
    },
    Scenario {
        name: "policy/port",
        covers: "DENY by port, which is the pod's and not the service's",
        run: port,
    },
    Scenario {
        name: "policy/condition",
        covers: "`when` conditions, and negations",
        run: condition,
    },
    Scenario {
        name: "policy/nothing",
        covers: "an ALLOW without rules allows nobody; a DENY of everything wins over ALLOW",
        run: nothing,
    },
    Scenario {
        name: "policy/request-rules",
        covers: "rules about HTTP: an ALLOW becomes narrower, a DENY wider",
        run: request_rules,
    },
    Scenario { name: "policy/dry-run", covers: "a policy in dry run refuses nobody", run: dry_run },
    Scenario {
        name: "policy/live",
        covers: "a policy that comes ends the connections it refuses, and no others",
        run: live,
    },
    Scenario {
        name: "policy/mesh",
        covers: "a policy of the root namespace holds everywhere",
        run: mesh,
    },
];

/// How long ztunnel is waited for where it is known to fall short.
const PEER: Duration = Duration::from_secs(5);

/// Everybody who may call: in the mesh, in its other namespace, and outside.
struct Callers {
    own: [Pod; 2],
    other: [Pod; 2],
    stranger: [Pod; 2],
}

impl Callers {
    fn of(town: &Town) -> Self {
        let pods = |namespace: &str| [0, 1].map(|node| town.pod(namespace, "client", node));
        Self { own: pods(&town.mesh()), other: pods(&town.other()), stranger: pods(&town.plain()) }
    }
}

/// Calls from `pods` to both servers' `port`.
fn cases(town: &Town, pods: &[Pod], port: u16, want: &Want) -> Vec<Case> {
    let to = |pod: &Pod| {
        [0, 1].map(|server| Case::new(pod, Call::http(town.server(server).at(port)), want.clone()))
    };
    pods.iter().flat_map(to).collect()
}

/// Applies one policy, and requires who is answered and who is refused.
fn judged(town: &Town, spec: Value, answered: &[&[Pod]], refused: &[&[Pod]]) -> Result<()> {
    town.with(&[policy(&town.mesh(), "judged", spec)], || {
        let mut all = Vec::new();
        for pods in answered {
            all.extend(cases(town, pods, 8080, &Want::Answer));
        }
        for pods in refused {
            all.extend(cases(town, pods, 8080, &Want::Refusal));
        }
        town.settle(&all).map(drop)
    })
}

fn allow(from: Value) -> Value {
    json!({ "action": "ALLOW", "rules": [{ "from": [{ "source": from }] }] })
}

fn deny(from: Value) -> Value {
    json!({ "action": "DENY", "rules": [{ "from": [{ "source": from }] }] })
}

fn principal(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let one = [all.own[0].clone()];
    let rest = [all.own[1].clone(), all.other[0].clone(), all.other[1].clone()];
    let exact = format!("*{}", one[0].identity());
    judged(town, allow(json!({ "principals": [exact] })), &[&one], &[&rest, &all.stranger])?;
    let prefix = format!("{}/ns/{}/*", trust_domain(town)?, town.mesh());
    judged(
        town,
        allow(json!({ "principals": [prefix] })),
        &[&all.own],
        &[&all.other, &all.stranger],
    )?;
    judged(town, allow(json!({ "principals": ["*"] })), &[&all.own, &all.other], &[&all.stranger])?;
    Verdict::passed("")
}

/// The trust domain, as an agent's certificates name it.
fn trust_domain(town: &Town) -> Result<String> {
    let dump = town.agents.dump(&town.agent(0)?)?;
    let identities = dump["certificates"].as_array().into_iter().flatten();
    let mut domains = identities.filter_map(|certificate| {
        let identity = certificate["identity"].as_str()?.strip_prefix("spiffe://")?;
        identity.split_once("/ns/").map(|(domain, _)| domain.to_owned())
    });
    domains.next().ok_or_else(|| anyhow::anyhow!("the agent holds no certificate"))
}

fn namespace(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let other = json!({ "namespaces": [town.other()] });
    judged(town, allow(other.clone()), &[&all.other], &[&all.own, &all.stranger])?;
    judged(town, deny(other), &[&all.own, &all.stranger], &[&all.other])?;
    Verdict::passed("")
}

fn account(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let accounts = json!({ "serviceAccounts": ["client-a", format!("{}/client-b", town.other())] });
    let (ours, theirs) =
        ([all.own[0].clone(), all.other[1].clone()], [all.own[1].clone(), all.other[0].clone()]);
    judged(town, allow(accounts), &[&ours], &[&theirs, &all.stranger])?;
    Verdict::passed("")
}

fn address(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let blocks = json!({ "ipBlocks": [all.own[0].ip(), all.stranger[1].ip()] });
    let named = [all.own[0].clone(), all.stranger[1].clone()];
    let rest = [all.own[1].clone(), all.stranger[0].clone()];
    judged(town, allow(blocks.clone()), &[&named], &[&rest, &all.other])?;
    judged(town, deny(blocks), &[&rest, &all.other], &[&named])?;
    Verdict::passed("")
}

fn port(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let of = |port: &str| json!({ "action": "DENY", "rules": [{ "to": [{ "operation": { "ports": [port] } }] }] });
    town.with(&[policy(&town.mesh(), "port", of("8080"))], || {
        let mut wanted = cases(town, &all.own, 8080, &Want::Refusal);
        wanted.extend(cases(town, &all.stranger, 8080, &Want::Refusal));
        wanted.extend(cases(town, &all.own, 8090, &Want::Answer));
        for from in &all.own {
            wanted.push(Case::new(from, Call::http("server-a:80"), Want::Refusal));
            wanted.push(Case::new(from, Call::http("server-b:8090"), Want::Answer));
        }
        town.settle(&wanted)
    })?;
    // The service's own port is nobody's.
    town.with(&[policy(&town.mesh(), "port", of("80"))], || {
        let wanted =
            all.own.iter().map(|from| Case::new(from, Call::http("server-a:80"), Want::Answer));
        town.settle(&wanted.collect::<Vec<_>>())
    })?;
    Verdict::passed("")
}

fn condition(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let rule = |when: Value| json!({ "action": "ALLOW", "rules": [{ "when": when }] });
    let spec = rule(json!([
        { "key": "source.namespace", "values": [town.mesh()] },
        { "key": "destination.port", "values": ["8080"] },
        { "key": "source.ip", "notValues": [all.own[1].ip()] },
    ]));
    let (one, not) = ([all.own[0].clone()], [all.own[1].clone()]);
    judged(town, spec, &[&one], &[&not, &all.other, &all.stranger])?;
    let but = deny(json!({ "notNamespaces": [town.other()] }));
    judged(town, but, &[&all.other], &[&all.own, &all.stranger])?;
    Verdict::passed("")
}

fn nothing(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    judged(town, json!({}), &[], &[&all.own, &all.other, &all.stranger])?;
    let mesh = town.mesh();
    town.with(&[policy(&mesh, "everybody", json!({ "action": "ALLOW", "rules": [{}] }))], || {
        let one = json!({ "app": "server-a" });
        let no = json!({ "selector": { "matchLabels": one }, "action": "DENY", "rules": [{}] });
        town.with(&[policy(&mesh, "no", no)], || {
            let to = |pod: &Pod, name: &str, want| {
                Case::new(pod, Call::http(format!("{name}:80")), want)
            };
            let wanted: Vec<Case> = all
                .own
                .iter()
                .flat_map(|pod| {
                    [to(pod, "server-a", Want::Refusal), to(pod, "server-b", Want::Answer)]
                })
                .collect();
            town.settle(&wanted)
        })
    })?;
    Verdict::passed("")
}

fn request_rules(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let paths = json!([{ "to": [{ "operation": { "paths": ["/allowed"], "ports": ["8080"] } }] }]);
    judged(town, json!({ "action": "ALLOW", "rules": paths }), &[], &[&all.own, &all.other])?;
    town.with(
        &[policy(&town.mesh(), "wide", json!({ "action": "DENY", "rules": paths }))],
        || {
            let mut wanted = cases(town, &all.own, 8080, &Want::Refusal);
            wanted.extend(cases(town, &all.own, 8090, &Want::Answer));
            town.settle(&wanted)
        },
    )?;
    Verdict::passed("")
}

fn dry_run(town: &Town) -> Result<Verdict> {
    let all = Callers::of(town);
    let mut quiet = policy(&town.mesh(), "dry", json!({ "action": "DENY", "rules": [{}] }));
    quiet["metadata"]["annotations"] = json!({ "istio.io/dry-run": "true" });
    // A real policy beside it shows when both have arrived.
    let real = policy(&town.mesh(), "real", deny(json!({ "namespaces": [town.other()] })));
    town.with(&[quiet, real], || {
        let mut wanted = cases(town, &all.own, 8080, &Want::Answer);
        wanted.extend(cases(town, &all.other, 8080, &Want::Refusal));
        town.settle(&wanted)
    })?;
    let known = town.agents.dump(&town.agent(1)?)?;
    let known =
        known["policies"].as_array().into_iter().flatten().any(|policy| policy["dryRun"] == true);
    Verdict::passed(if known { "" } else { "istiod keeps such policies to itself here" })
}

fn live(town: &Town) -> Result<Verdict> {
    let (refused, left) = (Callers::of(town).other, Callers::of(town).own);
    let to = |server: usize| town.server(server).at(9001);
    let start = |pod: &Pod, server| {
        Load::start(town, pod, &Plan { calls: None, streams: Some((to(server), 3)) })
    };
    let (mut denied, mut others) = (Vec::new(), Vec::new());
    for server in [0, 1] {
        for (pod, kept) in refused.iter().zip(&left) {
            denied.push((server, start(pod, server)?));
            others.push(start(kept, server)?);
        }
    }
    let selector = json!({ "matchLabels": { "role": "server" } });
    let mut spec = deny(json!({ "namespaces": [town.other()] }));
    spec["selector"] = selector;
    let mut known = 0;
    town.with(&[policy(&town.mesh(), "cut", spec)], || {
        town.settle(&cases(town, &refused, 8080, &Want::Refusal))?;
        for (server, load) in &denied {
            let kind = town.kind(*server)?;
            // The peer judges live connections with the policies that were bound when they began:
            // its streams would go on for ever.
            let limit = if kind == Kind::Ztunnel { PEER } else { town.options.patience };
            let ended = wait::until_some("the streams to end", limit, || {
                let report = load.report()?;
                ensure!(
                    report.streams.alive == 0,
                    "{} of 3 go on after a DENY",
                    report.streams.alive
                );
                Ok(())
            });
            match ended {
                Err(_) if kind == Kind::Ztunnel => known += 1,
                ended => ended?,
            }
        }
        Ok(())
    })?;
    for (_, load) in denied {
        load.stop()?;
    }
    for load in others {
        let report = load.stop()?;
        ensure!(report.lost_streams() == 0, "others were cut too: {}", report.first_losses());
    }
    if known == 0 {
        return Verdict::passed("");
    }
    Ok(Verdict::Known(format!("streams go on after a DENY with a selector ({known} of 4 paths)")))
}

fn mesh(town: &Town) -> Result<Verdict> {
    if !town.options.mesh_wide {
        return Verdict::skipped("changes the whole mesh: ask for it with --mesh-wide");
    }
    let all = Callers::of(town);
    let root = policy(
        &town.agents.namespace,
        "culvert-e2e",
        deny(json!({ "namespaces": [town.other()] })),
    );
    town.with(&[root], || {
        let mut wanted = cases(town, &all.other, 8080, &Want::Refusal);
        wanted.extend(cases(town, &all.own, 8080, &Want::Answer));
        town.settle(&wanted)
    })?;
    Verdict::passed("")
}
