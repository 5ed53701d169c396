#![allow(clippy::unwrap_used)]

use super::*;

fn peer(stream: u32, connection: u32) -> Arc<PeerWindows> {
    let peer = PeerWindows::new(65_535, 100);
    peer.note_settings(Some(stream), None);
    if connection > INITIAL_WINDOW {
        peer.note_connection_update(connection - INITIAL_WINDOW);
    }
    peer
}

#[test]
fn our_own_windows_carry_all_streams() {
    let peer = peer(1 << 20, 128 << 20);
    assert_eq!((peer.safe_streams(), peer.unacknowledged_limit()), (100, None));
    assert!(!peer.is_scarce() && peer.is_settled());
}

#[test]
fn stalled_streams_leave_half_of_a_scarce_window() {
    for (stream, connection) in [
        (4 << 20, 16 << 20),
        (16 << 20, 24 << 20),
        (65_535, 1 << 20),
        (1, 65_535),
        (1 << 20, 99 << 20),
    ] {
        let peer = peer(stream, connection);
        let safe = peer.safe_streams() as u64;
        let held = (safe - 1) * peer.unacknowledged_limit().unwrap_or_default();
        assert!(safe == 100 || held <= u64::from(connection) / 2, "{stream} in {connection}");
        assert!(peer.unacknowledged_limit().is_none_or(|limit| limit > u64::from(stream) / 2));
    }
    assert_eq!(peer(4 << 20, 16 << 20).safe_streams(), 4);
    assert_eq!(peer(65_535, 65_535).safe_streams(), 1);
}

#[test]
fn a_fresh_connection_takes_one_stream_until_the_peer_has_spoken() {
    let peer = PeerWindows::new(65_535, 100);
    assert_eq!(peer.safe_streams(), 1);
    peer.note_answer();
    assert!(!peer.is_settled());
    peer.note_settings(None, Some(7));
    assert!(!peer.is_settled());
    peer.note_answer();
    assert!(peer.is_settled());
    assert_eq!(peer.max_streams(), 7);
}

#[test]
fn the_connection_window_is_what_was_open_at_best() {
    let peer = peer(4 << 20, 16 << 20);
    peer.note_sent(8 << 20);
    peer.note_connection_update(8 << 20);
    assert_eq!(peer.connection.load(Relaxed), 16 << 20);
}
