//! A real waypoint: Envoy, set up by a file the way a mesh's control plane would set it up.
//!
//! A CONNECT on port 15008 ends at the first listener, its inner HTTP passes an internal listener
//! that adds a header to every answer, and leaves by a CONNECT of Envoy's own to the agent of the
//! destination pod.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::mesh::{Running, TRUST_DOMAIN};
use crate::pki::{Authority, Signed};
use crate::process::Process;
use crate::{http, wait};

/// The Envoy version that the lab was made with.
pub const ENVOY_VERSION: &str = "1.40";

const ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 15000);

/// Where a waypoint takes what was addressed to a service, or to a pod.
#[derive(Clone, Debug)]
pub struct Passage {
    /// The service, or the pod.
    pub service: String,
    /// Its port.
    pub port: u16,
    /// The pod that is to answer.
    pub pod: String,
    /// The pod's port.
    pub target: u16,
}

/// Where a proxy takes the bytes of a tunnel, without looking into them.
#[derive(Clone, Debug)]
pub struct Crossing {
    /// What the tunnel is to name: `IP:port` or `host:port`.
    pub authority: String,
    pub target: SocketAddr,
}

/// A port of a proxy's loopback address that leads into a tunnel.
#[derive(Clone, Debug)]
pub struct WayOut {
    pub port: u16,
    /// What the tunnel names.
    pub authority: String,
    /// Where it is dialled, on port 15008.
    pub via: IpAddr,
    /// Who must be there.
    pub identity: String,
}

/// What an Envoy is to do.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub passages: Vec<Passage>,
    pub crossings: Vec<Crossing>,
    pub ways_out: Vec<WayOut>,
}

/// Finds Envoy: the private installation below `target`, or the one on the path. One of another
/// version does not count.
pub fn find_envoy(target: &Path) -> Result<PathBuf> {
    let private = target.join("tools/envoy/bin/envoy");
    let candidates = [private, PathBuf::from("envoy")];
    let found = candidates.into_iter().find(|path| version_of(path).is_some());
    found.with_context(|| {
        format!("Envoy {ENVOY_VERSION} is missing; install it with: cargo xtask setup --for demo")
    })
}

fn version_of(envoy: &Path) -> Option<String> {
    let output = Command::new(envoy).arg("--version").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.contains(&format!("/{ENVOY_VERSION}.")).then_some(text)
}

/// Starts Envoy in the pod called `pod`, and waits until it serves.
///
/// The mesh's authority must exist ([`Authority::create`] with [`Running::ca`]). Answers carry
/// the header `x-waypoint: <pod>`.
pub fn start(
    mesh: &Running,
    authority: &Authority,
    pod: &str,
    envoy: &Path,
    passages: &[Passage],
) -> Result<Process> {
    let plan = Plan { passages: passages.to_vec(), ..Plan::default() };
    start_plan(mesh, authority, pod, envoy, &plan)
}

/// Starts Envoy in the pod called `pod` to do as planned, and waits until it serves.
pub fn start_plan(
    mesh: &Running,
    authority: &Authority,
    pod: &str,
    envoy: &Path,
    plan: &Plan,
) -> Result<Process> {
    let config = write_config(mesh, authority, pod, plan)?;
    let place = mesh.pod(pod).place();
    let mut command = place.command(envoy)?;
    command.arg("-c").arg(&config);
    command.args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "info"]);
    let mut process = place.start(&format!("waypoint-{pod}"), &mut command)?;
    let waited = wait::until_some("the waypoint to serve", Duration::from_secs(30), || {
        if let Some(status) = process.ended() {
            return Ok(Some(status));
        }
        let answer = place.run(|| http::get(ADMIN, "/ready", Duration::from_secs(2)))?;
        if answer.status == 200 { Ok(None) } else { Err(anyhow::anyhow!("{}", answer.body)) }
    });
    match waited {
        Ok(None) => Ok(process),
        Ok(Some(status)) => bail!("Envoy ended with {status}:\n{}", process.log_tail(20)),
        Err(error) => Err(error.context(process.log_tail(20))),
    }
}

/// Has Envoy read the configuration without serving it.
pub fn validate(
    mesh: &Running,
    authority: &Authority,
    pod: &str,
    envoy: &Path,
    passages: &[Passage],
) -> Result<()> {
    let plan = Plan { passages: passages.to_vec(), ..Plan::default() };
    let config = write_config(mesh, authority, pod, &plan)?;
    let config = config.to_str().context("the lab's folder is not text")?;
    let envoy = envoy.to_str().context("Envoy's path is not text")?;
    mesh.pod(pod).place().output(envoy, &["--mode", "validate", "-c", config]).map(drop)
}

