//! What the disruptive scenarios share: a load on every path, and waiting for the mesh to notice.

use anyhow::{Context, Result, ensure};

use crate::e2e::load::{Load, Plan, Report};
use crate::e2e::town::{PATHS, Pod, Town};

/// A load on each of the four paths, with calls and long streams.
#[derive(Debug)]
pub struct Loads<'t> {
    loads: Vec<((usize, usize), Load<'t>)>,
}

impl<'t> Loads<'t> {
    /// Begins, with all streams open and calls answered.
    pub fn start(town: &'t Town) -> Result<Self> {
        let mut loads = Vec::new();
        for path in PATHS {
            let (client, server) = (town.client(path.0), town.server(path.1));
            let plan =
                Plan { calls: Some((server.at(8080), 10.0)), streams: Some((server.at(9001), 3)) };
            loads.push((path, Load::start(town, &client, &plan)?));
        }
        let loads = Self { loads };
        loads.further(10)?;
        Ok(loads)
    }

    /// Goes on until each path has made so many more calls.
    pub fn further(&self, calls: u64) -> Result<()> {
        for (_, load) in &self.loads {
            load.further_calls(calls)?;
        }
        Ok(())
    }

    /// How it stands on one path.
    pub fn on(&self, path: (usize, usize)) -> Result<Report> {
        let found = self.loads.iter().find(|(other, _)| *other == path);
        found.context("no load on that path")?.1.report()
    }

    /// Ends all of them.
    pub fn stop(self) -> Result<Vec<((usize, usize), Report)>> {
        self.loads.into_iter().map(|(path, load)| Ok((path, load.stop()?))).collect()
    }
}

/// Waits until all pods of the mesh's namespace are in the mesh, or none.
pub fn enrolled(town: &Town, wanted: bool) -> Result<()> {
    for node in [0, 1] {
        for pod in [town.client(node), town.server(node)] {
            pod_enrolled(town, &pod, wanted)?;
        }
    }
    Ok(())
}

/// Waits until istio-cni has taken a pod into the mesh or out of it, as it notes on the pod.
pub fn pod_enrolled(town: &Town, pod: &Pod, wanted: bool) -> Result<()> {
    town.until(
        format!("{} to be {} the mesh", pod.name, if wanted { "in" } else { "out of" }),
        || {
            let now = town.kubectl.json(&["get", "pod", &pod.name, "-n", &pod.namespace])?;
            let noted = &now["metadata"]["annotations"]["ambient.istio.io/redirection"];
            ensure!((noted == "enabled") == wanted, "istio-cni says {noted}");
            Ok(())
        },
    )
}
