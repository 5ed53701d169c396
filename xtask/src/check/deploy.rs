//! What is deployed fits the agent: variables it knows, its probe, no privilege beyond the few.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_yaml_ng::Value;
use syn::visit::{self, Visit};

use super::Violation;
use super::source::Source;

/// What a container may be given beside nothing. docs/deploy.md says what for.
const CAPABILITIES: [&str; 4] = ["NET_ADMIN", "SYS_ADMIN", "BPF", "PERFMON"];
/// A value of the chart that is named like a variable and decides on a volume.
const OF_THE_CHART: &str = "ENABLE_CLUSTER_TRUST_BUNDLE_API";
const DOCUMENT: &str = "docs/deploy.md";
const CHART: &str = "deploy/helm/culvert";

pub fn check(root: &Path, sources: &[Source]) -> Result<Vec<Violation>> {
    let known = variables(sources);
    let mut violations = documented(&known, &read(root, DOCUMENT)?);
    for file in manifests(root)? {
        violations.extend(manifest(&file, &read(root, &file)?, &known));
    }
    for file in ["templates/_culvert.tpl", "templates/daemonset.yaml"] {
        let file = format!("{CHART}/{file}");
        violations.extend(template(&file, &read(root, &file)?, &known));
    }
    let values = read(root, &format!("{CHART}/values.yaml"))?;
    let schema = read(root, &format!("{CHART}/values.schema.json"))?;
    violations.extend(values_and_schema(&values, &schema)?);
    violations.extend(version(&read(root, &format!("{CHART}/Chart.yaml"))?)?);
    Ok(violations)
}

fn read(root: &Path, file: &str) -> Result<String> {
    fs::read_to_string(root.join(file)).with_context(|| format!("reading {file}"))
}

fn broken(file: &str, line: usize, rule: String) -> Violation {
    Violation { file: PathBuf::from(file), line, rule }
}

/// The names of variables, and beginnings of names, that the agent's settings are made from.
fn variables(sources: &[Source]) -> BTreeSet<String> {
    let mut found = Names(BTreeSet::new());
    let config = |source: &&Source| {
        source.package == "agent"
            && !source.tests
            && source
                .module
                .as_ref()
                .and_then(|module| module.first())
                .is_some_and(|m| m == "config")
    };
    sources.iter().filter(config).for_each(|source| found.visit_file(&source.parsed));
    found.0
}

struct Names(BTreeSet<String>);

impl<'ast> Visit<'ast> for Names {
    fn visit_lit_str(&mut self, literal: &'ast syn::LitStr) {
        if is_variable(&literal.value()) {
            self.0.insert(literal.value());
        }
    }

    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !super::source::is_test(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }
}

fn is_variable(text: &str) -> bool {
    text.len() > 3
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

fn is_known(name: &str, known: &BTreeSet<String>) -> bool {
    let begins = |prefix: &String| prefix.ends_with('_') && name.starts_with(prefix.as_str());
    known.contains(name) || known.iter().any(begins)
}

fn documented(known: &BTreeSet<String>, text: &str) -> Vec<Violation> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let words: BTreeSet<&str> = text.split(word).collect();
    // A beginning may be written with or without its last underscore.
    let told = |name: &str| words.contains(name) || words.contains(format!("{name}_").as_str());
    let missing = known.iter().filter(|name| !told(name));
    missing.map(|name| broken(DOCUMENT, 1, format!("says nothing of the setting {name}"))).collect()
}

