//! A stand-in for istio-cni on the nodes of a mesh: its sockets, its rules within pods, and the three
//! ways in which pods can be enrolled at an agent.

mod rules;
mod socket;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Enroller, Mesh, Running};
use culvert_lab::wait;

pub use rules::{PodRules, reroute};
pub use socket::{Add, Cni, Line, Listening};

use crate::binary;
use rules::{add_probe, add_rules, guard_probes, remove_probe, remove_rules};

/// Long enough for an agent to load its programs on a loaded machine.
const START: Duration = Duration::from_secs(60);

/// Who tells of pods, and who leads their connections to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrangement {
    /// The mesh file, and the kernel programs.
    File,
    /// istio-cni, by its rules.
    Rules,
    /// istio-cni, and the kernel programs beside its rules.
    Beside,
}

/// istio-cni on every node of a mesh: it enrols the pods in place of the mesh file.
pub struct IstioCni {
    /// What leads connections to the agents, as their setting names it.
    redirect: &'static str,
    rules: fn(&str) -> PodRules,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<String, Cni>,
    /// The pods of the mesh by name, as they were handed over.
    pods: BTreeMap<String, Add>,
}

impl IstioCni {
    /// With rules that lead connections to the agents, and for each pod what they lead there.
    pub fn by_rules(rules: fn(&str) -> PodRules) -> Arc<Self> {
        Self::new("cni", rules)
    }

    /// With rules, beside which there are the agents' kernel programs.
    pub fn beside_rules(rules: fn(&str) -> PodRules) -> Arc<Self> {
        Self::new("ebpf", rules)
    }

    fn new(redirect: &'static str, rules: fn(&str) -> PodRules) -> Arc<Self> {
        Arc::new(Self { redirect, rules, state: Mutex::default() })
    }

    /// How many agents of a node have their snapshot.
    pub fn agents(&self, node: &str) -> usize {
        self.state().nodes.get(node).map_or(0, Cni::agents)
    }

    /// Ends it on a node and starts it anew. It still knows its pods, but has lost the namespaces of
    /// those in `without`.
    pub fn restart(&self, mesh: &Running, node: &str, without: &[&str]) -> Result<()> {
        let mut state = self.state();
        let pods = state.nodes.remove(node).map(Cni::stop).unwrap_or_default();
        let cni = Cni::start(&socket(mesh, node))?;
        for add in pods.into_values() {
            let lost = without.contains(&add.name.as_str());
            cni.remember(Add { netns: add.netns.filter(|_| !lost), ..add });
        }
        state.nodes.insert(node.to_owned(), cni);
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn catch_up(&self, mesh: &Running) -> Result<()> {
        let mut state = self.state();
        for node in mesh.node_names() {
            if !state.nodes.contains_key(node) {
                guard_probes(mesh.node(node).place())?;
                state.nodes.insert(node.to_owned(), Cni::start(&socket(mesh, node))?);
            }
        }
        let enrolled = mesh.description().pods.iter().filter(|pod| pod.enrolled);
        let wanted: BTreeSet<&str> = enrolled.map(|pod| pod.name.as_str()).collect();
        let leaving: Vec<String> =
            state.pods.keys().filter(|name| !wanted.contains(name.as_str())).cloned().collect();
        for name in leaving {
            state.leave(mesh, &name)?;
        }
        for name in wanted {
            state.enter(mesh, name, (self.rules)(name))?;
        }
        Ok(())
    }
}

impl State {
    /// The rules go before the agent hears of it.
    fn leave(&mut self, mesh: &Running, name: &str) -> Result<()> {
        self.pods.remove(name);
        let pod = mesh.pod(name);
        remove_probe(mesh.node(pod.node()).place(), pod)?;
        remove_rules(pod.place())?;
        self.of(pod.node())?.del(&uid(name))
    }

    /// The rules come before the agent hears of it.
    fn enter(&mut self, mesh: &Running, name: &str, rules: PodRules) -> Result<()> {
        let (pod, add) = (mesh.pod(name), add_of(mesh, name));
        match self.pods.insert(name.to_owned(), add.clone()) {
            Some(before) if before.is_same(&add) => return Ok(()),
            // Another pod under the same name.
            Some(before) => self.of(pod.node())?.del(&before.uid)?,
            None => {
                add_rules(pod.place(), rules)?;
                add_probe(mesh.node(pod.node()).place(), pod)?;
            }
        }
        self.of(pod.node())?.add(add)
    }

