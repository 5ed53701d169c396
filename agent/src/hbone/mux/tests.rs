#![allow(clippy::unwrap_used)]

use std::task::Waker;

use http::{HeaderValue, Request, StatusCode};
use proptest::prelude::*;

use super::super::frame::{flag, kind};
use super::*;

fn settings() -> Settings {
    let streams_per_connection = 4;
    Settings { stream_window: 1000, max_streams: 4, streams_per_connection, ..Settings::default() }
}

/// Two ends without sockets.
struct Pair {
    client: Arc<Mux>,
    server: Arc<Mux>,
}

impl Pair {
    fn new() -> Self {
        let pair = Self {
            client: Mux::new(Role::Client, &settings()),
            server: Mux::new(Role::Server, &settings()),
        };
        pair.exchange().unwrap();
        pair
    }

    /// Moves what waits at either end, until nothing does.
    fn exchange(&self) -> Result<(), ConnectionError> {
        loop {
            let (there, back) = (waiting(&self.client), waiting(&self.server));
            if there.is_empty() && back.is_empty() {
                return Ok(());
            }
            self.server.lock().receive(&there)?;
            self.client.lock().receive(&back)?;
        }
    }

    /// Opens a stream and answers it.
    fn open(&self) -> u32 {
        let id = self.client.lock().open(&block()).unwrap();
        self.exchange().unwrap();
        let arrived = self.server.lock().accept().unwrap();
        assert_eq!((arrived.stream, arrived.authority.as_str()), (id, "10.0.0.1:80"));
        let none = HeaderMap::new();
        self.server.lock().answer(id, StatusCode::OK, &none, false).unwrap();
        self.exchange().unwrap();
        let head = self.client.lock().poll_answer(&cx(), id);
        assert!(matches!(head, Poll::Ready(Ok(Head { status: StatusCode::OK, .. }))));
        id
    }
}

fn waiting(mux: &Mux) -> Vec<u8> {
    let Some(batch) = mux.lock().take() else { return Vec::new() };
    [&batch.control, batch.data.filled(), &batch.tail].concat()
}

fn cx() -> Context<'static> {
    Context::from_waker(Waker::noop())
}

fn block() -> Vec<u8> {
    let request = Request::connect("10.0.0.1:80").body(()).unwrap();
    request_block(&request)
}

fn send(mux: &Mux, id: u32, bytes: &[u8]) -> Poll<Result<usize, StreamError>> {
    mux.lock().poll_send(&cx(), id, bytes.len(), |room| {
        let count = room.len().min(bytes.len());
        room[..count].copy_from_slice(&bytes[..count]);
        Ok(count)
    })
}

fn received(mux: &Mux, id: u32) -> (Vec<u8>, Received) {
    let mut state = mux.lock();
    let stream = state.stream(id).unwrap();
    let mut chunks = VecDeque::new();
    stream.take_queue(&mut chunks);
    stream.is_drained();
    let found = stream.poll_receive(&cx());
    (chunks.into_iter().flatten().collect(), found)
}

#[test]
fn bytes_arrive_and_each_direction_ends_by_itself() {
    let pair = Pair::new();
    let id = pair.open();
    assert!(matches!(send(&pair.client, id, b"hello"), Poll::Ready(Ok(5))));
    pair.client.lock().finish(id).unwrap();
    pair.exchange().unwrap();
    let (bytes, end) = received(&pair.server, id);
    assert!(bytes == b"hello" && matches!(end, Received::Finished));
    assert!(matches!(send(&pair.server, id, b"bye"), Poll::Ready(Ok(3))));
    pair.server.lock().reset(id, Reason::CANCEL);
    pair.exchange().unwrap();
    let (bytes, end) = received(&pair.client, id);
    assert_eq!(bytes, b"bye", "what was sent comes before the reset");
    assert!(matches!(end, Received::Failed(StreamError::Reset(Reason::CANCEL))));
}

