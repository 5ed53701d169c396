//! Calls from pod to pod, and what they should find.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use culvert_lab::http::{self, Response};

use super::town::Town;

const LIMIT: Duration = Duration::from_secs(5);

/// Asks `to` for its front page from inside the pod `from`.
pub fn call(town: &Town, from: &str, to: SocketAddr) -> Result<Response> {
    town.mesh.pod(from).place().run(|| http::get(to, "/", LIMIT))
}

/// Calls and expects a hello from the pod `server` that names the client's own address.
pub fn greet(town: &Town, from: &str, to: SocketAddr, server: &str) -> Result<String> {
    let response = call(town, from, to)?;
    ensure!(response.status == 200, "status {}: {}", response.status, response.body.trim());
    let said = response.body.trim().to_owned();
    let client = town.mesh.pod(from);
    let own: IpAddr = if to.is_ipv4() { client.v4().into() } else { client.v6().into() };
    let seen = said.strip_prefix(&format!("hello from {server} to "));
    let seen = seen.with_context(|| format!("not from {server}: {said:?}"))?;
    let seen: IpAddr = seen.trim_start_matches("::ffff:").parse().context("no address")?;
    ensure!(seen == own, "the server saw {seen} as the client, not {own}");
    Ok(format!("200, the server saw {seen}"))
}

/// Calls and expects to be refused.
pub fn refused(town: &Town, from: &str, to: SocketAddr) -> Result<String> {
    match call(town, from, to) {
        Ok(response) => anyhow::bail!("it was answered with {}", response.status),
        Err(error) => Ok(error.root_cause().to_string()),
    }
}
