//! The pods and services that all scenarios share: clients and servers on two nodes, in the mesh
//! and outside of it.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use culvert_lab::wait;
use serde_json::{Value, json};

use super::agents::{Agent, Agents, Kind};
use super::carried::{self, Expected, Through};
use super::kubectl::Kubectl;
use super::manifest::{self, PodSpec};
use super::talk::{self, Call, Outcome};
use super::undo::Undo;

pub mod cases;

/// What the scenarios may do, and how long they wait.
#[derive(Clone, Debug)]
pub struct Options {
    /// The image of the test application.
    pub image: String,
    /// How long something may take that should happen soon.
    pub patience: Duration,
    /// How long istiod stays away.
    pub istiod_away: Duration,
    /// Reboots the node whose name is put in place of `{}`.
    pub reboot: Option<String>,
    pub istioctl: Option<PathBuf>,
    /// Another image for the agents.
    pub upgrade: Option<String>,
    /// Whether the settings of the whole mesh may be changed for a while.
    pub mesh_wide: bool,
}

/// A pod of the test application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub account: String,
    pub node: String,
    /// IPv4 first, where there are both.
    pub ips: Vec<String>,
}

impl Pod {
    /// Its first address.
    pub fn ip(&self) -> &str {
        self.ips.first().map(String::as_str).unwrap_or_default()
    }

    /// Its IPv6 address, if it has one.
    pub fn v6(&self) -> Option<&str> {
        self.ips.iter().map(String::as_str).find(|ip| ip.contains(':'))
    }

    /// Its first address and a port.
    pub fn at(&self, port: u16) -> String {
        talk::at(self.ip(), port)
    }

    /// The end of its identity, as policies name it.
    pub fn identity(&self) -> String {
        format!("/ns/{}/sa/{}", self.namespace, self.account)
    }
}

/// The shared pods, and what reaches them.
#[derive(Debug)]
pub struct Town {
    pub kubectl: Kubectl,
    pub agents: Agents,
    pub undo: Undo,
    pub options: Options,
    /// The value of the label that marks all that this run makes.
    pub run: String,
    /// Two nodes, or the same one twice.
    pub nodes: [String; 2],
    pods: RwLock<Vec<Pod>>,
    begun: Mutex<Instant>,
    made: AtomicU64,
}

/// The ends of a path: the nodes of client and server as indexes.
pub const PATHS: [(usize, usize); 4] = [(0, 1), (1, 0), (0, 0), (1, 1)];

impl Town {
    /// Makes namespaces, pods and services, and waits until they serve.
    pub fn build(
        kubectl: Kubectl,
        agents: Agents,
        undo: Undo,
        options: Options,
        nodes: [String; 2],
    ) -> Result<Self> {
        let run = format!("e2e-{:x}", std::process::id());
        let town = Self {
            kubectl,
            agents,
            undo,
            options,
            run,
            nodes,
            pods: RwLock::default(),
            begun: Mutex::new(Instant::now()),
            made: AtomicU64::new(0),
        };
        let namespaces = [town.mesh(), town.other(), town.plain()];
        for namespace in &namespaces {
            // Not waited for: when interrupted, nobody wants to.
            let _ = town.undo.remember(&[
                "delete",
                "namespace",
                namespace,
                "--wait=false",
                "--ignore-not-found",
            ]);
        }
        town.kubectl.apply(&town.objects())?;
        for namespace in &namespaces {
            town.wait_ready(namespace)?;
        }
        town.renew()?;
        Ok(town)
    }

