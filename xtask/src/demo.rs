//! `cargo xtask demo`: two nodes with real applications, told line by line.

use anyhow::{Context, Result};
use culvert_lab::cleanup::{Sweep, sweep};

use crate::setup::{self, Purpose};
use crate::shell::{self, Steps};
use crate::{binary, demo::town::Town};

mod acts;
mod calls;
mod speed;
mod town;

/// Show two nodes talking through Culvert: tunnels, policy, a waypoint, a killed agent
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask demo            show everything and leave nothing behind
  cargo xtask demo --keep     leave the mesh running, to look around in it
  cargo xtask demo --stop     take down what --keep left")]
pub struct Arguments {
    /// Leave the mesh running at the end
    #[arg(long)]
    keep: bool,
    /// Take down what an earlier --keep left running
    #[arg(long, conflicts_with = "keep")]
    stop: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if arguments.stop {
        let removed = sweep(Sweep::DeadAndKept)?;
        println!(
            "taken down: {}",
            if removed.is_empty() { "nothing".into() } else { removed.join(", ") }
        );
        return Ok(());
    }
    let steps = Steps::new();
    setup::ensure(&steps, Purpose::Demo)?;
    let binary = binary::release(&steps)?;
    let begun = Steps::new();
    let mut town = Town::build(&begun, &binary, arguments.keep)?;
    if let Err(error) = play(&begun, &mut town) {
        println!("\n{}", shell::bold("The logs end with"));
        println!("{}", town.log_excerpt());
        return Err(error);
    }
    println!(
        "\n{} everything as it should be, in {:.0} s",
        shell::green("✔"),
        begun.elapsed().as_secs_f64()
    );
    if arguments.keep {
        town.keep().context("leaving the mesh running")?;
        town.tell_how_to_look_further();
    } else {
        println!("Look around in it: cargo xtask demo --keep. Measure: cargo xtask bench --quick");
    }
    Ok(())
}

fn play(steps: &Steps, town: &mut Town) -> Result<()> {
    acts::calls(steps, town)?;
    acts::policy(steps, town)?;
    acts::waypoint(steps, town)?;
    acts::outage(steps, town)?;
    speed::compare(steps, town)
}
