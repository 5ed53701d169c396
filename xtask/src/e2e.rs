//! `cargo xtask e2e`: scenarios on a cluster that runs Istio ambient, with Culvert on some nodes
//! and ztunnel on the others, or one of them on all.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::shell::{self, Steps};

mod agents;
mod kubectl;
mod manifest;
mod undo;

mod carried;
mod talk;

mod load;
mod town;

mod evidence;
mod scenario;
mod subjects;

use agents::Agents;
use kubectl::Kubectl;
use scenario::{Scenario, Verdict};
use town::{Options, Town};
use undo::Undo;

/// Run scenarios on a cluster with Istio ambient: Culvert beside ztunnel, both directions
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  cargo xtask e2e --list
  cargo xtask e2e --kubeconfig ~/.kube/config --apps-image registry.example/culvert-app:1
  cargo xtask e2e --kubeconfig lab.yaml --only mtls/ --only waypoint/added
  cargo xtask e2e --kubeconfig lab.yaml --mesh-wide --reboot-cmd 'ssh {} reboot' --istioctl ./istioctl")]
pub struct Arguments {
    /// The cluster's address and credentials
    #[arg(long, value_name = "FILE", required_unless_present = "list")]
    kubeconfig: Option<PathBuf>,
    /// The nodes that run Culvert [default: told by the agents' images]
    #[arg(long, value_name = "NODES", value_delimiter = ',')]
    culvert_nodes: Vec<String>,
    /// The two nodes to use [default: a Culvert node and a ztunnel node, or the first two]
    #[arg(long, value_name = "NODES", value_delimiter = ',', num_args = 1..=2)]
    nodes: Vec<String>,
    /// Only scenarios whose name contains this; may be given again
    #[arg(long, value_name = "PATTERN")]
    only: Vec<String>,
    /// Leave out scenarios whose name contains this; may be given again
    #[arg(long, value_name = "PATTERN")]
    except: Vec<String>,
    /// List the scenarios and what they show
    #[arg(long)]
    list: bool,
    /// The image of the test application; the nodes must have it or be able to pull it
    #[arg(long, value_name = "IMAGE", default_value = "culvert-app:dev")]
    apps_image: String,
    /// The kubectl to use [default: the one on the path]
    #[arg(long, value_name = "FILE")]
    kubectl: Option<PathBuf>,
    /// Also check what this istioctl reads from the agents
    #[arg(long, value_name = "FILE")]
    istioctl: Option<PathBuf>,
    /// Where Istio runs
    #[arg(long, value_name = "NAMESPACE", default_value = "istio-system")]
    istio_namespace: String,
    /// Also change settings of the whole mesh for a while: not on a cluster that others use
    #[arg(long)]
    mesh_wide: bool,
    /// A shell command that reboots a node, whose name is put in place of {}
    #[arg(long, value_name = "COMMAND")]
    reboot_cmd: Option<String>,
    /// Another image for Culvert, to upgrade to and back [default: a restart with a new template]
    #[arg(long, value_name = "IMAGE")]
    upgrade_image: Option<String>,
    /// Seconds that istiod stays away
    #[arg(long, default_value_t = 60)]
    istiod_away: u64,
    /// Seconds that a change may take to arrive everywhere
    #[arg(long, default_value_t = 90)]
    patience: u64,
    /// Leave everything as it is at the end
    #[arg(long)]
    keep: bool,
    /// Remove what earlier runs left, and do nothing else
    #[arg(long)]
    sweep: bool,
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let wanted = wanted(arguments);
    if arguments.list {
        for scenario in &wanted {
            println!("{:<28} {}", scenario.name, scenario.covers);
        }
        return Ok(());
    }
    let program = arguments.kubectl.clone().or_else(|| shell::find("kubectl"));
    let program = program.context("kubectl is not on the path; name it with --kubectl")?;
    let kubectl = Kubectl::new(program, arguments.kubeconfig.clone());
    if arguments.sweep {
        return sweep(&kubectl);
    }
    ensure!(!wanted.is_empty(), "no scenario has such a name; see --list");
    let undo = Undo::new(kubectl.clone());
    let at_interrupt = undo.clone();
    culvert_lab::sys::on_interrupt(move || {
        eprintln!("\ntaking everything back …");
        report(&at_interrupt.all());
    })?;
    let steps = Steps::new();
    let done = all(arguments, &steps, kubectl, &undo, &wanted);
    if arguments.keep {
        undo.forget_all();
        println!("everything is left as it is; remove it with: cargo xtask e2e --sweep");
    } else {
        report(&undo.all());
    }
    done
}

