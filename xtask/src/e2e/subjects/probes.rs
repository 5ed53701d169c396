//! The kubelet's probes, which come from outside of every pod and bring no identity.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::e2e::manifest::{self, peer_authentication};
use crate::e2e::scenario::{Scenario, Verdict};
use crate::e2e::town::Town;

pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "probes/strict",
    covers: "startup, readiness and liveness probes over HTTP and TCP pass under STRICT and a policy that allows nobody",
    run: strict,
}];

fn strict(town: &Town) -> Result<Verdict> {
    let mesh = town.mesh();
    let guards = [
        peer_authentication(&mesh, "strict", Value::Null, "STRICT", json!({})),
        manifest::policy(&mesh, "nobody", json!({})),
    ];
    town.with(&guards, || {
        let mut objects = Vec::new();
        let names: Vec<String> = [0, 1].iter().map(|_| town.unique("probed")).collect();
        for (index, name) in names.iter().enumerate() {
            let mut pod = manifest::pod(&town.spec(&mesh, name, index, json!({})));
            let container = &mut pod["spec"]["containers"][0];
            container["startupProbe"] = json!({ "tcpSocket": { "port": 9000 }, "periodSeconds": 1 });
            container["livenessProbe"] =
                json!({ "httpGet": { "path": "/live", "port": 8081 }, "periodSeconds": 1, "failureThreshold": 2 });
            objects.extend([manifest::account(&mesh, name), pod]);
        }
        town.with(&objects, || {
            town.wait_ready(&mesh)?;
            // The liveness probe, every second, would have ended them by now.
            let started = std::time::Instant::now();
            town.until("some seconds of probes", || {
                ensure!(started.elapsed().as_secs() >= 8, "{:?}", started.elapsed());
                Ok(())
            })?;
            for name in &names {
                let pod = town.kubectl.json(&["get", "pod", name, "-n", &mesh])?;
                let status = &pod["status"]["containerStatuses"][0];
                ensure!(status["restartCount"] == 0 && status["ready"] == true, "{name}: {status}");
            }
            Ok(())
        })
    })?;
    Verdict::passed("")
}
