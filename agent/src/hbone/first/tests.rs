#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use bytes::Bytes;
use h2::Reason;
use http::{Response, StatusCode};
use parking_lot::Mutex;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;

use super::*;
use crate::hbone::client::RequestError;
use crate::hbone::pool::ConnectError;
use crate::hbone::tests::{COUNT, LIMIT, Peer, headers, key, ping};
use crate::hbone::{Dialled, Pool, Settings};

/// An application that says something at once, and more when it is asked again.
#[derive(Default)]
struct Says(Mutex<Vec<&'static [u8]>>, Option<io::ErrorKind>);

impl Source for Says {
    fn poll_ready(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.0.lock().is_empty() && self.1.is_none() {
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(kind) = self.1 {
            return Err(kind.into());
        }
        let mut texts = self.0.lock();
        let Some(text) = texts.pop() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let count = text.len().min(buffer.len());
        buffer[..count].copy_from_slice(&text[..count]);
        Ok(count)
    }
}

/// A peer that refuses the first `refused` requests unseen, and answers the next one only when data
/// has come with it. Tells what came with each.
struct Awaiting {
    refused: usize,
    dials: AtomicUsize,
    came: mpsc::Sender<Bytes>,
}

impl Awaiting {
    fn new(refused: usize) -> (Self, mpsc::Receiver<Bytes>) {
        let (came, coming) = mpsc::channel(16);
        (Self { refused, dials: AtomicUsize::new(0), came }, coming)
    }

    async fn dial(&self) -> Result<Dialled<tokio::io::DuplexStream>, &'static str> {
        let is_refused = self.dials.fetch_add(1, Relaxed) < self.refused;
        let (near, far) = tokio::io::duplex(64 << 10);
        let came = self.came.clone();
        tokio::spawn(async move {
            let mut connection = h2::server::handshake(far).await.unwrap();
            let (request, mut respond) = connection.accept().await.unwrap().unwrap();
            let mut body = request.into_body();
            let answered = async move {
                came.send(body.data().await.unwrap().unwrap()).await.unwrap();
                if is_refused {
                    return respond.send_reset(Reason::REFUSED_STREAM);
                }
                let mut send = respond.send_response(Response::new(()), false).unwrap();
                while let Some(Ok(data)) = body.data().await {
                    body.flow_control().release_capacity(data.len()).unwrap();
                    let _ = send.send_data(data, false);
                }
            };
            tokio::spawn(answered);
            let _ = std::future::poll_fn(|cx| connection.poll_closed(cx)).await;
        });
        Ok(near.into())
    }
}

#[tokio::test]
async fn what_an_application_says_at_once_does_not_wait_for_the_answer() {
    let (peer, mut coming) = Awaiting::new(0);
    let says = Says(Mutex::new(vec![b"later", b"at once"]), None);
    let (pool, mut first) = (Pool::new(Settings::default()), First::of(&says));
    let (key, headers) = (key(1), headers(COUNT));
    let connecting = pool.connect_sending(&mut first, &key, &headers, || peer.dial());
    let mut accepted = tokio::time::timeout(LIMIT, connecting).await.unwrap().unwrap();
    assert_eq!(coming.recv().await.unwrap(), "at once");
    assert_eq!(first.count(), 7);
    assert_eq!(says.0.lock().len(), 1, "more is read only when there is a tunnel");
    ping(&mut accepted.stream).await;
}

#[tokio::test]
async fn a_request_that_is_repeated_elsewhere_takes_its_first_bytes_along() {
    let (peer, mut coming) = Awaiting::new(2);
    let says = Says(Mutex::new(vec![b"at once"]), None);
    let (pool, mut first) = (Pool::new(Settings::default()), First::of(&says));
    let (key, headers) = (key(1), headers(COUNT));
    let connecting = pool.connect_sending(&mut first, &key, &headers, || peer.dial());
    let mut accepted = tokio::time::timeout(LIMIT, connecting).await.unwrap().unwrap();
    for _ in 0..3 {
        assert_eq!(coming.recv().await.unwrap(), "at once");
    }
    assert_eq!((first.count(), peer.dials.load(Relaxed)), (7, 3));
    ping(&mut accepted.stream).await;
}

#[tokio::test]
async fn first_bytes_beyond_a_small_window_arrive_in_order_before_what_follows() {
    static LONG: [u8; 10_000] = {
        let mut bytes = [0; 10_000];
        let mut at = 0;
        while at < bytes.len() {
            bytes[at] = (at % 251) as u8;
            at += 1;
        }
        bytes
    };
    let peer = Peer::foreign(700, 100_000);
    let says = Says(Mutex::new(vec![&LONG[8_000..], &LONG[..8_000]]), None);
    let (pool, mut first) = (Pool::new(Settings::default()), First::of(&says));
    let (key, headers) = (key(1), headers(COUNT));
    let connecting = pool.connect_sending(&mut first, &key, &headers, || peer.dial());
    let mut stream = tokio::time::timeout(LIMIT, connecting).await.unwrap().unwrap().stream;
    let mut all = Vec::new();
    let echoed = async {
        let mut piece = [0; 1024];
        let known = first.count() as usize;
        while all.len() < known {
            let count = stream.read(&mut piece).await.unwrap();
            all.extend_from_slice(&piece[..count]);
        }
    };
    tokio::time::timeout(LIMIT, echoed).await.unwrap();
    assert_eq!(all, LONG[..all.len()]);
}

#[tokio::test]
async fn what_a_refused_request_took_along_is_gone_with_it() {
    let says = Says(Mutex::new(vec![b"at once"]), None);
    let (pool, peer, mut first) =
        (Pool::new(Settings::default()), Peer::default(), First::of(&says));
    let (key, headers) = (key(1), headers(crate::hbone::tests::REFUSE));
    let connecting = pool.connect_sending(&mut first, &key, &headers, || peer.dial());
    let refused = tokio::time::timeout(LIMIT, connecting).await.unwrap().err().unwrap();
    let ConnectError::Request(RequestError::Refused { status, .. }) = refused else {
        panic!("{refused}")
    };
    assert_eq!(status, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn an_application_that_fails_before_the_answer_ends_the_request() {
    let (peer, _coming) = Awaiting::new(0);
    let says = Says(Mutex::default(), Some(io::ErrorKind::ConnectionReset));
    let (pool, mut first) = (Pool::new(Settings::default()), First::of(&says));
    let (key, headers) = (key(1), headers(COUNT));
    let connecting = pool.connect_sending(&mut first, &key, &headers, || peer.dial());
    let failed = tokio::time::timeout(LIMIT, connecting).await.unwrap().err().unwrap();
    let ConnectError::Request(RequestError::Source(error)) = failed else { panic!("{failed}") };
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}
