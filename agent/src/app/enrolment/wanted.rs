//! What pods are to be enrolled, and how, out of what both sources say.

use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use super::{Enrolment, Marks, Netns, NetnsError, PodSpec};
use crate::file::NetnsRef;
use crate::pods::{Claim, PodName};

/// A pod that is to be enrolled.
pub(super) struct Wanted {
    pub claim: Claim,
    pub home: Home,
    pub spec: PodSpec,
}

/// A pod that istio-cni has handed over.
pub(super) struct Handed {
    pub name: PodName,
    pub netns: Arc<Netns>,
    /// Those of its interfaces; they count as long as its workload is not known.
    pub addresses: Vec<IpAddr>,
}

/// Where a pod's network namespace is found.
#[derive(Clone, Debug)]
pub(in crate::app) enum Home {
    /// Under a name, which may lead to another one later, or to none.
    Path(NetnsRef),
    /// It was handed over, and there is no way back to it but this.
    Handed(Arc<Netns>),
}

impl Home {
    pub fn open(&self, marks: Marks) -> Result<Arc<Netns>, NetnsError> {
        match self {
            Home::Path(path) => Ok(Arc::new(Netns::open(path.path())?.marked(marks))),
            Home::Handed(netns) => Ok(netns.clone()),
        }
    }

    /// Whether it still leads to the namespace that was opened.
    pub fn is_still(&self, opened: &Netns) -> bool {
        match self {
            Home::Path(path) => {
                let Ok(own) = opened.metadata() else { return false };
                fs::metadata(path.path())
                    .is_ok_and(|named| (named.dev(), named.ino()) == (own.dev(), own.ino()))
            }
            Home::Handed(_) => true,
        }
    }

    pub fn is_same(&self, other: &Home) -> bool {
        match (self, other) {
            (Home::Path(one), Home::Path(other)) => one == other,
            (Home::Handed(one), Home::Handed(other)) => one.is_same(other),
            (Home::Path(_), Home::Handed(_)) | (Home::Handed(_), Home::Path(_)) => false,
        }
    }
}

impl fmt::Display for Home {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Home::Path(path) => path.path().display().fmt(f),
            Home::Handed(netns) => match netns.metadata() {
                Ok(metadata) => write!(f, "net:[{}]", metadata.ino()),
                Err(_) => f.write_str("net:[?]"),
            },
        }
    }
}

impl Enrolment {
    /// Pods of the file are enrolled once their workload is known; istio-cni's as soon as it hands
    /// them over.
    pub(super) async fn wanted(&mut self) -> HashMap<Arc<str>, Wanted> {
        let snapshot = self.node.mesh.snapshot();
        let mut wanted = HashMap::new();
        for settings in &self.named {
            let Some(workload) = snapshot.workload(&settings.workload) else { continue };
            if workload.node != self.node.name {
                continue;
            }
            let uid = settings.workload.clone();
            let spec = PodSpec {
                addresses: workload.addresses.clone(),
                exclude_outbound_ports: settings.exclude_outbound_ports.clone(),
                exclude_outbound_cidrs: settings.exclude_outbound_cidrs.clone(),
                exclude_inbound_ports: settings.exclude_inbound_ports.clone(),
                capture_dns: self.node.dns.is_some(),
                ..PodSpec::default()
            };
            let (claim, home) = (Claim::Uid(uid.clone()), Home::Path(settings.netns.clone()));
            wanted.insert(uid, Wanted { claim, home, spec });
        }
        for uid in self.uids_of_handed() {
            if let Some(want) = self.wanted_of_handed(&uid).await {
                wanted.insert(uid, want);
            }
        }
        wanted
    }

    /// A pod's own addresses come from its workload; until that is known, from its interfaces.
    pub(super) async fn wanted_of_handed(&mut self, uid: &str) -> Option<Wanted> {
        let snapshot = self.node.mesh.snapshot();
        let handed = self.handed.get_mut(uid)?;
        let claim = Claim::Named(handed.name.clone());
        let addresses = match claim.find(&snapshot) {
            Some(workload) if !workload.addresses.is_empty() => workload.addresses.clone(),
            Some(_) | None => {
                if let Some(addresses) = read_addresses(&handed.netns).await {
                    handed.addresses = addresses;
                }
                handed.addresses.clone()
            }
        };
        let spec = PodSpec {
            addresses,
            capture_dns: self.node.dns.is_some(),
            beside_cni: true,
            ..PodSpec::default()
        };
        Some(Wanted { claim, home: Home::Handed(handed.netns.clone()), spec })
    }
}

/// The addresses of a pod's interfaces; `None` when they cannot be read.
pub(super) async fn read_addresses(netns: &Arc<Netns>) -> Option<Vec<IpAddr>> {
    let netns = netns.clone();
    let read = tokio::task::spawn_blocking(move || netns.addresses()).await;
    match read {
        Ok(Ok(addresses)) => Some(addresses),
        Ok(Err(error)) => {
            tracing::warn!(%error, "cannot read the addresses of a pod");
            None
        }
        Err(_ended) => None,
    }
}
