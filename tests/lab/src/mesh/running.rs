//! A mesh in its lab.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::yaml::{self, Facts};
use super::{Mesh, PodSpec};
use crate::agent::{Agent, AgentOptions};
use crate::lab::{Lab, Node, Pod};
use crate::wire::Wire;

/// Long enough for an agent to load its programs on a loaded machine.
const START: Duration = Duration::from_secs(60);

/// The namespaces of a mesh, with the file that describes it to the agents.
#[derive(Debug)]
pub struct Running {
    mesh: Mesh,
    nodes: Vec<Node>,
    pods: Vec<Pod>,
    lab: Lab,
}

impl Running {
    pub(super) fn start(mesh: Mesh) -> Result<Self> {
        let lab = Lab::new(mesh.attach)?;
        let mut running = Self { mesh, nodes: Vec::new(), pods: Vec::new(), lab };
        for name in running.mesh.nodes.clone() {
            running.nodes.push(running.lab.node(&name)?);
        }
        for spec in running.mesh.pods.clone() {
            running.pods.push(running.lab.pod(&spec.node, &spec.name)?);
        }
        running.take_effect()?;
        Ok(running)
    }

    /// The lab below.
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The lab below, to keep it.
    pub fn lab_mut(&mut self) -> &mut Lab {
        &mut self.lab
    }

    /// The description, as it stands.
    pub fn description(&self) -> &Mesh {
        &self.mesh
    }

    /// The names of all nodes.
    pub fn node_names(&self) -> impl Iterator<Item = &str> {
        self.nodes.iter().map(Node::name)
    }

    /// A node by its name. Panics when the mesh has none of that name.
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.unwrap_or_else(|| panic!("the mesh has no node {name}"))
    }

    /// A pod by its name. Panics when the mesh has none of that name.
    pub fn pod(&self, name: &str) -> &Pod {
        let found = self.pods.iter().find(|pod| pod.name() == name);
        found.unwrap_or_else(|| panic!("the mesh has no pod {name}"))
    }

    /// A pod's description by its name. Panics when the mesh has none of that name.
    pub fn spec(&self, name: &str) -> &PodSpec {
        let found = self.mesh.pods.iter().find(|pod| pod.name == name);
        found.unwrap_or_else(|| panic!("the mesh has no pod {name}"))
    }

    /// Both virtual addresses of a service. Panics when the mesh has none of that name.
    pub fn service(&self, name: &str) -> [IpAddr; 2] {
        let found = self.mesh.services.iter().position(|service| service.name == name);
        virtual_addresses(found.unwrap_or_else(|| panic!("the mesh has no service {name}")))
    }

    /// The configuration file that all agents read.
    pub fn config(&self) -> PathBuf {
        self.lab.state().join("mesh.yaml")
    }

    /// The folder of the embedded CA, shared by all nodes.
    pub fn ca(&self) -> PathBuf {
        self.lab.state().join("ca")
    }

    /// Changes the description and writes the file anew, in one step as editors do.
    pub fn change(&mut self, change: impl FnOnce(&mut Mesh)) -> Result<()> {
        change(&mut self.mesh);
        self.take_effect()
    }

    /// Adds a pod to a node while the mesh runs.
    pub fn add_pod(&mut self, node: &str, spec: PodSpec) -> Result<()> {
        self.pods.push(self.lab.pod(node, &spec.name)?);
        self.mesh.pods.push(PodSpec { node: node.to_owned(), ..spec });
        self.take_effect()
    }

    /// Removes a pod from the file and then its namespace with the processes in it.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        self.mesh.pods.retain(|spec| spec.name != name);
        self.take_effect()?;
        let at = self.pods.iter().position(|pod| pod.name() == name);
        let pod = self.pods.remove(at.with_context(|| format!("the mesh has no pod {name}"))?);
        self.lab.remove_pod(&pod)
    }

    /// Removes a pod, and puts another one with its addresses into its place: in the lab first, as
    /// agents hear of it later.
    pub fn replace_pod(&mut self, gone: &str, spec: PodSpec) -> Result<()> {
        let at = self.pods.iter().position(|pod| pod.name() == gone);
        let at = at.with_context(|| format!("the mesh has no pod {gone}"))?;
        self.pods[at] = self.lab.replace_pod(&self.pods[at], &spec.name)?;
        let node = self.pods[at].node().to_owned();
        self.mesh.pods.retain(|spec| spec.name != gone);
        self.mesh.pods.push(PodSpec { node, ..spec });
        self.take_effect()
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn agent(&self, node: &str, binary: &Path) -> Result<Agent> {
        self.agent_with(node, &AgentOptions::new(binary, &self.config()))
    }

    /// Starts the agent of a node in a given way and waits until it is ready.
    pub fn agent_with(&self, node: &str, options: &AgentOptions) -> Result<Agent> {
        let mut agent = self.start_agent(node, options)?;
        agent.wait_ready(START)?;
        Ok(agent)
    }

    /// Starts the agent of a node in a given way, without waiting for it to be ready.
    pub fn start_agent(&self, node: &str, options: &AgentOptions) -> Result<Agent> {
        let mut options = options.clone();
        if let Some(enroller) = &self.mesh.enroller {
            let own = std::mem::replace(&mut options.environment, enroller.environment(self, node));
            options.environment.extend(own);
        }
        Agent::start(&self.lab, self.node(node), &options)
    }

    /// Begins to record what passes between two nodes.
    pub fn wire(&self, one: &str, other: &str) -> Result<Wire> {
        self.lab.wire(self.node(one), self.node(other))
    }

    /// Writes the mesh as one agent alone is to see it, and gives the file.
    pub fn view(&self, name: &str, change: impl FnOnce(&mut Mesh)) -> Result<PathBuf> {
        let mut mesh = self.mesh.clone();
        change(&mut mesh);
        let file = self.lab.state().join(format!("mesh-{name}.yaml"));
        fs::write(&file, self.print(&mesh))
            .with_context(|| format!("writing {}", file.display()))?;
        Ok(file)
    }

    fn print(&self, mesh: &Mesh) -> String {
        let addresses = (0..mesh.services.len())
            .map(|index| virtual_addresses(index).map(|address| address.to_string()))
            .collect();
        yaml::print(mesh, &Facts { pods: &self.pods, ca: &self.ca(), addresses })
    }

    fn take_effect(&self) -> Result<()> {
        self.write_config()?;
        match &self.mesh.enroller {
            Some(enroller) => enroller.clone().follow(self).context("enrolling pods"),
            None => Ok(()),
        }
    }

    fn write_config(&self) -> Result<()> {
        let text = self.print(&self.mesh);
        let new = self.lab.state().join("mesh.yaml.new");
        fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
        fs::rename(&new, self.config()).context("putting the new configuration in place")
    }
}

fn virtual_addresses(index: usize) -> [IpAddr; 2] {
    let last = 10 + index as u8;
    let v4 = Ipv4Addr::new(10, 96, 0, last);
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, u16::from(last));
    [v4.into(), v6.into()]
}
