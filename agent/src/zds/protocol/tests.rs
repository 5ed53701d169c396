#![allow(clippy::unwrap_used)]

use std::fs::File;

use super::*;

/// Row Z1, and the encodings of the protocol's numbers.
const SNAPSHOT_SENT: &[u8] = &[0x1a, 0x00];
const DEL_U: &[u8] = &[0x12, 0x03, 0x12, 0x01, b'u'];
const KEEP_U: &[u8] = &[0x2a, 0x03, 0x0a, 0x01, b'u'];
const ADD_U: &[u8] =
    &[0x0a, 0x0e, 0x0a, 1, b'u', 0x12, 9, 0x0a, 1, b'n', 0x12, 1, b's', 0x1a, 1, b'a'];
const ADD_WITHOUT_INFO: &[u8] = &[0x0a, 0x03, 0x0a, 0x01, b'u'];

fn packet(bytes: &[u8], descriptors: usize) -> Packet {
    let descriptors = (0..descriptors).map(|_| File::open("/dev/null").unwrap().into());
    Packet { bytes: bytes.to_vec(), descriptors: descriptors.collect() }
}

fn hear(conversation: &mut Conversation, bytes: &[u8], descriptors: usize) -> String {
    match conversation.hear(packet(bytes, descriptors)) {
        Ok(Some(Order::Add { uid, info, .. })) => {
            format!("add {uid} {} {} {}", info.name, info.namespace, info.service_account)
        }
        Ok(Some(Order::Del { uid })) => format!("del {uid}"),
        Ok(Some(Order::Snapshot { uids })) => {
            let mut uids: Vec<&str> = uids.iter().map(AsRef::as_ref).collect();
            uids.sort_unstable();
            format!("snapshot {}", uids.join(","))
        }
        Ok(Some(Order::Lost(_))) => "lost".to_owned(),
        Ok(None) => "nothing".to_owned(),
        Err(fault) => fault.to_string(),
    }
}

#[test]
fn messages_are_those_of_the_protocol() {
    assert_eq!(hello(), [0x08, 0x01]);
    assert_eq!(success(), [0x0a, 0x00]);
    assert_eq!(failure("x"), [0x0a, 0x03, 0x0a, 0x01, b'x']);
}

#[test]
fn reasons_are_cut_to_what_can_be_read() {
    let answer = failure(&"ü".repeat(5000));
    assert!(answer.len() < 1024);
    let answer = zds::WorkloadResponse::decode(answer.as_slice()).unwrap();
    let Some(zds::workload_response::Payload::Ack(ack)) = answer.payload else { panic!() };
    assert_eq!(ack.error, "ü".repeat(450));
}

#[test]
fn each_sequence_is_answered_as_the_table_says() {
    let read = "failure to read message : ";
    let process = "failure to process message : ";
    // Row, packets with their number of descriptors, and what becomes of each.
    type Step<'a> = (&'a [u8], usize, &'a str);
    let rows: [(&str, &[Step<'_>]); 13] = [
        (
            "Z2, Z3",
            &[
                (ADD_U, 1, "add u n s a"),
                (SNAPSHOT_SENT, 0, "snapshot u"),
                (ADD_U, 1, "add u n s a"),
            ],
        ),
        ("Z5, Z6", &[(KEEP_U, 0, "nothing"), (SNAPSHOT_SENT, 0, "snapshot u")]),
        ("Z7, Z8", &[(SNAPSHOT_SENT, 0, "snapshot "), (DEL_U, 0, "del u")]),
        ("Z9", &[(SNAPSHOT_SENT, 0, "snapshot "), (SNAPSHOT_SENT, 0, process)]),
        ("Z10", &[(ADD_U, 0, "failure to read message : 0 descriptors, 1 expected")]),
        ("Z11", &[(ADD_U, 2, "failure to read message : 2 descriptors, 1 expected")]),
        (
            "Z13",
            &[(ADD_U, 1, "add u n s a"), (DEL_U, 0, "nothing"), (SNAPSHOT_SENT, 0, "snapshot ")],
        ),
        ("Z14", &[(ADD_WITHOUT_INFO, 1, process)]),
        ("keep after the snapshot", &[(SNAPSHOT_SENT, 0, "snapshot "), (KEEP_U, 0, process)]),
        ("descriptor on another message", &[(SNAPSHOT_SENT, 1, read), (DEL_U, 1, read)]),
        ("not a message", &[(&[0xff, 0xff], 0, read), (b"GET / HTTP/1.1\r\n", 0, read)]),
        ("no payload", &[(&[], 0, read), (&[0x22, 0x00], 0, read)]),
        (
            "former field of a removal",
            &[(SNAPSHOT_SENT, 0, "snapshot "), (&[0x12, 0x03, 0x0a, 0x01, b'u'], 0, "del ")],
        ),
    ];
    for (row, steps) in rows {
        let mut conversation = Conversation::default();
        for (bytes, descriptors, wanted) in steps {
            let heard = hear(&mut conversation, bytes, *descriptors);
            let same = match wanted.starts_with("failure") {
                true => heard.starts_with(wanted),
                false => heard == *wanted,
            };
            assert!(same, "{row}: {heard:?} instead of {wanted:?}");
        }
    }
}

proptest::proptest! {
    #[test]
    fn no_packet_is_too_much(bytes: Vec<u8>, descriptors in 0usize..3) {
        let mut conversation = Conversation::default();
        for _ in 0..2 {
            let heard = hear(&mut conversation, &bytes, descriptors);
            proptest::prop_assert!(!heard.is_empty());
        }
    }
}
