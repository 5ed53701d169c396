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

/// The package of the scenarios.
const SCENARIOS: &str = "culvert-tests";
/// Those that hold whatever leads connections to the agents.
const BOTH_WAYS: [&str; 5] = ["applications", "authorization", "dns", "fail_closed", "routing"];

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
    let test = || {
        let mut cargo = shell::cargo();
        cargo.env("CULVERT_BIN", &binary).args(["test", "--no-fail-fast"]);
        cargo
    };
    let mut all = test();
    match &arguments.package {
        Some(package) => all.args(["--package", package]),
        None => all.arg("--workspace"),
    };
    run_with(all, arguments)?;
    if arguments.package.as_deref().is_none_or(|package| package == SCENARIOS) {
        println!("the scenarios with istio-cni's packet rules in place of the kernel programs");
        let mut by_rules = test();
        by_rules.env("CULVERT_TEST_REDIRECT", "cni").args(["--package", SCENARIOS]);
        by_rules.args(BOTH_WAYS.iter().flat_map(|test| ["--test", test]));
        run_with(by_rules, arguments)?;
    }
    println!("{} all tests passed ({:.0} s)", shell::green("✔"), steps.elapsed().as_secs_f64());
    Ok(())
}

fn run_with(mut cargo: std::process::Command, arguments: &Arguments) -> Result<()> {
    cargo.args(&arguments.filter);
    if !arguments.further.is_empty() {
        cargo.arg("--").args(&arguments.further);
    }
    shell::run(&mut cargo)
}
