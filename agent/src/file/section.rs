//! The `culvert` section: which pods to enrol, the embedded CA, and the mesh's own settings.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use culvert_core::snapshot::RequireWaypoint;
use culvert_core::workload::Workload;
use ipnet::IpNet;
use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::place::{FieldPath, Step};
use super::scalar::Text;
use crate::config::StatedMesh;

/// How long certificates of the embedded CA live unless the file says otherwise.
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);

/// The `culvert` key of the file. What may also come from the environment is `None` when the file
/// does not say it; `Config::mesh` brings the two together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CulvertSection {
    pub trust_domain: Option<Arc<str>>,
    pub network: Option<Arc<str>>,
    pub cluster_id: Option<Arc<str>>,
    pub ca: CaSettings,
    pub require_waypoint: RequireWaypoint,
    /// Pods of any node. Each names a workload of the file that has a node and a whole identity.
    pub pods: Vec<PodSettings>,
    /// Whose connections count as the node's own; `None`: the agent's network namespace.
    pub node_netns: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaSettings {
    /// Absolute; `None`: `ca` in the state directory.
    pub directory: Option<PathBuf>,
    /// Life of the certificates it signs; at least a second.
    pub ttl: Duration,
}

/// One pod to enrol, on the node of its workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSettings {
    /// The uid of a workload of the same file.
    pub workload: Arc<str>,
    pub netns: NetnsRef,
    pub exclude_outbound_ports: Vec<u16>,
    pub exclude_outbound_cidrs: Vec<IpNet>,
    pub exclude_inbound_ports: Vec<u16>,
}

impl CulvertSection {
    /// What the file says of the mesh, for comparison with the environment.
    pub fn stated(&self) -> StatedMesh {
        StatedMesh {
            trust_domain: self.trust_domain.clone(),
            network: self.network.clone(),
            cluster_id: self.cluster_id.clone(),
        }
    }
}

/// How the file names a network namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum NetnsRef {
    /// An absolute path.
    Path(PathBuf),
    /// A process that lives in it.
    Pid(u32),
}

impl NetnsRef {
    /// What to open to get at it (proc(5) for a process).
    pub fn path(&self) -> PathBuf {
        match self {
            NetnsRef::Path(path) => path.clone(),
            NetnsRef::Pid(pid) => PathBuf::from(format!("/proc/{pid}/ns/net")),
        }
    }
}

impl fmt::Display for NetnsRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NetnsRef::Path(path) => path.display().fmt(f),
            NetnsRef::Pid(pid) => write!(f, "pid {pid}"),
        }
    }
}

impl Default for CulvertSection {
    fn default() -> Self {
        CulvertSection {
            trust_domain: None,
            network: None,
            cluster_id: None,
            ca: CaSettings { directory: None, ttl: DEFAULT_TTL },
            require_waypoint: RequireWaypoint::Nobody,
            pods: Vec::new(),
            node_netns: None,
        }
    }
}

/// A field of the section that cannot be as it is, in view of the rest of the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) path: FieldPath,
    pub(super) why: String,
}

