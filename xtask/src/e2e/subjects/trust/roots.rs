//! The mesh moves from its root to a new one, and back: first both are trusted, then the other
//! signs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::super::control::{endure, none_lost};
use super::super::disturb::Loads;
use super::with_life;
use crate::e2e::scenario::Verdict;
use crate::e2e::town::Town;
use crate::shell;

/// The life of certificates meanwhile: long enough that nobody is left with an expired one while
/// the kubelets bring the new roots to the agents' volumes.
const LIFE: u64 = 180;
/// How long kubelets may take to bring a changed ConfigMap to running pods.
const KUBELET: Duration = Duration::from_secs(100);

pub fn run(town: &Town) -> Result<Verdict> {
    if !town.options.mesh_wide {
        return Verdict::skipped("changes the whole mesh: ask for it with --mesh-wide");
    }
    let namespace = town.agents.namespace.clone();
    if town.kubectl.json(&["get", "secret", "cacerts", "-n", &namespace]).is_ok() {
        return Verdict::skipped("the mesh has a CA of its owner's (secret cacerts)");
    }
    let Some(openssl) = shell::find("openssl") else {
        return Verdict::skipped("openssl is not on the path");
    };
    let folder = shell::target().join("e2e").join(&town.run).join("roots");
    fs::create_dir_all(&folder).context("making a folder for the new root")?;
    let authorities = [present(town)?, made(&openssl, &folder)?];
    let note = with_life(town, LIFE, || {
        super::super::calm(town)?;
        let loads = Loads::start(town)?;
        let step = town.undo.remember(&[
            "delete",
            "secret",
            "cacerts",
            "-n",
            &namespace,
            "--ignore-not-found",
        ]);
        let moved = move_there_and_back(town, &openssl, &authorities, &loads);
        town.undo.now(step)?;
        restart_istiod(town)?;
        moved?;
        endure(&loads, Duration::from_secs(LIFE))?;
        none_lost(loads)
    })?;
    Verdict::passed(note)
}

fn move_there_and_back(
    town: &Town,
    openssl: &Path,
    [old, new]: &[Authority; 2],
    loads: &Loads<'_>,
) -> Result<()> {
    for signer in [old, new, old] {
        install(town, signer, &[old, new])?;
        restart_istiod(town)?;
        endure(loads, KUBELET)?;
        for node in [0, 1] {
            town.until("certificates of the other root", || {
                endure(loads, Duration::from_secs(5))?;
                signed_by(town, openssl, node, signer)
            })?;
        }
    }
    Ok(())
}

/// A certificate and key that sign, in PEM.
struct Authority {
    certificate: String,
    key: String,
}

/// The one that istiod made for itself.
fn present(town: &Town) -> Result<Authority> {
    let secret = ["get", "secret", "istio-ca-secret", "-n", &town.agents.namespace];
    let part = |name: &str| -> Result<String> {
        let template = format!("go-template={{{{index .data \"{name}\" | base64decode}}}}");
        town.kubectl.run(&[&secret[..], &["-o", &template]].concat())
    };
    Ok(Authority { certificate: part("ca-cert.pem")?, key: part("ca-key.pem")? })
}

fn made(openssl: &Path, folder: &Path) -> Result<Authority> {
    let (key, certificate): (PathBuf, PathBuf) = (folder.join("key.pem"), folder.join("cert.pem"));
    let mut command = Command::new(openssl);
    command.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "30", "-sha256"]);
    command
        .args(["-subj", "/O=culvert e2e/CN=another root", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    command.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign"]);
    shell::quietly(&mut command)?;
    let read = |file: &Path| {
        fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))
    };
    Ok(Authority { certificate: read(&certificate)?, key: read(&key)? })
}

/// Has istiod sign with one authority, while all are trusted.
fn install(town: &Town, signer: &Authority, trusted: &[&Authority]) -> Result<()> {
    let roots: Vec<&str> = trusted.iter().map(|authority| authority.certificate.trim()).collect();
    town.kubectl.apply(&[json!({
        "apiVersion": "v1", "kind": "Secret", "type": "Opaque",
        "metadata": { "name": "cacerts", "namespace": town.agents.namespace },
        "stringData": {
            "ca-cert.pem": signer.certificate, "ca-key.pem": signer.key,
            "cert-chain.pem": signer.certificate, "root-cert.pem": format!("{}\n", roots.join("\n")),
        },
    })])
}

fn restart_istiod(town: &Town) -> Result<()> {
    let namespace = town.agents.namespace.clone();
    let sets = town.kubectl.items(&["get", "deployments", "-n", &namespace, "-l", "app=istiod"])?;
    let name = sets
        .first()
        .and_then(|set| set["metadata"]["name"].as_str())
        .context("istiod has no Deployment")?;
    let name = format!("deployment/{name}");
    town.kubectl.run(&["rollout", "restart", &name, "-n", &namespace])?;
    town.kubectl.run(&["rollout", "status", &name, "-n", &namespace, "--timeout=180s"]).map(drop)
}

/// Requires that every certificate of the test's pods on a node comes from `signer`.
fn signed_by(town: &Town, openssl: &Path, node: usize, signer: &Authority) -> Result<()> {
    let wanted = key_id(openssl, &signer.certificate)?;
    let dump = town.agents.dump(&town.agent(node)?)?;
    let ours = |certificate: &&Value| {
        certificate["identity"].as_str().is_some_and(|identity| identity.contains(&town.mesh()))
    };
    let certificates: Vec<&Value> =
        dump["certificates"].as_array().into_iter().flatten().filter(ours).collect();
    ensure!(!certificates.is_empty(), "node {node} holds no certificate of the test's pods");
    for certificate in certificates {
        let identity = &certificate["identity"];
        let leaf = certificate["certChain"][0]["pem"].as_str().context("no leaf")?;
        let leaf = feed(openssl, &["base64", "-d", "-A"], leaf)?;
        let issuer = feed(openssl, &["x509", "-noout", "-issuer"], &leaf)?;
        ensure!(issuer == wanted, "{identity} on node {node} is of {}", issuer.trim());
        let roots = certificate["rootCerts"].as_array().map_or(0, Vec::len);
        ensure!(roots >= 2, "{identity} on node {node} trusts {roots} root");
    }
    Ok(())
}

/// An authority's own name, as its certificates name their issuer.
fn key_id(openssl: &Path, certificate: &str) -> Result<String> {
    Ok(feed(openssl, &["x509", "-noout", "-subject"], certificate)?
        .replacen("subject", "issuer", 1))
}

fn feed(openssl: &Path, arguments: &[&str], input: &str) -> Result<String> {
    use std::io::Write as _;
    let mut command = Command::new(openssl);
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().context("starting openssl")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).context("writing to openssl")?;
    }
    let output = child.wait_with_output().context("waiting for openssl")?;
    ensure!(output.status.success(), "openssl {} failed", arguments.join(" "));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
