//! The cluster, as far as `kubectl` reaches.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A program and the cluster that it talks to.
#[derive(Clone, Debug)]
pub struct Kubectl {
    program: PathBuf,
    config: Option<PathBuf>,
}

impl Kubectl {
    pub fn new(program: PathBuf, config: Option<PathBuf>) -> Self {
        Self { program, config }
    }

    /// The file with the cluster's address and credentials, if one was named.
    pub fn config(&self) -> Option<&PathBuf> {
        self.config.as_ref()
    }

    pub fn command<S: AsRef<str>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(config) = &self.config {
            command.arg("--kubeconfig").arg(config);
        }
        command.args(arguments.iter().map(AsRef::as_ref));
        command
    }

    /// Runs it, and gives what it prints.
    pub fn run<S: AsRef<str>>(&self, arguments: &[S]) -> Result<String> {
        self.with_input(arguments, None)
    }

    /// What it prints as JSON.
    pub fn json<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Value> {
        let mut all: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
        all.extend(["-o", "json"]);
        let text = self.run(&all)?;
        serde_json::from_str(&text).with_context(|| format!("reading what {} printed", line(&all)))
    }

    /// The list of objects that it prints.
    pub fn items<S: AsRef<str>>(&self, arguments: &[S]) -> Result<Vec<Value>> {
        let list = self.json(arguments)?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    /// Makes objects, or changes them.
    pub fn apply(&self, objects: &[Value]) -> Result<()> {
        let list = json!({ "apiVersion": "v1", "kind": "List", "items": objects }).to_string();
        self.with_input(&["apply", "--server-side", "--force-conflicts", "-f", "-"], Some(&list))
            .map(drop)
    }

    /// Runs a program in a pod. It may run twice, so that doing so must change nothing.
    pub fn exec(&self, namespace: &str, pod: &str, command: &[&str]) -> Result<String> {
        let line = [&["exec", "-n", namespace, pod, "--"], command].concat();
        match self.run(&line) {
            // On a busy machine kubectl sometimes gets a program's output before it expects any, and
            // throws it away.
            Err(error) if error.to_string().contains("Unknown stream id") => self.run(&line),
            done => done,
        }
    }

    fn with_input<S: AsRef<str>>(&self, arguments: &[S], input: Option<&str>) -> Result<String> {
        let shown = line(arguments);
        let mut command = self.command(arguments);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child =
            command.spawn().with_context(|| format!("starting {}", self.program.display()))?;
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(text.as_bytes()).context("writing to kubectl")?;
        }
        let output = child.wait_with_output().context("waiting for kubectl")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("`{shown}` ended with {}: {}", output.status, said.trim());
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// A command line as it is told: long arguments are cut.
fn line<S: AsRef<str>>(arguments: &[S]) -> String {
    let words = arguments.iter().map(|word| {
        let word = word.as_ref();
        if word.len() <= 200 { word.to_owned() } else { format!("{}…", head(word, 200)) }
    });
    std::iter::once("kubectl".to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}

/// The beginning of a text, at most `length` bytes of it.
pub fn head(text: &str, length: usize) -> &str {
    let end = (0..=length.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text.get(..end.unwrap_or(0)).unwrap_or_default()
}
