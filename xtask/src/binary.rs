//! The agent that the commands start.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::shell::{self, Steps};

/// The binary that `CULVERT_BIN` names, or else a release build, made now with cargo's own
/// progress shown.
pub fn release(steps: &Steps) -> Result<PathBuf> {
    if let Some(binary) = std::env::var_os("CULVERT_BIN") {
        let binary = shell::root().join(binary);
        if !binary.is_file() {
            bail!("CULVERT_BIN names {}, which is no file", binary.display());
        }
        return Ok(binary);
    }
    steps.heading("Building the agent");
    shell::run(shell::cargo().args(["build", "--release", "--package", "culvert-agent"]))?;
    Ok(shell::target().join("release/culvert"))
}
