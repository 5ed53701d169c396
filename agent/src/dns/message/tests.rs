#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, Ipv6Addr};

use hickory_proto::op::{MessageType, OpCode};
use hickory_proto::rr::RData;
use hickory_proto::rr::rdata::{A, AAAA};
use proptest::prelude::*;

use super::*;

/// A query as clients send it, recursion desired.
fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.id = 0x1234;
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message
}

fn with_edns(mut message: Message, payload: u16, dnssec_ok: bool) -> Message {
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    edns.set_dnssec_ok(dnssec_ok);
    message.set_edns(edns);
    message
}

fn question(message: &Message) -> Question {
    Question::parse(&message.to_vec().unwrap()).unwrap()
}

fn addresses(count: u32) -> Reply {
    let owner = Name::from_ascii("cart.shop.").unwrap();
    let record = |n| Record::from_rdata(owner.clone(), 30, RData::A(A(Ipv4Addr::from(n))));
    let answers = (0..count).map(record).collect();
    Reply { authoritative: true, answers, ..Reply::default() }
}

fn answered(question: &Question, reply: Reply, transport: Transport) -> (usize, Message) {
    let bytes = question.answer(reply, transport);
    (bytes.len(), Message::from_vec(&bytes).unwrap())
}

#[test]
fn an_answer_repeats_the_question_and_its_wish_for_recursion() {
    let mut asked = query("CaRt.ShOp.", RecordType::A);
    for desired in [true, false] {
        asked.metadata.recursion_desired = desired;
        let question = question(&asked);
        let (_, answer) = answered(&question, addresses(1), Transport::Udp);
        assert_eq!(answer.metadata.id, 0x1234);
        assert_eq!(answer.metadata.message_type, MessageType::Response);
        assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
        assert!(answer.metadata.authoritative && answer.metadata.recursion_available);
        assert_eq!(answer.metadata.recursion_desired, desired);
        assert!(answer.queries[0].name().eq_case(asked.queries[0].name()));
        assert_eq!(answer.answers.len(), 1);
        assert!(answer.edns.is_none());
    }
}

#[test]
fn hostnames_are_in_lower_case_and_of_plain_characters() {
    for (labels, expected) in [
        (&["CaRt", "Shop", "svc"][..], Some("cart.shop.svc")),
        (&["_http", "-", "*"], Some("_http.-.*")),
        (&[], Some("")),
        (&["a.b", "shop"], None),
        (&["a b", "shop"], None),
        (&["ü", "shop"], None),
    ] {
        let name = Name::from_labels(labels.iter().map(|label| label.as_bytes())).unwrap();
        let mut message = query(".", RecordType::A);
        message.queries = vec![Query::query(name, RecordType::A)];
        assert_eq!(question(&message).hostname().as_deref(), expected, "{labels:?}");
    }
}

#[test]
fn a_stripped_name_keeps_the_letters_of_the_question() {
    let question = question(&query("CaRt.ShOp.svc.cluster.local.", RecordType::A));
    assert_eq!(question.first_labels(2).unwrap().to_ascii(), "CaRt.ShOp.");
}

#[test]
fn edns_is_answered_in_kind() {
    // Rows: query with OPT 4096 and DO, query with OPT 300.
    for (payload, dnssec_ok, expected) in [(4096, true, 4096), (300, false, 512)] {
        let mut message = with_edns(query("cart.shop.", RecordType::A), 4096, dnssec_ok);
        if payload < 512 {
            // The library does not write so small a size by itself.
            let mut bytes = message.to_vec().unwrap();
            let at = bytes.len() - 8;
            bytes[at..at + 2].copy_from_slice(&u16::to_be_bytes(payload));
            message = Message::from_vec(&bytes).unwrap();
        }
        let (_, answer) = answered(&question(&message), addresses(1), Transport::Udp);
        let edns = answer.edns.unwrap();
        assert_eq!(edns.max_payload(), expected);
        assert_eq!(edns.flags().dnssec_ok, dnssec_ok);
        assert_eq!(edns.version(), 0);
    }
}

