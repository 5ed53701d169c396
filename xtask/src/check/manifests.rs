//! Which of our packages may depend on which.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Violation;

/// A package's folder, and those of ours that its manifest may name.
const MAY: [(&str, &[&str]); 8] = [
    ("ebpf/abi", &[]),
    ("ebpf", &["culvert-abi"]),
    ("proto", &[]),
    ("agent/core", &["culvert-abi"]),
    ("agent", &["culvert-abi", "culvert-core", "culvert-proto"]),
    ("tests/lab", &[]),
    ("tests", &["culvert-abi", "culvert-agent", "culvert-core", "culvert-lab", "culvert-proto"]),
    ("xtask", &["culvert-lab"]),
];

pub fn check(root: &Path) -> Result<Vec<Violation>> {
    let mut violations = Vec::new();
    for (folder, may) in MAY {
        let file = Path::new(folder).join("Cargo.toml");
        let text = fs::read_to_string(root.join(&file));
        let text = text.with_context(|| format!("reading {}", file.display()))?;
        violations.extend(forbidden(&text, may).into_iter().map(|(line, name)| Violation {
            file: file.clone(),
            line,
            rule: format!("{folder} may not depend on {name}"),
        }));
    }
    Ok(violations)
}

/// The lines that name a package of ours which is not in `may`.
fn forbidden(manifest: &str, may: &[&str]) -> Vec<(usize, String)> {
    let mut in_dependencies = false;
    let mut found = Vec::new();
    for (index, line) in manifest.lines().enumerate() {
        if let Some(section) = line.strip_prefix('[') {
            in_dependencies = section.trim_end().ends_with("dependencies]");
        }
        let name = line.split(['.', '=', ' ']).next().unwrap_or_default();
        if in_dependencies && name.starts_with("culvert-") && !may.contains(&name) {
            found.push((index + 1, name.to_owned()));
        }
    }
    found
}

#[cfg(test)]
mod tests;
