//! Waypoints: who is sent through one, and what becomes of traffic when it comes and goes.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::e2e::carried::Through;
use crate::e2e::load::{Load, Plan};
use crate::e2e::manifest::{self, WAYPOINT, service_entry};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::{Call, at};
use crate::e2e::town::cases::{Case, Want};
use crate::e2e::town::{Carried, PATHS, Town};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "waypoint/service",
        covers: "a service's waypoint: its address goes through, a pod's own does not; HTTP and TCP",
        run: service,
    },
    Scenario {
        name: "waypoint/workload",
        covers: "a pod's waypoint: its own address goes through, a service's does not",
        run: workload,
    },
    Scenario {
        name: "waypoint/namespace",
        covers: "a namespace's waypoint, for services and pods alike, and a service that opts out",
        run: namespace,
    },
    Scenario {
        name: "waypoint/elsewhere",
        covers: "a waypoint in another namespace",
        run: elsewhere,
    },
    Scenario {
        name: "waypoint/under-load",
        covers: "a waypoint comes and goes under load: only while agents and Envoy have different news may a call be lost",
        run: under_load,
    },
    Scenario {
        name: "waypoint/missing",
        covers: "a waypoint that does not exist keeps nobody from being answered",
        run: missing,
    },
    Scenario {
        name: "waypoint/scaled-away",
        covers: "a waypoint without pods refuses, and serves again when they are back",
        run: scaled_away,
    },
    Scenario {
        name: "waypoint/canary",
        covers: "two waypoints share a service by weight",
        run: canary,
    },
    Scenario {
        name: "waypoint/egress",
        covers: "a ServiceEntry's waypoint stands before what is outside",
        run: egress,
    },
];

/// Makes a waypoint for the time of `work`, once it serves. Its name must be new: of a name that it
/// has seen before, istiod can forget to say that the waypoint is there.
pub fn with_waypoint<T>(
    town: &Town,
    (namespace, name, traffic): (&str, &str, &str),
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let mut gateway = manifest::waypoint(namespace, name, traffic);
    gateway["spec"]["listeners"][0]["allowedRoutes"] = json!({ "namespaces": { "from": "All" } });
    town.with(&[gateway], || {
        let (gateway, deployment) = (format!("gateway/{name}"), format!("deployment/{name}"));
        let limit = format!("--timeout={}s", town.options.patience.as_secs());
        let wait = ["wait", "--for=condition=Programmed", &gateway, "-n", namespace, &limit];
        town.kubectl.run(&wait).context("waiting for the waypoint")?;
        town.kubectl.run(&["rollout", "status", &deployment, "-n", namespace, &limit])?;
        work()
    })
}

/// Calls on all four paths: by pod and by service.
fn cases(town: &Town, by_pod: &Want, by_service: &Want) -> Vec<Case> {
    let mut cases = Vec::new();
    for (client, server) in PATHS {
        let (from, to) = (town.client(client), town.server(server));
        cases.push(Case::new(&from, Call::http(to.at(8080)), by_pod.clone()));
        cases.push(Case::new(&from, Call::http(at(&to.name, 80)), by_service.clone()));
    }
    cases
}

/// The labels of the pods' services, set for the time of `work`.
fn for_services<T>(
    town: &Town,
    key: &str,
    value: &str,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let mesh = town.mesh();
    town.labelled(&mesh, "service/server-a", (key, Some(value)), || {
        town.labelled(&mesh, "service/server-b", (key, Some(value)), work)
    })
}

fn service(town: &Town) -> Result<Verdict> {
    let name = town.unique("waypoint");
    let mesh = town.mesh();
    with_waypoint(town, (&mesh, &name, "service"), || {
        for_services(town, WAYPOINT, &name, || {
            let mut cases = cases(town, &Want::NoWaypoint, &Want::Waypoint);
            for (client, server) in PATHS {
                let host = at(&town.server(server).name, 9000);
                cases.push(Case::new(
                    &town.client(client),
                    Call::echo(host, 200_000),
                    Want::Answer,
                ));
                let host = at(&town.server(server).name, 9001);
                cases.push(Case::new(&town.client(client), Call::banner(host), Want::Answer));
            }
            // Nobody sends a stranger through it.
            let host = at(&format!("server-a.{mesh}"), 80);
            cases.push(Case::new(
                &town.pod(&town.plain(), "client", 1),
                Call::http(host),
                Want::NoWaypoint,
            ));
            let outcomes = town.settle(&cases)?;
            let through =
                cases.iter().zip(&outcomes).filter(|(case, _)| case.want == Want::Waypoint);
            let through = through.map(|(case, outcome)| {
                let call = Carried::new(&case.from, &town.named(outcome)?, outcome, 8080);
                Ok(Carried { through: Through::Waypoint, ..call })
            });
            town.carried(&through.collect::<Result<Vec<_>>>()?)
        })
    })?;
    Verdict::passed("")
}

