//! `cargo xtask kind`: a cluster of kind with an ambient mesh, and Culvert on one of its nodes.
//!
//! It only runs other people's programs in the right order: docker, kind, istioctl, helm, kubectl.

use std::path::Path;
use std::process::Command;

use anyhow::{Result, bail};
use clap::Subcommand;

use crate::shell::{self, Steps};

/// Make a kind cluster with Istio ambient, and Culvert in place of ztunnel on one node
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Needs docker, kind, istioctl, helm and kubectl, and root for the nodes' BPF folders.
Examples:
  cargo xtask kind create
  cargo xtask e2e --kubeconfig target/kind/kubeconfig --apps-image culvert-app:dev
  cargo xtask kind load      after a change: new images into the cluster, and a new agent
  cargo xtask kind delete"
)]
pub struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Subcommand)]
enum Action {
    /// Make the cluster, install Istio, load the images, and put Culvert on one node
    Create,
    /// Build the images anew, load them, and restart the agent
    Load,
    /// Delete the cluster
    Delete,
}

/// As `deploy/kind/cluster.yaml` names it.
const CLUSTER: &str = "culvert";
/// The node that Culvert takes over.
const NODE: &str = "culvert-worker2";
/// The pins of each node's agent, as the cluster's mounts name them.
const PINS: &str = "/sys/fs/bpf/culvert-kind";
/// The definitions that waypoints are made from.
const GATEWAY_API: &str =
    "https://github.com/kubernetes-sigs/gateway-api/releases/download/v1.4.0/standard-install.yaml";

pub fn run(arguments: &Arguments) -> Result<()> {
    let steps = Steps::new();
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let lines = lines(arguments.action, &shell::target(), architecture);
    let missing: Vec<&str> = lines
        .iter()
        .map(|line| line.program())
        .filter(|program| shell::find(program).is_none())
        .collect();
    if let Some(program) = missing.first() {
        bail!("{program} is not on the path");
    }
    std::fs::create_dir_all(shell::target().join("kind"))?;
    for line in &lines {
        steps.step(line.what, || shell::quietly(&mut line.command()).map(|()| String::new()))?;
    }
    if arguments.action == Action::Create {
        let config = shell::target().join("kind/kubeconfig");
        println!("\nCulvert runs on {NODE}, ztunnel on the other. Now:");
        println!("  cargo xtask e2e --kubeconfig {}", config.display());
    }
    Ok(())
}

/// One program to run.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    what: &'static str,
    words: Vec<String>,
}

impl Line {
    fn program(&self) -> &str {
        self.words.first().map(String::as_str).unwrap_or_default()
    }

    fn command(&self) -> Command {
        let mut command =
            if self.program() == "cargo" { shell::cargo() } else { Command::new(self.program()) };
        command.args(self.words.iter().skip(1));
        command
    }
}

/// What is to be run, in this order.
fn lines(action: Action, target: &Path, architecture: &str) -> Vec<Line> {
    let target = target.display().to_string();
    let config = format!("{target}/kind/kubeconfig");
    let mut lines = Vec::new();
    let mut line = |what: &'static str, text: &str| {
        let words = text.split_whitespace().map(|word| {
            word.replace("@target", &target)
                .replace("@config", &config)
                .replace("@arch", architecture)
        });
        lines.push(Line { what, words: words.collect() });
    };
    match action {
        Action::Create => {
            line("folders for pins", &format!("mkdir -p {PINS}/worker {PINS}/worker2"));
            let create = "kind create cluster --config deploy/kind/cluster.yaml --kubeconfig @config --wait 180s";
            line("cluster", create);
            line(
                "Gateway API",
                &format!("kubectl --kubeconfig @config apply --server-side -f {GATEWAY_API}"),
            );
            line("Istio", "istioctl --kubeconfig @config install -y --set profile=ambient");
            images(&mut line);
            line(
                "ztunnel leaves labelled nodes",
                "kubectl --kubeconfig @config -n istio-system patch daemonset ztunnel --patch-file deploy/one-node-first/ztunnel-patch.yaml",
            );
            let chart = format!(
                "helm --kubeconfig @config install culvert deploy/helm/culvert -n istio-system -f deploy/one-node-first/culvert-values.yaml --set image=docker.io/library/culvert:{} --set imagePullPolicy=Never",
                env!("CARGO_PKG_VERSION")
            );
            line("Culvert's chart", &chart);
            line(
                "the node's label",
                &format!("kubectl --kubeconfig @config label node {NODE} mesh-node-agent=culvert"),
            );
            line(
                "Culvert serves",
                "kubectl --kubeconfig @config -n istio-system rollout status daemonset/culvert --timeout=180s",
            );
        }
        Action::Load => {
            images(&mut line);
            line(
                "a new agent",
                "kubectl --kubeconfig @config -n istio-system rollout restart daemonset/culvert",
            );
            line(
                "Culvert serves",
                "kubectl --kubeconfig @config -n istio-system rollout status daemonset/culvert --timeout=180s",
            );
        }
        Action::Delete => {
            line("cluster", &format!("kind delete cluster --name {CLUSTER} --kubeconfig @config"));
            line("folders for pins", &format!("rm -rf {PINS}"));
        }
    }
    lines
}

fn images(line: &mut impl FnMut(&'static str, &str)) {
    line("Culvert's image", "cargo xtask image");
    line("the test application's image", "cargo xtask image --apps");
    for name in ["culvert", "culvert-app"] {
        line(
            "an image into the nodes",
            &format!("kind load image-archive @target/{name}-@arch.tar --name {CLUSTER}"),
        );
    }
}

#[cfg(test)]
mod tests;
