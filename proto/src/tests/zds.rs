//! Bytes of the zds messages, written by hand from the protocol's numbers.

use super::wire::{assert_wire, hex};
use crate::istio::workload::zds::*;
use prost::Message;

fn request(payload: workload_request::Payload) -> WorkloadRequest {
    WorkloadRequest { payload: Some(payload) }
}

fn answer(error: &str) -> WorkloadResponse {
    let ack = Ack { error: error.to_owned() };
    WorkloadResponse { payload: Some(workload_response::Payload::Ack(ack)) }
}

#[test]
fn hello_names_version_one() {
    assert_wire(ZdsHello { version: Version::V1.into() }, hex("08 01"));
    assert_eq!(Version::try_from(0), Ok(Version::NotUsed));
}

#[test]
fn success_is_an_empty_acknowledgement() {
    assert_wire(answer(""), hex("0a 00"));
}

#[test]
fn failure_carries_its_reason() {
    assert_wire(answer("x"), hex("0a 03 0a 01 78"));
}

#[test]
fn end_of_the_snapshot_is_request_three() {
    assert_wire(request(workload_request::Payload::SnapshotSent(SnapshotSent {})), hex("1a 00"));
}

#[test]
fn removal_has_its_uid_in_field_two() {
    let del = DelWorkload { uid: "u".to_owned() };
    assert_wire(request(workload_request::Payload::Del(del)), hex("12 03 12 01 75"));
}

#[test]
fn keep_is_request_five() {
    let keep = KeepWorkload { uid: "u".to_owned() };
    assert_wire(request(workload_request::Payload::Keep(keep)), hex("2a 03 0a 01 75"));
}

#[test]
fn addition_names_the_workload() {
    let workload_info = WorkloadInfo {
        name: "n".to_owned(),
        namespace: "s".to_owned(),
        service_account: "a".to_owned(),
    };
    let add = AddWorkload { uid: "u".to_owned(), workload_info: Some(workload_info) };
    assert_wire(
        request(workload_request::Payload::Add(add)),
        hex("0a 0e 0a 01 75 12 09 0a 01 6e 12 01 73 1a 01 61"),
    );
}

#[test]
fn former_trust_domain_of_a_workload_is_ignored() {
    let info = WorkloadInfo::decode(hex("0a 01 6e 22 01 74").as_slice()).unwrap();
    assert_eq!(info, WorkloadInfo { name: "n".to_owned(), ..WorkloadInfo::default() });
}

#[test]
fn unused_request_number_has_no_payload() {
    // A reader must be able to tell "nothing that I know" from every request it knows.
    assert_eq!(WorkloadRequest::decode(hex("22 00").as_slice()).unwrap().payload, None);
    assert_eq!(WorkloadRequest::decode(&[][..]).unwrap().payload, None);
}