#[test]
fn what_does_not_fit_is_cut_and_says_so() {
    let plain = query("cart.shop.", RecordType::A);
    let large = with_edns(plain.clone(), 1232, false);
    for (asked, limit) in [(&plain, 512), (&large, 1232)] {
        let (length, answer) = answered(&question(asked), addresses(1000), Transport::Udp);
        assert!(length <= limit && length > limit - 16, "{length} of {limit}");
        assert!(answer.metadata.truncation);
        assert!(!answer.answers.is_empty());
        assert_eq!(answer.edns.is_some(), asked.edns.is_some());
    }
    let (_, answer) = answered(&question(&plain), addresses(1000), Transport::Tcp);
    assert!(!answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 1000);
    let (length, answer) = answered(&question(&plain), addresses(10_000), Transport::Tcp);
    assert!(length <= usize::from(u16::MAX) && answer.metadata.truncation);
    assert!(answer.answers.len() > 2000, "{}", answer.answers.len());
}

#[test]
fn other_sections_go_before_answers() {
    let soa = Record::from_rdata(
        Name::from_ascii("a.very.long.name.of.some.zone.example.").unwrap(),
        30,
        RData::AAAA(AAAA(Ipv6Addr::LOCALHOST)),
    );
    let mut reply = addresses(28);
    reply.additionals = vec![soa; 10];
    let question = question(&query("cart.shop.", RecordType::A));
    let (_, answer) = answered(&question, reply, Transport::Udp);
    assert!(answer.metadata.truncation);
    assert_eq!(answer.answers.len(), 28);
    assert_eq!(answer.additionals.len(), 0);
}

/// The code of a message that is rejected.
fn rejected(bytes: &[u8]) -> u8 {
    match Question::parse(bytes) {
        Err(Rejected::With(answer)) => {
            assert_eq!(answer.len(), 12);
            assert_eq!(answer[..2], bytes[..2], "identifier");
            assert_eq!(answer[2] & 0x80, 0x80, "response");
            assert_eq!(answer[2] & 0x79, bytes[2] & 0x79, "operation, recursion desired");
            answer[3] & 0xf
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_no_question_is_rejected() {
    let plain = query("cart.shop.", RecordType::A);
    let mut response = plain.clone();
    response.metadata.message_type = MessageType::Response;
    assert_eq!(rejected(&response.to_vec().unwrap()), FORMAT_ERROR);
    for operation in [OpCode::Notify, OpCode::Update, OpCode::Status, OpCode::Unknown(9)] {
        let mut notify = plain.clone();
        notify.metadata.op_code = operation;
        assert_eq!(rejected(&notify.to_vec().unwrap()), NOT_IMPLEMENTED);
    }
    let mut two = plain.clone();
    two.add_query(two.queries[0].clone());
    assert_eq!(rejected(&two.to_vec().unwrap()), FORMAT_ERROR);
    let mut none = plain.clone();
    none.queries.clear();
    assert_eq!(rejected(&none.to_vec().unwrap()), FORMAT_ERROR);
    let whole = plain.to_vec().unwrap();
    assert_eq!(rejected(&whole[..whole.len() - 1]), FORMAT_ERROR);
    for length in 0..12 {
        assert_eq!(Question::parse(&whole[..length]).unwrap_err(), Rejected::Silently);
    }
}

#[test]
fn records_that_are_not_there_are_not_awaited() {
    let mut bytes = query("cart.shop.", RecordType::A).to_vec().unwrap();
    bytes[6..12].fill(0xff);
    assert_eq!(rejected(&bytes), FORMAT_ERROR);
}

proptest! {
    #[test]
    fn any_bytes_are_read_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        handle(&bytes);
    }

    #[test]
    fn damaged_questions_are_read_without_panic(
        labels in proptest::collection::vec("[a-zA-Z0-9_]{1,20}", 0..8),
        kind in any::<u16>(),
        edns in proptest::option::of(any::<u16>()),
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut message = query(&(labels.join(".") + "."), kind.into());
        if let Some(payload) = edns {
            message = with_edns(message, payload, payload % 2 == 1);
        }
        let mut bytes = message.to_vec().unwrap();
        handle(&bytes);
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        handle(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        handle(&bytes);
    }
}

/// Whatever is taken for a question can be answered, and the answer be read.
fn handle(bytes: &[u8]) {
    match Question::parse(bytes) {
        Ok(question) => {
            let _ = question.hostname();
            for transport in [Transport::Udp, Transport::Tcp] {
                let limit = question.limit(transport);
                let (length, answer) = answered(&question, addresses(100), transport);
                assert!(length <= limit);
                assert_eq!(answer.queries.len(), 1);
            }
        }
        Err(Rejected::Silently) => assert!(bytes.len() < 12),
        Err(Rejected::With(answer)) => assert_eq!(answer.len(), 12),
    }
}