#[test]
fn no_more_is_sent_than_the_peer_allows_until_it_has_consumed() {
    let pair = Pair::new();
    let id = pair.open();
    let sent = || match send(&pair.client, id, &[1; 4000]) {
        Poll::Ready(Ok(count)) => count,
        other => panic!("{other:?}"),
    };
    assert_eq!(sent(), 1000);
    assert!(send(&pair.client, id, b"x").is_pending());
    pair.exchange().unwrap();
    assert_eq!(received(&pair.server, id).0.len(), 1000);
    assert!(send(&pair.client, id, b"x").is_pending(), "taken over is not consumed");
    pair.server.lock().consume(id, 300);
    pair.exchange().unwrap();
    assert_eq!(sent(), 300);
}

#[test]
fn what_ends_a_stream_never_overtakes_its_data() {
    let pair = Pair::new();
    let ids: Vec<u32> = (0..3).map(|_| pair.open()).collect();
    for id in &ids {
        let _ = send(&pair.client, *id, &[7; 900]);
        pair.client.lock().reset(*id, Reason::CANCEL);
    }
    pair.exchange().unwrap();
    for id in ids {
        assert_eq!(received(&pair.server, id).0.len(), 900);
    }
}

#[test]
fn bytes_of_a_stream_that_is_gone_give_the_connection_its_window_back() {
    let pair = Pair::new();
    for _ in 0..20 {
        let id = pair.open();
        let _ = send(&pair.client, id, &[7; 1000]);
        pair.exchange().unwrap();
        let mut chunks = VecDeque::new();
        let held = pair.server.lock().stream(id).unwrap().take_queue(&mut chunks);
        pair.server.lock().release(id, held);
        let _ = send(&pair.client, id, &[7; 100]);
        pair.exchange().unwrap();
        pair.client.lock().release(id, 0);
        pair.exchange().unwrap();
    }
    let (client, server) = (pair.client.lock(), pair.server.lock());
    assert_eq!((client.streams.open(), server.streams.open()), (0, 0));
    let lost = i64::from(server.local.connection_window) - server.receive_window;
    assert_eq!(lost, i64::from(server.unreturned));
}

#[test]
fn more_streams_than_allowed_are_refused_unseen() {
    let pair = Pair::new();
    let _open: Vec<u32> = (0..4).map(|_| pair.open()).collect();
    let id = pair.client.lock().open(&block()).unwrap();
    pair.exchange().unwrap();
    assert!(pair.server.lock().accept().is_none());
    let mut client = pair.client.lock();
    assert!(matches!(
        client.poll_answer(&cx(), id),
        Poll::Ready(Err(StreamError::Reset(Reason::REFUSED_STREAM)))
    ));
    assert!(client.is_unprocessed(id));
}

#[test]
fn a_server_that_leaves_finishes_its_streams() {
    let pair = Pair::new();
    let id = pair.open();
    pair.server.lock().leave();
    pair.exchange().unwrap();
    assert!(pair.client.lock().open(&block()).is_err());
    assert!(!pair.server.lock().has_left());
    assert!(matches!(send(&pair.client, id, b"x"), Poll::Ready(Ok(1))));
    for end in [&pair.client, &pair.server] {
        end.lock().finish(id).unwrap();
        pair.exchange().unwrap();
    }
    assert!(pair.server.lock().has_left());
}

#[test]
fn a_stream_that_crosses_our_last_word_harms_no_other() {
    let pair = Pair::new();
    let id = pair.open();
    pair.server.lock().leave();
    pair.exchange().unwrap();
    // What a client had in its queue when it answered the PING.
    let mut late = Vec::new();
    frame::put_headers(&mut late, id + 2, false, &block(), 1 << 14);
    frame::put(&mut late, kind::DATA, 0, id + 2, b"late");
    frame::put_window_update(&mut late, id + 2, 1);
    frame::put_reset(&mut late, id + 2, Reason::CANCEL);
    pair.server.lock().receive(&late).unwrap();
    assert!(pair.server.lock().accept().is_none());
    assert!(matches!(send(&pair.client, id, b"x"), Poll::Ready(Ok(1))));
    pair.exchange().unwrap();
    assert_eq!(received(&pair.server, id).0, b"x");
    pair.server.lock().consume(id, 1);
    let server = pair.server.lock();
    let lost = i64::from(server.local.connection_window) - server.receive_window;
    assert_eq!(lost, i64::from(server.unreturned), "bytes of no stream");
}

