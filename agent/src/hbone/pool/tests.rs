#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, AtomicUsize};

use bytes::Bytes;
use futures_util::future::join_all;
use h2::Reason;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

use super::*;
use crate::hbone::tests::{ECHO, LIMIT, Peer, connect, headers, key, ping, stream};
use crate::hbone::{Request, serve};

fn pool() -> Pool {
    Pool::new(Settings::default())
}

async fn until(condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait).await.expect("condition never holds");
}

#[tokio::test]
async fn concurrent_streams_share_one_connection() {
    let (pool, peer) = (pool(), Peer::default());
    let streams = join_all((0..100).map(|_| stream(&pool, &peer, ECHO))).await;
    assert_eq!(peer.dialled(), 1);
    let _more = stream(&pool, &peer, ECHO).await;
    assert_eq!(peer.dialled(), 2);
    drop(streams);
    let mut again = join_all((0..100).map(|_| stream(&pool, &peer, ECHO))).await;
    assert_eq!(peer.dialled(), 2, "a connection that was full is used again");
    for stream in &mut again {
        ping(stream).await;
    }
}

#[tokio::test]
async fn another_key_has_its_own_connection() {
    let (pool, peer) = (pool(), Peer::default());
    let _one = pool.connect(&key(1), &headers(ECHO), || peer.dial()).await.unwrap();
    let _two = pool.connect(&key(2), &headers(ECHO), || peer.dial()).await.unwrap();
    let other = PoolKey { source_ip: "10.0.0.99".parse().unwrap(), ..key(1) };
    let _three = pool.connect(&other, &headers(ECHO), || peer.dial()).await.unwrap();
    assert_eq!((peer.dialled(), pool.connections()), (3, 3));
}

#[tokio::test]
async fn a_peer_with_scarce_windows_gets_more_connections_and_then_fuller_ones() {
    let pool = Pool::new(Settings { spread: 3, ..Settings::default() });
    let peer = Peer::foreign(4 << 20, 16 << 20);
    let mut streams = Vec::new();
    for _ in 0..12 {
        streams.push(stream(&pool, &peer, ECHO).await);
    }
    assert_eq!(peer.dialled(), 3);
    for _ in 0..12 {
        streams.push(stream(&pool, &peer, ECHO).await);
    }
    assert_eq!(peer.dialled(), 3);
    for stream in &mut streams {
        ping(stream).await;
    }
}

#[tokio::test]
async fn the_peers_stream_limit_is_respected() {
    let pool = pool();
    let peer = Peer { foreign_streams: Some(2), ..Peer::foreign(1 << 20, 128 << 20) };
    let mut streams = join_all((0..6).map(|_| stream(&pool, &peer, ECHO))).await;
    for stream in &mut streams {
        ping(stream).await;
    }
    assert_eq!(peer.dialled(), 3);
}