fn workload(town: &Town) -> Result<Verdict> {
    let name = town.unique("for-pods");
    let mesh = town.mesh();
    with_waypoint(town, (&mesh, &name, "workload"), || {
        let label = (WAYPOINT, Some(name.as_str()));
        town.labelled(&mesh, "pod/server-a", label, || {
            town.labelled(&mesh, "pod/server-b", label, || {
                town.settle(&cases(town, &Want::Waypoint, &Want::NoWaypoint))
            })
        })
    })?;
    Verdict::passed("")
}

fn namespace(town: &Town) -> Result<Verdict> {
    let name = town.unique("for-all");
    let mesh = town.mesh();
    with_waypoint(town, (&mesh, &name, "all"), || {
        town.labelled("", &format!("namespace/{mesh}"), (WAYPOINT, Some(&name)), || {
            town.settle(&cases(town, &Want::Waypoint, &Want::Waypoint))?;
            town.labelled(&mesh, "service/server-b", (WAYPOINT, Some("none")), || {
                let out = [0, 1].map(|node| {
                    Case::new(&town.client(node), Call::http("server-b:80"), Want::NoWaypoint)
                });
                let on = [0, 1].map(|node| {
                    Case::new(&town.client(node), Call::http("server-a:80"), Want::Waypoint)
                });
                town.settle(&[out, on].concat())
            })
        })
    })?;
    Verdict::passed("")
}

fn elsewhere(town: &Town) -> Result<Verdict> {
    let name = town.unique("lent");
    let other = town.other();
    with_waypoint(town, (&other, &name, "service"), || {
        for_services(town, "istio.io/use-waypoint-namespace", &other, || {
            for_services(town, WAYPOINT, &name, || {
                town.settle(&cases(town, &Want::NoWaypoint, &Want::Waypoint))
            })
        })
    })?;
    Verdict::passed("")
}

fn under_load(town: &Town) -> Result<Verdict> {
    let name = town.unique("passing");
    let mesh = town.mesh();
    let start = |node: usize| {
        let to = at(&town.server(1 - node).name, 80);
        Load::start(town, &town.client(node), &Plan { calls: Some((to, 15.0)), streams: None })
    };
    let loads = [start(0)?, start(1)?];
    with_waypoint(town, (&mesh, &name, "service"), || {
        for _ in 0..2 {
            for_services(town, WAYPOINT, &name, || {
                town.settle(&cases(town, &Want::NoWaypoint, &Want::Waypoint))
            })?;
            town.settle(&cases(town, &Want::NoWaypoint, &Want::NoWaypoint))?;
        }
        for load in &loads {
            load.further_calls(30)?;
        }
        Ok(())
    })?;
    let (mut made, mut lost, mut told) = (0, 0, Vec::new());
    for load in loads {
        let report = load.stop()?;
        // istiod tells the agents and Envoy separately: for a moment one of them is ahead, and Envoy
        // refuses what it does not know yet, or any longer.
        ensure!(
            report.lost_calls() * 20 <= report.calls.made,
            "{report}: {}",
            report.first_losses()
        );
        made += report.calls.made;
        lost += report.lost_calls();
        told.extend(report.tell_losses());
    }
    Verdict::passed(format!("{lost} of {made} calls lost in four changes{}", told.concat()))
}