#[test]
fn a_client_that_leaves_may_finish_its_streams() {
    let pair = Pair::new();
    let id = pair.open();
    pair.client.lock().say_goodbye(Reason::NO_ERROR);
    pair.exchange().unwrap();
    assert!(!pair.server.lock().has_left());
    for end in [&pair.client, &pair.server] {
        end.lock().finish(id).unwrap();
        pair.exchange().unwrap();
    }
    assert!(pair.server.lock().has_left());
}

#[test]
fn streams_after_the_last_that_a_goaway_names_are_unprocessed() {
    let client = Mux::new(Role::Client, &settings());
    let ids: Vec<u32> = (0..2).map(|_| client.lock().open(&block()).unwrap()).collect();
    let mut goaway = Vec::new();
    frame::put_settings(&mut goaway, &[]);
    frame::put_goaway(&mut goaway, ids[0], Reason::NO_ERROR);
    client.lock().receive(&goaway).unwrap();
    assert!(client.lock().poll_answer(&cx(), ids[0]).is_pending());
    assert!(client.lock().poll_answer(&cx(), ids[1]).is_ready());
    assert!(client.lock().is_unprocessed(ids[1]) && !client.lock().is_unprocessed(ids[0]));
}

#[test]
fn padding_is_no_content_and_counts_for_the_windows() {
    let pair = Pair::new();
    let id = pair.open();
    let payload = [&[4][..], b"data", &[0; 4]].concat();
    let mut frame = Vec::new();
    frame::put(&mut frame, kind::DATA, flag::PADDED, id, &payload);
    for size in 1..frame.len() {
        for piece in frame.chunks(size) {
            pair.server.lock().receive(piece).unwrap();
        }
        assert_eq!(received(&pair.server, id).0, b"data", "pieces of {size}");
        pair.server.lock().consume(id, 4);
    }
    let server = pair.server.lock();
    let lost = i64::from(server.local.connection_window) - server.receive_window;
    assert_eq!(lost, i64::from(server.unreturned));
}

#[test]
fn a_peer_that_limits_the_header_table_is_told_that_there_is_none() {
    let pair = Pair::new();
    let mut limit = Vec::new();
    frame::put_settings(&mut limit, &[(setting::HEADER_TABLE_SIZE, 0)]);
    pair.client.lock().receive(&limit).unwrap();
    let _ack = waiting(&pair.client);
    let blocks = [(), ()].map(|()| {
        pair.client.lock().open(&block()).unwrap();
        let frame = waiting(&pair.client);
        frame.get(9..).unwrap().to_vec()
    });
    assert_eq!(blocks[0], [&[0x20][..], &block()].concat());
    assert_eq!(blocks[1], block());
}

fn malformed_requests(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for id in 1..count {
        frame::put_headers(&mut bytes, 2 * id + 1, false, &[], 1 << 14);
    }
    bytes
}

fn requests_reset_at_once(count: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for id in 1..count {
        frame::put_headers(&mut bytes, 2 * id + 1, false, &block(), 1 << 14);
        frame::put_reset(&mut bytes, 2 * id + 1, Reason::CANCEL);
    }
    bytes
}

fn continuations(count: usize, part: &[u8]) -> Vec<u8> {
    let (mut bytes, mut more) = (Vec::new(), Vec::new());
    frame::put(&mut bytes, kind::HEADERS, 0, 3, &block());
    frame::put(&mut more, kind::CONTINUATION, 0, 3, part);
    bytes.extend(more.repeat(count));
    bytes
}

