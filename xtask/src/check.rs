//! `cargo xtask check`: everything that is checked before the tests.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};

use crate::shell::{self, Steps};

mod deploy;
mod imports;
mod limits;
mod manifests;
mod safety;
mod source;

/// Check format, lints, sizes, imports, docs and licences
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only our own rules on sizes, imports and deployment, which take no compiling
    #[arg(long)]
    rules: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    let mut failed = Vec::new();
    let mut check = |name: &str, work: &dyn Fn() -> Result<String>| {
        if let Err(error) = steps.step(name, work) {
            println!("{error:#}");
            failed.push(name.to_owned());
        }
    };
    check("sizes, imports, unsafe blocks and deployment", &rules);
    if !arguments.rules {
        check("format", &format);
        check("clippy", &clippy);
        check("documentation", &documentation);
        if shell::find("cargo-deny").is_some() {
            check("licences and advisories", &dependencies);
        } else {
            steps.skipped(
                "licences and advisories",
                "install cargo-deny with: cargo xtask setup --for check",
            );
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("not in order: {}", failed.join(", ")) }
}

/// A place where a rule is broken.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Violation {
    file: PathBuf,
    line: usize,
    rule: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.rule)
    }
}

fn rules() -> Result<String> {
    let root = shell::root();
    let sources = source::all(&root)?;
    let mut violations = manifests::check(&root)?;
    violations.extend(deploy::check(&root, &sources)?);
    for source in &sources {
        violations.extend(limits::check(source));
        violations.extend(safety::check(source));
    }
    violations.extend(imports::check(&sources));
    if violations.is_empty() {
        return Ok(format!("{} files", sources.len()));
    }
    violations.sort();
    let lines: Vec<String> = violations.iter().map(Violation::to_string).collect();
    bail!("{} places:\n{}", lines.len(), lines.join("\n"))
}

fn format() -> Result<String> {
    shell::quietly(shell::cargo().args(["fmt", "--all", "--check", "--", "-l"]))?;
    // The kernel programs are a workspace of their own.
    if shell::root().join("ebpf/Cargo.toml").exists() {
        let manifest = ["fmt", "--manifest-path", "ebpf/Cargo.toml", "--check", "--", "-l"];
        shell::quietly(shell::cargo().args(manifest))?;
    }
    Ok(String::new())
}

fn clippy() -> Result<String> {
    let arguments = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    shell::quietly(shell::cargo().args(arguments))?;
    Ok(String::new())
}

fn documentation() -> Result<String> {
    let mut cargo = shell::cargo();
    cargo.env("RUSTDOCFLAGS", "-D warnings");
    shell::quietly(cargo.args(["doc", "--quiet", "--workspace", "--no-deps"]))?;
    Ok(String::new())
}

fn dependencies() -> Result<String> {
    let fetched = shell::quietly(Command::new("cargo-deny").args(["fetch", "db"]));
    let mut deny = Command::new("cargo-deny");
    deny.args(["--log-level", "error", "check", "--hide-inclusion-graph"]);
    match fetched {
        Ok(()) => shell::quietly(deny.args(["--disable-fetch"])).map(|()| String::new()),
        Err(_) => {
            shell::quietly(deny.args(["licenses", "bans", "sources"]))?;
            Ok("without advisories, whose database cannot be fetched here".to_owned())
        }
    }
}