impl Fault {
    fn new(below: &[Step], why: impl Into<String>) -> Self {
        let steps = std::iter::once(Step::Key("culvert")).chain(below.iter().cloned());
        Fault { path: FieldPath(steps.collect()), why: why.into() }
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct RawSection {
    trust_domain: Option<String>,
    network: Option<String>,
    cluster_id: Option<String>,
    ca: Option<RawCa>,
    require_waypoint: Option<RawRequireWaypoint>,
    pods: Vec<RawPod>,
    node_netns: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawCa {
    directory: Option<PathBuf>,
    ttl: Option<Text<Duration>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawPod {
    workload: String,
    netns: Option<PathBuf>,
    pid: Option<u32>,
    #[serde(default)]
    exclude_outbound_ports: Vec<u16>,
    #[serde(default)]
    exclude_outbound_cidrs: Vec<Text<IpNet>>,
    #[serde(default)]
    exclude_inbound_ports: Vec<u16>,
}

/// `nobody`, `everyBound` or a list of uids.
struct RawRequireWaypoint(RequireWaypoint);

impl<'de> Deserialize<'de> for RawRequireWaypoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;

        impl<'de> Visitor<'de> for Read {
            type Value = RequireWaypoint;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("nobody, everyBound or a list of workload uids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<RequireWaypoint, E> {
                match text {
                    "nobody" => Ok(RequireWaypoint::Nobody),
                    "everyBound" => Ok(RequireWaypoint::EveryBound),
                    _ => Err(E::custom(format!(
                        "{text:?} is not nobody, everyBound or a list of workload uids"
                    ))),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(
                self,
                mut list: A,
            ) -> Result<RequireWaypoint, A::Error> {
                let mut uids = Vec::new();
                while let Some(uid) = list.next_element::<String>()? {
                    uids.push(Arc::from(uid));
                }
                Ok(RequireWaypoint::Workloads(uids))
            }
        }

        deserializer.deserialize_any(Read).map(RawRequireWaypoint)
    }
}

impl RawSection {
    /// The section, if it agrees with itself and with the file's workloads.
    pub(super) fn check(
        self,
        workloads: &BTreeMap<Arc<str>, Workload>,
    ) -> Result<CulvertSection, Fault> {
        let key = Step::Key;
        for (name, value) in [("trustDomain", &self.trust_domain), ("clusterId", &self.cluster_id)]
        {
            if value.as_deref() == Some("") {
                return Err(Fault::new(&[key(name)], "is empty"));
            }
        }
        if self.trust_domain.as_deref().is_some_and(|domain| domain.contains('/')) {
            return Err(Fault::new(&[key("trustDomain")], "holds a `/`"));
        }
        if let Some(path) = &self.node_netns {
            absolute(path).map_err(|why| Fault::new(&[key("nodeNetns")], why))?;
        }
        let require_waypoint = self.require_waypoint.map(|raw| raw.0).unwrap_or_default();
        check_bound(&require_waypoint, workloads)?;
        Ok(CulvertSection {
            trust_domain: self.trust_domain.map(Into::into),
            network: self.network.map(Into::into),
            cluster_id: self.cluster_id.map(Into::into),
            ca: check_ca(self.ca)?,
            require_waypoint,
            pods: check_pods(self.pods, workloads)?,
            node_netns: self.node_netns,
        })
    }
}

fn check_ca(raw: Option<RawCa>) -> Result<CaSettings, Fault> {
    let (directory, ttl) = match raw {
        Some(raw) => (raw.directory, raw.ttl.map_or(DEFAULT_TTL, |ttl| ttl.0)),
        None => (None, DEFAULT_TTL),
    };
    let ca = Step::Key("ca");
    if let Some(path) = &directory {
        absolute(path).map_err(|why| Fault::new(&[ca.clone(), Step::Key("directory")], why))?;
    }
    if ttl < Duration::from_secs(1) {
        return Err(Fault::new(&[ca, Step::Key("ttl")], "is shorter than a second"));
    }
    Ok(CaSettings { directory, ttl })
}

fn check_bound(
    require: &RequireWaypoint,
    workloads: &BTreeMap<Arc<str>, Workload>,
) -> Result<(), Fault> {
    let uids: &[Arc<str>] = match require {
        RequireWaypoint::Nobody | RequireWaypoint::EveryBound => &[],
        RequireWaypoint::Workloads(uids) => uids,
    };
    match uids.iter().position(|uid| !workloads.contains_key(uid)) {
        None => Ok(()),
        Some(index) => Err(Fault::new(
            &[Step::Key("requireWaypoint"), Step::Index(index)],
            no_such_workload(&uids[index]),
        )),
    }
}

fn check_pods(
    raw: Vec<RawPod>,
    workloads: &BTreeMap<Arc<str>, Workload>,
) -> Result<Vec<PodSettings>, Fault> {
    let mut pods = Vec::with_capacity(raw.len());
    let mut uids = HashMap::new();
    let mut namespaces = HashMap::new();
    for (index, raw) in raw.into_iter().enumerate() {
        let fault = |field: &'static str, why: String| {
            Fault::new(&[Step::Key("pods"), Step::Index(index), Step::Key(field)], why)
        };
        let Some(workload) = workloads.get(raw.workload.as_str()) else {
            return Err(fault("workload", no_such_workload(&raw.workload)));
        };
        enrollable(workload).map_err(|why| fault("workload", why))?;
        if let Some(first) = uids.insert(workload.uid.clone(), index) {
            let why = format!("{:?} is enrolled by pods[{first}] already", raw.workload);
            return Err(fault("workload", why));
        }
        let netns = check_netns(&raw).map_err(|(field, why)| fault(field, why))?;
        // The same path means another namespace on another node.
        let place = (workload.node.clone(), netns.path());
        if let Some(first) = namespaces.insert(place, index) {
            let field = match netns {
                NetnsRef::Path(_) => "netns",
                NetnsRef::Pid(_) => "pid",
            };
            return Err(fault(field, format!("{netns} is enrolled by pods[{first}] already")));
        }
        for (field, ports) in [
            ("excludeOutboundPorts", &raw.exclude_outbound_ports),
            ("excludeInboundPorts", &raw.exclude_inbound_ports),
        ] {
            if ports.contains(&0) {
                return Err(fault(field, "0 is not a port".to_owned()));
            }
        }
        pods.push(PodSettings {
            workload: workload.uid.clone(),
            netns,
            exclude_outbound_ports: raw.exclude_outbound_ports,
            exclude_outbound_cidrs: raw.exclude_outbound_cidrs.into_iter().map(|it| it.0).collect(),
            exclude_inbound_ports: raw.exclude_inbound_ports,
        });
    }
    Ok(pods)
}

/// A pod without a node would be enrolled by no agent, and one without a whole identity could get
/// no certificate: all its traffic would be refused.
fn enrollable(workload: &Workload) -> Result<(), String> {
    let uid = &workload.uid;
    if workload.node.is_empty() {
        return Err(format!("workload {uid:?} has no `node`, so no agent would enrol it"));
    }
    if !workload.identity().is_complete() {
        return Err(format!(
            "workload {uid:?} cannot have a certificate: `trustDomain`, `namespace` and \
             `serviceAccount` must all be set, without `/`"
        ));
    }
    Ok(())
}

fn check_netns(pod: &RawPod) -> Result<NetnsRef, (&'static str, String)> {
    match (&pod.netns, pod.pid) {
        (Some(_), Some(_)) => Err(("pid", "`netns` and `pid` exclude each other".to_owned())),
        (None, None) => Err(("netns", "is missing, and so is `pid`".to_owned())),
        (None, Some(0)) => Err(("pid", "0 is not a process".to_owned())),
        (None, Some(pid)) => Ok(NetnsRef::Pid(pid)),
        (Some(path), None) => match absolute(path) {
            Ok(()) => Ok(NetnsRef::Path(path.clone())),
            Err(why) => Err(("netns", why)),
        },
    }
}

fn absolute(path: &Path) -> Result<(), String> {
    if path.is_absolute() {
        Ok(())
    } else {
        Err(format!("{:?} is not an absolute path", path.display().to_string()))
    }
}

fn no_such_workload(uid: &str) -> String {
    format!("no workload of this file has the uid {uid:?}")
}

/// The first setting that differs and is read at start only.
pub(super) fn fixed_at_start(old: &CulvertSection, new: &CulvertSection) -> Option<Fault> {
    let differs = [
        ("trustDomain", old.trust_domain != new.trust_domain),
        ("network", old.network != new.network),
        ("clusterId", old.cluster_id != new.cluster_id),
        ("ca", old.ca != new.ca),
        ("nodeNetns", old.node_netns != new.node_netns),
    ];
    let (field, _) = differs.into_iter().find(|(_, differs)| *differs)?;
    Some(Fault::new(&[Step::Key(field)], "cannot change while the agent runs; restart it"))
}
