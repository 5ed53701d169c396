//! `cargo xtask bench`: Culvert beside the plain path, in alternated rounds.

use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::setup::{self, Purpose};
use crate::shell::Steps;
use crate::{binary, shell};

pub mod load;
pub mod server;

mod field;
mod measure;
mod peer;
mod report;
mod scale;

use field::{Field, Path};
use measure::Kind;
use peer::Programs;
use report::Report;

/// Measure throughput, latency, connections, processor time and memory beside the plain path
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask bench --quick
  cargo xtask bench --only latency --only cpu-per-10k --json numbers.json
  cargo xtask bench --path accelerated --only throughput-1 --only latency-1
  CULVERT_BIN=/tmp/other/culvert cargo xtask bench --path cross
  CULVERT_PEER_ZTUNNEL=/tmp/ztunnel cargo xtask bench --path same
  cargo xtask bench scale

CULVERT_PEER_ZTUNNEL names a ztunnel binary to measure in the same rounds.")]
pub struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    /// A minute's look: one short round
    #[arg(long)]
    quick: bool,
    /// Also write the figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Only measures whose name begins with this; may be given again
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Only this path
    #[arg(long, value_enum)]
    path: Option<Path>,
    /// Rounds of each measure
    #[arg(long)]
    rounds: Option<usize>,
    /// Seconds of one measurement
    #[arg(long)]
    seconds: Option<f64>,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Scale(scale::Arguments),
}

pub fn run(arguments: &Arguments) -> Result<()> {
    if let Some(What::Scale(arguments)) = &arguments.what {
        return scale::run(arguments);
    }
    let steps = Steps::new();
    setup::ensure(&steps, Purpose::Test)?;
    let binary = binary::release(&steps)?;
    let peer = Programs::of(&steps)?;
    let files = culvert_lab::sys::raise_open_files_limit();
    let files = files.context("raising the limit of open files")?;
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { 5 }).max(1);
    let seconds = arguments.seconds.unwrap_or(if arguments.quick { 1.2 } else { 3.0 });
    let idle = if arguments.quick { 2_000 } else { 10_000 };
    // ztunnel has both ends of a connection within its node, and tunnels besides.
    let idle_within = match peer {
        Some(_) => idle.min(usize::try_from(files / 2)?.saturating_sub(500)),
        None => idle,
    };
    let mut report = Report::default();
    steps.heading("Making the mesh");
    let mut field = None;
    steps.step("three nodes with agents, two without", || {
        field = Some(Field::start(&binary)?);
        Ok(String::new())
    })?;
    let mut field = field.context("no mesh")?;
    if let Some(programs) = &peer {
        steps.step("two nodes with ztunnel", || {
            field.add_peer(programs)?;
            Ok(String::new())
        })?;
    }
    let wanted = |kind: &Kind| {
        let names = kind.measures();
        let matches = |only: &String| names.iter().any(|name| name.starts_with(only.as_str()));
        arguments.only.is_empty() || arguments.only.iter().any(matches)
    };
    for path in [Path::Same, Path::Accelerated, Path::Cross] {
        if arguments.path.is_some_and(|only| only != path) {
            continue;
        }
        if let (Path::Accelerated, Some(because)) = (path, &field.unaccelerated) {
            println!("\nNothing is accelerated here: {because}");
            continue;
        }
        steps.heading(&format!("{}, {rounds} rounds of {seconds} s each", path.title()));
        // Memory, and what other pods notice, is what it is without.
        let without = |kind: &Kind| matches!(kind, Kind::Fairness(_) | Kind::Idle);
        let told = |kind: &Kind| wanted(kind) && !(path == Path::Accelerated && without(kind));
        for kind in Kind::all().into_iter().filter(told) {
            steps.step(kind.title(), || {
                let figures = match kind {
                    Kind::Idle if path == Path::Cross => measure::idle(&mut field, path, idle)?,
                    Kind::Idle => measure::idle(&mut field, path, idle_within)?,
                    _ => measure::alternate(&mut field, path, kind, rounds, seconds)?,
                };
                let note = figures.first().map(|figure| figure.summary()).unwrap_or_default();
                report.extend(figures);
                Ok(note)
            })?;
        }
    }
    report.retain(&arguments.only);
    println!("\n{report}");
    if let Some(file) = &arguments.json {
        report.write(file)?;
        println!("written to {}", file.display());
    }
    println!("{}", shell::dim(&format!("{:.0} s", steps.elapsed().as_secs_f64())));
    Ok(())
}
