//! `/config_dump`, of this agent or of ztunnel, as far as the commands show it.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

/// What is listed, each entry also as it came.
#[derive(Debug, Default)]
pub(super) struct Dump {
    pub(super) workloads: Vec<Entry<Workload>>,
    pub(super) services: Vec<Entry<Service>>,
    pub(super) policies: Vec<Entry<Policy>>,
    pub(super) certificates: Vec<Entry<Certificate>>,
    /// Whether a workload is healthy, by uid; not narrowed by namespace.
    pub(super) healthy: HashMap<String, bool>,
    /// Names of services by what may refer to them; not narrowed by namespace.
    pub(super) service_names: HashMap<String, String>,
}

#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) it: T,
    raw: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Workload {
    pub(super) uid: String,
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) workload_ips: Vec<String>,
    pub(super) hostname: String,
    pub(super) node: String,
    pub(super) protocol: String,
    pub(super) status: String,
    pub(super) waypoint: Option<Gateway>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Gateway {
    pub(super) destination: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) hostname: String,
    pub(super) vips: Vec<String>,
    pub(super) waypoint: Option<Gateway>,
    pub(super) endpoints: Value,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Policy {
    pub(super) name: String,
    pub(super) namespace: String,
    pub(super) scope: String,
    pub(super) action: String,
    pub(super) rules: Vec<Value>,
    pub(super) dry_run: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Certificate {
    pub(super) identity: String,
    pub(super) state: String,
    pub(super) cert_chain: Vec<Link>,
    pub(super) root_certs: Vec<Link>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Link {
    /// Decimal.
    pub(super) serial_number: String,
    /// RFC 3339, as is `expiration_time`.
    pub(super) valid_from: String,
    pub(super) expiration_time: String,
}

impl Service {
    /// An address of the service without its network.
    pub(super) fn addresses(&self) -> impl Iterator<Item = &str> {
        self.vips.iter().map(|vip| vip.split_once('/').map_or(vip.as_str(), |(_, ip)| ip))
    }

    /// The uids of its endpoints.
    pub(super) fn endpoints(&self) -> impl Iterator<Item = &str> {
        let endpoints = values(&self.endpoints).into_iter();
        endpoints.map(|it| it.get("workloadUid").and_then(Value::as_str).unwrap_or_default())
    }
}

impl Dump {
    pub(super) fn read(answer: Value) -> Result<Dump, serde_json::Error> {
        let workloads: Vec<Entry<Workload>> = entries(&answer, "workloads")?;
        let services: Vec<Entry<Service>> = entries(&answer, "services")?;
        let mut service_names = HashMap::new();
        for Entry { it: service, .. } in &services {
            let hostname = format!("{}/{}", service.namespace, service.hostname);
            for key in service.vips.iter().cloned().chain([hostname]) {
                service_names.insert(key, service.name.clone());
            }
        }
        let healthy =
            workloads.iter().map(|Entry { it, .. }| (it.uid.clone(), it.status == "Healthy"));
        Ok(Dump {
            healthy: healthy.collect(),
            service_names,
            policies: entries(&answer, "policies")?,
            certificates: entries(&answer, "certificates")?,
            workloads,
            services,
        })
    }

    /// Without the entries of other namespaces.
    pub(super) fn of_namespace(mut self, namespace: Option<&str>) -> Dump {
        if let Some(wanted) = namespace {
            self.workloads.retain(|entry| entry.it.namespace == wanted);
            self.services.retain(|entry| entry.it.namespace == wanted);
            self.policies.retain(|entry| entry.it.namespace == wanted);
        }
        self
    }

    pub(super) fn raw_workloads(&self) -> Value {
        raw(&self.workloads)
    }

    pub(super) fn raw_services(&self) -> Value {
        raw(&self.services)
    }

    pub(super) fn raw_policies(&self) -> Value {
        raw(&self.policies)
    }

    pub(super) fn raw_certificates(&self) -> Value {
        raw(&self.certificates)
    }
}

fn entries<T: for<'de> Deserialize<'de>>(
    answer: &Value,
    key: &str,
) -> Result<Vec<Entry<T>>, serde_json::Error> {
    let listed = answer.get(key).map(values).unwrap_or_default();
    let entry = |raw: &Value| Ok(Entry { it: T::deserialize(raw)?, raw: raw.clone() });
    listed.into_iter().map(entry).collect()
}

/// Older dumps have objects where newer ones have lists.
fn values(listed: &Value) -> Vec<&Value> {
    match listed {
        Value::Array(list) => list.iter().collect(),
        Value::Object(object) => object.values().collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
    }
}

fn raw<T>(entries: &[Entry<T>]) -> Value {
    Value::Array(entries.iter().map(|entry| entry.raw.clone()).collect())
}