    fn objects(&self) -> Vec<Value> {
        let (mesh, other, plain) = (self.mesh(), self.other(), self.plain());
        let mut objects = vec![
            manifest::namespace(&mesh, &self.run, true),
            manifest::namespace(&other, &self.run, true),
            manifest::namespace(&plain, &self.run, false),
        ];
        for (index, letter) in ["a", "b"].into_iter().enumerate() {
            let (client, server) = (format!("client-{letter}"), format!("server-{letter}"));
            for (namespace, name) in [
                (&mesh, &client),
                (&mesh, &server),
                (&other, &client),
                (&plain, &client),
                (&plain, &server),
            ] {
                let role = name.split('-').next().unwrap_or_default();
                objects.push(manifest::account(namespace, name));
                objects.push(manifest::pod(&self.spec(
                    namespace,
                    name,
                    index,
                    json!({ "role": role }),
                )));
            }
            for namespace in [&mesh, &plain] {
                objects.push(manifest::service(
                    namespace,
                    &server,
                    json!({ "app": server }),
                    false,
                ));
            }
        }
        objects.push(manifest::service(&mesh, "server", json!({ "role": "server" }), false));
        objects.push(manifest::service(&mesh, "headless", json!({ "role": "server" }), true));
        objects
    }

    /// A pod with an account of its own name on the first or second node.
    pub fn spec<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
        node: usize,
        labels: Value,
    ) -> PodSpec<'a> {
        let node = self.nodes.get(node).map(String::as_str).unwrap_or_default();
        PodSpec { name, namespace, account: name, node, image: &self.options.image, labels }
    }

    /// The namespace in the mesh that most happens in.
    pub fn mesh(&self) -> String {
        format!("{}-mesh", self.run)
    }

    /// Another namespace in the mesh.
    pub fn other(&self) -> String {
        format!("{}-other", self.run)
    }

    /// A namespace outside of the mesh.
    pub fn plain(&self) -> String {
        format!("{}-plain", self.run)
    }

    /// The client in the mesh on the first or second node.
    pub fn client(&self, node: usize) -> Pod {
        self.pod(&self.mesh(), "client", node)
    }

    /// The server in the mesh on the first or second node.
    pub fn server(&self, node: usize) -> Pod {
        self.pod(&self.mesh(), "server", node)
    }

    /// The pod of this role (`client` or `server`) in one of the namespaces.
    pub fn pod(&self, namespace: &str, role: &str, node: usize) -> Pod {
        let name = format!("{role}-{}", if node == 0 { "a" } else { "b" });
        let found =
            self.pods().iter().find(|pod| pod.namespace == namespace && pod.name == name).cloned();
        found.unwrap_or_else(|| Pod {
            namespace: namespace.to_owned(),
            account: name.clone(),
            name,
            node: String::new(),
            ips: Vec::new(),
        })
    }

    /// Looks up the pods again: after a reboot they have other addresses.
    pub fn renew(&self) -> Result<()> {
        let mut found = Vec::new();
        for namespace in [self.mesh(), self.other(), self.plain()] {
            found.extend(self.pods_of(&namespace)?);
        }
        *self.pods.write().unwrap_or_else(PoisonError::into_inner) = found;
        Ok(())
    }

    fn pods(&self) -> RwLockReadGuard<'_, Vec<Pod>> {
        self.pods.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Which program carries the mesh on the first or second node.
    pub fn kind(&self, node: usize) -> Result<Kind> {
        Ok(self.agent(node)?.kind)
    }

    /// The agent on the first or second node.
    pub fn agent(&self, node: usize) -> Result<Agent> {
        self.agents.on(self.nodes.get(node).context("no such node")?)
    }

    /// A name that nothing else of this run has.
    pub fn unique(&self, stem: &str) -> String {
        format!("{stem}-{}", self.made.fetch_add(1, Ordering::Relaxed))
    }

    /// Notes that a scenario begins: logs are read from here on.
    pub fn begin(&self) {
        *self.begun.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// The time that the present scenario's logs span, and a little more.
    pub fn window(&self) -> Duration {
        let begun = *self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        begun.elapsed() + Duration::from_secs(3)
    }

    /// Asks until there is an answer, as long as patience lasts.
    pub fn until<T>(&self, what: impl Display, probe: impl FnMut() -> Result<T>) -> Result<T> {
        wait::until_some(what, self.options.patience, probe)
    }

    /// Makes calls from one pod, of which each must be answered.
    pub fn call_all(&self, from: &Pod, calls: &[Call]) -> Result<Vec<Outcome>> {
        let outcomes = self.calls(from, calls)?;
        let failed: Vec<String> = calls
            .iter()
            .zip(&outcomes)
            .filter(|(_, outcome)| !outcome.ok)
            .map(|(call, outcome)| format!("{}: {outcome}", call.told()))
            .collect();
        if failed.is_empty() {
            return Ok(outcomes);
        }
        bail!(
            "{} of {} calls from {} failed:\n    {}",
            failed.len(),
            calls.len(),
            from.name,
            failed.join("\n    ")
        )
    }

    /// Makes calls from one pod, however they end.
    pub fn calls(&self, from: &Pod, calls: &[Call]) -> Result<Vec<Outcome>> {
        talk::calls(&self.kubectl, &from.namespace, &from.name, calls)
    }

    /// Makes objects for the time of `work`, and removes them, however it ended.
    pub fn with<T>(&self, objects: &[Value], work: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut steps = Vec::new();
        for object in objects {
            let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
            let group = text(&object["apiVersion"]);
            let group =
                group.split_once('/').map(|(group, _)| format!(".{group}")).unwrap_or_default();
            let kind = format!("{}{group}", text(&object["kind"]).to_lowercase());
            let (name, namespace) =
                (text(&object["metadata"]["name"]), text(&object["metadata"]["namespace"]));
            let mut undo =
                vec!["delete", kind.as_str(), name.as_str(), "--ignore-not-found", "--timeout=60s"];
            if !namespace.is_empty() {
                undo.extend(["-n", namespace.as_str()]);
            }
            steps.push(self.undo.remember(&undo));
        }
        let done = self.kubectl.apply(objects).and_then(|()| work());
        let mut undone = Ok(());
        for step in steps.into_iter().rev() {
            undone = undone.and(self.undo.now(step));
        }
        let done = done?;
        undone.context("taking back what the scenario made")?;
        Ok(done)
    }

    /// Sets labels for the time of `work`. `object` is `kind/name`; a value of null removes one.
    pub fn labelled<T>(
        &self,
        namespace: &str,
        object: &str,
        (key, value): (&str, Option<&str>),
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let (kind, name) = object.split_once('/').context("an object without a name")?;
        let scope = if kind == "namespace" { vec![] } else { vec!["-n", namespace] };
        let now = self.kubectl.json(&[&["get", kind, name][..], &scope].concat())?;
        let set =
            |value: Option<&str>| value.map_or(format!("{key}-"), |value| format!("{key}={value}"));
        let (before, after) = (set(now["metadata"]["labels"][key].as_str()), set(value));
        let line = |label: &str| {
            let label = label.to_owned();
            let mut line: Vec<String> = ["label", "--overwrite", kind, name]
                .iter()
                .map(|word| (*word).to_owned())
                .collect();
            line.push(label);
            line.extend(scope.iter().map(|word| (*word).to_owned()));
            line
        };
        let back = line(&before);
        let step = self.undo.remember(&back.iter().map(String::as_str).collect::<Vec<_>>());
        let done = self.kubectl.run(&line(&after)).and_then(|_| work());
        let undone = self.undo.now(step);
        let done = done?;
        undone?;
        Ok(done)
    }

    /// Waits until all pods of a namespace are ready.
    pub fn wait_ready(&self, namespace: &str) -> Result<()> {
        let limit = format!("--timeout={}s", self.options.patience.as_secs().max(60));
        let wait = ["wait", "--for=condition=Ready", "pod", "--all", "-n", namespace, &limit];
        self.kubectl.run(&wait).map(drop)
    }

    /// The pods of a namespace that have addresses.
    pub fn pods_of(&self, namespace: &str) -> Result<Vec<Pod>> {
        let pods = self.kubectl.items(&["get", "pods", "-n", namespace])?;
        let live = pods.iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let found = live.filter_map(|pod| {
            let mut ips: Vec<String> = pod["status"]["podIPs"]
                .as_array()?
                .iter()
                .filter_map(|ip| ip["ip"].as_str().map(ToOwned::to_owned))
                .collect();
            ips.sort_by_key(|ip| ip.contains(':'));
            Some(Pod {
                namespace: namespace.to_owned(),
                name: pod["metadata"]["name"].as_str()?.to_owned(),
                account: pod["spec"]["serviceAccountName"].as_str()?.to_owned(),
                node: pod["spec"]["nodeName"].as_str()?.to_owned(),
                ips,
            })
        });
        Ok(found.collect())
    }

    /// The cluster addresses of a service, IPv4 first.
    pub fn vips(&self, namespace: &str, service: &str) -> Result<Vec<String>> {
        let service = self.kubectl.json(&["get", "service", service, "-n", namespace])?;
        let ips = service["spec"]["clusterIPs"].as_array().into_iter().flatten();
        let mut ips: Vec<String> =
            ips.filter_map(|ip| ip.as_str().map(ToOwned::to_owned)).collect();
        ips.sort_by_key(|ip| ip.contains(':'));
        Ok(ips)
    }

    /// The pod of the town that a server said it is.
    pub fn named(&self, outcome: &Outcome) -> Result<Pod> {
        let mesh = self.mesh();
        let pods = self.pods();
        let found = pods.iter().find(|pod| pod.namespace == mesh && pod.name == outcome.server());
        found.cloned().with_context(|| format!("answered by {:?}", outcome.server()))
    }

    /// Requires that the mesh carried these calls: both agents' access logs must say so.
    pub fn carried(&self, calls: &[Carried]) -> Result<()> {
        ensure!(!calls.is_empty(), "no call to look for");
        let nodes: BTreeSet<&str> = calls
            .iter()
            .flat_map(|call| [call.from.node.as_str(), call.to.node.as_str()])
            .collect();
        wait::until_some("the access logs to tell of every call", Duration::from_secs(15), || {
            let mut logs = Vec::new();
            for node in &nodes {
                let agent = self.agents.on(node)?;
                logs.push((*node, carried::lines(&self.agents.log(&agent, self.window())?)));
            }
            let of = |node: &str| {
                logs.iter()
                    .find(|(name, _)| *name == node)
                    .map(|(_, lines)| lines.as_slice())
                    .unwrap_or_default()
            };
            let mut taken = calls.iter().map(|call| call.local.clone()).collect();
            let missing: Vec<String> = calls
                .iter()
                .filter_map(|call| {
                    let (leaving, arriving) = (of(&call.from.node), of(&call.to.node));
                    carried::check(&call.expected(), leaving, arriving, &mut taken).err()
                })
                .collect();
            ensure!(
                missing.is_empty(),
                "{} of {} calls:\n    {}",
                missing.len(),
                calls.len(),
                missing.join("\n    ")
            );
            Ok(())
        })
    }
}

/// A call that was answered, and how it should have travelled.
#[derive(Clone, Debug)]
pub struct Carried {
    pub from: Pod,
    pub to: Pod,
    /// The caller's own `address:port`.
    pub local: String,
    /// The port that the destination serves.
    pub port: u16,
    pub through: Through,
}

impl Carried {
    /// Through the tunnel, or joined on its node.
    pub fn new(from: &Pod, to: &Pod, outcome: &Outcome, port: u16) -> Self {
        let (from, to, local) = (from.clone(), to.clone(), outcome.local.clone());
        Self { from, to, local, port, through: Through::Mesh }
    }

    fn expected(&self) -> Expected {
        Expected {
            source: self.from.name.clone(),
            destination: self.to.name.clone(),
            local: self.local.clone(),
            port: self.port,
            through: self.through,
        }
    }
}
