//! A mesh whose agents hear of it as in a cluster: from a control plane that serves the workload API
//! and signs certificates, and from istio-cni. Each node has an agent of ours, or the peer's.

mod encode;
mod signer;

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use culvert_agent::file;
use culvert_core::snapshot::Change;
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Enroller, Mesh, Running, TRUST_DOMAIN};
use culvert_lab::pki::Authority;
use culvert_lab::process::Process;
use culvert_lab::{http, wait};
use culvert_proto::istio::workload::address;

use crate::binary;
use crate::cni::{IstioCni, PodRules};
use crate::control::{ControlPlane, Listen};
use signer::Signer;

/// Long enough for an agent to start on a loaded machine.
const START: Duration = Duration::from_secs(30);
/// Of the control plane, on the first node.
const PORT: u16 = 15012;
/// What the control plane's certificate calls it.
const NAME: &str = "istiod.istio-system.svc";

/// The program of the peer, if there is one to test with: `CULVERT_PEER_ZTUNNEL`.
pub fn ztunnel() -> Option<PathBuf> {
    std::env::var_os("CULVERT_PEER_ZTUNNEL").map(PathBuf::from)
}

/// The control plane of a mesh, and istio-cni on its nodes.
pub struct Cluster {
    cni: Arc<IstioCni>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    plane: Option<ControlPlane>,
    /// What the control plane serves.
    told: file::Mesh,
}

impl Cluster {
    /// Starts a mesh. Agents of ours have their connections brought by istio-cni's rules alone, or by
    /// their kernel programs beside these.
    pub fn start(mesh: Mesh, by_rules: bool) -> Result<(Running, Arc<Cluster>)> {
        let rules = |_: &str| PodRules::default();
        let cni = match by_rules {
            true => IstioCni::by_rules(rules),
            false => IstioCni::beside_rules(rules),
        };
        let cluster = Arc::new(Self { cni, state: Mutex::default() });
        let mesh = mesh.enrolled_by(cluster.clone()).start()?;
        Ok((mesh, cluster))
    }

    /// What is to be done with the control plane.
    pub fn plane<T>(&self, work: impl FnOnce(&mut ControlPlane) -> T) -> Result<T> {
        self.state().plane.as_mut().map(work).context("no control plane")
    }

    /// How an agent of ours is started: all it knows it is told.
    pub fn options(&self, mesh: &Running) -> Result<AgentOptions> {
        let empty = mesh.lab().state().join("empty.yaml");
        fs::write(&empty, "{}\n").context("writing an empty mesh file")?;
        let mut options = AgentOptions::new(&binary(), &empty);
        // Of several addresses the one that says nothing is given up sooner.
        let at = self.plane(|plane| plane.address())?;
        options.environment.push(("XDS_ADDRESS".to_owned(), format!("{at},{at}")));
        Ok(options)
    }

    /// Starts an agent of ours on a node, and waits until it is ready.
    pub fn culvert(&self, mesh: &Running, node: &str) -> Result<Agent> {
        mesh.agent_with(node, &self.options(mesh)?)
    }

