#![allow(clippy::unwrap_used)]

use super::*;

/// An IPv4 TCP packet from port `from` to port `to`.
fn packet(from: u16, to: u16, sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x45, 0];
    bytes.extend(u16::try_from(40 + payload.len()).unwrap().to_be_bytes());
    bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend(from.to_be_bytes());
    bytes.extend(to.to_be_bytes());
    bytes.extend(sequence.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
    bytes.extend(payload);
    bytes
}

const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

fn opened() -> Ledger {
    let mut ledger = Ledger::default();
    ledger.note(&packet(40000, HBONE_PORT, 99, SYN, &[]));
    ledger
}

#[test]
fn records_are_followed_across_segments() {
    let mut ledger = opened();
    ledger.note(&packet(40000, HBONE_PORT, 100, ACK, &[22, 3, 1, 0, 4, b'a', b'b']));
    ledger.note(&packet(40000, HBONE_PORT, 107, ACK, &[b'c', b'd', 23, 3]));
    ledger.note(&packet(40000, HBONE_PORT, 111, ACK, &[3, 0, 1, b'x']));
    assert!(ledger.only_tls(), "{ledger}");
    assert_eq!((ledger.tls_records, ledger.tunnel_bytes), (2, 15));
}

#[test]
fn packets_seen_in_another_order_are_put_in_theirs() {
    let mut ledger = Ledger::default();
    ledger.note(&packet(40000, HBONE_PORT, 107, ACK, &[b'c', b'd', 23, 3]));
    ledger.note(&packet(40000, HBONE_PORT, 111, ACK, &[3, 0, 1, b'x']));
    ledger.note(&packet(40000, HBONE_PORT, 99, SYN, &[]));
    ledger.note(&packet(40000, HBONE_PORT, 100, ACK, &[22, 3, 1, 0, 4, b'a', b'b']));
    ledger.close();
    assert!(ledger.only_tls(), "{ledger}");
    assert_eq!((ledger.tls_records, ledger.tunnel_bytes, ledger.unchecked_bytes), (2, 15, 0));
}

#[test]
fn streams_without_their_beginning_are_not_held_for_ever() {
    let mut ledger = Ledger::default();
    for n in 0..100u32 {
        ledger.note(&packet(40000, HBONE_PORT, n * 60_000, ACK, &[7; 60_000]));
    }
    ledger.close();
    assert_eq!(ledger.unchecked_bytes, 6_000_000);
}

#[test]
fn a_retransmission_counts_once() {
    let mut ledger = opened();
    let first = packet(40000, HBONE_PORT, 100, ACK, &[22, 3, 1, 0, 1, b'a']);
    ledger.note(&first);
    ledger.note(&first);
    ledger.note(&packet(
        40000,
        HBONE_PORT,
        100,
        ACK,
        &[22, 3, 1, 0, 1, b'a', 23, 3, 3, 0, 1, b'b'],
    ));
    assert!(ledger.only_tls(), "{ledger}");
    assert_eq!(ledger.tls_records, 2);
}

#[test]
fn plain_text_on_the_tunnel_port_is_reported() {
    let mut ledger = opened();
    ledger.note(&packet(40000, HBONE_PORT, 100, ACK, b"GET / HTTP/1.1\r\n"));
    assert!(!ledger.only_tls());
    assert_eq!(ledger.clear[&HBONE_PORT].sample, b"GET / HTTP/1.1\r\n");
}

#[test]
fn plain_text_inside_a_tls_stream_is_reported() {
    let mut ledger = opened();
    ledger.note(&packet(40000, HBONE_PORT, 100, ACK, &[22, 3, 1, 0, 1, b'a']));
    ledger.note(&packet(40000, HBONE_PORT, 106, ACK, b"secret"));
    assert!(!ledger.only_tls());
}

#[test]
fn payload_on_another_port_is_reported_by_the_servers_port() {
    let mut ledger = opened();
    for _ in 0..2 {
        ledger.note(&packet(40001, 8080, 7, SYN, &[]));
    }
    ledger.note(&packet(8080, 40001, 9, ACK, b"hello"));
    assert_eq!(ledger.clear[&8080].bytes, 5);
    assert_eq!(ledger.attempts[&8080], 1);
}

#[test]
fn bytes_after_a_gap_are_told_as_unchecked() {
    let mut ledger = opened();
    ledger.note(&packet(40000, HBONE_PORT, 200, ACK, &[1, 2, 3]));
    ledger.close();
    assert_eq!(ledger.unchecked_bytes, 3);
    assert!(!ledger.only_tls());
}

#[test]
fn cut_and_foreign_packets_do_no_harm() {
    let whole = packet(40000, HBONE_PORT, 100, ACK, &[22, 3, 1, 0, 1, b'a']);
    let mut ledger = Ledger::default();
    for length in 0..whole.len() {
        ledger.note(&whole[..length]);
    }
    for first in 0..=255u8 {
        ledger.note(&[first; 61]);
    }
    assert_eq!(ledger.packets, whole.len() as u64 + 256);
}
