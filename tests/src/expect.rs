//! What scenarios wait for: refusals as an application sees them, and what agents tell.

use std::io::{self, Read};
use std::net::{IpAddr, TcpStream};

use anyhow::{Context, Result, anyhow, bail};
use culvert_lab::agent::Agent;
use culvert_lab::mesh::{Match, Mesh, Running};
use culvert_lab::wait::{self, SOON};
use serde_json::Value;

use crate::connect;

/// A rule of one clause with one match.
pub fn rule(one: Match) -> Vec<Vec<Match>> {
    vec![vec![one]]
}

/// Whether the application's connection is cut rather than ended: refused, or reset at its first
/// read. What it reads instead is an error.
pub fn is_refused(mesh: &Running, pod: &str, to: (IpAddr, u16)) -> Result<()> {
    match connect(mesh, pod, to) {
        Ok(stream) => is_reset(&stream),
        Err(error) if is_cut(&error) => Ok(()),
        Err(error) => Err(error).context("neither connected nor refused"),
    }
}

/// Whether the next read of an open connection finds it cut.
pub fn is_reset(mut stream: &TcpStream) -> Result<()> {
    match stream.read(&mut [0; 64]) {
        Err(error) if is_cut(&error) => Ok(()),
        Err(error) => Err(error).context("neither answered nor reset"),
        Ok(0) => bail!("a clean end"),
        Ok(count) => bail!("{count} bytes of an answer"),
    }
}

fn is_cut(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    // Aborted is what the kernel destroys by itself (`SOCK_DESTROY`).
    matches!(error.kind(), ConnectionReset | ConnectionRefused | ConnectionAborted)
}

/// Waits for a line of the agent's log that holds each of `parts`, and gives it.
pub fn logged(agent: &Agent, parts: &[&str]) -> Result<String> {
    wait::until_some(format!("a log line with {parts:?}"), SOON, || {
        let log = agent.log();
        let line = log.lines().find(|line| parts.iter().all(|part| line.contains(part)));
        line.map(str::to_owned).ok_or_else(|| format!("the log is\n{log}"))
    })
}

/// Waits until the sum of the samples called `name` with these labels is `wanted`.
pub fn counted(agent: &Agent, name: &str, labels: &[&str], wanted: f64) -> Result<()> {
    wait::until_some(format!("{name} {labels:?} to be {wanted}"), SOON, || {
        let metrics = agent.metrics()?;
        let now = culvert_lab::agent::sum(&metrics, name, labels);
        let of_name: Vec<&str> = metrics.lines().filter(|line| line.contains(name)).collect();
        if now == wanted { Ok(()) } else { Err(anyhow!("it is {now}:\n{}", of_name.join("\n"))) }
    })
}

/// The JSON that the admin address answers.
pub fn answer(agent: &Agent, path: &str) -> Result<Value> {
    let response = agent.admin(path)?;
    if response.status != 200 {
        bail!("{path}: {} {}", response.status, response.body);
    }
    serde_json::from_str(&response.body).with_context(|| format!("{path}: {}", response.body))
}

/// How often the agent has taken over the mesh file since it started.
pub fn loads(agent: &Agent) -> Result<f64> {
    agent.metric("culvert_source_loads_total", &[])
}

/// Edits the mesh, and waits until all `agents` have taken it over.
pub fn edit(mesh: &mut Running, agents: &[&Agent], change: impl FnOnce(&mut Mesh)) -> Result<()> {
    let before = agents.iter().map(|agent| loads(agent)).collect::<Result<Vec<_>>>()?;
    mesh.change(change)?;
    for (agent, before) in agents.iter().zip(before) {
        wait::until_some("the edit to be taken over", SOON, || {
            let now = loads(agent)?;
            if now > before { Ok(()) } else { Err(anyhow!("{}", agent.log())) }
        })?;
    }
    Ok(())
}
