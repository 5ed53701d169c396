#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::*;
use crate::tls::testing::Authority;
use crate::tls::{HANDSHAKE_LIMIT, accept, config, connect};

const SERVER: &str = "spiffe://td1/ns/a/sa/server";
const CLIENT: &str = "spiffe://td1/ns/a/sa/client";

/// Ours on both sides, over a pipe of this size.
async fn pair(size: usize) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let authority = Authority::root("root");
    let (server, client) = (authority.workload(SERVER), authority.workload(CLIENT));
    let (near, far) = duplex(size);
    let expect = [SERVER.parse().unwrap()];
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connect(far, &client, &expect, HANDSHAKE_LIMIT)
    );
    (accepted.unwrap().0, connected.unwrap())
}

/// Ours as the server, the TLS library's own stream as the client.
async fn with_client() -> (TlsStream<DuplexStream>, client::TlsStream<DuplexStream>) {
    let authority = Authority::root("root");
    let (server, client) = (authority.workload(SERVER), authority.workload(CLIENT));
    let (near, far) = duplex(1 << 16);
    let connector = TlsConnector::from(client.client_config(&[SERVER.parse().unwrap()]));
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connector.connect(config::unsent_server_name(), far)
    );
    (accepted.unwrap().0, connected.unwrap())
}

/// The other way round; the library's server sends tickets.
async fn with_server() -> (TlsStream<DuplexStream>, server::TlsStream<DuplexStream>) {
    let authority = Authority::root("root");
    let (server, client) = (authority.workload(SERVER), authority.workload(CLIENT));
    let (near, far) = duplex(1 << 16);
    let mut config = (*server.server_config()).clone();
    config.send_tls13_tickets = 4;
    config.session_storage = rustls::server::ServerSessionMemoryCache::new(8);
    let expect = [SERVER.parse().unwrap()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let (accepted, connected) =
        tokio::join!(acceptor.accept(near), connect(far, &client, &expect, HANDSHAKE_LIMIT));
    (connected.unwrap(), accepted.unwrap())
}

/// Sends `count` bytes each way at once and compares them.
async fn exchange<A, B>(near: &mut A, far: &mut B, count: usize)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let bytes: Vec<u8> = (0..count).map(|place| (place / 3) as u8).collect();
    let (mut near_reads, mut near_writes) = tokio::io::split(near);
    let (mut far_reads, mut far_writes) = tokio::io::split(far);
    let send_near = async {
        near_writes.write_all(&bytes).await.unwrap();
        near_writes.flush().await.unwrap();
    };
    let send_far = async {
        far_writes.write_all(&bytes).await.unwrap();
        far_writes.flush().await.unwrap();
    };
    let (mut at_near, mut at_far) = (vec![0; count], vec![0; count]);
    let moved = async {
        tokio::join!(
            send_near,
            send_far,
            async { near_reads.read_exact(&mut at_near).await.unwrap() },
            async { far_reads.read_exact(&mut at_far).await.unwrap() }
        )
    };
    tokio::time::timeout(HANDSHAKE_LIMIT, moved).await.unwrap();
    assert!(at_near == bytes && at_far == bytes);
}

#[tokio::test]
async fn bytes_of_any_count_arrive_over_pipes_of_any_size() {
    for size in [7, 1000, 1 << 20] {
        let (mut near, mut far) = pair(size).await;
        for count in [1, 100, 16_384, 16_385, 300_000] {
            exchange(&mut near, &mut far, count).await;
        }
    }
}

#[tokio::test]
async fn the_librarys_own_streams_understand_ours_and_their_tickets_are_passed_over() {
    let (mut ours, mut client) = with_client().await;
    exchange(&mut ours, &mut client, 300_000).await;
    let (mut ours, mut server) = with_server().await;
    exchange(&mut ours, &mut server, 300_000).await;
}

#[tokio::test]
async fn a_peer_may_change_its_key_and_want_ours_changed() {
    let (mut ours, mut client) = with_client().await;
    for _ in 0..3 {
        client.get_mut().1.refresh_traffic_keys().unwrap();
        exchange(&mut ours, &mut client, 100_000).await;
    }
    client.get_mut().1.refresh_traffic_keys().unwrap();
    client.write_all(b"x").await.unwrap();
    client.flush().await.unwrap();
    ours.read_exact(&mut [0; 1]).await.unwrap();
    exchange(&mut ours, &mut client, 100_000).await;
}

