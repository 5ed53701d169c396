#![allow(clippy::unwrap_used)]

use super::*;

const FITTING: &str = "
kind: DaemonSet
spec:
  selector: {matchLabels: {app: ztunnel}}
  template:
    metadata: {labels: {app: ztunnel, further: label}}
    spec:
      containers:
        - image: culvert:1
          env: [{name: NODE_NAME, value: a}, {name: XDS_HEADER_X, value: b}]
          readinessProbe: {httpGet: {path: /healthz/ready, port: 15021}}
          securityContext:
            readOnlyRootFilesystem: true
            capabilities: {drop: [ALL], add: [NET_ADMIN]}
";

fn known() -> BTreeSet<String> {
    ["NODE_NAME", "XDS_HEADER_"].map(str::to_owned).into()
}

fn rules(text: &str) -> Vec<String> {
    manifest("a.yaml", text, &known()).into_iter().map(|violation| violation.rule).collect()
}

#[test]
fn a_fitting_manifest_passes() {
    assert_eq!(rules(FITTING), [""; 0]);
}

#[test]
fn each_fault_is_named() {
    for (good, bad, told) in [
        ("name: NODE_NAME", "name: NODE", "the agent knows no variable NODE"),
        ("15021", "15020", "the agent tells its readiness at port 15021, /healthz/ready"),
        ("[NET_ADMIN]", "[SYS_PTRACE]", "the agent needs no capability SYS_PTRACE"),
        ("drop: [ALL], ", "", "the container keeps capabilities that it is not given: drop ALL"),
        (
            "readOnlyRootFilesystem: true",
            "privileged: false",
            "the agent writes nothing to its own file system: readOnlyRootFilesystem",
        ),
        (
            "labels: {app: ztunnel",
            "labels: {app: other",
            "the selector does not select the pods of the template",
        ),
        ("containers:", "hostPID: true\n      containers:", "the agent needs no hostPID"),
    ] {
        let rules = rules(&FITTING.replace(good, bad));
        assert!(rules.iter().any(|rule| rule == told), "{bad}: {rules:?}");
    }
}

#[test]
fn a_patch_need_not_state_what_stays() {
    let patch = "
kind: DaemonSet
spec:
  template:
    spec:
      containers:
        - name: istio-proxy
          env: [{name: NODE_NAME, value: a}]
";
    assert_eq!(rules(patch), [""; 0]);
}

#[test]
fn a_kustomization_names_files_that_are_there() {
    let file = "deploy/kustomize/base/kustomization.yaml";
    let text = "{kind: Kustomization, resources: [culvert.yaml, other.yaml]}";
    let found = manifest(file, text, &known());
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].rule, "names other.yaml, which is not there");
}

#[test]
fn variables_are_found_in_the_settings_of_the_agent_only() {
    let source =
        |path: &str, text: &str| Source::parse(Path::new(path), text.to_owned()).unwrap().unwrap();
    let sources = [
        source("agent/src/config/a.rs", "fn a() { f(\"A_NAME\", \"text\", \"A_PREFIX_\"); }"),
        source("agent/src/cli.rs", "fn a() { f(\"NOT_THIS\"); }"),
    ];
    assert_eq!(variables(&sources), ["A_NAME", "A_PREFIX_"].map(str::to_owned).into());
}

#[test]
fn a_setting_that_the_document_leaves_out_is_named() {
    let found = documented(&known(), "| `NODE_NAME` | | the node |");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].rule, "says nothing of the setting XDS_HEADER_");
}

#[test]
fn a_template_names_no_variable_that_the_agent_does_not_know() {
    let text = "{{ dict \"NODE_NAME\" 1 }}\n{{ dict \"NO_DE\" 1 }}";
    let found = template("t", text, &known());
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].line, found[0].rule.as_str()), (2, "the agent knows no variable NO_DE"));
}

#[test]
fn a_value_without_a_schema_is_named() {
    let schema = "{properties: {culvert: {properties: {a: {}}}}}";
    assert_eq!(values_and_schema("culvert: {a: 1}", schema).unwrap(), []);
    assert_eq!(values_and_schema("culvert: {a: 1, b: 2}", schema).unwrap().len(), 1);
    assert_eq!(values_and_schema("culvert: {}", schema).unwrap().len(), 1);
}
