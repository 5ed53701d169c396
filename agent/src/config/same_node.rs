//! How connections between two pods of this node travel.

use std::time::Duration;

use culvert_core::view::Chosen;

use super::environment::{Environment, Setting, duration, number, switch};
use super::{ConfigError, Named, Redirect};

/// What is done with connections between pods of this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SameNode {
    /// `CULVERT_SAME_NODE`.
    pub path: SameNodePath,
    /// Whose connections are encrypted within the node, too (`CULVERT_SAME_NODE_TUNNELS`).
    pub tunnelled: Chosen,
    /// Whose connections among each other go past TCP (`CULVERT_ACCELERATE`); `None`: nobody's.
    pub accelerated: Option<Chosen>,
    /// To how many destinations of one pod the kernel admits by itself; at least 1
    /// (`CULVERT_SAME_NODE_VERDICTS`).
    pub verdicts_per_pod: u32,
    /// How long it does so without an agent (`CULVERT_SAME_NODE_ADMIT_TIME`).
    pub admit_time: Duration,
    /// It does so even where the agent cannot end such connections
    /// (`CULVERT_SAME_NODE_IRREVOCABLE`).
    pub irrevocable: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SameNodePath {
    /// From socket to socket, once the agent has admitted the first.
    Kernel,
    /// Through the agent, unencrypted.
    Agent,
    /// Through the agent, in a tunnel.
    Tunnel,
}

const DEFAULT_VERDICTS: u32 = 1024;
const MOST_VERDICTS: u64 = 65_536;
const DEFAULT_ADMIT_TIME: Duration = Duration::from_secs(5 * 60);
const LEAST_ADMIT_TIME: Duration = Duration::from_secs(1);
const MOST_ADMIT_TIME: Duration = Duration::from_secs(24 * 60 * 60);

pub(super) fn same_node(env: &Environment, redirect: Redirect) -> Result<SameNode, ConfigError> {
    let path = env.parse("CULVERT_SAME_NODE", |text| match text {
        "kernel" => Ok(SameNodePath::Kernel),
        "agent" => Ok(SameNodePath::Agent),
        "tunnel" => Ok(SameNodePath::Tunnel),
        _ => Err("is none of kernel, agent and tunnel".to_owned()),
    })?;
    let path = match (path, redirect) {
        (Some(SameNodePath::Kernel), Redirect::Cni) => {
            return Err(ConfigError::Contradiction {
                setting: Named("CULVERT_SAME_NODE".to_owned()),
                other: Named("CULVERT_REDIRECT".to_owned()),
                why: "with istio-cni's rules no program of ours is in the kernel".to_owned(),
            });
        }
        (Some(path), _) => path,
        (None, Redirect::Ebpf) => SameNodePath::Kernel,
        (None, Redirect::Cni) => SameNodePath::Agent,
    };
    let mut tunnelled = match env.setting("CULVERT_SAME_NODE_TUNNELS")? {
        Some(setting) => named(&setting)?,
        None => Chosen::default(),
    };
    tunnelled.everyone = path == SameNodePath::Tunnel;
    let accelerated = match env.setting("CULVERT_ACCELERATE")? {
        Some(setting) if path != SameNodePath::Kernel => {
            return Err(ConfigError::Contradiction {
                setting: setting.name,
                other: Named("CULVERT_SAME_NODE".to_owned()),
                why: "only what the kernel carries can be accelerated".to_owned(),
            });
        }
        setting => setting.map(|setting| named(&setting)).transpose()?,
    };
    let verdicts =
        env.parse("CULVERT_SAME_NODE_VERDICTS", |text| number(text, 1, MOST_VERDICTS))?;
    let admit_time = env.parse("CULVERT_SAME_NODE_ADMIT_TIME", |text| match duration(text)? {
        time if (LEAST_ADMIT_TIME..=MOST_ADMIT_TIME).contains(&time) => Ok(time),
        _ => Err("is not between 1s and 24h".to_owned()),
    })?;
    Ok(SameNode {
        path,
        tunnelled,
        accelerated,
        verdicts_per_pod: verdicts.unwrap_or(DEFAULT_VERDICTS),
        admit_time: admit_time.unwrap_or(DEFAULT_ADMIT_TIME),
        irrevocable: env.parse("CULVERT_SAME_NODE_IRREVOCABLE", switch)?.unwrap_or(false),
    })
}

/// `namespace` and `namespace/workload`, separated by commas.
fn named(setting: &Setting) -> Result<Chosen, ConfigError> {
    let mut tunnelled = Chosen::default();
    for item in setting.value.split(',').map(str::trim) {
        let parts: Vec<&str> = item.split('/').collect();
        match parts.as_slice() {
            [namespace] if !namespace.is_empty() => {
                tunnelled.namespaces.insert((*namespace).into());
            }
            [namespace, workload] if !namespace.is_empty() && !workload.is_empty() => {
                tunnelled.workloads.insert(((*namespace).into(), (*workload).into()));
            }
            _ => {
                let why = format!("{item:?} is neither namespace nor namespace/workload");
                return Err(setting.invalid(why));
            }
        }
    }
    Ok(tunnelled)
}
