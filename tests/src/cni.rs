//! A stand-in for istio-cni on one node: its socket, its rules within pods, and the three ways in
//! which pods can be enrolled at an agent.

mod rules;
mod socket;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use culvert_lab::agent::{Agent, AgentOptions};
use culvert_lab::mesh::{Mesh, Running};
use culvert_lab::wait;

pub use rules::{add_probe, add_rules, guard_probes, remove_probe, remove_rules, reroute};
pub use socket::{Add, Cni, Line, Listening};

use crate::binary;

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

/// A mesh whose pods are enrolled in one of the three ways.
pub struct Town {
    pub mesh: Running,
    pub arrangement: Arrangement,
    cnis: BTreeMap<String, Cni>,
}

impl Town {
    /// Starts the mesh, with istio-cni on each node where that takes part. The pods that are to be
    /// enrolled are, as soon as there is an agent.
    pub fn start(mesh: Mesh, arrangement: Arrangement) -> Result<Self> {
        let by_cni = arrangement != Arrangement::File;
        let mut mesh = mesh.start()?;
        mesh.change(|mesh| mesh.enrols = !by_cni)?;
        let mut town = Self { mesh, arrangement, cnis: BTreeMap::new() };
        if by_cni {
            for node in town.node_names() {
                guard_probes(town.mesh.node(&node).place())?;
                town.cnis.insert(node.clone(), Cni::start(&town.socket(&node))?);
            }
            let enrolled = town.mesh.description().pods.iter().filter(|pod| pod.enrolled);
            for pod in enrolled.map(|pod| pod.name.clone()).collect::<Vec<_>>() {
                town.prepare(&pod)?;
                town.cni_of(&pod).remember(town.add_of(&pod));
            }
        }
        Ok(town)
    }

    /// istio-cni on a node. Panics where the file enrols.
    pub fn cni(&self, node: &str) -> &Cni {
        self.cnis.get(node).unwrap_or_else(|| panic!("no istio-cni on node {node}"))
    }

    /// Ends istio-cni on a node and starts it anew. It still knows its pods, but has lost the
    /// namespaces of those in `without`.
    pub fn restart_cni(&mut self, node: &str, without: &[&str]) -> Result<()> {
        let pods = self.cnis.remove(node).map(Cni::stop).unwrap_or_default();
        let cni = Cni::start(&self.socket(node))?;
        for add in pods.into_values() {
            let lost = without.contains(&add.name.as_str());
            cni.remember(Add { netns: add.netns.filter(|_| !lost), ..add });
        }
        self.cnis.insert(node.to_owned(), cni);
        Ok(())
    }

    /// How an agent is to be started.
    pub fn options(&self, node: &str) -> AgentOptions {
        let mut options = AgentOptions::new(&binary(), &self.mesh.config());
        let mut set = |name: &str, value: &str| {
            options.environment.push((name.to_owned(), value.to_owned()));
        };
        let redirect = match self.arrangement {
            Arrangement::File => return options,
            Arrangement::Rules => "cni",
            Arrangement::Beside => "ebpf",
        };
        set("INPOD_UDS", &self.socket(node).to_string_lossy());
        set("CULVERT_REDIRECT", redirect);
        options
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn agent(&self, node: &str) -> Result<Agent> {
        let mut agent = Agent::start(self.mesh.lab(), self.mesh.node(node), &self.options(node))?;
        agent.wait_ready(START)?;
        Ok(agent)
    }

    /// Takes a pod into the mesh while all runs, and waits until its agent serves it.
    pub fn enrol(&mut self, agent: &Agent, pod: &str) -> Result<()> {
        self.set_enrolled(pod, true)?;
        if self.arrangement != Arrangement::File {
            self.prepare(pod)?;
            self.cni_of(pod).add(self.add_of(pod))?;
        }
        self.wait(agent, pod, true)
    }

    /// Takes a pod out of the mesh, and waits until its agent knows.
    pub fn withdraw(&mut self, agent: &Agent, pod: &str) -> Result<()> {
        self.set_enrolled(pod, false)?;
        if self.arrangement != Arrangement::File {
            let place = self.mesh.pod(pod).place().clone();
            remove_probe(self.mesh.node(self.mesh.pod(pod).node()).place(), self.mesh.pod(pod))?;
            remove_rules(&place)?;
            self.cni_of(pod).del(&uid(pod))?;
        }
        self.wait(agent, pod, false)
    }

    /// What istio-cni says when it hands a pod over.
    pub fn add_of(&self, pod: &str) -> Add {
        let spec = self.mesh.spec(pod);
        Add {
            uid: uid(pod),
            name: spec.name.clone(),
            namespace: spec.namespace.clone(),
            service_account: spec.service_account.clone(),
            netns: Some(self.mesh.pod(pod).place().netns().file()),
        }
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

    /// The rules come before the agent hears of a pod.
    fn prepare(&self, pod: &str) -> Result<()> {
        let pod = self.mesh.pod(pod);
        add_rules(pod.place())?;
        add_probe(self.mesh.node(pod.node()).place(), pod)
    }

    fn cni_of(&self, pod: &str) -> &Cni {
        self.cni(self.mesh.pod(pod).node())
    }

    fn socket(&self, node: &str) -> PathBuf {
        self.mesh.lab().state().join(format!("{node}.sock"))
    }

    fn node_names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            self.mesh.description().pods.iter().map(|pod| pod.node.clone()).collect();
        names.sort();
        names.dedup();
        names
    }
}

/// The Kubernetes UID of a pod of the lab.
pub fn uid(pod: &str) -> String {
    format!("8f0c2a5e-0000-4000-8000-{pod}")
}

/// An answer without an error.
pub fn accepted(answer: &str) -> Result<()> {
    if answer.is_empty() { Ok(()) } else { Err(anyhow!("{answer}")).context("refused") }
}
