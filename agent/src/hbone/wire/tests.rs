#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = u32::try_from(payload.len()).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

fn conversation() -> Vec<u8> {
    let settings =
        [&[0, 3, 0, 0, 0, 100][..], &[0, 4, 0, 0x40, 0, 0], &[0, 9, 0, 0, 0, 1]].concat();
    let update = (16_u32 << 20) - 65_535;
    [
        frame(0x4, 0, 0, &settings),
        frame(0x0, 0, 1, &[8; 1000]),
        frame(0x8, 0, 0, &update.to_be_bytes()),
        frame(0x8, 0, 1, &77_u32.to_be_bytes()),
        frame(0x4, 1, 0, &[]),
        frame(0x7, 0, 0, &[0; 8]),
    ]
    .concat()
}

proptest! {
    #[test]
    fn frames_are_read_however_they_are_cut(cuts in proptest::collection::vec(1..40usize, 1..200)) {
        let peer = PeerWindows::new(1 << 20, 100);
        let stream = peer.open(1);
        let mut scanner = Scanner::new(24);
        let bytes = [vec![9; 24], conversation()].concat();
        let (mut rest, mut cuts) = (bytes.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (now, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            scanner.scan(now, &peer);
            rest = later;
        }
        prop_assert_eq!((peer.max_streams(), peer.safe_streams()), (100, 4));
        prop_assert_eq!(stream.acknowledged(), 77);
        prop_assert!(peer.is_going_away() && peer.is_settled());
    }

    #[test]
    fn any_bytes_are_scanned_without_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let peer = PeerWindows::new(1 << 20, 100);
        Scanner::new(0).scan(&bytes, &peer);
        let _ = (peer.safe_streams(), peer.unacknowledged_limit(), peer.is_scarce());
    }
}

#[tokio::test]
async fn small_writes_leave_together_and_in_order_with_large_ones() {
    let (near, mut far) = tokio::io::duplex(1 << 20);
    let (mut wire, flusher) = wire(near, 0, PeerWindows::new(1 << 20, 100));
    let mut expected = Vec::new();
    for n in 0..100_u8 {
        let size = if n % 10 == 9 { 20_000 } else { 100 };
        wire.write_all(&vec![n; size]).await.unwrap();
        wire.flush().await.unwrap();
        expected.extend(vec![n; size]);
    }
    wire.write_all(b"end").await.unwrap();
    expected.extend(b"end");
    std::future::poll_fn(|cx| flusher.poll_flush(cx)).await.unwrap();
    wire.shutdown().await.unwrap();
    let mut got = Vec::new();
    far.read_to_end(&mut got).await.unwrap();
    assert!(got == expected);
}