/// What a peer must not do, each to a fresh pair with one open stream.
#[test]
fn faults_end_the_connection_with_their_reason() {
    let frame = |kind, flags, stream, payload: &[u8]| {
        let mut bytes = Vec::new();
        frame::put(&mut bytes, kind, flags, stream, payload);
        bytes
    };
    let (end, ack) = (flag::END_HEADERS, flag::ACK);
    for (bytes, reason) in [
        (frame(kind::DATA, 0, 0, b"x"), Reason::PROTOCOL_ERROR),
        (frame(kind::DATA, 0, 9, b"x"), Reason::PROTOCOL_ERROR),
        (frame(kind::DATA, 0, 1, &[0; 1001]), Reason::FLOW_CONTROL_ERROR),
        (frame(kind::DATA, flag::PADDED, 1, &[9, 1]), Reason::PROTOCOL_ERROR),
        (frame(kind::HEADERS, end, 2, &block()), Reason::PROTOCOL_ERROR),
        (frame(kind::HEADERS, end, 3, &[0x80]), Reason::COMPRESSION_ERROR),
        (frame(kind::CONTINUATION, end, 3, &[]), Reason::PROTOCOL_ERROR),
        (frame(kind::RST_STREAM, 0, 9, &[0; 4]), Reason::PROTOCOL_ERROR),
        (frame(kind::RST_STREAM, 0, 1, &[0; 3]), Reason::FRAME_SIZE_ERROR),
        (frame(kind::SETTINGS, 0, 1, &[]), Reason::PROTOCOL_ERROR),
        (frame(kind::SETTINGS, 0, 0, &[0; 5]), Reason::FRAME_SIZE_ERROR),
        (frame(kind::SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]), Reason::FLOW_CONTROL_ERROR),
        (frame(kind::SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]), Reason::PROTOCOL_ERROR),
        (frame(kind::PUSH_PROMISE, end, 1, &[0; 8]), Reason::PROTOCOL_ERROR),
        (frame(kind::PING, ack, 0, &[0; 7]), Reason::FRAME_SIZE_ERROR),
        (frame(kind::GOAWAY, 0, 0, &[0; 7]), Reason::FRAME_SIZE_ERROR),
        (frame(kind::GOAWAY, 0, 1, &[0; 8]), Reason::PROTOCOL_ERROR),
        (frame(kind::SETTINGS, ack, 0, &[0; 6]), Reason::FRAME_SIZE_ERROR),
        (frame(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 2]), Reason::PROTOCOL_ERROR),
        (frame(kind::WINDOW_UPDATE, 0, 0, &[0; 4]), Reason::PROTOCOL_ERROR),
        (frame(kind::WINDOW_UPDATE, 0, 0, &[0x7f, 255, 255, 255]), Reason::FLOW_CONTROL_ERROR),
        (frame(kind::DATA, 0, 1, &[]).repeat(10_001), Reason::ENHANCE_YOUR_CALM),
        // Answers that nobody reads.
        (frame(kind::PING, 0, 0, &[0; 8]).repeat(20_000), Reason::ENHANCE_YOUR_CALM),
        (frame(kind::SETTINGS, 0, 0, &[]).repeat(40_000), Reason::ENHANCE_YOUR_CALM),
        (malformed_requests(40_000), Reason::ENHANCE_YOUR_CALM),
        (requests_reset_at_once(20), Reason::ENHANCE_YOUR_CALM),
        // Header blocks without end.
        (continuations(300, &[0; 1000]), Reason::ENHANCE_YOUR_CALM),
        (continuations(300_000, &[0]), Reason::ENHANCE_YOUR_CALM),
        (continuations(1, &[]), Reason::ENHANCE_YOUR_CALM),
    ] {
        let pair = Pair::new();
        pair.open();
        let error = pair.server.lock().receive(&bytes).unwrap_err();
        assert!(error.is_fault(), "{error}");
        assert_eq!(error.reason(), reason, "{error} for {:?}", bytes.get(..9));
    }
    let server = Mux::new(Role::Server, &settings());
    assert!(server.lock().receive(b"GET / HTTP/1.1").unwrap_err().is_fault());
    let push = frame(kind::SETTINGS, 0, 0, &[0, 2, 0, 0, 0, 1]);
    for first in [push, frame(kind::PING, 0, 0, &[0; 8]), frame(kind::SETTINGS, ack, 0, &[])] {
        let client = Mux::new(Role::Client, &settings());
        let error = client.lock().receive(&first).unwrap_err();
        assert_eq!(error.reason(), Reason::PROTOCOL_ERROR);
    }
}

#[test]
fn answers_that_are_read_have_no_end() {
    let pair = Pair::new();
    let mut ping = Vec::new();
    frame::put(&mut ping, kind::PING, 0, 0, &[0; 8]);
    for _ in 0..20_000 {
        pair.server.lock().receive(&ping).unwrap();
        assert_eq!(waiting(&pair.server).len(), ping.len());
    }
}