fn wanted(arguments: &Arguments) -> Vec<Scenario> {
    let matches = |patterns: &[String], scenario: &Scenario| {
        patterns.iter().any(|pattern| scenario.name.contains(pattern.as_str()))
    };
    let mut all = subjects::all();
    all.retain(|scenario| arguments.only.is_empty() || matches(&arguments.only, scenario));
    all.retain(|scenario| !matches(&arguments.except, scenario));
    all
}

fn all(
    arguments: &Arguments,
    steps: &Steps,
    kubectl: Kubectl,
    undo: &Undo,
    wanted: &[Scenario],
) -> Result<()> {
    let agents = Agents::new(
        kubectl.clone(),
        arguments.istio_namespace.clone(),
        arguments.culvert_nodes.clone(),
    );
    let nodes = choose(&agents, &arguments.nodes)?;
    steps.heading("The cluster");
    for node in &nodes {
        let agent = agents.on(node)?;
        println!("  {node}: {} ({}, DaemonSet {})", agent.kind, agent.pod, agent.set);
    }
    let mut town = None;
    steps.step("pods in the mesh and outside of it, on both nodes", || {
        let built = Town::build(kubectl, agents, undo.clone(), options(arguments), nodes)?;
        let note = built.run.clone();
        town = Some(built);
        Ok(note)
    })?;
    let town = town.context("no pods")?;
    steps.heading(&format!("{} scenarios", wanted.len()));
    let (mut failed, mut known, mut skipped) = (Vec::new(), 0, 0);
    for scenario in wanted {
        match one(steps, &town, scenario) {
            Ok(Verdict::Passed(_)) => {}
            Ok(Verdict::Known(_)) => known += 1,
            Ok(Verdict::Skipped(_)) => skipped += 1,
            Err(error) => {
                println!("    {error:#}");
                evidence::tell(&town, scenario.name);
                failed.push(scenario.name);
            }
        }
    }
    let passed = wanted.len() - failed.len() - known - skipped;
    let took = steps.elapsed().as_secs_f64();
    println!(
        "\n{passed} passed, {known} with what is known of the peer, {skipped} left out, {} failed, in {took:.0} s",
        failed.len()
    );
    if failed.is_empty() { Ok(()) } else { bail!("failed: {}", failed.join(", ")) }
}

/// Runs one scenario on a calm mesh, and prints its line.
fn one(steps: &Steps, town: &Town, scenario: &Scenario) -> Result<Verdict> {
    town.begin();
    let start = Instant::now();
    let done = subjects::calm(town)
        .context("the mesh was not calm when the scenario began")
        .and_then(|()| (scenario.run)(town));
    let (mark, note) = match &done {
        Ok(Verdict::Passed(note)) => (shell::green("✔"), note.clone()),
        Ok(Verdict::Known(what)) => (shell::yellow("✔"), format!("known of the peer: {what}")),
        Ok(Verdict::Skipped(why)) => (shell::yellow("–"), why.clone()),
        Err(_) => (shell::red("✘"), String::new()),
    };
    steps.tell(&mark, scenario.name, &note, start.elapsed());
    done
}

fn options(arguments: &Arguments) -> Options {
    Options {
        image: arguments.apps_image.clone(),
        patience: Duration::from_secs(arguments.patience),
        istiod_away: Duration::from_secs(arguments.istiod_away),
        reboot: arguments.reboot_cmd.clone(),
        istioctl: arguments.istioctl.clone(),
        upgrade: arguments.upgrade_image.clone(),
        mesh_wide: arguments.mesh_wide,
    }
}

/// Two nodes with agents, of different kinds if there are both; one node stands for two.
fn choose(agents: &Agents, named: &[String]) -> Result<[String; 2]> {
    let all = agents.all()?;
    ensure!(!all.is_empty(), "no agent runs in namespace {}", agents.namespace);
    if let Some(first) = named.first() {
        return Ok([first.clone(), named.get(1).unwrap_or(first).clone()]);
    }
    let nodes = agents.nodes()?;
    let nodes = nodes.into_iter().filter_map(|node| all.iter().find(|agent| agent.node == node));
    let nodes: Vec<_> = nodes.collect();
    let first = *nodes.first().context("no node takes pods and has an agent")?;
    let other = nodes.iter().find(|agent| agent.kind != first.kind);
    let other = *other.or_else(|| nodes.get(1)).unwrap_or(&first);
    Ok([first.node.clone(), other.node.clone()])
}

fn sweep(kubectl: &Kubectl) -> Result<()> {
    let said = kubectl.run(&["delete", "namespace", "-l", manifest::RUN, "--wait=false"])?;
    print!("{said}");
    Ok(())
}

fn report(errors: &[anyhow::Error]) {
    for error in errors {
        eprintln!("{} {error:#}", shell::red("not taken back:"));
    }
}