    /// Starts the peer's agent on a node, and waits until it is ready.
    pub fn ztunnel(&self, mesh: &Running, node: &str, program: &Path) -> Result<Process> {
        let place = mesh.node(node).place().within("agent")?;
        let mut command = place.command(program)?;
        command.args(["proxy", "ztunnel"]).env_clear();
        let environment = self.environment(mesh, node);
        command.envs(environment.into_iter().filter(|(name, _)| !name.starts_with("CULVERT")));
        for (name, value) in [
            ("NODE_NAME", node),
            ("RUST_LOG", "info"),
            ("PROXY_MODE", "shared"),
            ("READINESS_ADDR", "[::]:15021"),
        ] {
            command.env(name, value);
        }
        let mut process = place.start(&format!("ztunnel-{node}"), &mut command)?;
        let ready = SocketAddr::from(([127, 0, 0, 1], 15021));
        let waited = wait::until_some("ztunnel to be ready", START, || {
            if let Some(status) = process.ended() {
                bail!("it ended with {status}");
            }
            let asked = place.run(|| http::get(ready, "/healthz/ready", Duration::from_secs(5)))?;
            if asked.status == 200 { Ok(()) } else { bail!("{}", asked.body.trim()) }
        });
        waited.with_context(|| format!("its log ends with:\n{}", process.log_tail(20)))?;
        Ok(process)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn at(mesh: &Running) -> Option<SocketAddr> {
        let node = mesh.node(mesh.node_names().next()?);
        Some(SocketAddr::from((node.v4(), PORT)))
    }
}

impl State {
    /// On a thread that is nobody's, because the server makes a runtime of its own.
    fn catch_up(&mut self, mesh: &Running) -> Result<()> {
        if self.plane.is_none() {
            self.plane = Some(start_plane(mesh)?);
        }
        let Some(plane) = &self.plane else { bail!("no control plane") };
        let text = fs::read(mesh.config()).context("reading the mesh file")?;
        let wanted = file::Mesh::parse(&text).map_err(|error| anyhow::anyhow!("{error}"))?;
        let mut addresses = Vec::new();
        for change in file::diff(&self.told, &wanted) {
            let world = &plane.world;
            match change {
                Change::Workload(it) => {
                    addresses.push(address::Type::Workload(encode::workload(&it)));
                }
                Change::Service(it) => {
                    addresses.push(address::Type::Service(encode::service(&it)));
                }
                Change::Authorization(it) => world.put_policy(&encode::authorization(&it)),
                Change::RemoveWorkload(uid) => world.remove_address(&uid),
                Change::RemoveService(key) => world.remove_address(&key.to_string()),
                Change::RemoveAuthorization(key) => world.remove_policy(&key),
                // Only files can say so.
                Change::RequireWaypoint(_) => {}
            }
        }
        if !addresses.is_empty() {
            plane.world.put_all(addresses);
        }
        self.told = wanted;
        Ok(())
    }
}

fn start_plane(mesh: &Running) -> Result<ControlPlane> {
    Authority::create(&mesh.ca(), TRUST_DOMAIN)?;
    let signer = Signer::of(&mesh.ca())?;
    let node = mesh.node_names().next().context("a mesh without nodes")?;
    let at = Cluster::at(mesh).context("a mesh without nodes")?;
    let listen = Listen::In(mesh.node(node).place().netns().clone(), at);
    let plane = ControlPlane::start_with(listen, |routes, _| routes.add_service(signer.service()))?;
    let state = mesh.lab().state();
    fs::write(state.join("plane-root.pem"), plane.pki.root())?;
    fs::write(state.join("plane-token"), "token")?;
    Ok(plane)
}

impl Enroller for Cluster {
    fn follow(&self, mesh: &Running) -> Result<()> {
        let followed =
            std::thread::scope(|scope| scope.spawn(|| self.state().catch_up(mesh)).join());
        followed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        self.cni.follow(mesh)
    }

    fn environment(&self, mesh: &Running, node: &str) -> Vec<(String, String)> {
        let file = |name: &str| mesh.lab().state().join(name).to_string_lossy().into_owned();
        let at = Self::at(mesh).map_or_else(String::new, |at| format!("https://{at}"));
        let mut all = self.cni.environment(mesh, node);
        for (name, value) in [
            ("XDS_ADDRESS", at.as_str()),
            ("CA_ADDRESS", &at),
            ("XDS_ROOT_CA", &file("plane-root.pem")),
            ("CA_ROOT_CA", &file("plane-root.pem")),
            ("ALT_XDS_HOSTNAME", NAME),
            ("ALT_CA_HOSTNAME", NAME),
            ("AUTH_TOKEN", &file("plane-token")),
            ("CLUSTER_ID", "Kubernetes"),
            ("POD_NAME", &format!("agent-{node}")),
            ("POD_NAMESPACE", "istio-system"),
            ("SERVICE_ACCOUNT", "ztunnel"),
        ] {
            all.push((name.to_owned(), value.to_owned()));
        }
        all
    }
}

impl fmt::Debug for Cluster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cluster({:?})", self.cni)
    }
}
