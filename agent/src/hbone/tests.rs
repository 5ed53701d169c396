#![allow(clippy::unwrap_used)]

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::client::{Accepted, RequestError};
use super::headers::{Baggage, Forwarded, ReceivedHeaders, TraceParent};
use super::pool::ConnectError;
use super::*;

/// What the test peer does with a stream, chosen by the port of its authority.
pub(crate) const ECHO: u16 = 1;
pub(crate) const STALL: u16 = 2;
pub(crate) const REFUSE: u16 = 3;
/// Resets when a byte has come.
pub(crate) const RESET: u16 = 4;
/// Reads all, answers its length, ends.
pub(crate) const COUNT: u16 = 5;
/// Sends without end.
pub(crate) const POUR: u16 = 6;
/// Sends END_STREAM, reads nothing.
pub(crate) const END: u16 = 7;
/// Sends END_STREAM and, when a byte has come, NO_ERROR.
pub(crate) const END_AND_STOP: u16 = 8;

pub(crate) const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn headers(port: u16) -> ConnectHeaders {
    ConnectHeaders {
        authority: format!("10.0.0.1:{port}").parse().unwrap(),
        baggage: Baggage { cluster: Some("c1".into()), ..Baggage::default() },
        forwarded: Forwarded { client: "10.0.0.2:5".parse().unwrap(), host: None },
        traceparent: TraceParent { trace_id: 1, parent_id: 1 },
        x_forwarded_network: None,
    }
}

pub(crate) fn key(last: u8) -> PoolKey {
    let identity = culvert_core::identity::Identity::new("td", "ns", "sa");
    PoolKey {
        source: identity.clone(),
        expect: vec![identity],
        next_hop: culvert_core::addr::HboneAddr::new(
            format!("10.0.0.{last}:15008").parse().unwrap(),
        ),
        source_ip: "10.0.0.2".parse().unwrap(),
    }
}

/// A node that peers dial over in-memory pipes.
#[derive(Clone, Default)]
pub(crate) struct Peer {
    pub(crate) settings: Settings,
    /// Served by plain `h2` with this stream and connection window, instead of by our server.
    pub(crate) foreign: Option<(u32, u32)>,
    pub(crate) foreign_streams: Option<u32>,
    pub(crate) dials: Arc<AtomicUsize>,
    /// Bytes that stalled streams of a foreign peer hold.
    pub(crate) held: Arc<AtomicU64>,
}

impl Peer {
    pub(crate) fn foreign(stream: u32, connection: u32) -> Self {
        Self { foreign: Some((stream, connection)), ..Self::default() }
    }

    pub(crate) async fn dial(&self) -> Result<Dialled<DuplexStream>, &'static str> {
        self.dials.fetch_add(1, Relaxed);
        let (near, far) = tokio::io::duplex(256 << 10);
        let peer = self.clone();
        tokio::spawn(async move {
            match peer.foreign {
                Some((stream, connection)) => peer.serve_foreign(far, stream, connection).await,
                None => {
                    let never = std::future::pending();
                    let _ = serve(far, &peer.settings, answer, never).await;
                }
            }
        });
        Ok(near.into())
    }

    pub(crate) fn dialled(&self) -> usize {
        self.dials.load(Relaxed)
    }

    async fn serve_foreign(&self, io: DuplexStream, stream: u32, connection: u32) {
        let mut builder = h2::server::Builder::new();
        builder.initial_window_size(stream).initial_connection_window_size(connection);
        if let Some(streams) = self.foreign_streams {
            builder.max_concurrent_streams(streams);
        }
        let Ok(mut connection) = builder.handshake::<_, Bytes>(io).await else { return };
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            let port = request.uri().authority().unwrap().port_u16().unwrap();
            let mut body = request.into_body();
            let held = self.held.clone();
            tokio::spawn(async move {
                let mut send = respond.send_response(Response::new(()), false).unwrap();
                while let Some(Ok(data)) = body.data().await {
                    if port == STALL {
                        held.fetch_add(data.len() as u64, Relaxed);
                        continue;
                    }
                    body.flow_control().release_capacity(data.len()).unwrap();
                    let _ = send.send_data(data, false);
                }
                let _ = send.send_data(Bytes::new(), true);
            });
        }
    }
}

