//! Messages of the control plane and of the node's CNI plugin.

use std::fmt::Debug;
use std::sync::LazyLock;

use culvert_agent::ca::parse_chain;
use culvert_agent::tls::WorkloadCertificate;
use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use culvert_proto::istio::security::Authorization;
use culvert_proto::istio::v1::auth::IstioCertificateResponse;
use culvert_proto::istio::workload::Address;
use culvert_proto::istio::workload::zds::WorkloadRequest;
use prost::Message;

pub(super) fn address(bytes: &[u8]) {
    message::<Address>(bytes);
}

pub(super) fn authorization(bytes: &[u8]) {
    message::<Authorization>(bytes);
}

/// A response with resources of both kinds.
pub(super) fn discovery(bytes: &[u8]) {
    let Some(response) = message::<DeltaDiscoveryResponse>(bytes) else { return };
    for resource in response.resources {
        let value = resource.resource.map(|any| any.value).unwrap_or_default();
        address(&value);
        authorization(&value);
    }
}

pub(super) fn zds_request(bytes: &[u8]) {
    message::<WorkloadRequest>(bytes);
}

/// Any private key; no certificate that is tried here belongs to it.
static KEY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    rcgen::KeyPair::generate().expect("the system has randomness").serialize_der()
});

pub(super) fn certificate_answer(bytes: &[u8]) {
    let Some(answer) = message::<IstioCertificateResponse>(bytes) else { return };
    let Ok(issued) = parse_chain(&answer.cert_chain) else { return };
    assert_eq!(issued.presented.len() + 1, answer.cert_chain.len());
    assert!(!issued.presented.is_empty() && !issued.roots.is_empty());
    let made = WorkloadCertificate::new(issued.presented, KEY.clone(), issued.roots);
    assert!(made.is_err(), "a foreign key became part of {made:?}");
}

/// Decodes, and asserts that what is encoded again means the same.
fn message<M: Message + Default + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert_eq!(M::decode(message.encode_to_vec().as_slice()).as_ref(), Ok(&message));
    Some(message)
}
