//! Nodes with the peer's agents, for `cargo xtask bench`: tells where their pods and agents are, and
//! takes them away when its standard input ends.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "it talks with the benchmark through its output")]

use std::io;
use std::path::PathBuf;

use anyhow::{Context, Result};
use culvert_lab::lab::Pod;
use culvert_lab::mesh::Mesh;
use culvert_lab::process::Process;
use culvert_tests::cluster::Cluster;
use serde_json::{Map, Value, json};

/// Arguments: the peer's program, and each node with its pods, such as `a=client,server`. They have
/// the namespace `bench`, and service accounts of their own names.
fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let program = PathBuf::from(arguments.next().context("no program of the peer")?);
    let mut mesh = Mesh::new();
    for node in arguments {
        let (name, pods) = node.split_once('=').with_context(|| format!("no pods in {node:?}"))?;
        mesh = mesh.node(name);
        for pod in pods.split(',') {
            mesh = mesh.pod(pod, "bench", pod);
        }
    }
    let (mesh, cluster) = Cluster::start(mesh, true)?;
    let started = mesh.node_names().map(|node| cluster.ztunnel(&mesh, node, &program));
    let agents: Vec<Process> = started.collect::<Result<_>>()?;
    let pods = mesh.description().pods.iter().map(|spec| mesh.pod(&spec.name));
    let told = json!({
        "agents": agents.iter().map(agent).collect::<Vec<_>>(),
        "pods": pods.map(|it| (it.name().to_owned(), pod(it))).collect::<Map<_, _>>(),
    });
    println!("{told}");
    io::copy(&mut io::stdin(), &mut io::sink()).context("waiting for the end")?;
    Ok(())
}

fn agent(process: &Process) -> Value {
    json!({ "pid": process.pid(), "log": process.log_path() })
}

fn pod(pod: &Pod) -> Value {
    let place = pod.place();
    json!({ "netns": place.netns().name(), "cgroup": place.cgroup(), "address": pod.v4() })
}