/// Behaves as the port says.
pub(crate) async fn answer(request: Request) {
    let port = request.authority().rsplit_once(':').map_or(0, |(_, port)| port.parse().unwrap());
    if port == REFUSE {
        let mut headers = HeaderMap::new();
        headers.insert("x-why", HeaderValue::from_static("policy ns/p"));
        return request.refuse(StatusCode::UNAUTHORIZED, headers);
    }
    let Ok(mut stream) = request.accept(Some("service.name=server")) else { return };
    match port {
        STALL => until_reset(&mut stream).await,
        RESET => {
            stream.read_exact(&mut [0; 1]).await.unwrap();
            stream.reset(Reason::CANCEL);
        }
        COUNT => {
            let mut all = Vec::new();
            if stream.read_to_end(&mut all).await.is_ok() {
                stream.write_all(all.len().to_string().as_bytes()).await.unwrap();
                stream.shutdown().await.unwrap();
            }
        }
        POUR => while stream.write_all(&[7; 10_000]).await.is_ok() {},
        END => {
            stream.finish().unwrap();
            until_reset(&mut stream).await;
        }
        END_AND_STOP => {
            stream.write_all(b"enough").await.unwrap();
            stream.finish().unwrap();
            // A reset overtakes what has not left yet, so the client says when it has all.
            stream.read_exact(&mut [0; 1]).await.unwrap();
            stream.reset(Reason::NO_ERROR);
        }
        _ => {
            let (mut reader, mut writer) = tokio::io::split(stream);
            if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
                let _ = writer.shutdown().await;
            }
        }
    }
}

async fn until_reset(stream: &mut HboneStream) {
    std::future::poll_fn(|cx| stream.poll_peer_reset(cx)).await;
}

pub(crate) async fn connect(
    pool: &Pool,
    peer: &Peer,
    port: u16,
) -> Result<Accepted, ConnectError<&'static str>> {
    let (key, headers) = (key(1), headers(port));
    let result = pool.connect(&key, &headers, || peer.dial());
    tokio::time::timeout(LIMIT, result).await.expect("connect hangs")
}

pub(crate) async fn stream(pool: &Pool, peer: &Peer, port: u16) -> HboneStream {
    connect(pool, peer, port).await.unwrap_or_else(|error| panic!("{error}")).stream
}

/// Sends and waits for the echo.
pub(crate) async fn ping(stream: &mut HboneStream) {
    let mut echo = [0; 5];
    let round = async {
        stream.write_all(b"hello").await.unwrap();
        stream.read_exact(&mut echo).await.unwrap();
    };
    tokio::time::timeout(LIMIT, round).await.expect("no echo");
    assert_eq!(&echo, b"hello");
}

/// Writes until the stream takes no more for a while; returns how many bytes it took.
async fn fill(stream: &mut HboneStream) -> u64 {
    let mut taken = 0;
    let chunk = [1; 16 << 10];
    loop {
        match tokio::time::timeout(Duration::from_millis(500), stream.write(&chunk)).await {
            Ok(count) => taken += count.unwrap() as u64,
            Err(_) => return taken,
        }
    }
}

#[tokio::test]
async fn each_direction_ends_by_itself() {
    let (pool, peer) = (Pool::new(Settings::default()), Peer::default());
    let accepted = connect(&pool, &peer, COUNT).await.unwrap();
    let answer = ReceivedHeaders::parse(&accepted.headers);
    assert_eq!(answer.baggage.unwrap().service_name.unwrap(), "server");
    let mut stream = accepted.stream;
    stream.write_all(&vec![1; 3 << 20]).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, (3 << 20).to_string());

    let mut stream = self::stream(&pool, &peer, END).await;
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    stream.write_all(b"still open").await.unwrap();
}

#[tokio::test]
async fn refusal_carries_status_and_reason() {
    let (pool, peer) = (Pool::new(Settings::default()), Peer::default());
    let Err(ConnectError::Request(RequestError::Refused { status, headers })) =
        connect(&pool, &peer, REFUSE).await
    else {
        panic!("not refused")
    };
    assert_eq!(
        (status, headers["x-why"].as_bytes()),
        (StatusCode::UNAUTHORIZED, &b"policy ns/p"[..])
    );
    ping(&mut stream(&pool, &peer, ECHO).await).await;
    assert_eq!(peer.dialled(), 1);
}

#[tokio::test]
async fn a_reset_is_seen_while_reading_and_while_only_sending() {
    let (pool, peer) = (Pool::new(Settings::default()), Peer::default());
    let mut stream = self::stream(&pool, &peer, RESET).await;
    stream.write_all(b"!").await.unwrap();
    let error = stream.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);

    let mut stream = self::stream(&pool, &peer, END_AND_STOP).await;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "enough");
    stream.write_all(b"!").await.unwrap();
    let error = tokio::time::timeout(LIMIT, std::future::poll_fn(|cx| stream.poll_peer_reset(cx)));
    assert!(matches!(error.await.unwrap(), StreamError::Reset(Reason::NO_ERROR)));
}