#[tokio::test]
async fn our_key_is_changed_before_it_is_used_up() {
    let (mut ours, mut client) = with_client().await;
    ours.sending.records_per_key = 5;
    exchange(&mut ours, &mut client, 1 << 20).await;
    assert!(ours.sending.key.records() <= 5);
}

#[tokio::test]
async fn an_end_is_clean_only_if_it_was_announced() {
    let (mut ours, mut client) = with_client().await;
    client.write_all(b"all").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    ours.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "all");
    ours.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);

    let (mut ours, client) = with_client().await;
    drop(client);
    let cut = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);

    // Within a record, and told again to whoever asks again.
    let (mut ours, mut peer) = pair(1 << 16).await;
    let mut record = [0; 60];
    let count = peer.sending.key.seal(content::DATA, b"lost", &mut record).unwrap();
    peer.io.write_all(&record[..count - 1]).await.unwrap();
    drop(peer);
    for _ in 0..2 {
        let cut = ours.read(&mut [0; 1]).await.unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
    }
}

#[tokio::test]
async fn what_follows_the_handshake_in_one_segment_is_not_lost() {
    let authority = Authority::root("root");
    let (server, client) = (authority.workload(SERVER), authority.workload(CLIENT));
    // Large enough that the client's last flight and its first bytes come together.
    let (near, far) = duplex(1 << 20);
    let connected = async {
        let mut stream =
            connect(far, &client, &[SERVER.parse().unwrap()], HANDSHAKE_LIMIT).await.unwrap();
        stream.write_all(&[5; 40_000]).await.unwrap();
        stream.flush().await.unwrap();
        stream
    };
    let accepted = async { accept(near, &server, HANDSHAKE_LIMIT).await.unwrap().0 };
    let (_stream, mut accepted) = tokio::join!(connected, accepted);
    let mut bytes = vec![0; 40_000];
    tokio::time::timeout(HANDSHAKE_LIMIT, accepted.read_exact(&mut bytes)).await.unwrap().unwrap();
    assert!(bytes.iter().all(|byte| *byte == 5));
}

/// Sends these records as they are, and what the other side makes of them.
async fn after(records: &[(u8, &[u8])]) -> (Vec<u8>, io::Error, io::Error) {
    let (mut ours, mut peer) = pair(1 << 20).await;
    for (kind, content) in records {
        let mut record = vec![0; content.len() + HEADER + TRAILER];
        let count = peer.sending.key.seal(*kind, content, &mut record).unwrap();
        peer.io.write_all(&record[..count]).await.unwrap();
    }
    let mut bytes = Vec::new();
    let error = ours.read_to_end(&mut bytes).await.unwrap_err();
    (bytes, error, peer.read(&mut [0; 1]).await.unwrap_err())
}

#[tokio::test]
async fn what_a_peer_must_not_send_is_refused_with_an_alert_after_what_came_before() {
    const UPDATE: &[u8] = &[KEY_UPDATE, 0, 0, 1, 0];
    let data = (content::DATA, &b"data"[..]);
    let empty = vec![(content::DATA, &b""[..]); IDLE_IN_A_ROW + 1];
    let begun = (content::HANDSHAKE, &[KEY_UPDATE, 0][..]);
    // What is sealed with this type is padding, or says its type itself.
    const PADDING: u8 = 0;
    let mut overlong = vec![0; CONTENT + 1];
    overlong[0] = content::DATA;
    for (records, alert) in [
        (vec![data, (content::HANDSHAKE, &[])], 10),
        (vec![data, begun, data], 10),
        (vec![data, begun, (content::ALERT, &[WARNING, CLOSE_NOTIFY])], 10),
        (vec![data, (content::HANDSHAKE, &[1, 0, 0, 0])], 10),
        (vec![data, (content::HANDSHAKE, &[UPDATE, &[0]].concat())], 10),
        (vec![data, (content::HANDSHAKE, &[KEY_UPDATE, 0, 0, 1, 2])], 10),
        (vec![data, (20, &[1])], 10),
        // Tickets are the server's.
        (vec![data, (content::HANDSHAKE, &[NEW_SESSION_TICKET, 0, 0, 0])], 10),
        (vec![data, (PADDING, &[])], 10),
        (vec![data, (PADDING, &[0; 60])], 10),
        (vec![data, (PADDING, &overlong)], 22),
        (vec![data, (content::ALERT, &[2])], 22),
        (vec![data, (content::HANDSHAKE, UPDATE), data], 20),
        ([vec![data], empty].concat(), 10),
    ] {
        let (bytes, error, told) = after(&records).await;
        assert_eq!((bytes.as_slice(), error.kind()), (&b"data"[..], io::ErrorKind::InvalidData));
        assert_eq!(told.to_string(), StreamFault::Alert(alert).to_string(), "{error}");
    }
}