#[test]
fn data_that_must_not_come_resets_its_stream_alone() {
    let pair = Pair::new();
    let (ended, good) = (pair.open(), pair.open());
    let mut bytes = Vec::new();
    frame::put(&mut bytes, kind::DATA, flag::END_STREAM, ended, b"x");
    frame::put(&mut bytes, kind::DATA, 0, ended, b"y");
    frame::put(&mut bytes, kind::WINDOW_UPDATE, 0, good, &[0; 4]);
    pair.server.lock().receive(&bytes).unwrap();
    let answers = waiting(&pair.server);
    let mut resets = Vec::new();
    frame::put_reset(&mut resets, ended, Reason::STREAM_CLOSED);
    frame::put_reset(&mut resets, good, Reason::PROTOCOL_ERROR);
    assert_eq!(answers, resets);

    let early = pair.client.lock().open(&block()).unwrap();
    let _request = waiting(&pair.client);
    bytes.clear();
    frame::put(&mut bytes, kind::DATA, 0, early, b"before the answer");
    pair.client.lock().receive(&bytes).unwrap();
    resets.clear();
    frame::put_reset(&mut resets, early, Reason::PROTOCOL_ERROR);
    assert_eq!(waiting(&pair.client), resets);
}

#[test]
fn streams_that_a_peer_breaks_have_an_end_though_it_reads_our_answers() {
    let pair = Pair::new();
    let broken = || {
        let id = pair.open();
        let mut nothing = Vec::new();
        frame::put(&mut nothing, kind::WINDOW_UPDATE, 0, id, &[0; 4]);
        let received = pair.server.lock().receive(&nothing);
        pair.server.lock().release(id, 0);
        assert!(!waiting(&pair.server).is_empty() || received.is_err());
        pair.client.lock().release(id, 0);
        let _cancel = waiting(&pair.client);
        received
    };
    let (lawful, error) = (1..).map(|count| (count, broken())).find(|(_, it)| it.is_err()).unwrap();
    assert_eq!((lawful, error.unwrap_err().reason()), (1001, Reason::ENHANCE_YOUR_CALM));
}

#[test]
fn requests_that_end_before_anybody_takes_them_do_not_pile_up() {
    let pair = Pair::new();
    let mut bytes = Vec::new();
    for id in 1..20 {
        frame::put_headers(&mut bytes, 2 * id + 1, false, &block(), 1 << 14);
        frame::put(&mut bytes, kind::WINDOW_UPDATE, 0, 2 * id + 1, &[0; 4]);
    }
    let error = pair.server.lock().receive(&bytes).unwrap_err();
    assert_eq!(error.reason(), Reason::ENHANCE_YOUR_CALM);
    assert_eq!(pair.server.lock().arrived.len(), 9);
}

#[test]
fn of_several_windows_in_one_settings_the_last_holds() {
    let pair = Pair::new();
    let id = pair.open();
    let mut bytes = Vec::new();
    let windows = [1, (1 << 31) - 1, 5].map(|window| (setting::INITIAL_WINDOW_SIZE, window));
    frame::put_settings(&mut bytes, &windows);
    pair.client.lock().receive(&bytes).unwrap();
    assert!(matches!(send(&pair.client, id, b"too much"), Poll::Ready(Ok(5))));
    assert!(send(&pair.client, id, b"x").is_pending());
}

#[test]
fn a_window_may_become_negative_and_no_larger_than_the_rfc_allows() {
    let pair = Pair::new();
    let id = pair.open();
    let mut bytes = Vec::new();
    assert!(matches!(send(&pair.client, id, &[1; 800]), Poll::Ready(Ok(800))));
    frame::put_settings(&mut bytes, &[(setting::INITIAL_WINDOW_SIZE, 0)]);
    frame::put_window_update(&mut bytes, id, 800);
    pair.client.lock().receive(&bytes).unwrap();
    assert!(send(&pair.client, id, b"x").is_pending());
    bytes.clear();
    frame::put_window_update(&mut bytes, id, (1 << 31) - 1);
    frame::put_settings(&mut bytes, &[(setting::INITIAL_WINDOW_SIZE, (1 << 31) - 1)]);
    let error = pair.client.lock().receive(&bytes).unwrap_err();
    assert_eq!(error.reason(), Reason::FLOW_CONTROL_ERROR);
}

