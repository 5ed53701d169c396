//! `cargo xtask test`: every test there is.

use anyhow::Result;

use crate::setup::{self, Purpose};
use crate::shell::{self, Steps};

/// Run all tests: unit, property, fuzz smoke, and scenarios on a mesh of namespaces (as root)
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Only tests of this package
    #[arg(short, long)]
    package: Option<String>,
    /// Further arguments of the test programs
    #[arg(last = true)]
    further: Vec<String>,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    setup::ensure(&steps, Purpose::Test)?;
    culvert_lab::sys::raise_open_files_limit()?;
    let binary = match std::env::var_os("CULVERT_BIN") {
        Some(binary) => binary.into(),
        None => {
            shell::run(shell::cargo().args(["build", "--package", "culvert-agent"]))?;
            shell::target().join("debug/culvert")
        }
    };
    let mut cargo = shell::cargo();
    cargo.env("CULVERT_BIN", binary).args(["test", "--no-fail-fast"]);
    match &arguments.package {
        Some(package) => cargo.args(["--package", package]),
        None => cargo.arg("--workspace"),
    };
    cargo.args(&arguments.filter);
    if !arguments.further.is_empty() {
        cargo.arg("--").args(&arguments.further);
    }
    shell::run(&mut cargo)?;
    println!("{} all tests passed ({:.0} s)", shell::green("✔"), steps.elapsed().as_secs_f64());
    Ok(())
}
