//! The agents that the commands start.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::shell::{self, Steps};

/// The binary that `CULVERT_BIN` names, or else a release build, made now with cargo's own
/// progress shown.
pub fn release(steps: &Steps) -> Result<PathBuf> {
    if let Some(binary) = named("CULVERT_BIN")? {
        return Ok(binary);
    }
    steps.heading("Building the agent");
    shell::run(shell::cargo().args(["build", "--release", "--package", "culvert-agent"]))?;
    Ok(shell::target().join("release/culvert"))
}

/// The binary of a ztunnel to measure beside, if `CULVERT_PEER_ZTUNNEL` names one.
pub fn peer() -> Result<Option<PathBuf>> {
    named("CULVERT_PEER_ZTUNNEL")
}

fn named(variable: &str) -> Result<Option<PathBuf>> {
    let Some(binary) = std::env::var_os(variable) else { return Ok(None) };
    let binary = shell::root().join(binary);
    if !binary.is_file() {
        bail!("{variable} names {}, which is no file", binary.display());
    }
    Ok(Some(binary))
}