    fn of(&self, node: &str) -> Result<&Cni> {
        self.nodes.get(node).with_context(|| format!("no istio-cni on node {node}"))
    }
}

impl Enroller for IstioCni {
    fn follow(&self, mesh: &Running) -> Result<()> {
        // On a thread of its own, because the test's may not block.
        let followed = std::thread::scope(|scope| scope.spawn(|| self.catch_up(mesh)).join());
        followed.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    fn environment(&self, mesh: &Running, node: &str) -> Vec<(String, String)> {
        let socket = socket(mesh, node).to_string_lossy().into_owned();
        let set = |name: &str, value: String| (name.to_owned(), value);
        vec![set("INPOD_UDS", socket), set("CULVERT_REDIRECT", self.redirect.to_owned())]
    }
}

impl fmt::Debug for IstioCni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IstioCni({})", self.redirect)
    }
}

/// A mesh whose pods are enrolled in one of the three ways.
pub struct Town {
    pub mesh: Running,
    pub arrangement: Arrangement,
    cni: Option<Arc<IstioCni>>,
}

impl Town {
    /// Starts the mesh, with istio-cni on each node where that takes part. The pods that are to be
    /// enrolled are, as soon as there is an agent.
    pub fn start(mesh: Mesh, arrangement: Arrangement) -> Result<Self> {
        Self::start_with(mesh, arrangement, |_| PodRules::default())
    }

    /// The same with what istio-cni's rules lead to the agent in each pod, by its name.
    pub fn start_with(
        mesh: Mesh,
        arrangement: Arrangement,
        rules: fn(&str) -> PodRules,
    ) -> Result<Self> {
        let cni = match arrangement {
            Arrangement::File => None,
            Arrangement::Rules => Some(IstioCni::by_rules(rules)),
            Arrangement::Beside => Some(IstioCni::beside_rules(rules)),
        };
        let mesh = match &cni {
            Some(cni) => mesh.enrolled_by(cni.clone()),
            None => mesh,
        };
        Ok(Self { mesh: mesh.start()?, arrangement, cni })
    }

    /// istio-cni. Panics where the file enrols.
    pub fn cni(&self) -> &IstioCni {
        self.cni.as_ref().unwrap_or_else(|| panic!("no istio-cni in this arrangement"))
    }

    /// Ends istio-cni on a node and starts it anew; see [`IstioCni::restart`].
    pub fn restart_cni(&self, node: &str, without: &[&str]) -> Result<()> {
        self.cni().restart(&self.mesh, node, without)
    }

    /// How an agent is to be started.
    pub fn options(&self) -> AgentOptions {
        AgentOptions::new(&binary(), &self.mesh.config())
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn agent(&self, node: &str) -> Result<Agent> {
        let mut agent = self.mesh.start_agent(node, &self.options())?;
        agent.wait_ready(START)?;
        Ok(agent)
    }

    /// Takes a pod into the mesh while all runs, and waits until its agent serves it.
    pub fn enrol(&mut self, agent: &Agent, pod: &str) -> Result<()> {
        self.set_enrolled(pod, true)?;
        self.wait(agent, pod, true)
    }

    /// Takes a pod out of the mesh, and waits until its agent knows.
    pub fn withdraw(&mut self, agent: &Agent, pod: &str) -> Result<()> {
        self.set_enrolled(pod, false)?;
        self.wait(agent, pod, false)
    }

    /// What istio-cni says when it hands a pod over.
    pub fn add_of(&self, pod: &str) -> Add {
        add_of(&self.mesh, pod)
    }

    fn set_enrolled(&mut self, pod: &str, enrolled: bool) -> Result<()> {
        self.mesh.change(|mesh| {
            let spec = mesh.pods.iter_mut().find(|spec| spec.name == pod);
            if let Some(spec) = spec {
                spec.enrolled = enrolled;
            }
        })
    }

    fn wait(&self, agent: &Agent, pod: &str, wanted: bool) -> Result<()> {
        let uid = self.mesh.spec(pod).uid();
        wait::until_some(format!("{pod} enrolled: {wanted}"), wait::SOON, || {
            let enrolled = crate::figures::enrolled(agent)?;
            if enrolled.contains(&uid) == wanted { Ok(()) } else { Err(anyhow!("{enrolled:?}")) }
        })
    }
}

fn add_of(mesh: &Running, pod: &str) -> Add {
    let spec = mesh.spec(pod);
    Add {
        uid: uid(pod),
        name: spec.name.clone(),
        namespace: spec.namespace.clone(),
        service_account: spec.service_account.clone(),
        netns: Some(mesh.pod(pod).place().netns().file()),
    }
}

fn socket(mesh: &Running, node: &str) -> PathBuf {
    mesh.lab().state().join(format!("{node}.sock"))
}

/// The Kubernetes UID of a pod of the lab.
pub fn uid(pod: &str) -> String {
    format!("8f0c2a5e-0000-4000-8000-{pod}")
}

/// An answer without an error.
pub fn accepted(answer: &str) -> Result<()> {
    if answer.is_empty() { Ok(()) } else { Err(anyhow!("{answer}")).context("refused") }
}
