#![allow(clippy::unwrap_used)]

use std::future::pending;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::hbone::tests::{ECHO, LIMIT, headers, key};
use crate::hbone::{Pool, Request, Settings, serve};

#[derive(Default)]
struct Counts {
    received: AtomicU64,
    sent: AtomicU64,
}

impl Counters for Counts {
    fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
    }
    fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
    }
}

impl Counts {
    fn both(&self) -> (u64, u64) {
        (self.received.load(Relaxed), self.sent.load(Relaxed))
    }
}

#[derive(Clone, Copy, Debug)]
enum Path {
    /// TCP, one relay, TCP.
    Plain,
    /// TCP, relay into a tunnel, relay out of it, TCP.
    Tunnel,
}

const PATHS: [Path; 2] = [Path::Plain, Path::Tunnel];

/// Two applications, `client` and `server`, joined by relays.
struct Joined {
    client: TcpStream,
    server: TcpStream,
    near: JoinHandle<Result<(), RelayError<&'static str>>>,
    near_counts: Arc<Counts>,
    far_counts: Arc<Counts>,
    close: Option<oneshot::Sender<()>>,
    pool: Option<Pool>,
}

async fn tcp_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.unwrap(), other.unwrap().0)
}

async fn join(path: Path) -> Joined {
    let (client, downstream) = tcp_pair().await;
    let (upstream, server) = tcp_pair().await;
    let (near_counts, far_counts) = (Arc::<Counts>::default(), Arc::<Counts>::default());
    let (close, closed) = oneshot::channel();
    let closing = async {
        match closed.await {
            Ok(()) => "policy",
            Err(_) => pending().await,
        }
    };
    let counts = near_counts.clone();
    let (near, pool) = match path {
        Path::Plain => {
            let relay = async move { tcp_tcp(downstream, upstream, &*counts, closing).await };
            (tokio::spawn(relay), None)
        }
        Path::Tunnel => {
            let (pool, stream) = tunnel(upstream, far_counts.clone()).await;
            let downstream = Tcp::new(downstream);
            let relay = async move { tcp_hbone(downstream, stream, counts).run(closing).await };
            (tokio::spawn(relay), Some(pool))
        }
    };
    Joined { client, server, near, near_counts, far_counts, close: Some(close), pool }
}

/// A tunnel at whose far end `upstream` is relayed.
async fn tunnel(upstream: TcpStream, counts: Arc<Counts>) -> (Pool, HboneStream) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let upstream = Mutex::new(Some(upstream));
    tokio::spawn(async move {
        let handler = move |request: Request| {
            let upstream = upstream.lock().unwrap().take().unwrap();
            let counts = counts.clone();
            async move {
                let stream = request.accept(None).unwrap();
                let _ = hbone_tcp(stream, upstream, counts).run(pending::<&str>()).await;
            }
        };
        let _ = serve(far, &Settings::default(), handler, pending()).await;
    });
    let pool = Pool::new(Settings::default());
    let near = Mutex::new(Some(near));
    let dial = || {
        let near = near.lock().unwrap().take();
        std::future::ready(near.map(Into::into).ok_or("dialled twice"))
    };
    let accepted = pool.connect(&key(1), &headers(ECHO), dial).await.unwrap();
    (pool, accepted.stream)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.expect("takes too long")
}

/// What a reader gets until the end, and how it ended.
async fn read_all(stream: &mut TcpStream) -> (Vec<u8>, Option<ErrorKind>) {
    let mut all = Vec::new();
    let end = within(stream.read_to_end(&mut all)).await;
    (all, end.err().map(|error| error.kind()))
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().unwrap();
}

/// Writes until nobody takes more.
async fn write_until_blocked(stream: &mut TcpStream) {
    let chunk = vec![5; 256 << 10];
    while tokio::time::timeout(Duration::from_millis(300), stream.write(&chunk)).await.is_ok() {}
}

#[tokio::test]
async fn each_direction_ends_by_itself_and_bytes_are_counted() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.client.write_all(b"question").await.unwrap();
        joined.client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.server).await, (b"question".to_vec(), None));
        joined.server.write_all(b"long answer").await.unwrap();
        joined.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.client).await, (b"long answer".to_vec(), None));
        within(joined.near).await.unwrap().unwrap();
        assert_eq!(joined.near_counts.both(), (8, 11), "{path:?}");
        if matches!(path, Path::Tunnel) {
            assert_eq!(joined.far_counts.both(), (8, 11));
        }
    }
}

