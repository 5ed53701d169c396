//! Names: authorities, identities, and what pods ask for.

use std::net::Ipv4Addr;

use culvert_agent::dns::{Question, Rejected, Reply, Transport};
use culvert_core::addr::{Authority, HboneAddr, NamespacedHostname};
use culvert_core::identity::Identity;
use culvert_core::names::{self, Answer, Client, Directory, Family};
use culvert_core::snapshot::Snapshot;
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};

pub(super) fn authority(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(name) = text.parse::<NamespacedHostname>() {
        assert_eq!(name.to_string(), text);
    }
    let Ok(authority) = text.parse::<Authority>() else { return };
    assert_eq!(authority.to_string().parse(), Ok(authority.clone()));
    match &authority {
        Authority::Addr(addr) => {
            assert_eq!(*addr, HboneAddr::new(*addr).addr(), "an address is in one form only");
        }
        Authority::Host { host, .. } => {
            assert!(!host.is_empty() && host.len() <= 253);
            assert!(host.parse::<Ipv4Addr>().is_err(), "{host} is an address");
        }
    }
}

pub(super) fn identity(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(identity) = text.parse::<Identity>() else { return };
    assert!(identity.is_complete());
    assert_eq!(identity.to_string(), text);
    assert_eq!(text.strip_prefix("spiffe://"), Some(identity.principal().as_str()));
}

/// Every answer is to the question, can be read, and fits.
pub(super) fn dns_question(bytes: &[u8]) {
    let question = match Question::parse(bytes) {
        Ok(question) => question,
        Err(Rejected::Silently) => return assert!(bytes.len() < 12),
        Err(Rejected::With(answer)) => return is_answer(&answer, bytes, 12),
    };
    if let Some(hostname) = question.hostname() {
        let snapshot = Snapshot::default();
        let directory = Directory {
            snapshot: &snapshot,
            cluster_domain: "cluster.local",
            preferred_namespace: None,
            ipv6: true,
        };
        let client = Client { namespace: "web", network: "" };
        let answer = names::answer(&directory, &client, &hostname, Family::V4);
        assert_eq!(answer, Answer::Unknown);
    }
    let labels = question.name().iter().count();
    let name = question.first_labels(labels).expect("the whole name is one");
    assert_eq!(name.to_lowercase(), question.name().to_lowercase());
    let record = |n| {
        let address = A::from(Ipv4Addr::from_bits(n));
        Record::from_rdata(name.clone(), 30, RData::A(address))
    };
    for (count, transport, most) in [
        (0, Transport::Udp, 512),
        (1, Transport::Udp, 65_507),
        (200, Transport::Udp, 65_507),
        (200, Transport::Tcp, 65_535),
    ] {
        let answers = (0..count).map(record).collect();
        let reply = Reply { code: ResponseCode::NoError, answers, ..Reply::default() };
        is_answer(&question.answer(reply, transport), bytes, most);
    }
}

fn is_answer(answer: &[u8], question: &[u8], most: usize) {
    assert!(answer.len() <= most, "{} bytes", answer.len());
    assert_eq!(answer[..2], question[..2], "another identifier");
    assert!(answer[2] & 0x80 != 0, "not an answer");
    let message = Message::from_vec(answer);
    assert!(message.is_ok(), "{message:?}: {answer:?}");
}
