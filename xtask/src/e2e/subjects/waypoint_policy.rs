//! Policies and routes behind a waypoint, and what the destination's agent still guards.

use anyhow::{Result, ensure};
use serde_json::json;

use super::waypoint::with_waypoint;
use crate::e2e::manifest::{self, WAYPOINT};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::talk::Call;
use crate::e2e::town::Town;
use crate::e2e::town::cases::{Case, Want};

pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "waypoint/request-policy",
        covers: "a policy about requests, by the client's own identity",
        run: request_policy,
    },
    Scenario {
        name: "waypoint/only-way",
        covers: "a destination that admits its waypoint alone cannot be reached past it",
        run: only_way,
    },
    Scenario {
        name: "waypoint/route",
        covers: "an HTTPRoute splits a service and adds a header",
        run: route,
    },
];

/// Puts both services behind a waypoint called `name`.
fn behind<T>(town: &Town, name: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let mesh = town.mesh();
    with_waypoint(town, (&mesh, name, "service"), || {
        town.labelled(&mesh, "service/server-a", (WAYPOINT, Some(name)), || {
            town.labelled(&mesh, "service/server-b", (WAYPOINT, Some(name)), work)
        })
    })
}

fn request_policy(town: &Town) -> Result<Verdict> {
    let name = town.unique("waypoint");
    let mesh = town.mesh();
    let spec = json!({
        "targetRefs": [{ "kind": "Service", "group": "", "name": "server-a" }],
        "action": "DENY",
        "rules": [{
            "from": [{ "source": { "principals": [format!("*/ns/{mesh}/sa/client-a")] } }],
            "to": [{ "operation": { "paths": ["/closed"] } }],
        }],
    });
    behind(town, &name, || {
        town.with(&[manifest::policy(&mesh, "requests", spec)], || {
            let call = |path: &str| Call::http("server-a:80").with("path", path);
            town.settle(&[
                Case::new(&town.client(0), call("/closed"), Want::Status(403)),
                Case::new(&town.client(0), call("/open"), Want::Waypoint),
                Case::new(&town.client(1), call("/closed"), Want::Waypoint),
            ])
        })
    })?;
    Verdict::passed("")
}

fn only_way(town: &Town) -> Result<Verdict> {
    let name = town.unique("waypoint");
    let mesh = town.mesh();
    let spec = json!({
        "selector": { "matchLabels": { "role": "server" } },
        "rules": [{ "from": [{ "source": { "principals": [format!("*/ns/{mesh}/sa/{name}")] } }] }],
    });
    behind(town, &name, || {
        town.with(&[manifest::policy(&mesh, "only-way", spec)], || {
            let mut cases = Vec::new();
            for (index, name) in ["server-a", "server-b"].into_iter().enumerate() {
                let (client, stranger) =
                    (town.client(1 - index), town.pod(&town.plain(), "client", index));
                cases.push(Case::new(&client, Call::http(format!("{name}:80")), Want::Waypoint));
                cases.push(Case::new(
                    &client,
                    Call::http(town.server(index).at(8080)),
                    Want::Refusal,
                ));
                cases.push(Case::new(
                    &stranger,
                    Call::http(town.server(index).at(8080)),
                    Want::Refusal,
                ));
            }
            town.settle(&cases)
        })
    })?;
    Verdict::passed("")
}

fn route(town: &Town) -> Result<Verdict> {
    let name = town.unique("waypoint");
    let mesh = town.mesh();
    let to = |name: &str| json!({ "name": name, "port": 80, "weight": 1 });
    let route = manifest::object(
        "gateway.networking.k8s.io/v1",
        "HTTPRoute",
        &mesh,
        "split",
        json!({ "spec": {
            "parentRefs": [{ "group": "", "kind": "Service", "name": "server-a", "port": 80 }],
            "rules": [{
                "filters": [{ "type": "RequestHeaderModifier", "requestHeaderModifier": { "add": [{ "name": "x-routed", "value": "yes" }] } }],
                "backendRefs": [to("server-a"), to("server-b")],
            }],
        }}),
    );
    behind(town, &name, || {
        town.with(&[route], || {
            town.until("the route to hold", || {
                for node in [0, 1] {
                    let outcomes =
                        town.call_all(&town.client(node), &vec![Call::http("server-a:80"); 20])?;
                    ensure!(
                        outcomes.iter().all(|outcome| outcome.header("x-routed") == Some("yes")),
                        "without the header"
                    );
                    for name in ["server-a", "server-b"] {
                        ensure!(
                            outcomes.iter().any(|outcome| outcome.server() == name),
                            "{name} got none of 20"
                        );
                    }
                }
                Ok(())
            })
        })
    })?;
    Verdict::passed("")
}
