//! The content of one file as core values, and what lies between two of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use culvert_core::addr::NamespacedHostname;
use culvert_core::authorization::Authorization;
use culvert_core::service::Service;
use culvert_core::snapshot::Change;
use culvert_core::workload::{PolicyKey, Workload};
use serde::Deserialize;

use super::entities::{RawPolicy, RawService, RawWorkload};
use super::error::Place;
use super::place::{find, place_of};
use super::section::{CulvertSection, RawSection};

/// A valid file. Of several entries with one key the last counts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mesh {
    pub workloads: BTreeMap<Arc<str>, Workload>,
    pub services: BTreeMap<NamespacedHostname, Service>,
    pub policies: BTreeMap<PolicyKey, Authorization>,
    pub culvert: CulvertSection,
}

/// What is wrong with the text of a file, and where. The operator's side is at fault.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct Invalid {
    pub place: Option<Place>,
    /// Names the field, as `workloads[1].services`, and says why it is refused.
    pub what: String,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawFile {
    workloads: Vec<RawWorkload>,
    policies: Vec<RawPolicy>,
    services: Vec<RawService>,
    culvert: Option<RawSection>,
}

impl Mesh {
    /// Reads YAML 1.2 in UTF-8. An empty document is an empty mesh.
    pub fn parse(yaml: &[u8]) -> Result<Mesh, Invalid> {
        let raw: Option<RawFile> = serde_yaml_ng::from_slice(yaml).map_err(Invalid::from)?;
        let raw = raw.unwrap_or_default();
        let workloads = raw.workloads.into_iter().map(Workload::from);
        let services = raw.services.into_iter().map(Service::from);
        let policies = raw.policies.into_iter().map(Authorization::from);
        let workloads = workloads.map(|it| (it.uid.clone(), it)).collect();
        let section = raw.culvert.unwrap_or_default();
        let culvert = section.check(&workloads).map_err(|fault| Invalid {
            place: find(yaml, &fault.path),
            what: format!("{}: {}", fault.path, fault.why),
        })?;
        Ok(Mesh {
            workloads,
            services: services.map(|it| (it.key(), it)).collect(),
            policies: policies.map(|it| (it.key(), it)).collect(),
            culvert,
        })
    }
}

impl From<serde_yaml_ng::Error> for Invalid {
    fn from(error: serde_yaml_ng::Error) -> Self {
        let place = place_of(&error);
        let mut what = error.to_string();
        if let Some(Place { line, column }) = place
            && let Some(end) = what.rfind(&format!(" at line {line} column {column}"))
        {
            // The place stands in front of our messages; the library's own syntax errors go on
            // after it (`…, while parsing …`).
            what.replace_range(end..end + format!(" at line {line} column {column}").len(), "");
        }
        Invalid { place, what }
    }
}

/// The changes that lead from `old` to `new`; removals stand first. Applied to a snapshot of
/// `old` they make a snapshot of `new`.
pub fn diff(old: &Mesh, new: &Mesh) -> Vec<Change> {
    let mut changes = Vec::new();
    changes.extend(gone(&old.workloads, &new.workloads).map(Change::RemoveWorkload));
    changes.extend(gone(&old.services, &new.services).map(Change::RemoveService));
    changes.extend(gone(&old.policies, &new.policies).map(Change::RemoveAuthorization));
    changes.extend(fresh(&old.workloads, &new.workloads).map(Change::workload));
    changes.extend(fresh(&old.policies, &new.policies).map(Change::Authorization));
    changes.extend(fresh(&old.services, &new.services).map(Change::service));
    if old.culvert.require_waypoint != new.culvert.require_waypoint {
        changes.push(Change::RequireWaypoint(new.culvert.require_waypoint.clone()));
    }
    changes
}

fn gone<K: Ord + Clone, V>(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> impl Iterator<Item = K> {
    old.keys().filter(|key| !new.contains_key(key)).cloned()
}

fn fresh<K: Ord, V: Clone + PartialEq>(
    old: &BTreeMap<K, V>,
    new: &BTreeMap<K, V>,
) -> impl Iterator<Item = V> {
    new.iter().filter(|(key, value)| old.get(key) != Some(value)).map(|(_, value)| value.clone())
}