/// The files for kubectl, wherever below `deploy/` they are.
fn manifests(root: &Path) -> Result<Vec<String>> {
    let mut found = vec!["deploy/detach.yaml".to_owned()];
    let mut folders = vec!["deploy/kustomize".to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(root.join(&folder)).with_context(|| folder.clone())? {
            let entry = entry?;
            let path = format!("{folder}/{}", entry.file_name().to_string_lossy());
            if entry.file_type()?.is_dir() {
                folders.push(path);
            } else if path.ends_with(".yaml") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

fn manifest(file: &str, text: &str, known: &BTreeSet<String>) -> Vec<Violation> {
    let mut violations = Vec::new();
    for document in serde_yaml_ng::Deserializer::from_str(text) {
        let mut rule = |rule: String| violations.push(broken(file, 1, rule));
        match Value::deserialize(document) {
            Err(error) => rule(format!("is not YAML: {error}")),
            Ok(object) if object["kind"] == "Kustomization" => {
                files_exist(file, &object, &mut rule)
            }
            Ok(object) => workload(&object, known, &mut rule),
        }
    }
    violations
}

fn files_exist(file: &str, object: &Value, rule: &mut impl FnMut(String)) {
    let folder = crate::shell::root().join(file);
    let folder = folder.parent().unwrap_or(Path::new("."));
    let resources = list(&object["resources"]).iter().filter_map(Value::as_str);
    let patches = list(&object["patches"]).iter().filter_map(|patch| patch["path"].as_str());
    for name in resources.chain(patches).filter(|name| !folder.join(name).exists()) {
        rule(format!("names {name}, which is not there"));
    }
}

fn workload(object: &Value, known: &BTreeSet<String>, rule: &mut impl FnMut(String)) {
    let template = &object["spec"]["template"];
    let labels = &template["metadata"]["labels"];
    if let Some(selector) = object["spec"]["selector"]["matchLabels"].as_mapping() {
        if selector.iter().any(|(name, value)| labels.get(name) != Some(value)) {
            rule("the selector does not select the pods of the template".to_owned());
        }
        if labels["app"] != "ztunnel" {
            rule("istioctl and istio-cni find the agent by the label app: ztunnel".to_owned());
        }
    }
    let pod = &template["spec"];
    for shared in ["hostNetwork", "hostPID", "hostIPC"] {
        if pod[shared] == true {
            rule(format!("the agent needs no {shared}"));
        }
    }
    for container in list(&pod["containers"]) {
        // What is patched states only what changes.
        let whole = !container["image"].is_null();
        privileges(&container["securityContext"], whole, rule);
        let probe = &container["readinessProbe"]["httpGet"];
        if whole
            && object["kind"] == "DaemonSet"
            && (probe["port"] != 15021 || probe["path"] != "/healthz/ready")
        {
            rule("the agent tells its readiness at port 15021, /healthz/ready".to_owned());
        }
        for variable in list(&container["env"]) {
            let name = variable["name"].as_str().unwrap_or_default();
            if !is_known(name, known) {
                rule(format!("the agent knows no variable {name}"));
            }
        }
    }
}

fn privileges(context: &Value, whole: bool, rule: &mut impl FnMut(String)) {
    let added = list(&context["capabilities"]["add"]);
    for capability in added.iter().filter_map(Value::as_str) {
        if !CAPABILITIES.contains(&capability) {
            rule(format!("the agent needs no capability {capability}"));
        }
    }
    let drops_all = list(&context["capabilities"]["drop"]).iter().any(|dropped| dropped == "ALL");
    if whole && !drops_all {
        rule("the container keeps capabilities that it is not given: drop ALL".to_owned());
    }
    if context["privileged"] == true {
        rule("the agent need not be privileged".to_owned());
    }
    if whole && context["readOnlyRootFilesystem"] != true {
        rule("the agent writes nothing to its own file system: readOnlyRootFilesystem".to_owned());
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_sequence().map(Vec::as_slice).unwrap_or_default()
}

/// What stands in quotes in a template and looks like a variable.
fn template(file: &str, text: &str, known: &BTreeSet<String>) -> Vec<Violation> {
    let mut violations = Vec::new();
    for (index, line) in text.lines().enumerate() {
        for quoted in line.split('"').skip(1).step_by(2) {
            if is_variable(quoted) && quoted != OF_THE_CHART && !is_known(quoted, known) {
                let rule = format!("the agent knows no variable {quoted}");
                violations.push(broken(file, index + 1, rule));
            }
        }
    }
    violations
}

/// Culvert's own values are the same in both.
fn values_and_schema(values: &str, schema: &str) -> Result<Vec<Violation>> {
    let values: Value = serde_yaml_ng::from_str(values).context("values.yaml")?;
    let schema: Value = serde_yaml_ng::from_str(schema).context("values.schema.json")?;
    let keys = |value: &Value| -> BTreeSet<String> {
        let keys = value.as_mapping().into_iter().flatten();
        keys.filter_map(|(key, _)| key.as_str().map(str::to_owned)).collect()
    };
    let culvert = &schema["properties"]["culvert"]["properties"];
    let mut violations = Vec::new();
    for (own, allowed, within) in [
        (&values["culvert"], culvert, "culvert"),
        (&values["culvert"]["xdsCache"], &culvert["xdsCache"]["properties"], "culvert.xdsCache"),
        (
            &values["culvert"]["podMonitor"],
            &culvert["podMonitor"]["properties"],
            "culvert.podMonitor",
        ),
    ] {
        for key in keys(own).symmetric_difference(&keys(allowed)) {
            let rule =
                format!("{within}.{key} is in one of values.yaml and values.schema.json only");
            violations.push(broken(&format!("{CHART}/values.yaml"), 1, rule));
        }
    }
    Ok(violations)
}

fn version(chart: &str) -> Result<Vec<Violation>> {
    let chart: Value = serde_yaml_ng::from_str(chart).context("Chart.yaml")?;
    let ours = env!("CARGO_PKG_VERSION");
    let other = ["version", "appVersion"].into_iter().filter(|key| chart[*key] != ours);
    let rule = |key| format!("{key} is not that of the workspace, {ours}");
    Ok(other.map(|key| broken(&format!("{CHART}/Chart.yaml"), 1, rule(key))).collect())
}

#[cfg(test)]
mod tests;
