//! Messages of the control plane, of the node's CNI plugin and of another agent.

use std::collections::HashSet;
use std::fmt::Debug;
use std::fs::File;
use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use culvert_agent::ca::parse_chain;
use culvert_agent::handover;
use culvert_agent::packet::Packet;
use culvert_agent::tls::{Issued, Trust, WorkloadCertificate};
use culvert_agent::xds::{Address, Decoder, FrameError, Frames, Part, Rejection};
use culvert_agent::zds::{Conversation, Order};
use culvert_core::authorization::Connection;
use culvert_core::identity::Identity;
use culvert_core::snapshot::{Change, Snapshot};
use culvert_core::workload::NetworkMode;
use culvert_proto::envoy::service::discovery::v3::DeltaDiscoveryResponse;
use culvert_proto::istio::v1::auth::IstioCertificateResponse;
use culvert_proto::istio::workload::zds::WorkloadRequest;
use culvert_proto::istio::workload::zds::workload_request::Payload;
use culvert_proto::istio::{security, workload as proto};
use prost::Message;

/// What is taken over can be found where it says it is.
pub(super) fn address(bytes: &[u8]) {
    let read = message::<proto::Address>(bytes);
    let decoded = Decoder::default().address(bytes.to_vec().into());
    // Also what is not a text where there should be one.
    assert!(read.is_some() || decoded.is_err());
    match decoded {
        Ok(Address::Workload(workload)) => {
            let snapshot = Snapshot::default().with([Change::workload(workload.clone())]);
            assert_eq!(snapshot.workload(&workload.uid), Some(&workload));
            for ip in workload.addresses.iter().map(|ip| ip.to_canonical()) {
                let found = snapshot.workload_at(&workload.network, ip);
                let its_own = workload.network_mode == NetworkMode::Standard;
                assert_eq!(found.is_some(), its_own, "{ip}");
            }
            assert_eq!(emptied(&snapshot, Change::RemoveWorkload(workload.uid.clone())), 0);
        }
        Ok(Address::Service(service)) => {
            let snapshot = Snapshot::default().with([Change::service(service.clone())]);
            assert_eq!(snapshot.service(&service.key()), Some(&service));
            for vip in &service.vips {
                assert!(snapshot.service_at(&vip.network, vip.ip, None).is_some(), "{vip}");
            }
            assert_eq!(emptied(&snapshot, Change::RemoveService(service.key())), 0);
        }
        Err(rejection) => assert!(!rejection.to_string().is_empty()),
    }
}

fn emptied(snapshot: &Snapshot, removal: Change) -> usize {
    let snapshot = snapshot.with([removal]);
    snapshot.workload_count() + snapshot.service_count()
}

