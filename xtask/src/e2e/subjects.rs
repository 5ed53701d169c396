//! All scenarios, by subject, in the order in which they are run: the gentle ones first.

use anyhow::Result;

use super::scenario::Scenario;
use super::talk::{Call, at};
use super::town::cases::{Case, Want};
use super::town::{PATHS, Town};

mod calls;
mod outside;

mod mtls;
mod probes;

mod authorization;

mod names;

mod entries;
mod waypoint;
mod waypoint_policy;

mod telemetry;

mod istioctl;

mod disturb;

mod enrolment;
mod rollout;

mod agent;
mod control;
mod trust;

mod node;

/// Every scenario there is.
pub fn all() -> Vec<Scenario> {
    let subjects: [&[Scenario]; 17] = [
        calls::SCENARIOS,
        outside::SCENARIOS,
        mtls::SCENARIOS,
        probes::SCENARIOS,
        authorization::SCENARIOS,
        names::SCENARIOS,
        entries::SCENARIOS,
        waypoint::SCENARIOS,
        waypoint_policy::SCENARIOS,
        telemetry::SCENARIOS,
        istioctl::SCENARIOS,
        rollout::SCENARIOS,
        enrolment::SCENARIOS,
        control::SCENARIOS,
        trust::SCENARIOS,
        agent::SCENARIOS,
        node::SCENARIOS,
    ];
    subjects.concat()
}

/// Waits until what an earlier scenario changed is gone everywhere: whoever calls is answered, and
/// no waypoint is in between.
pub fn calm(town: &Town) -> Result<()> {
    let (mesh, plain) = (town.mesh(), town.plain());
    let mut cases = Vec::new();
    for (client, server) in PATHS {
        let (client, server) = (town.client(client), town.server(server));
        let service = at(&format!("{}.{mesh}", server.name), 80);
        cases.push(Case::new(&client, Call::http(server.at(8080)), Want::NoWaypoint));
        cases.push(Case::new(&client, Call::http(service), Want::NoWaypoint));
    }
    for node in [0, 1] {
        let stranger = town.pod(&plain, "client", node);
        cases.push(Case::new(&stranger, Call::http(town.server(1 - node).at(8080)), Want::Answer));
    }
    town.until("a calm mesh", || town.expect(&cases)).map(drop)
}

#[cfg(test)]
mod tests;
