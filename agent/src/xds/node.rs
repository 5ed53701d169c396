//! How the agent describes itself to the control plane.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use culvert_proto::envoy::config::core::v3::Node;
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};

use super::NodeFacts;
use crate::config::XdsSettings;

/// Stands for an address that is not known; istiod refuses an id without one.
const UNKNOWN_IP: IpAddr = IpAddr::V4(Ipv4Addr::new(1, 1, 1, 1));

/// The id has four parts, the first of which istiod knows node agents by. Its domain is always
/// `cluster.local`, as peers write it.
pub(super) fn describe(settings: &XdsSettings, facts: &NodeFacts) -> Node {
    let pod = &facts.pod;
    let (name, namespace) = (&pod.name, &pod.namespace);
    let ip = pod.ip.unwrap_or(UNKNOWN_IP);
    let given = settings.metadata.iter().map(|(key, value)| (key.clone(), wire(value)));
    let mut fields: BTreeMap<String, Value> = given.collect();
    for (key, text) in [
        ("NAME", name.to_string()),
        ("NAMESPACE", namespace.to_string()),
        ("INSTANCE_IPS", ip.to_string()),
        ("NODE_NAME", facts.node.to_string()),
    ] {
        fields.insert(key.to_owned(), value(Kind::StringValue(text)));
    }
    Node {
        id: format!("ztunnel~{ip}~{name}.{namespace}~{namespace}.svc.cluster.local"),
        metadata: Some(Struct { fields }),
    }
}

fn value(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn wire(json: &serde_json::Value) -> Value {
    value(match json {
        serde_json::Value::Null => Kind::NullValue(0),
        serde_json::Value::Bool(value) => Kind::BoolValue(*value),
        serde_json::Value::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or_default()),
        serde_json::Value::String(text) => Kind::StringValue(text.clone()),
        serde_json::Value::Array(list) => {
            Kind::ListValue(ListValue { values: list.iter().map(wire).collect() })
        }
        serde_json::Value::Object(map) => {
            let fields = map.iter().map(|(key, value)| (key.clone(), wire(value)));
            Kind::StructValue(Struct { fields: fields.collect() })
        }
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;
    use crate::config::{AgentPod, ControlPlane, Roots};

    #[test]
    fn the_id_and_the_metadata_are_those_of_a_node_agent() {
        let control = ControlPlane {
            addresses: Vec::new(),
            roots: Roots::System,
            alt_hostname: None,
            token: None,
            headers: Vec::new(),
            cluster_id: "c1".into(),
        };
        let metadata = vec![
            ("CLUSTER_ID".to_owned(), json!("c1")),
            ("NAME".to_owned(), json!("not mine")),
            ("LABELS".to_owned(), json!({"a": [1, true, null]})),
        ];
        let settings = XdsSettings { control, on_demand: false, metadata, kept: None };
        let pod = AgentPod {
            name: "agent-1".into(),
            namespace: "istio-system".into(),
            service_account: "ztunnel".into(),
            ip: None,
        };
        let facts = NodeFacts { pod: pod.clone(), node: "n1".into() };
        let node = describe(&settings, &facts);
        assert_eq!(node.id, "ztunnel~1.1.1.1~agent-1.istio-system~istio-system.svc.cluster.local");
        let fields = node.metadata.unwrap().fields;
        for (key, json) in [
            ("NAME", json!("agent-1")),
            ("NAMESPACE", json!("istio-system")),
            ("INSTANCE_IPS", json!("1.1.1.1")),
            ("NODE_NAME", json!("n1")),
            ("CLUSTER_ID", json!("c1")),
            ("LABELS", json!({"a": [1, true, null]})),
        ] {
            assert_eq!(fields[key], wire(&json), "{key}");
        }
        let pod = AgentPod { ip: Some("fd00::7".parse().unwrap()), ..pod };
        let node = describe(&settings, &NodeFacts { pod, node: "n1".into() });
        assert!(node.id.starts_with("ztunnel~fd00::7~"), "{}", node.id);
    }
}