#[tokio::test]
async fn the_server_may_end_first() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.server.write_all(b"greeting").await.unwrap();
        joined.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.client).await, (b"greeting".to_vec(), None));
        joined.client.write_all(b"thanks").await.unwrap();
        joined.client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.server).await, (b"thanks".to_vec(), None), "{path:?}");
        within(joined.near).await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_whole_both_ways_at_once() {
    for path in PATHS {
        let Joined { client, server, near, near_counts, pool: _pool, .. } = join(path).await;
        let size = 16 << 20;
        // Made and compared piece by piece, which costs an unoptimised build much less.
        let pattern = |seed: usize| {
            let piece: Vec<u8> = (0..65_537).map(|n| (n * 31 + n / 4099 + seed) as u8).collect();
            let mut all = piece.repeat(size / piece.len() + 1);
            all.truncate(size);
            all
        };
        let send = |seed, mut half: tokio::net::tcp::OwnedWriteHalf| async move {
            half.write_all(&pattern(seed)).await.unwrap();
            half.shutdown().await.unwrap();
        };
        let check = |seed, mut half: tokio::net::tcp::OwnedReadHalf| async move {
            let mut all = Vec::new();
            half.read_to_end(&mut all).await.unwrap();
            assert!(all == pattern(seed));
        };
        let ((cr, cw), (sr, sw)) = (client.into_split(), server.into_split());
        within(async { tokio::join!(send(1, cw), send(2, sw), check(1, sr), check(2, cr)) }).await;
        within(near).await.unwrap().unwrap();
        assert_eq!(near_counts.both(), (size as u64, size as u64), "{path:?}");
    }
}

#[tokio::test]
async fn a_reset_of_the_client_resets_the_idle_server_side() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.client.write_all(b"half a question").await.unwrap();
        joined.server.read_exact(&mut [0; 15]).await.unwrap();
        reset(joined.client);
        let (_, end) = read_all(&mut joined.server).await;
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{path:?}");
        let error = within(joined.near).await.unwrap().unwrap_err();
        assert!(matches!(error, RelayError::Client(_)) && error.is_reset());
    }
}

#[tokio::test]
async fn a_reset_of_the_server_cuts_an_answer_off_visibly() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.server.write_all(b"half an answer").await.unwrap();
        joined.client.read_exact(&mut [0; 14]).await.unwrap();
        reset(joined.server);
        let (_, end) = read_all(&mut joined.client).await;
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{path:?}");
        let error = within(joined.near).await.unwrap().unwrap_err();
        assert!(error.is_reset(), "{error}");
    }
}

#[tokio::test]
async fn a_reset_passes_a_direction_that_is_blocked() {
    for path in PATHS {
        let mut joined = join(path).await;
        write_until_blocked(&mut joined.client).await;
        reset(joined.client);
        within(joined.near).await.unwrap().unwrap_err();
        let (_, end) = read_all(&mut joined.server).await;
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{path:?}");

        let mut joined = join(path).await;
        write_until_blocked(&mut joined.client).await;
        reset(joined.server);
        within(joined.near).await.unwrap().unwrap_err();
        let end = within(joined.client.write_all(&vec![0; 1 << 20])).await;
        let kind = end.unwrap_err().kind();
        assert!(matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{path:?}");
    }
}

#[tokio::test]
async fn a_reset_after_a_half_close_is_still_a_reset() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.client.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.server).await, (Vec::new(), None));
        reset(joined.client);
        let refused = async {
            while joined.server.write_all(b"answer").await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        within(refused).await;
        within(joined.near).await.unwrap().unwrap_err();

        let mut joined = join(path).await;
        joined.server.shutdown().await.unwrap();
        assert_eq!(read_all(&mut joined.client).await, (Vec::new(), None));
        reset(joined.server);
        let refused = async {
            while joined.client.write_all(b"more").await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        within(refused).await;
        let end = within(joined.near).await.unwrap();
        assert!(end.is_err(), "{path:?}");
    }
}

#[tokio::test]
async fn writing_to_a_side_that_has_closed_fails() {
    for path in PATHS {
        let Joined { mut client, server, near, pool: _pool, .. } = join(path).await;
        drop(server);
        assert_eq!(read_all(&mut client).await, (Vec::new(), None));
        let refused = async {
            while client.write_all(b"more").await.is_ok() {
                tokio::task::yield_now().await;
            }
        };
        within(refused).await;
        assert!(within(near).await.unwrap().is_err(), "{path:?}");
    }
}