fn write_config(mesh: &Running, authority: &Authority, pod: &str, plan: &Plan) -> Result<PathBuf> {
    let identity = mesh.spec(pod).identity();
    let signed = authority.sign_identity(&mesh.lab().state().join("waypoint"), pod, &identity)?;
    let path = mesh.lab().state().join(format!("waypoint-{pod}.yaml"));
    let text = print(mesh, &signed, pod, plan);
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path)
}

fn print(mesh: &Running, signed: &Signed, pod: &str, plan: &Plan) -> String {
    let own = trust(signed, &format!("prefix: \"spiffe://{TRUST_DOMAIN}/\""));
    let mut hosts = String::new();
    let mut listeners = String::new();
    let mut clusters = String::new();
    for (number, passage) in plan.passages.iter().enumerate() {
        let is_pod = mesh.description().pods.iter().any(|spec| spec.name == passage.service);
        let addresses = match is_pod {
            true => mesh.pod(&passage.service).addresses(),
            false => mesh.service(&passage.service),
        };
        let domains: Vec<String> = addresses
            .iter()
            .map(|ip| format!("\"{}\"", SocketAddr::new(*ip, passage.port)))
            .collect();
        let target = SocketAddr::new(mesh.pod(&passage.pod).v4().into(), passage.target);
        let peer = format!("exact: \"{}\"", mesh.spec(&passage.pod).identity());
        // Writing to a string cannot fail.
        let _ = write!(
            hosts,
            "{}",
            fill(HOST, &[("N", &number.to_string()), ("DOMAINS", &domains.join(", "))])
        );
        let values = [
            ("N", number.to_string()),
            ("POD", pod.to_owned()),
            ("TARGET", target.to_string()),
            ("ADDRESS", target.ip().to_string()),
            ("TRUST", trust(signed, &peer)),
        ];
        let values: Vec<(&str, &str)> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
        listeners.push_str(&fill(INNER, &values));
        clusters.push_str(&fill(OUTWARD, &values));
    }
    for (number, crossing) in plan.crossings.iter().enumerate() {
        let values = [
            ("N", format!("crossing-{number}")),
            ("DOMAINS", format!("\"{}\"", crossing.authority)),
            ("ADDRESS", crossing.target.ip().to_string()),
            ("PORT", crossing.target.port().to_string()),
        ];
        let values: Vec<(&str, &str)> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
        hosts.push_str(&fill(HOST, &values));
        clusters.push_str(&fill(CROSSING, &values));
    }
    for (number, way) in plan.ways_out.iter().enumerate() {
        let values = [
            ("N", format!("way-{number}")),
            ("PORT", way.port.to_string()),
            ("TARGET", way.authority.clone()),
            ("ADDRESS", way.via.to_string()),
            ("TRUST", trust(signed, &format!("exact: \"{}\"", way.identity))),
        ];
        let values: Vec<(&str, &str)> = values.iter().map(|(k, v)| (*k, v.as_str())).collect();
        listeners.push_str(&fill(WAY_OUT, &values));
        clusters.push_str(&fill(TUNNEL, &values));
    }
    let parts =
        [("TRUST", own), ("HOSTS", hosts), ("LISTENERS", listeners), ("CLUSTERS", clusters)];
    let parts: Vec<(&str, &str)> = parts.iter().map(|(k, v)| (*k, v.as_str())).collect();
    fill(WHOLE, &parts)
}

/// The common part of both TLS contexts: own certificate, and which peers to accept.
fn trust(signed: &Signed, peer: &str) -> String {
    let files = [
        ("CERTIFICATE", signed.certificate.to_string_lossy()),
        ("KEY", signed.key.to_string_lossy()),
        ("ROOT", signed.root.to_string_lossy()),
        ("PEER", peer.into()),
    ];
    let files: Vec<(&str, &str)> = files.iter().map(|(k, v)| (*k, v.as_ref())).collect();
    fill(TRUST, &files)
}

fn fill(template: &str, values: &[(&str, &str)]) -> String {
    values
        .iter()
        .fold(template.to_owned(), |text, (name, value)| text.replace(&format!("@{name}@"), value))
}

const TRUST: &str = include_str!("waypoint/trust.yaml");
const WHOLE: &str = include_str!("waypoint/whole.yaml");
const HOST: &str = include_str!("waypoint/host.yaml");
const INNER: &str = include_str!("waypoint/inner.yaml");
const OUTWARD: &str = include_str!("waypoint/outward.yaml");
const CROSSING: &str = include_str!("waypoint/crossing.yaml");
const WAY_OUT: &str = include_str!("waypoint/way_out.yaml");
const TUNNEL: &str = include_str!("waypoint/tunnel.yaml");

#[cfg(test)]
mod tests;
