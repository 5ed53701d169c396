//! What newer peers may send, and what no honest peer sends.

use super::wire::{block, number};
use crate::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DeltaDiscoveryResponse};
use crate::istio::security::Authorization;
use crate::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use crate::istio::workload::zds::{WorkloadRequest, WorkloadResponse, ZdsHello};
use crate::istio::workload::{Address, Service, Workload};
use proptest::prelude::*;
use prost::Message;

/// Fields of every wire type under numbers that no message of ours uses.
fn fields_of_tomorrow() -> Vec<u8> {
    let group = [vec![0xfb, 0x3e], number(1, 1), vec![0xfc, 0x3e]].concat();
    let eight_bytes = [vec![0xf1, 0x3e], vec![1; 8]].concat();
    let four_bytes = [vec![0xf5, 0x3e], vec![1; 4]].concat();
    [number(1005, 3), block(1006, "new"), group, eight_bytes, four_bytes].concat()
}

fn assert_tolerates<M: Message + Default + PartialEq + std::fmt::Debug>() {
    assert_eq!(M::decode(fields_of_tomorrow().as_slice()).unwrap(), M::default());
}

#[test]
fn unknown_fields_are_passed_over() {
    assert_tolerates::<Address>();
    assert_tolerates::<Workload>();
    assert_tolerates::<Service>();
    assert_tolerates::<Authorization>();
    assert_tolerates::<DeltaDiscoveryRequest>();
    assert_tolerates::<DeltaDiscoveryResponse>();
    assert_tolerates::<IstioCertificateRequest>();
    assert_tolerates::<IstioCertificateResponse>();
    assert_tolerates::<WorkloadRequest>();
    assert_tolerates::<WorkloadResponse>();
    assert_tolerates::<ZdsHello>();
}

#[test]
fn reserved_fields_are_passed_over() {
    let wire = [block(15, "old"), block(1, "name")].concat();
    assert_eq!(Workload::decode(wire.as_slice()).unwrap().name, "name");
}

#[test]
fn later_member_of_a_choice_wins() {
    let wire = [block(1, block(20, "uid")), block(2, block(3, "host"))].concat();
    let address = Address::decode(wire.as_slice()).unwrap();
    assert!(matches!(address.r#type, Some(crate::istio::workload::address::Type::Service(_))));
}

#[test]
fn cut_off_message_is_an_error() {
    let wire = block(1, "name");
    for length in 1..wire.len() {
        Workload::decode(&wire[..length]).unwrap_err();
    }
}

#[test]
fn string_that_is_not_utf8_is_an_error() {
    Workload::decode(block(1, [0xff, 0xfe]).as_slice()).unwrap_err();
}

#[test]
fn field_of_another_wire_type_is_an_error() {
    Workload::decode(number(1, 1).as_slice()).unwrap_err();
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        // Whatever decodes must also decode from its own encoding.
        macro_rules! survive {
            ($($message:ty),*) => {$(
                if let Ok(message) = <$message>::decode(bytes.as_slice()) {
                    prop_assert_eq!(<$message>::decode(message.encode_to_vec().as_slice()), Ok(message));
                }
            )*};
        }
        survive!(Address, Authorization, DeltaDiscoveryRequest, DeltaDiscoveryResponse);
        survive!(IstioCertificateResponse, WorkloadRequest, WorkloadResponse, ZdsHello);
    }
}
