//! The description of a mesh, the file that agents read it from, and the mesh running.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

mod running;
mod yaml;

pub use running::Running;

/// Who tells agents of pods, in place of the file.
pub trait Enroller: fmt::Debug + Send + Sync {
    /// Makes the enrolled pods those that the description names now.
    fn follow(&self, mesh: &Running) -> anyhow::Result<()>;
    /// What the agent of a node is told of it: variables of its environment.
    fn environment(&self, mesh: &Running, node: &str) -> Vec<(String, String)>;
}

/// A mesh to be: nodes, pods, services and policies.
///
/// Methods named after a thing add it; a pod belongs to the node added last.
#[derive(Clone, Debug)]
pub struct Mesh {
    pub(crate) nodes: Vec<String>,
    /// The pods, each with the name of its node.
    pub pods: Vec<PodSpec>,
    /// The services. Their addresses follow from their order.
    pub services: Vec<ServiceSpec>,
    /// The policies.
    pub policies: Vec<PolicySpec>,
    /// Workloads that have no pod here, each a map in YAML.
    pub workloads: Vec<String>,
    /// The network of the agents, of their pods and of the services' addresses.
    pub network: String,
    /// `nobody`, `everyBound`, or a list in YAML.
    pub require_waypoint: String,
    /// How long the embedded CA's certificates live.
    pub certificate_ttl: Duration,
    /// Whether the file says which pods are enrolled; otherwise agents learn it from elsewhere.
    pub enrols: bool,
    pub(crate) enroller: Option<Arc<dyn Enroller>>,
    pub(crate) attach: crate::lab::Attach,
}

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Unique in the mesh; also the workload's and the namespace's name.
    pub name: String,
    /// The name of its node.
    pub node: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its service account.
    pub service_account: String,
    /// Whether an agent is to capture it.
    pub enrolled: bool,
    /// Whether it is reached through HBONE.
    pub hbone: bool,
    /// Whether the mesh knows it at all.
    pub known: bool,
    /// The waypoint for traffic addressed to the pod itself: `<namespace>/<hostname>`.
    pub waypoint: Option<String>,
    /// Policies with `WorkloadSelector` scope: `<namespace>/<name>`.
    pub policies: Vec<String>,
    /// Outbound ports that are left alone.
    pub exclude_outbound_ports: Vec<u16>,
    /// Destinations that are left alone.
    pub exclude_outbound_cidrs: Vec<String>,
    /// Inbound ports that are left alone.
    pub exclude_inbound_ports: Vec<u16>,
    /// Fields of the workload with their values in YAML, added or in place of those that follow from
    /// the above.
    pub fields: Vec<(String, String)>,
}

/// A service to be, with one virtual address of each family.
#[derive(Clone, Debug)]
pub struct ServiceSpec {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Service port and target port.
    pub ports: Vec<(u16, u16)>,
    /// The names of the pods behind it.
    pub endpoints: Vec<String>,
    /// The waypoint for traffic addressed to it: `<namespace>/<hostname>`.
    pub waypoint: Option<String>,
    /// The value of `loadBalancer` in YAML, if any.
    pub load_balancer: Option<String>,
    /// Further fields with their values in YAML, added or in place of those that follow from the
    /// above.
    pub fields: Vec<(String, String)>,
}

/// A policy to be.
#[derive(Clone, Debug)]
pub struct PolicySpec {
    /// Its name.
    pub name: String,
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// `Global`, `Namespace` or `WorkloadSelector`.
    pub scope: &'static str,
    /// `Allow` or `Deny`.
    pub action: &'static str,
    /// Judged and told, without effect.
    pub dry_run: bool,
    /// Rules of clauses of matches.
    pub rules: Vec<Vec<Vec<Match>>>,
}

/// One match of a policy: fields of the file with their values in YAML.
#[derive(Clone, Debug, Default)]
pub struct Match(pub(crate) Vec<(String, String)>);

impl Default for Mesh {
    fn default() -> Self {
        Self::new()
    }
}

impl Mesh {
    /// An empty mesh.
    pub fn new() -> Self {
        Self {
            nodes: Vec::new(),
            pods: Vec::new(),
            services: Vec::new(),
            policies: Vec::new(),
            workloads: Vec::new(),
            network: String::new(),
            require_waypoint: "nobody".to_owned(),
            certificate_ttl: Duration::from_secs(24 * 3600),
            enrols: true,
            enroller: None,
            attach: crate::lab::Attach::Process,
        }
    }

    /// At which cgroup the agents attach, if not at the process's own.
    pub fn attach(mut self, attach: crate::lab::Attach) -> Self {
        self.attach = attach;
        self
    }

    /// Who enrols the pods; the file then does not.
    pub fn enrolled_by(mut self, enroller: Arc<dyn Enroller>) -> Self {
        self.enrols = false;
        self.enroller = Some(enroller);
        self
    }

    /// A node; the pods that follow live on it.
    pub fn node(mut self, name: &str) -> Self {
        self.nodes.push(name.to_owned());
        self
    }

    /// An enrolled pod on the last node.
    pub fn pod(self, name: &str, namespace: &str, service_account: &str) -> Self {
        self.pod_with(PodSpec::new(name, namespace, service_account))
    }

    /// A pod on the last node.
    pub fn pod_with(mut self, mut pod: PodSpec) -> Self {
        pod.node = self.nodes.last().cloned().unwrap_or_default();
        self.pods.push(pod);
        self
    }

    /// A service.
    pub fn service(mut self, service: ServiceSpec) -> Self {
        self.services.push(service);
        self
    }