/// 100 readers stall, mixed with 20 that do not; the 20 are as quick as ever, before and after.
async fn stalled_readers_do_not_stall_others(peer: Peer, held_per_stream: u64) {
    let pool = Arc::new(Pool::new(Settings::default()));
    let mut echoes = Vec::new();
    let mut stalled = Vec::new();
    for n in 0..100 {
        if n % 10 == 0 {
            echoes.push(stream(&pool, &peer, ECHO).await);
        }
        let mut stalling = stream(&pool, &peer, STALL).await;
        stalled.push(tokio::spawn(async move {
            let taken = fill(&mut stalling).await;
            (stalling, taken)
        }));
    }
    let mut held = Vec::new();
    for stalling in stalled {
        held.push(stalling.await.unwrap());
    }
    for _ in 0..10 {
        echoes.push(stream(&pool, &peer, ECHO).await);
    }
    for echo in &mut echoes {
        let begin = std::time::Instant::now();
        ping(echo).await;
        assert!(begin.elapsed() < Duration::from_secs(10), "slow beside stalled readers");
        let big = vec![3; 1 << 20];
        let mut back = vec![0; big.len()];
        let (mut reader, mut writer) = tokio::io::split(echo);
        let round = async { tokio::join!(writer.write_all(&big), reader.read_exact(&mut back)) };
        let (sent, read) = tokio::time::timeout(LIMIT, round).await.expect("bulk stalls");
        sent.unwrap();
        read.unwrap();
        assert_eq!(big, back);
    }
    for (_, taken) in &held {
        assert!(*taken > 0 && *taken <= held_per_stream, "{taken} of {held_per_stream}");
    }
    assert!(peer.held.load(Relaxed) <= 100 * held_per_stream);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_at_our_own_server_do_not_stall_others() {
    let settings = Settings::default();
    stalled_readers_do_not_stall_others(Peer::default(), settings.stream_window.into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_at_a_peer_with_16_mib_for_all_do_not_stall_others() {
    stalled_readers_do_not_stall_others(Peer::foreign(4 << 20, 16 << 20), 3 << 20).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_at_a_peer_with_default_windows_do_not_stall_others() {
    stalled_readers_do_not_stall_others(Peer::foreign(65_535, 65_535), 65_535).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_readers_of_answers_do_not_stall_others() {
    let (pool, peer) = (Pool::new(Settings::default()), Peer::default());
    let mut pouring = Vec::new();
    for _ in 0..100 {
        pouring.push(stream(&pool, &peer, POUR).await);
    }
    for stream in &mut pouring {
        stream.read_exact(&mut [0; 1000]).await.unwrap();
    }
    for _ in 0..20 {
        ping(&mut stream(&pool, &peer, ECHO).await).await;
    }
    let window = Settings::default().stream_window as usize;
    for stream in &mut pouring {
        let _ = tokio::time::timeout(
            Duration::from_millis(5),
            std::future::poll_fn(|cx| stream.poll_fill(cx)),
        )
        .await;
        let mut slices = [IoSlice::new(&[]); 4096];
        let filled = stream.received(&mut slices);
        let bytes: usize = slices.iter().take(filled).map(|slice| slice.len()).sum();
        assert!(bytes <= window, "{bytes} of {window}");
    }
}

#[tokio::test]
async fn many_tiny_messages_to_a_stalled_reader_cost_their_size_only() {
    let (near, far) = tokio::io::duplex(64 << 10);
    let settings = Settings { stream_window: 256 << 10, ..Settings::default() };
    let served = settings.clone();
    tokio::spawn(async move {
        let reading_late = |request: Request| async move {
            let mut stream = request.accept(None).unwrap();
            // Takes in without consuming, as a relay with a slow application does.
            let end = std::future::poll_fn(|cx| stream.poll_fill(cx)).await;
            assert!(end.is_ok());
            let mut slices = [IoSlice::new(&[]); 4096];
            let chunks = stream.received(&mut slices);
            let bytes: usize = slices.iter().take(chunks).map(|slice| slice.len()).sum();
            stream.write_all(format!("{chunks} {bytes}").as_bytes()).await.unwrap();
            stream.finish().unwrap();
        };
        let _ = serve(far, &served, reading_late, std::future::pending()).await;
    });
    let (connection, driver) = client::handshake(near, &settings);
    tokio::spawn(driver);
    let request = headers(1).request().unwrap();
    let mut stream = connection.connect(request, &mut First::none()).await.unwrap().stream;
    for _ in 0..100_000 {
        stream.write_all(b"x").await.unwrap();
    }
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (chunks, bytes) = answer.split_once(' ').unwrap();
    assert_eq!(bytes, "100000");
    assert!(chunks.parse::<usize>().unwrap() < 100, "{chunks} chunks");
}
