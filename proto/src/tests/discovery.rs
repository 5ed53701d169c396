//! Bytes of the discovery messages, written by hand from the protocol's numbers.

use std::collections::BTreeMap;

use super::wire::{any, assert_wire, block, number};
use crate::envoy::config::core::v3::Node;
use crate::envoy::service::discovery::v3::aggregated_discovery_service_server::SERVICE_NAME;
use crate::envoy::service::discovery::v3::*;
use crate::google::rpc::Status;

#[test]
fn every_field_of_a_request_has_its_number() {
    let name =
        prost_types::Value { kind: Some(prost_types::value::Kind::StringValue("pod".to_owned())) };
    let metadata = prost_types::Struct { fields: BTreeMap::from([("NAME".to_owned(), name)]) };
    let detail = prost_types::Any { type_url: "t".to_owned(), value: vec![9] };
    let request = DeltaDiscoveryRequest {
        node: Some(Node { id: "ztunnel~1.1.1.1~p.n~d".to_owned(), metadata: Some(metadata) }),
        type_url: "t".to_owned(),
        resource_names_subscribe: vec!["*".to_owned()],
        resource_names_unsubscribe: vec!["*".to_owned(), "a".to_owned()],
        initial_resource_versions: BTreeMap::from([("n".to_owned(), "v".to_owned())]),
        response_nonce: "7".to_owned(),
        error_detail: Some(Status { code: 3, message: "m".to_owned(), details: vec![detail] }),
    };
    // google.protobuf.Struct: a map in field 1; a string is field 3 of Value.
    let metadata = block(1, [block(1, "NAME"), block(2, block(3, "pod"))].concat());
    let wire = [
        block(1, [block(1, "ztunnel~1.1.1.1~p.n~d"), block(3, metadata)].concat()),
        block(2, "t"),
        block(3, "*"),
        block(4, "*"),
        block(4, "a"),
        block(5, [block(1, "n"), block(2, "v")].concat()),
        block(6, "7"),
        block(7, [number(1, 3), block(2, "m"), block(3, any("t", &[9]))].concat()),
    ];
    assert_wire(request, wire.concat());
}

#[test]
fn every_field_of_a_response_has_its_number() {
    let resource = Resource {
        name: "n/h".to_owned(),
        aliases: vec!["/10.96.0.10".to_owned()],
        version: "v".to_owned(),
        resource: Some(prost_types::Any { type_url: "t".to_owned(), value: vec![1] }),
    };
    let response = DeltaDiscoveryResponse {
        system_version_info: "s".to_owned(),
        resources: vec![resource],
        type_url: "t".to_owned(),
        nonce: "7".to_owned(),
        removed_resources: vec!["gone".to_owned()],
    };
    let resource =
        [block(1, "v"), block(2, any("t", &[1])), block(3, "n/h"), block(4, "/10.96.0.10")]
            .concat();
    let wire = [block(1, "s"), block(2, resource), block(4, "t"), block(5, "7"), block(6, "gone")];
    assert_wire(response, wire.concat());
}

#[test]
fn stream_has_the_name_that_control_planes_serve() {
    assert_eq!(SERVICE_NAME, "envoy.service.discovery.v3.AggregatedDiscoveryService");
}
