//! Signals for processes found by their name, as a pod with the host's processes in view can send
//! them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

/// Signals every process whose executable or command is called `name`.
pub fn kill(name: &str, signal: i32) -> Result<String> {
    let own = std::process::id();
    let mut hit = Vec::new();
    for entry in fs::read_dir("/proc").context("reading /proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|text| text.parse::<u32>().ok()) else {
            continue;
        };
        if pid != own && called(&entry.path(), name) {
            culvert_lab::sys::kill(pid, signal).with_context(|| format!("signalling {pid}"))?;
            hit.push(pid);
        }
    }
    if hit.is_empty() {
        bail!("no process is called {name}");
    }
    Ok(json!({ "signalled": hit }).to_string())
}

fn called(process: &Path, name: &str) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    let first = line.split(|byte| *byte == 0).next().unwrap_or_default();
    let first = String::from_utf8_lossy(first);
    first.rsplit('/').next() == Some(name)
}