/// Whatever is taken over can be evaluated.
pub(super) fn authorization(bytes: &[u8]) {
    let read = message::<security::Authorization>(bytes);
    let decoded = Decoder::default().authorization(bytes.to_vec().into());
    assert!(read.is_some() || matches!(decoded, Err(Rejection::Unreadable(_))));
    let Ok(policy) = decoded else { return };
    let plaintext = Connection {
        source: IpAddr::from([10, 2, 0, 3]),
        identity: None,
        destination: IpAddr::from([10, 1, 0, 7]),
        port: 8080,
    };
    let identity = Some(Identity::new("cluster.local", "web", "front"));
    for connection in [plaintext.clone(), Connection { identity, ..plaintext }] {
        let rule = policy.matching_rule(&connection);
        assert!(rule.is_none_or(|rule| rule < policy.rules.len()));
    }
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

/// The delta stream's half of the control plane, in pieces of the first byte's size. It must not
/// matter how it is cut.
pub(super) fn discovery_stream(bytes: &[u8]) {
    let Some((piece, stream)) = bytes.split_first() else { return };
    let cut = stream_parts(stream, usize::from(*piece).max(1));
    assert_eq!(cut, stream_parts(stream, stream.len().max(1)));
}

/// What is read of it, and how it ended.
fn stream_parts(stream: &[u8], piece: usize) -> (Vec<String>, Result<(), FrameError>) {
    let (mut frames, mut parts) = (Frames::default(), Vec::new());
    for piece in stream.chunks(piece) {
        frames.push(piece);
        loop {
            match frames.part() {
                Ok(Some(Part::Resource(resource))) if resource.len() > stream.len() => {
                    panic!("a resource of {} bytes out of {}", resource.len(), stream.len())
                }
                Ok(Some(part)) => parts.push(format!("{part:?}")),
                Ok(None) => break,
                Err(error) => return (parts, Err(error)),
            }
        }
    }
    (parts, frames.end())
}

/// One connection of istio-cni: packets, each after its length and its number of descriptors.
pub(super) fn zds_packets(bytes: &[u8]) {
    let mut conversation = Conversation::default();
    let (mut named, mut removed, mut complete) = (HashSet::new(), HashSet::new(), false);
    let mut rest = bytes;
    while let Some((&[length, descriptors], further)) = rest.split_first_chunk() {
        let (packet, further) = further.split_at(further.len().min(length.into()));
        rest = further;
        let request = message::<WorkloadRequest>(packet).and_then(|request| request.payload);
        let null = || File::open("/dev/null").expect("there is always /dev/null").into();
        let descriptors = (0..descriptors % 3).map(|_| null()).collect();
        let heard = conversation.hear(Packet { bytes: packet.to_vec(), descriptors });
        let Ok(order) = heard else { continue };
        match (request.expect("what is understood can be read"), order) {
            (Payload::Add(add), Some(Order::Add { uid, .. })) => {
                assert_eq!(*uid, *add.uid);
                named.insert(uid);
            }
            (Payload::Keep(keep), None) if !complete => {
                named.insert(keep.uid.into());
            }
            (Payload::Del(del), Some(Order::Del { uid })) if complete => assert_eq!(*uid, *del.uid),
            (Payload::Del(del), None) if !complete => {
                removed.insert(del.uid);
            }
            (Payload::SnapshotSent(_), Some(Order::Snapshot { uids })) if !complete => {
                complete = true;
                assert!(uids.is_subset(&named), "{uids:?} of {named:?}");
                let lost = |uid: &Arc<str>| !uids.contains(uid) && !removed.contains(&**uid);
                assert!(!named.iter().any(lost), "{uids:?} of {named:?} without {removed:?}");
            }
            (payload, order) => panic!("{payload:?} was taken for {order:?}"),
        }
    }
}

/// What another agent gives: packets, each after its length and its number of descriptors.
pub(super) fn handover_packets(bytes: &[u8]) {
    let mut given = handover::GivenPods::new(16);
    let mut rest = bytes;
    while let Some((&[low, high, descriptors], further)) = rest.split_first_chunk() {
        let length = usize::from(u16::from_le_bytes([low, high]));
        let (packet, further) = further.split_at(further.len().min(length));
        rest = further;
        let Ok(message) = handover::Message::read(packet) else { continue };
        let again = handover::Message::read(&message.to_bytes());
        assert_eq!(again.as_ref(), Ok(&message), "{}", message.name());
        let null = || File::open("/dev/null").expect("there is always /dev/null").into();
        let descriptors = (0..descriptors % 8).map(|_| null()).collect();
        let whole = matches!(message, handover::Message::Whole { pods: 0 });
        let heard = given.hear(message, descriptors);
        assert!(heard != Ok(true) || whole, "whole without having been told so");
        // Nothing of a pod came that could be one.
        assert!(given.pods.is_empty(), "{:?}", given.pods);
    }
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
    let issued = Issued { chain: issued.presented, key: KEY.clone(), roots: issued.roots };
    let made = WorkloadCertificate::new(issued, &Trust::default());
    assert!(made.is_err(), "a foreign key became part of {made:?}");
}

/// Decodes, and asserts that what is encoded again means the same.
fn message<M: Message + Default + PartialEq + Debug>(bytes: &[u8]) -> Option<M> {
    let message = M::decode(bytes).ok()?;
    assert_eq!(M::decode(message.encode_to_vec().as_slice()).as_ref(), Ok(&message));
    Some(message)
}
