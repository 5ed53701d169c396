//! `PROXY_CONFIG`: settings that Istio's installation may hand over as one YAML text.

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde::Deserialize;

use super::environment::Environment;
use super::{ConfigError, Named};

/// Which variable each key stands for.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ProxyConfig {
    discovery_address: Option<String>,
    proxy_admin_port: Option<u16>,
    status_port: Option<u16>,
    concurrency: Option<u16>,
    #[serde(default)]
    proxy_metadata: BTreeMap<String, String>,
}

/// The variables that `PROXY_CONFIG` stands for; those that are set themselves win. Keys that are
/// not the agent's business are left to others.
pub(super) fn variables(env: &Environment) -> Result<Vec<(OsString, OsString)>, ConfigError> {
    let Some(text) = env.text("PROXY_CONFIG")? else { return Ok(Vec::new()) };
    let config: ProxyConfig =
        serde_yaml_ng::from_str(&text).map_err(|error| ConfigError::Invalid {
            setting: Named("PROXY_CONFIG".to_owned()),
            value: text,
            why: format!("is not a proxy configuration: {error}"),
        })?;
    let mut variables = Vec::new();
    let mut stands_for = |name: &str, value: Option<String>| {
        if let Some(value) = value
            && !env.is_set(name)
        {
            variables.push((OsString::from(name), OsString::from(value)));
        }
    };
    stands_for("XDS_ADDRESS", config.discovery_address.clone());
    stands_for("CA_ADDRESS", config.discovery_address);
    stands_for("ADMIN_ADDR", config.proxy_admin_port.map(|port| format!("127.0.0.1:{port}")));
    stands_for("STATS_ADDR", config.status_port.map(|port| format!("[::]:{port}")));
    stands_for("ZTUNNEL_WORKER_THREADS", config.concurrency.map(|count| count.to_string()));
    for (name, value) in config.proxy_metadata {
        let name = match name.starts_with("ISTIO_META") {
            true => name,
            false => format!("ISTIO_META_{name}"),
        };
        stands_for(&name, Some(value));
    }
    Ok(variables)
}