/// Also when TLS has announced the end (RFC 9113 section 5.4.1).
#[test]
fn an_end_of_the_connection_is_no_end_of_its_streams() {
    let pair = Pair::new();
    let (ended, open) = (pair.open(), pair.open());
    let _ = send(&pair.client, ended, b"all");
    pair.client.lock().finish(ended).unwrap();
    let _ = send(&pair.client, open, b"half");
    pair.exchange().unwrap();
    pair.server.lock().fail(ConnectionError::Closed);
    let (bytes, end) = received(&pair.server, ended);
    assert!(bytes == b"all" && matches!(end, Received::Finished));
    let (bytes, end) = received(&pair.server, open);
    assert!(bytes == b"half" && matches!(end, Received::Failed(StreamError::Broken(_))));
}

#[test]
fn a_client_that_does_not_know_our_window_yet_may_use_the_default() {
    let server = Mux::new(Role::Server, &settings());
    let mut bytes = PREFACE.to_vec();
    frame::put_settings(&mut bytes, &[]);
    frame::put_headers(&mut bytes, 1, false, &block(), 1 << 14);
    frame::put(&mut bytes, kind::DATA, 0, 1, &[1; 3000]);
    server.lock().receive(&bytes).unwrap();
    bytes.clear();
    frame::put(&mut bytes, kind::SETTINGS, flag::ACK, 0, &[]);
    server.lock().receive(&bytes).unwrap();
    assert_eq!(received(&server, 1).0.len(), 3000);
    server.lock().consume(1, 3000);
    bytes.clear();
    frame::put(&mut bytes, kind::DATA, 0, 1, &[1; 1000]);
    server.lock().receive(&bytes).unwrap();
    bytes.clear();
    frame::put(&mut bytes, kind::DATA, 0, 1, &[1]);
    let error = server.lock().receive(&bytes).unwrap_err();
    assert_eq!(error.reason(), Reason::FLOW_CONTROL_ERROR);
}

#[test]
fn malformed_requests_are_reset_alone() {
    let pair = Pair::new();
    let open = pair.open();
    let mut upper = block();
    super::super::hpack::put(&mut upper, b"X-Upper", b"v");
    let mut hop = block();
    super::super::hpack::put(&mut hop, b"connection", b"close");
    let twice = [block(), block()].concat();
    let mut state = pair.client.lock();
    let ids = [upper, hop, twice, Vec::new()].map(|block| state.open(&block).unwrap());
    drop(state);
    pair.exchange().unwrap();
    assert!(pair.server.lock().accept().is_none());
    for id in ids {
        let answer = pair.client.lock().poll_answer(&cx(), id);
        let reset = StreamError::Reset(Reason::PROTOCOL_ERROR);
        assert!(
            matches!(answer, Poll::Ready(Err(error)) if error.to_string() == reset.to_string())
        );
    }
    assert!(matches!(send(&pair.client, open, b"x"), Poll::Ready(Ok(1))));
}

#[test]
fn headers_of_an_answer_arrive_and_what_precedes_it_is_passed_over() {
    let pair = Pair::new();
    let id = pair.client.lock().open(&block()).unwrap();
    pair.exchange().unwrap();
    let none = HeaderMap::new();
    pair.server.lock().answer(id, StatusCode::PROCESSING, &none, false).unwrap();
    let mut headers = HeaderMap::new();
    headers.insert("baggage", HeaderValue::from_static("a=b"));
    pair.server.lock().answer(id, StatusCode::FORBIDDEN, &headers, true).unwrap();
    pair.exchange().unwrap();
    let Poll::Ready(Ok(head)) = pair.client.lock().poll_answer(&cx(), id) else { panic!() };
    assert_eq!((head.status, &head.headers), (StatusCode::FORBIDDEN, &headers));
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let pair = Pair::new();
        pair.open();
        let _ = pair.server.lock().receive(&bytes);
        let _ = pair.client.lock().receive(&bytes);
    }
}