#[tokio::test]
async fn an_alert_of_the_peer_is_an_error_and_is_not_answered() {
    let (mut ours, mut peer) = pair(1 << 20).await;
    peer.seal_alert([FATAL, 42]).unwrap();
    peer.flush().await.unwrap();
    let error = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.to_string(), StreamFault::Alert(42).to_string());
    drop(ours);
    assert_eq!(peer.io.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_peer_that_only_changes_its_key_is_refused_in_the_end() {
    let (mut ours, mut peer) = pair(1 << 20).await;
    for _ in 0..=IDLE_IN_A_ROW {
        peer.update_key().unwrap();
        peer.flush().await.unwrap();
    }
    let error = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.to_string(), StreamFault::Empty.to_string());
}

#[tokio::test]
async fn a_server_that_only_sends_tickets_is_refused_in_the_end() {
    const TICKET: &[u8] = &[NEW_SESSION_TICKET, 0, 0, 2, 1, 2];
    let (mut peer, mut ours) = pair(1 << 20).await;
    for _ in 0..=IDLE_IN_A_ROW {
        let mut record = [0; 60];
        let count = peer.sending.key.seal(content::HANDSHAKE, TICKET, &mut record).unwrap();
        peer.io.write_all(&record[..count]).await.unwrap();
    }
    let error = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.to_string(), StreamFault::Empty.to_string());
}

#[tokio::test]
async fn handshake_messages_longer_than_any_are_refused() {
    let (mut peer, mut ours) = pair(1 << 16).await;
    let mut record = [0; 60];
    let begun = [NEW_SESSION_TICKET, 1, 0, 1];
    let count = peer.sending.key.seal(content::HANDSHAKE, &begun, &mut record).unwrap();
    peer.io.write_all(&record[..count]).await.unwrap();
    let error = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.to_string(), StreamFault::from(RecordError::Length(65_537)).to_string());
}

#[tokio::test]
async fn nothing_is_sent_after_our_end_also_if_the_peer_wants_a_new_key() {
    let (mut ours, mut peer) = pair(1 << 16).await;
    ours.shutdown().await.unwrap();
    let mut record = [0; 60];
    let wanted = [KEY_UPDATE, 0, 0, 1, 1];
    let count = peer.sending.key.seal(content::HANDSHAKE, &wanted, &mut record).unwrap();
    peer.io.write_all(&record[..count]).await.unwrap();
    peer.io.shutdown().await.unwrap();
    ours.read(&mut [0; 1]).await.unwrap_err();
    assert!(ours.sending.update && ours.sending.outgoing.is_empty());
    assert_eq!(peer.read(&mut [0; 1]).await.unwrap(), 0);
    assert_eq!(peer.io.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn a_key_is_changed_with_as_much_waiting_as_there_is_room_for() {
    let (mut near, mut far) = pair(100).await;
    let mut cx = Context::from_waker(std::task::Waker::noop());
    let mut sent = 0;
    while let Poll::Ready(count) = Pin::new(&mut near).poll_write(&mut cx, &[1; 16_000]) {
        sent += count.unwrap();
        near.sending.update = near.sending.has_room(0);
        if near.sending.update {
            near.update_key().unwrap();
        }
    }
    assert!(sent > 100_000);
    let read = async {
        let mut bytes = vec![0; sent];
        far.read_exact(&mut bytes).await.unwrap();
        assert!(bytes.iter().all(|byte| *byte == 1));
    };
    let (flushed, ()) = tokio::join!(near.shutdown(), read);
    flushed.unwrap();
    assert_eq!(far.read(&mut [0; 1]).await.unwrap(), 0);
}

#[tokio::test]
async fn garbage_after_the_handshake_ends_the_stream() {
    let (mut ours, mut peer) = pair(1 << 16).await;
    peer.io.write_all(&[23, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]).await.unwrap();
    peer.io.write_all(&[0; 10]).await.unwrap();
    let error = ours.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}