#[tokio::test]
async fn closing_with_unread_data_is_a_reset() {
    for path in PATHS {
        let Joined { mut client, mut server, near, pool: _pool, .. } = join(path).await;
        server.write_all(b"greeting").await.unwrap();
        client.read_exact(&mut [0; 8]).await.unwrap();
        client.write_all(&[0; 1000]).await.unwrap();
        server.read_exact(&mut [0; 1]).await.unwrap();
        drop(server);
        let (_, end) = read_all(&mut client).await;
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{path:?}");
        assert!(within(near).await.unwrap().is_err());
    }
}

#[tokio::test]
async fn an_answer_before_the_reset_arrives() {
    for path in PATHS {
        let Joined { mut client, mut server, near: _near, pool: _pool, .. } = join(path).await;
        client.write_all(&[0; 1000]).await.unwrap();
        server.read_exact(&mut [0; 1]).await.unwrap();
        server.write_all(b"413").await.unwrap();
        drop(server);
        let (answer, end) = read_all(&mut client).await;
        assert_eq!(answer, b"413", "{path:?}");
        assert_eq!(end, Some(ErrorKind::ConnectionReset), "{path:?}");
    }
}

#[tokio::test]
async fn urgent_data_stays_in_its_place_and_stops_nothing() {
    const BULK: usize = 4 << 20;
    for path in PATHS {
        let Joined { client, mut server, near: _near, pool: _pool, .. } = join(path).await;
        let writer = std::thread::spawn(move || {
            let mut client = client.into_std().unwrap();
            client.set_nonblocking(false).unwrap();
            let urgent = |client: &std::net::TcpStream| {
                socket2::SockRef::from(client).send_out_of_band(b"!").unwrap();
            };
            for size in [6, BULK] {
                std::io::Write::write_all(&mut client, &vec![b'x'; size]).unwrap();
                urgent(&client);
            }
            std::io::Write::write_all(&mut client, b"end").unwrap();
            urgent(&client);
        });
        let (got, end) = read_all(&mut server).await;
        writer.join().unwrap();
        assert_eq!(got.len(), 6 + 1 + BULK + 1 + 3 + 1, "{path:?}");
        let marks: Vec<usize> = (0..got.len()).filter(|at| got[*at] == b'!').collect();
        assert_eq!(marks, [6, 7 + BULK, got.len() - 1], "{path:?}");
        assert_eq!(end, None, "{path:?}");
    }
}

#[tokio::test]
async fn closing_by_policy_resets_both_sides_with_the_reason() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.client.write_all(b"x").await.unwrap();
        joined.server.read_exact(&mut [0; 1]).await.unwrap();
        joined.close.take().unwrap().send(()).unwrap();
        let end = within(joined.near).await.unwrap();
        assert!(matches!(end, Err(RelayError::Closed("policy"))));
        assert_eq!(read_all(&mut joined.client).await.1, Some(ErrorKind::ConnectionReset));
        assert_eq!(read_all(&mut joined.server).await.1, Some(ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn a_relay_that_is_dropped_resets_both_sides() {
    for path in PATHS {
        let mut joined = join(path).await;
        joined.client.write_all(b"x").await.unwrap();
        joined.server.read_exact(&mut [0; 1]).await.unwrap();
        joined.near.abort();
        assert_eq!(read_all(&mut joined.client).await.1, Some(ErrorKind::ConnectionReset));
        assert_eq!(read_all(&mut joined.server).await.1, Some(ErrorKind::ConnectionReset));
    }
}

#[tokio::test]
async fn a_tunnel_that_breaks_resets_both_applications() {
    let mut joined = join(Path::Tunnel).await;
    joined.client.write_all(b"x").await.unwrap();
    joined.server.read_exact(&mut [0; 1]).await.unwrap();
    drop(joined.pool.take());
    assert_eq!(read_all(&mut joined.client).await.1, Some(ErrorKind::ConnectionReset));
    assert_eq!(read_all(&mut joined.server).await.1, Some(ErrorKind::ConnectionReset));
    let end = within(joined.near).await.unwrap().unwrap_err();
    assert!(matches!(end, RelayError::Tunnel(StreamError::Broken(_))), "{end:?}");
}

#[tokio::test]
async fn a_stalled_reader_bounds_what_is_taken_from_the_writer() {
    for path in PATHS {
        let mut joined = join(path).await;
        write_until_blocked(&mut joined.client).await;
        let (taken, _) = joined.near_counts.both();
        // Socket buffers at each hop are the kernel's; ours is the stream window.
        assert!(taken < 32 << 20, "{taken} over {path:?}");
    }
}
