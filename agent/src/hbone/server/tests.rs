#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use http::Request as HttpRequest;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::*;
use crate::hbone::tests::{LIMIT, answer};

fn served(settings: Settings) -> (DuplexStream, tokio::task::JoinHandle<Result<(), ServeError>>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let task =
        tokio::spawn(async move { serve(far, &settings, answer, std::future::pending()).await });
    (near, task)
}

#[tokio::test(start_paused = true)]
async fn a_client_without_preface_is_closed_after_the_limit() {
    let (mut near, task) = served(Settings::default());
    let mut all = Vec::new();
    near.read_to_end(&mut all).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(ServeError::NoPreface(_))));
}

#[tokio::test]
async fn a_client_that_breaks_the_protocol_is_at_fault() {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let another = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec();
    let ping = [PREFACE, b"\0\0\x03\x06\0\0\0\0\0xyz"].concat();
    for (bytes, told) in [(another, "http2 handshake failed"), (ping, "h2 failed")] {
        let (mut client, serving) = served(Settings::default());
        client.write_all(&bytes).await.unwrap();
        let error = serving.await.unwrap().unwrap_err();
        assert!(error.is_fault_of_peer() && error.to_string().starts_with(told), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_answers_no_ping_is_closed() {
    let (mut near, task) = served(Settings::default());
    near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut all = Vec::new();
    near.read_to_end(&mut all).await.unwrap();
    assert!(matches!(task.await.unwrap(), Err(ServeError::PingTimeout(_))));
    // GOAWAY with NO_ERROR is the last frame: 8 bytes of payload after its header.
    assert_eq!(all.get(all.len() - 17..).unwrap()[3], 7);
    assert_eq!(all.get(all.len() - 4..).unwrap(), [0; 4]);
}

#[tokio::test]
async fn method_and_authority_reach_the_handler_as_sent() {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (seen, mut saw) = tokio::sync::mpsc::channel(1024);
    tokio::spawn(async move {
        let handler = move |request: Request| {
            let seen = seen.clone();
            async move {
                seen.try_send((request.method().clone(), request.authority().to_owned())).unwrap();
                request.refuse(StatusCode::BAD_REQUEST, HeaderMap::new());
            }
        };
        let _ = serve(far, &Settings::default(), handler, std::future::pending()).await;
    });
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(connection);
    let get = HttpRequest::get("https://10.1.0.7:8080/").body(()).unwrap();
    let connect = HttpRequest::connect("no-port.example").body(()).unwrap();
    for (request, method, authority) in
        [(get, "GET", "10.1.0.7:8080"), (connect, "CONNECT", "no-port.example")]
    {
        let (response, _) = send.send_request(request, false).unwrap();
        let response = response.await.unwrap();
        assert_eq!(response.status(), StatusCode::BAD_REQUEST);
        assert!(response.body().is_end_stream());
        let (seen_method, seen_authority) = saw.recv().await.unwrap();
        assert_eq!((seen_method.as_str(), seen_authority.as_str()), (method, authority));
    }
}

#[tokio::test]
async fn headers_beyond_the_limit_end_only_their_request() {
    let (near, _task) = served(Settings::default());
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(connection);
    let big = HttpRequest::connect("10.0.0.1:1").header("x", "y".repeat(70_000)).body(()).unwrap();
    let (response, _) = send.send_request(big, false).unwrap();
    let refused = response.await;
    assert!(refused.is_err() || refused.is_ok_and(|response| response.status() == 431));
    let fine = HttpRequest::connect("10.0.0.1:1").body(()).unwrap();
    let (response, _stream) = send.send_request(fine, false).unwrap();
    assert_eq!(response.await.unwrap().status(), StatusCode::OK);
}

#[tokio::test]
async fn requests_that_are_reset_at_once_do_not_pile_up() {
    static RUNNING: AtomicUsize = AtomicUsize::new(0);
    static MOST: AtomicUsize = AtomicUsize::new(0);
    let (near, far) = tokio::io::duplex(64 << 10);
    let settings = Settings { max_streams: 8, ..Settings::default() };
    let task = tokio::spawn(async move {
        let handler = |_request: Request| async move {
            MOST.fetch_max(RUNNING.fetch_add(1, Relaxed) + 1, Relaxed);
            std::future::pending::<()>().await;
        };
        serve(far, &settings, handler, std::future::pending()).await
    });
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..200 {
        let Ok(mut ready) = send.ready().await else { break };
        let request = HttpRequest::connect("10.0.0.1:1").body(()).unwrap();
        if let Ok((_, mut stream)) = ready.send_request(request, false) {
            tokio::task::yield_now().await;
            stream.send_reset(h2::Reason::CANCEL);
        }
        send = ready;
    }
    let ended = tokio::time::timeout(LIMIT, task).await.expect("a flood is served on");
    assert!(matches!(ended.unwrap(), Err(ServeError::Connection(_))));
    assert!(MOST.load(Relaxed) <= 8);
}

#[tokio::test(start_paused = true)]
async fn a_connection_whose_window_is_held_by_stalled_readers_is_retired() {
    let (near, _task) = served(Settings::default());
    let (mut send, connection) = h2::client::handshake(near).await.unwrap();
    tokio::spawn(connection);
    let pour = HttpRequest::connect("10.0.0.1:6").body(()).unwrap();
    let (response, _stream) = send.send_request(pour, false).unwrap();
    let mut stalled = response.await.unwrap().into_body();
    let first = stalled.data().await.unwrap().unwrap();
    let retired = async {
        while let Ok(ready) = send.clone().ready().await {
            drop(ready);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, retired).await.expect("goes on with a used-up window");
    stalled.flow_control().release_capacity(first.len()).unwrap();
    assert!(stalled.data().await.unwrap().is_ok(), "its streams go on");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_bytes_after_the_preface_end_in_order(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut near, task) = served(Settings::default());
            near.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
            let _ = near.write_all(&bytes).await;
            drop(near);
            let ended = tokio::time::timeout(LIMIT, task).await.expect("never ends");
            assert!(ended.is_ok(), "panicked");
        });
    }
}