    /// A policy.
    pub fn policy(mut self, policy: PolicySpec) -> Self {
        self.policies.push(policy);
        self
    }

    /// A workload that has no pod here: a map in YAML.
    pub fn workload(mut self, yaml: &str) -> Self {
        self.workloads.push(yaml.to_owned());
        self
    }

    /// Makes the namespaces and writes the file. Agents are started one by one afterwards.
    pub fn start(self) -> anyhow::Result<Running> {
        Running::start(self)
    }
}

impl PodSpec {
    /// An enrolled pod that speaks HBONE.
    pub fn new(name: &str, namespace: &str, service_account: &str) -> Self {
        Self {
            name: name.to_owned(),
            node: String::new(),
            namespace: namespace.to_owned(),
            service_account: service_account.to_owned(),
            enrolled: true,
            hbone: true,
            known: true,
            waypoint: None,
            policies: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            exclude_outbound_cidrs: Vec::new(),
            exclude_inbound_ports: Vec::new(),
            fields: Vec::new(),
        }
    }

    /// A pod that the mesh knows, but that no agent captures and no tunnel reaches.
    pub fn outside(name: &str, namespace: &str, service_account: &str) -> Self {
        let pod = Self::new(name, namespace, service_account);
        Self { enrolled: false, hbone: false, ..pod }
    }

    /// A waypoint: it ends tunnels itself, so that no agent captures it.
    pub fn waypoint(name: &str, namespace: &str, service_account: &str) -> Self {
        Self { enrolled: false, ..Self::new(name, namespace, service_account) }
    }

    /// A pod that the mesh has never heard of.
    pub fn unknown(name: &str) -> Self {
        Self { known: false, ..Self::outside(name, "", "") }
    }

    /// Sends traffic addressed to the pod through a waypoint.
    pub fn behind(mut self, waypoint: &str) -> Self {
        self.waypoint = Some(waypoint.to_owned());
        self
    }

    /// Sets a field of the workload, such as `capacity`, to a value in YAML.
    pub fn with(mut self, field: &str, yaml: &str) -> Self {
        self.fields.push((field.to_owned(), yaml.to_owned()));
        self
    }

    /// The key of its workload.
    pub fn uid(&self) -> String {
        format!("lab//Pod/{}/{}", self.namespace, self.name)
    }

    /// Its SPIFFE identity.
    pub fn identity(&self) -> String {
        format!("spiffe://{}/ns/{}/sa/{}", TRUST_DOMAIN, self.namespace, self.service_account)
    }
}

/// The trust domain of every lab.
pub const TRUST_DOMAIN: &str = "cluster.local";

impl ServiceSpec {
    /// A service without ports and endpoints.
    pub fn new(name: &str, namespace: &str) -> Self {
        Self {
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            ports: Vec::new(),
            endpoints: Vec::new(),
            waypoint: None,
            load_balancer: None,
            fields: Vec::new(),
        }
    }

    /// Adds a port and the pods' port behind it.
    pub fn port(mut self, port: u16, target: u16) -> Self {
        self.ports.push((port, target));
        self
    }

    /// Adds a pod behind it.
    pub fn endpoint(mut self, pod: &str) -> Self {
        self.endpoints.push(pod.to_owned());
        self
    }

    /// Sends traffic addressed to the service through a waypoint.
    pub fn behind(mut self, waypoint: &str) -> Self {
        self.waypoint = Some(waypoint.to_owned());
        self
    }

    /// Sets a field, such as `ipFamilies`, to a value in YAML.
    pub fn with(mut self, field: &str, yaml: &str) -> Self {
        self.fields.push((field.to_owned(), yaml.to_owned()));
        self
    }

    /// Its full name.
    pub fn hostname(&self) -> String {
        format!("{}.{}.svc.cluster.local", self.name, self.namespace)
    }

    /// Its key, as waypoint references name it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.hostname())
    }
}

impl PolicySpec {
    /// A policy for all pods of a namespace that allows what one of `rules` matches.
    pub fn allow(name: &str, namespace: &str, rules: Vec<Vec<Vec<Match>>>) -> Self {
        let (name, namespace) = (name.to_owned(), namespace.to_owned());
        Self { name, namespace, scope: "Namespace", action: "Allow", dry_run: false, rules }
    }

    /// A policy for all pods of a namespace that denies what one of `rules` matches.
    pub fn deny(name: &str, namespace: &str, rules: Vec<Vec<Vec<Match>>>) -> Self {
        Self { action: "Deny", ..Self::allow(name, namespace, rules) }
    }

    /// Its key, as workloads name it.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

impl Match {
    /// A match of everything.
    pub fn any() -> Self {
        Self::default()
    }

    /// Adds a field of the file, such as `notPrincipals`, with its value in YAML.
    pub fn with(mut self, field: &str, yaml: &str) -> Self {
        self.0.push((field.to_owned(), yaml.to_owned()));
        self
    }

    /// Peers with exactly this principal: an identity without `spiffe://`.
    pub fn principal(self, principal: &str) -> Self {
        self.with("principals", &format!("[!Exact {}]", yaml::quoted(principal)))
    }

    /// Peers with this service account.
    pub fn service_account(self, namespace: &str, account: &str) -> Self {
        let (namespace, account) = (yaml::quoted(namespace), yaml::quoted(account));
        let account = format!("[{{namespace: {namespace}, serviceAccount: {account}}}]");
        self.with("serviceAccounts", &account)
    }

    /// Connections to this port of the pod.
    pub fn port(self, port: u16) -> Self {
        self.with("destinationPorts", &format!("[{port}]"))
    }
}

#[cfg(test)]
mod tests;