fn missing(town: &Town) -> Result<Verdict> {
    let name = town.unique("nowhere");
    for_services(town, WAYPOINT, &name, || {
        let cases = cases(town, &Want::NoWaypoint, &Want::NoWaypoint);
        town.settle(&cases)?;
        // It comes, is used, and goes again.
        let mesh = town.mesh();
        with_waypoint(town, (&mesh, &name, "service"), || {
            town.settle(&self::cases(town, &Want::NoWaypoint, &Want::Waypoint))
        })?;
        town.settle(&cases)
    })?;
    Verdict::passed("")
}

fn scaled_away(town: &Town) -> Result<Verdict> {
    let name = town.unique("small");
    let mesh = town.mesh();
    with_waypoint(town, (&mesh, &name, "service"), || {
        for_services(town, WAYPOINT, &name, || {
            let there = cases(town, &Want::NoWaypoint, &Want::Waypoint);
            town.settle(&there)?;
            let deployment = format!("deployment/{name}");
            let scale = |count: &str| {
                ["scale", deployment.as_str(), "-n", mesh.as_str(), count].map(ToOwned::to_owned)
            };
            town.kubectl.run(&scale("--replicas=0"))?;
            town.settle(&cases(town, &Want::NoWaypoint, &Want::Refusal))?;
            town.kubectl.run(&scale("--replicas=1"))?;
            town.settle(&there)
        })
    })?;
    Verdict::passed("")
}

fn canary(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let (primary, second) = (town.unique("primary"), town.unique("canary"));
    let own = |name: &str| format!("*/ns/{mesh}/sa/{name}");
    with_waypoint(town, (&mesh, &primary, "service"), || {
        with_waypoint(town, (&mesh, &second, "service"), || {
            for_services(town, WAYPOINT, &primary, || {
                for_services(town, "istio.io/use-waypoint-canary", &second, || {
                    // Only what the canary brings is let in: the refused rest came by the other.
                    let spec = json!({
                        "selector": { "matchLabels": { "role": "server" } },
                        "rules": [{ "from": [{ "source": { "principals": [own(&second)] } }] }],
                    });
                    town.with(&[manifest::policy(&mesh, "canary-only", spec)], || {
                        for (weight, least, most) in [(100, 20, 20), (0, 0, 0), (50, 2, 18)] {
                            weigh(town, weight)?;
                            town.until(format!("weight {weight}"), || share(town, least, most))?;
                        }
                        Ok(())
                    })
                })
            })
        })
    })?;
    Verdict::passed("")
}

fn weigh(town: &Town, weight: u32) -> Result<()> {
    let annotation = format!("istio.io/use-waypoint-canary-weight={weight}");
    let mesh = town.mesh();
    for service in ["server-a", "server-b"] {
        town.kubectl.run(&[
            "annotate",
            "--overwrite",
            "service",
            service,
            "-n",
            &mesh,
            &annotation,
        ])?;
    }
    Ok(())
}

/// How many of 20 calls from each client were answered.
fn share(town: &Town, least: usize, most: usize) -> Result<()> {
    for node in [0, 1] {
        let outcomes = town.calls(&town.client(node), &vec![Call::http("server-a:80"); 20])?;
        let answered = outcomes.iter().filter(|outcome| outcome.ok).count();
        ensure!(
            (least..=most).contains(&answered),
            "{answered} of 20 came by the canary, not {least} to {most}"
        );
    }
    Ok(())
}

fn egress(town: &Town) -> Result<Verdict> {
    let name = town.unique("egress");
    let mesh = town.mesh();
    let to = town.pod(&town.plain(), "server", 0);
    let spec = json!({
        "hosts": [format!("egress.{}.example", town.run)], "addresses": ["240.240.200.30"],
        "resolution": "STATIC", "location": "MESH_EXTERNAL",
        "ports": [{ "number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080 }],
        "endpoints": [{ "address": to.ip() }],
    });
    let entry = manifest::labelled(service_entry(&mesh, &name, spec), &json!({ WAYPOINT: name }));
    with_waypoint(town, (&mesh, &name, "service"), || {
        town.with(&[entry], || {
            let call = Call::http("240.240.200.30:80");
            let cases =
                [0, 1].map(|node| Case::new(&town.client(node), call.clone(), Want::Waypoint));
            for outcome in town.settle(&cases)? {
                ensure!(outcome.server() == to.name, "answered by {:?}", outcome.server());
            }
            Ok(())
        })
    })?;
    Verdict::passed("")
}
