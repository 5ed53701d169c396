//! The objects that scenarios make, as the API takes them.

use serde_json::{Value, json};

/// The label that all namespaces of a run carry, with the run as its value.
pub const RUN: &str = "culvert.dev/e2e";
/// The label that takes a namespace or a pod into the mesh, and out of it.
pub const MODE: &str = "istio.io/dataplane-mode";
/// The label that names the waypoint of a namespace, a service or a pod.
pub const WAYPOINT: &str = "istio.io/use-waypoint";

/// A pod of the test application.
#[derive(Clone, Debug)]
pub struct PodSpec<'a> {
    pub name: &'a str,
    pub namespace: &'a str,
    pub account: &'a str,
    pub node: &'a str,
    pub image: &'a str,
    pub labels: Value,
}

pub fn namespace(name: &str, run: &str, meshed: bool) -> Value {
    let mut labels = json!({ RUN: run });
    if meshed {
        labels[MODE] = "ambient".into();
    }
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": name, "labels": labels } })
}

pub fn account(namespace: &str, name: &str) -> Value {
    object("v1", "ServiceAccount", namespace, name, json!({}))
}

/// Any object: `body` holds what stands beside its name.
pub fn object(version: &str, kind: &str, namespace: &str, name: &str, body: Value) -> Value {
    let mut whole = json!({
        "apiVersion": version, "kind": kind, "metadata": { "namespace": namespace, "name": name },
    });
    if let (Some(whole), Value::Object(body)) = (whole.as_object_mut(), body) {
        whole.extend(body);
    }
    whole
}

/// With more labels.
pub fn labelled(mut object: Value, labels: &Value) -> Value {
    for (key, value) in labels.as_object().into_iter().flatten() {
        object["metadata"]["labels"][key] = value.clone();
    }
    object
}

pub fn pod(spec: &PodSpec<'_>) -> Value {
    let mut body = json!({ "spec": pod_body(spec, &["culvert-app", "serve", "--linger", "0", "--grace", "1"]) });
    body["spec"]["terminationGracePeriodSeconds"] = 3.into();
    let whole = object("v1", "Pod", spec.namespace, spec.name, body);
    labelled(labelled(whole, &json!({ "app": spec.name })), &spec.labels)
}

/// The inside of a pod that runs `command` of the test application's image.
pub fn pod_body(spec: &PodSpec<'_>, command: &[&str]) -> Value {
    let field = |path: &str| json!({ "fieldRef": { "fieldPath": path } });
    json!({
        "serviceAccountName": spec.account,
        "nodeSelector": { "kubernetes.io/hostname": spec.node },
        "tolerations": [{ "operator": "Exists" }],
        "containers": [{
            "name": "app", "image": spec.image, "command": command,
            "env": [
                { "name": "POD_NAME", "valueFrom": field("metadata.name") },
                { "name": "NODE_NAME", "valueFrom": field("spec.nodeName") },
            ],
            "readinessProbe": { "httpGet": { "path": "/ready", "port": 8081 }, "periodSeconds": 1 },
            "resources": { "requests": { "cpu": "5m", "memory": "16Mi" } },
        }],
    })
}

/// A Deployment of the test application: `body` as from [`pod_body`].
pub fn deployment(
    namespace: &str,
    name: &str,
    replicas: u32,
    labels: &Value,
    mut body: Value,
) -> Value {
    let mut all = json!({ "app": name });
    for (key, value) in labels.as_object().into_iter().flatten() {
        all[key] = value.clone();
    }
    if let Some(body) = body.as_object_mut() {
        body.remove("nodeSelector");
    }
    object(
        "apps/v1",
        "Deployment",
        namespace,
        name,
        json!({ "spec": {
            "replicas": replicas,
            "selector": { "matchLabels": { "app": name } },
            "strategy": { "rollingUpdate": { "maxUnavailable": 0, "maxSurge": 1 } },
            "template": { "metadata": { "labels": all }, "spec": body },
        }}),
    )
}

/// A Service of the pods with these labels, with all ports of the test application: HTTP at 80.
pub fn service(namespace: &str, name: &str, selector: Value, headless: bool) -> Value {
    let port = |name: &str, port: u16, target: u16, protocol: &str| json!({ "name": name, "port": port, "targetPort": target, "protocol": protocol });
    let mut body = json!({ "spec": {
        "selector": selector, "ipFamilyPolicy": "PreferDualStack",
        "ports": [
            port("http", 80, 8080, "TCP"), port("http-too", 8090, 8090, "TCP"),
            port("tcp-echo", 9000, 9000, "TCP"), port("tcp-banner", 9001, 9001, "TCP"),
            port("tcp-trickle", 9002, 9002, "TCP"), port("tcp-sum", 9003, 9003, "TCP"),
            port("tcp-loopback", 9009, 9009, "TCP"), port("udp", 9004, 9004, "UDP"),
        ],
    }});
    if headless {
        body["spec"]["clusterIP"] = "None".into();
    }
    object("v1", "Service", namespace, name, body)
}

/// A PeerAuthentication; `selector` may be null, `ports` maps port numbers to modes.
pub fn peer_authentication(
    namespace: &str,
    name: &str,
    selector: Value,
    mode: &str,
    ports: Value,
) -> Value {
    let mut spec = json!({ "mtls": { "mode": mode } });
    if !selector.is_null() {
        spec["selector"] = json!({ "matchLabels": selector });
    }
    for (port, mode) in ports.as_object().into_iter().flatten() {
        spec["portLevelMtls"][port] = json!({ "mode": mode });
    }
    object("security.istio.io/v1", "PeerAuthentication", namespace, name, json!({ "spec": spec }))
}

/// An AuthorizationPolicy; `spec` holds selector or targetRefs, action and rules.
pub fn policy(namespace: &str, name: &str, spec: Value) -> Value {
    object("security.istio.io/v1", "AuthorizationPolicy", namespace, name, json!({ "spec": spec }))
}

/// A waypoint for `traffic`: `service`, `workload` or `all`.
pub fn waypoint(namespace: &str, name: &str, traffic: &str) -> Value {
    let gateway = object(
        "gateway.networking.k8s.io/v1",
        "Gateway",
        namespace,
        name,
        json!({ "spec": {
            "gatewayClassName": "istio-waypoint",
            "listeners": [{ "name": "mesh", "port": 15008, "protocol": "HBONE" }],
        }}),
    );
    labelled(gateway, &json!({ "istio.io/waypoint-for": traffic }))
}

pub fn service_entry(namespace: &str, name: &str, spec: Value) -> Value {
    object("networking.istio.io/v1", "ServiceEntry", namespace, name, json!({ "spec": spec }))
}