#[tokio::test]
async fn a_failed_dial_is_its_callers_own() {
    let (pool, peer) = (pool(), Peer::default());
    let broken = AtomicBool::new(true);
    let dial = || async {
        tokio::task::yield_now().await;
        if broken.swap(false, Relaxed) { Err("refused") } else { peer.dial().await }
    };
    let (key, headers) = (key(1), headers(ECHO));
    let attempts = (0..5).map(|_| pool.connect(&key, &headers, dial));
    let results = join_all(attempts).await;
    let failed =
        results.iter().filter(|result| matches!(result, Err(ConnectError::Dial("refused"))));
    assert_eq!(failed.count(), 1);
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 4);
    assert_eq!(peer.dialled(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_is_released_and_a_used_one_is_not() {
    let (pool, peer) = (pool(), Peer::default());
    let mut busy = stream(&pool, &peer, ECHO).await;
    tokio::time::sleep(Duration::from_secs(600)).await;
    ping(&mut busy).await;
    drop(busy);
    tokio::time::sleep(Duration::from_secs(200)).await;
    ping(&mut stream(&pool, &peer, ECHO).await).await;
    assert_eq!((peer.dialled(), pool.connections()), (1, 1));
    tokio::time::sleep(Duration::from_secs(310)).await;
    assert_eq!(pool.connections(), 0);
    assert!(pool.shared.table.lock().hops.is_empty());
    ping(&mut stream(&pool, &peer, ECHO).await).await;
    assert_eq!(peer.dialled(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_draining_peer_keeps_its_streams_and_gets_no_new_ones() {
    let pool = pool();
    let dials = AtomicUsize::new(0);
    let (drain, watch) = tokio::sync::watch::channel(false);
    let dial = || {
        let first = dials.fetch_add(1, Relaxed) == 0;
        let (near, far) = tokio::io::duplex(64 << 10);
        let mut watch = watch.clone();
        tokio::spawn(async move {
            let drained = async move {
                if !first || watch.wait_for(|drain| *drain).await.is_err() {
                    std::future::pending::<()>().await;
                }
                Instant::now() + Duration::from_secs(5)
            };
            let _ = serve(far, &Settings::default(), crate::hbone::tests::answer, drained).await;
        });
        std::future::ready(Ok::<_, &str>(Dialled::from(near)))
    };
    let mut old = pool.connect(&key(1), &headers(ECHO), &dial).await.unwrap().stream;
    drain.send(true).unwrap();
    ping(&mut old).await;
    let mut new = pool.connect(&key(1), &headers(ECHO), &dial).await.unwrap().stream;
    assert_eq!(dials.load(Relaxed), 2);
    ping(&mut old).await;
    ping(&mut new).await;
    let end = tokio::time::timeout(LIMIT, old.read(&mut [0; 1])).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    ping(&mut new).await;
}

#[tokio::test]
async fn a_request_that_a_leaving_peer_never_saw_goes_elsewhere() {
    let pool = pool();
    let peer = Peer::default();
    let dials = AtomicUsize::new(0);
    let dial = || async {
        if dials.fetch_add(1, Relaxed) > 0 {
            return peer.dial().await;
        }
        let (near, far) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(far).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            respond.send_reset(Reason::REFUSED_STREAM);
            std::future::poll_fn(|cx| connection.poll_closed(cx)).await.unwrap();
        });
        Ok(near.into())
    };
    let mut stream = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap().stream;
    ping(&mut stream).await;
    assert_eq!(dials.load(Relaxed), 2);
}

#[tokio::test]
async fn a_broken_connection_is_replaced_and_its_streams_end_abnormally() {
    let pool = pool();
    let (kill, killed) = tokio::sync::oneshot::channel::<()>();
    let killed = parking_lot::Mutex::new(Some(killed));
    let dial = || {
        let (near, far) = tokio::io::duplex(64 << 10);
        let killed = killed.lock().take();
        tokio::spawn(async move {
            let settings = Settings::default();
            let served = serve(far, &settings, crate::hbone::tests::answer, std::future::pending());
            match killed {
                Some(killed) => tokio::select! { _ = served => {}, _ = killed => {} },
                None => drop(served.await),
            }
        });
        std::future::ready(Ok::<_, &str>(Dialled::from(near)))
    };
    let mut old = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap().stream;
    ping(&mut old).await;
    kill.send(()).unwrap();
    let end = tokio::time::timeout(LIMIT, old.read(&mut [0; 1])).await.unwrap();
    assert!(end.is_err());
    until(|| pool.connections() == 0).await;
    let mut new = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap().stream;
    ping(&mut new).await;
}

#[tokio::test]
async fn draining_lets_streams_finish_and_takes_no_new_ones() {
    let (pool, peer) = (pool(), Peer::default());
    let mut old = stream(&pool, &peer, ECHO).await;
    pool.drain();
    assert!(matches!(connect(&pool, &peer, ECHO).await, Err(ConnectError::Closed)));
    ping(&mut old).await;
    old.shutdown().await.unwrap();
    assert_eq!(old.read(&mut [0; 1]).await.unwrap(), 0);
    drop(old);
    until(|| pool.connections() == 0).await;
}

#[tokio::test]
async fn dropping_the_pool_ends_streams_abnormally() {
    let (pool, peer) = (pool(), Peer::default());
    let mut stream = stream(&pool, &peer, ECHO).await;
    ping(&mut stream).await;
    drop(pool);
    let end = tokio::time::timeout(LIMIT, stream.read(&mut [0; 1])).await.unwrap();
    assert!(end.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_silent_peer_is_given_up_after_the_ping_timeout() {
    let pool = pool();
    let dial = || async {
        let (near, far) = tokio::io::duplex(64 << 10);
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(far).await.unwrap();
            let (_, mut respond) = connection.accept().await.unwrap().unwrap();
            let send = respond.send_response(http::Response::new(()), false);
            // Moves no more frames once the answer has left, and keeps all open.
            let moved = std::future::poll_fn(|cx| connection.poll_closed(cx));
            let _ = tokio::time::timeout(Duration::from_secs(1), moved).await;
            std::future::pending::<()>().await;
            drop::<(h2::server::Connection<_, Bytes>, _)>((connection, send));
        });
        Ok::<_, &str>(Dialled::from(near))
    };
    let begin = Instant::now();
    let mut stream = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap().stream;
    assert!(stream.read(&mut [0; 1]).await.is_err());
    assert_eq!(begin.elapsed().as_secs(), 30);
}

#[tokio::test]
async fn a_handler_that_never_answers_frees_its_place_when_the_caller_gives_up() {
    let pool = pool();
    let (near, far) = tokio::io::duplex(64 << 10);
    let near = parking_lot::Mutex::new(Some(near));
    let (withdrawn, mut saw) = tokio::sync::mpsc::channel(1024);
    tokio::spawn(async move {
        let settings = Settings::default();
        let handler = move |mut request: Request| {
            let withdrawn = withdrawn.clone();
            async move {
                std::future::poll_fn(|cx| request.poll_withdrawn(cx)).await;
                withdrawn.try_send(()).unwrap();
            }
        };
        let _ = serve(far, &settings, handler, std::future::pending()).await;
    });
    let (key, headers) = (key(1), headers(ECHO));
    let dial = || std::future::ready(near.lock().take().map(Dialled::from).ok_or("dialled twice"));
    let connecting = pool.connect(&key, &headers, dial);
    assert!(tokio::time::timeout(Duration::from_millis(50), connecting).await.is_err());
    tokio::time::timeout(LIMIT, saw.recv()).await.unwrap().unwrap();
}

#[tokio::test]
async fn connection_that_is_cut_off_tells_its_streams_and_is_not_used_again() {
    let (pool, peer) = (pool(), Peer::default());
    let cut = tokio_util::sync::CancellationToken::new();
    let dial = || async {
        let io = peer.dial().await?.io;
        let cut = cut.clone();
        Ok::<_, &str>(Dialled { io, cut_off: Box::pin(cut.cancelled_owned()) })
    };
    let mut first = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap();
    ping(&mut first.stream).await;
    assert!(!first.cut_off.is_cancelled());
    cut.cancel();
    tokio::time::timeout(LIMIT, first.cut_off.cancelled()).await.unwrap();
    let mut second = pool.connect(&key(1), &headers(ECHO), || peer.dial()).await.unwrap();
    ping(&mut second.stream).await;
    assert_eq!(peer.dialled(), 2);
    assert!(!second.cut_off.is_cancelled());
    // Even a stream that nobody reads does not keep the connection.
    until(|| pool.connections() == 1).await;
    let end = tokio::time::timeout(LIMIT, first.stream.read(&mut [0; 1])).await.unwrap();
    assert!(end.is_err());
}

#[tokio::test]
async fn request_that_waits_on_a_connection_that_is_cut_off_ends_with_it() {
    let pool = pool();
    let cut = tokio_util::sync::CancellationToken::new();
    let (asked, mut seen) = tokio::sync::mpsc::channel(1);
    let dial = || {
        let (near, far) = tokio::io::duplex(64 << 10);
        let asked = asked.clone();
        tokio::spawn(async move {
            let settings = Settings::default();
            let handler = move |request: Request| {
                let asked = asked.clone();
                async move {
                    asked.send(()).await.unwrap();
                    std::future::pending::<()>().await;
                    drop(request);
                }
            };
            let _ = serve(far, &settings, handler, std::future::pending()).await;
        });
        let cut_off = Box::pin(cut.clone().cancelled_owned());
        std::future::ready(Ok::<_, &str>(Dialled { io: near, cut_off }))
    };
    let (key, headers) = (key(1), headers(ECHO));
    let connecting = pool.connect(&key, &headers, dial);
    let cutting = async {
        seen.recv().await.unwrap();
        cut.cancel();
    };
    let (connected, ()) =
        tokio::time::timeout(LIMIT, async { tokio::join!(connecting, cutting) }).await.unwrap();
    let cut_off = matches!(connected, Err(ConnectError::Request(RequestError::CutOff)));
    assert!(cut_off, "the answer never comes");
    until(|| pool.connections() == 0).await;
}
