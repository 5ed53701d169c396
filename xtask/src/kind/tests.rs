use std::fs;

use super::*;

fn told(action: Action) -> Vec<String> {
    lines(action, Path::new("/t"), "amd64").iter().map(|line| line.words.join(" ")).collect()
}

#[test]
fn a_cluster_is_made_before_anything_goes_into_it() {
    let lines = told(Action::Create);
    let place = |text: &str| lines.iter().position(|line| line.starts_with(text));
    let order = [
        place("mkdir -p /sys/fs/bpf/culvert-kind/worker "),
        place(
            "kind create cluster --config deploy/kind/cluster.yaml --kubeconfig /t/kind/kubeconfig",
        ),
        place("istioctl --kubeconfig /t/kind/kubeconfig install"),
        place("cargo xtask image"),
        place("kind load image-archive /t/culvert-amd64.tar --name culvert"),
        place("kubectl --kubeconfig /t/kind/kubeconfig -n istio-system patch daemonset ztunnel"),
        place("helm --kubeconfig /t/kind/kubeconfig install culvert deploy/helm/culvert"),
        place("kubectl --kubeconfig /t/kind/kubeconfig label node culvert-worker2"),
        place(
            "kubectl --kubeconfig /t/kind/kubeconfig -n istio-system rollout status daemonset/culvert",
        ),
    ];
    assert!(order.iter().all(Option::is_some), "{lines:#?}");
    assert!(order.is_sorted(), "{lines:#?}");
}

#[test]
fn files_that_are_named_exist() {
    for line in told(Action::Create) {
        for word in line.split_whitespace().filter(|word| word.starts_with("deploy/")) {
            assert!(shell::root().join(word).exists(), "{word}");
        }
    }
}

#[test]
fn the_cluster_is_the_one_of_its_description() {
    let text =
        fs::read_to_string(shell::root().join("deploy/kind/cluster.yaml")).unwrap_or_default();
    assert!(text.contains(&format!("name: {CLUSTER}\n")));
    assert!(text.contains(&format!("hostPath: {PINS}/worker2")));
}

#[test]
fn deleting_leaves_no_pins() {
    let lines = told(Action::Delete);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines.last().map(String::as_str), Some("rm -rf /sys/fs/bpf/culvert-kind"));
}
