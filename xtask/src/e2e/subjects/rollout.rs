//! Deployments that change under load: clients must not notice.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::e2e::load::{Load, Plan, Report};
use crate::e2e::manifest;
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::at;
use crate::e2e::town::Town;

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "rollout/deployment",
        covers: "a Deployment rolled over twice under load, no call failed",
        run: deployment,
    },
    Scenario {
        name: "rollout/scale",
        covers: "a Deployment scaled up and down under load, no call failed",
        run: scale,
    },
    Scenario {
        name: "rollout/crowd",
        covers: "twenty pods come and go beside a load that does not notice",
        run: crowd,
    },
];

/// A Deployment of two pods with a service, for the time of `work`.
fn rolled<T>(town: &Town, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mesh = town.mesh();
    let spec = town.spec(&mesh, name, 0, Value::Null);
    let mut body =
        manifest::pod_body(&spec, &["culvert-app", "serve", "--linger", "5", "--grace", "20"]);
    body["terminationGracePeriodSeconds"] = 30.into();
    let objects = [
        manifest::account(&mesh, name),
        manifest::deployment(&mesh, name, 2, &json!({}), body),
        manifest::service(&mesh, name, json!({ "app": name }), false),
    ];
    town.with(&objects, || {
        settled(town, name)?;
        work()
    })
}

/// Waits until a Deployment is what it should be.
fn settled(town: &Town, name: &str) -> Result<()> {
    let deployment = format!("deployment/{name}");
    let limit = format!("--timeout={}s", town.options.patience.as_secs().max(120));
    town.kubectl.run(&["rollout", "status", &deployment, "-n", &town.mesh(), &limit]).map(drop)
}

/// Loads from both nodes to a service, which must lose nothing while `work` goes on.
fn unnoticed(
    town: &Town,
    service: &str,
    work: impl FnOnce(&[Load<'_>]) -> Result<()>,
) -> Result<String> {
    let plan = Plan { calls: Some((at(service, 80), 20.0)), streams: None };
    let loads =
        [Load::start(town, &town.client(0), &plan)?, Load::start(town, &town.client(1), &plan)?];
    for load in &loads {
        load.further_calls(20)?;
    }
    let worked = work(&loads);
    for load in &loads {
        load.further_calls(40)?;
    }
    let mut told = Vec::new();
    for load in loads {
        told.push(load.stop()?);
    }
    worked?;
    none_lost(&told)
}

fn none_lost(reports: &[Report]) -> Result<String> {
    for report in reports {
        ensure!(report.lost() == 0, "{report}: {}", report.first_losses());
    }
    let calls: u64 = reports.iter().map(|report| report.calls.made).sum();
    let servers: usize = reports.iter().map(|report| report.calls.servers.len()).max().unwrap_or(0);
    Ok(format!("{calls} calls, none lost, answered by {servers} pods"))
}

fn deployment(town: &Town) -> Result<Verdict> {
    let note = rolled(town, "rolled", || {
        unnoticed(town, "rolled", |_| {
            for _ in 0..2 {
                town.kubectl.run(&[
                    "rollout",
                    "restart",
                    "deployment/rolled",
                    "-n",
                    &town.mesh(),
                ])?;
                settled(town, "rolled")?;
            }
            Ok(())
        })
    })?;
    Verdict::passed(note)
}

fn scale(town: &Town) -> Result<Verdict> {
    let note = rolled(town, "scaled", || {
        unnoticed(town, "scaled", |loads| {
            for count in [5, 1, 3] {
                let replicas = format!("--replicas={count}");
                town.kubectl.run(&["scale", "deployment/scaled", "-n", &town.mesh(), &replicas])?;
                settled(town, "scaled")?;
                for load in loads {
                    load.further_calls(40)?;
                }
            }
            Ok(())
        })
    })?;
    Verdict::passed(note)
}

fn crowd(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let note = unnoticed(town, "server", |_| {
        for _ in 0..2 {
            let spec = town.spec(&mesh, "crowd", 0, Value::Null);
            let mut body = manifest::pod_body(
                &spec,
                &["culvert-app", "serve", "--linger", "0", "--grace", "0"],
            );
            body["terminationGracePeriodSeconds"] = 1.into();
            let objects = [
                manifest::account(&mesh, "crowd"),
                manifest::deployment(&mesh, "crowd", 20, &json!({}), body),
            ];
            town.with(&objects, || settled(town, "crowd"))?;
        }
        Ok(())
    })?;
    Verdict::passed(note)
}
