//! What the streams of one connection and its driver share: HTTP/2 without I/O.
//!
//! Streams write their frames straight into the queue that the driver hands to the socket, and the
//! driver hands what arrives straight to whoever takes a stream's bytes; only what cannot be taken
//! at once is kept. So a message wakes one task of ours, not two.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use http::HeaderMap;
use parking_lot::{Mutex, MutexGuard};

use super::Settings;
use super::frame::{self, Cutter, PREFACE, Reason, setting};
use super::hpack::{self, Decoder};
use super::stream::StreamError;
use super::windows::{INITIAL_WINDOW, PeerWindows};

mod headers;
mod outgoing;
mod receive;
mod send;
pub(super) mod stream;

pub(super) use headers::{Arrived, Head, request as request_block};
pub(super) use outgoing::Batch;
pub(super) use stream::{Received, Sink};

use stream::Stream;

use headers::Block;
use outgoing::Outgoing;
use stream::Streams;

/// Why a connection carries nothing more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionError {
    #[error("{0}")]
    Io(String),
    /// Without a word.
    #[error("connection closed by the peer")]
    Closed,
    #[error("the peer says {0}")]
    ByPeer(Reason),
    /// The peer broke the protocol (RFC 9113 section 5.4.1).
    #[error("{1}: {0}")]
    Fault(Reason, &'static str),
    /// We are done with it.
    #[error("connection closed")]
    Ended,
}

impl ConnectionError {
    /// What the peer is told.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Fault(reason, _) => *reason,
            Self::Io(_) | Self::Closed | Self::ByPeer(_) | Self::Ended => Reason::NO_ERROR,
        }
    }

    /// Whether the peer broke the protocol.
    pub(super) fn is_fault(&self) -> bool {
        matches!(self, Self::Fault(..))
    }
}

impl From<io::Error> for ConnectionError {
    fn from(error: io::Error) -> Self {
        Self::Io(error.to_string())
    }
}

/// Which end of the connection we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Client,
    Server,
}

/// One connection. Only its own streams and its driver meet at the lock.
pub(super) struct Mux(Mutex<State>);

pub(super) struct State {
    role: Role,
    local: Local,
    pub(super) peer: Arc<PeerWindows>,
    out: Outgoing,
    streams: Streams,
    /// The next stream that we open, as a client.
    next: u32,
    /// The last stream that the peer opened.
    last: u32,
    /// Bytes that we may send on all streams.
    send_window: i64,
    /// What a new stream may send (the peer's SETTINGS_INITIAL_WINDOW_SIZE).
    send_initial: i64,
    /// The peer's SETTINGS_MAX_FRAME_SIZE.
    send_frame: u32,
    /// Bytes that the peer may send on all streams.
    receive_window: i64,
    /// Consumed bytes whose window is not yet returned.
    unreturned: u32,
    cutter: Cutter,
    decoder: Decoder,
    /// The peer has limited the table of our header blocks, and is to be told that they use none.
    tells_table: bool,
    /// A header block that is not yet whole.
    block: Option<Block>,
    /// Bytes of the client's preface that are still to come.
    preface: &'static [u8],
    /// The peer's first SETTINGS have come.
    is_introduced: bool,
    /// The peer has taken in ours.
    is_acknowledged: bool,
    /// Requests that nobody has taken yet.
    arrived: VecDeque<Arrived>,
    /// How many of them were reset meanwhile.
    withdrawn: usize,
    /// Padding of the DATA frame that comes now.
    padding: u32,
    /// DATA frames in a row that carry nothing.
    empty: usize,
    /// Streams that were reset for what the peer did on them.
    faulty: usize,
    leaving: Leaving,
    ping: PingState,
    pub(super) failure: Option<ConnectionError>,
    driver: Option<Waker>,
    /// The driver will look for itself.
    is_driving: bool,
}

/// What we announced.
#[derive(Clone, Copy, Debug)]
struct Local {
    stream_window: u32,
    connection_window: u32,
    max_streams: u32,
    max_frame: u32,
    header_list: u32,
}

/// Our graceful end (RFC 9113 section 6.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Leaving {
    No,
    /// The peer was told; what it opened meanwhile still counts until it answers a PING.
    Announced,
    /// The last stream is named.
    Named,
}

#[derive(Clone, Copy, Debug, Default)]
struct PingState {
    /// One of the keep-alive is unanswered.
    awaited: bool,
}

/// Payloads of our PINGs.
const ALIVE: [u8; 8] = *b"culv-png";
const LEAVE: [u8; 8] = *b"culv-bye";

impl Mux {
    /// Begins a connection: our preface and SETTINGS are queued.
    pub(super) fn new(role: Role, settings: &Settings) -> Arc<Self> {
        let peer = PeerWindows::new(settings.stream_window, settings.streams_per_connection);
        let header_list = match role {
            Role::Client => settings.client_header_list,
            Role::Server => settings.server_header_list,
        };
        let local = Local {
            stream_window: settings.stream_window,
            // It begins with this and cannot shrink (RFC 9113 section 6.9.2).
            connection_window: settings.connection_window().max(INITIAL_WINDOW),
            max_streams: settings.max_streams,
            max_frame: settings.max_frame.clamp(frame::LEAST_MAX_FRAME, (1 << 24) - 1),
            header_list,
        };
        let mut state = State {
            role,
            local,
            peer,
            out: Outgoing::default(),
            streams: Streams::default(),
            next: 1,
            last: 0,
            send_window: i64::from(INITIAL_WINDOW),
            send_initial: i64::from(INITIAL_WINDOW),
            send_frame: frame::LEAST_MAX_FRAME,
            receive_window: local.connection_window.into(),
            unreturned: 0,
            cutter: Cutter::default(),
            decoder: Decoder::default(),
            tells_table: false,
            block: None,
            preface: if role == Role::Server { PREFACE } else { &[] },
            is_introduced: false,
            is_acknowledged: false,
            arrived: VecDeque::new(),
            withdrawn: 0,
            padding: 0,
            empty: 0,
            faulty: 0,
            leaving: Leaving::No,
            ping: PingState::default(),
            failure: None,
            driver: None,
            is_driving: false,
        };
        state.introduce();
        Arc::new(Self(Mutex::new(state)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock()
    }

    /// Has the driver look at its surroundings again.
    pub(super) fn wake_driver(&self) {
        self.lock().wake_driver();
    }

    /// Streams that have been waiting for the peer's window for at least `time`.
    pub(super) fn stalled_streams(&self, time: Duration) -> usize {
        self.lock().streams.stalled(time)
    }
}

impl State {
    fn introduce(&mut self) {
        let local = self.local;
        let control = &mut self.out.control;
        let mut settings = vec![
            (setting::INITIAL_WINDOW_SIZE, local.stream_window),
            (setting::MAX_FRAME_SIZE, local.max_frame),
            (setting::MAX_HEADER_LIST_SIZE, local.header_list),
        ];
        match self.role {
            Role::Client => {
                control.extend_from_slice(PREFACE);
                settings.push((setting::ENABLE_PUSH, 0));
            }
            Role::Server => settings.push((setting::MAX_CONCURRENT_STREAMS, local.max_streams)),
        }
        frame::put_settings(control, &settings);
        let more = local.connection_window.saturating_sub(INITIAL_WINDOW);
        if more > 0 {
            frame::put_window_update(control, 0, more);
        }
    }

    /// The driver begins a turn: until [`State::take`] nobody needs to wake it.
    pub(super) fn begin_turn(&mut self, cx: &Context<'_>) {
        self.is_driving = true;
        match &mut self.driver {
            Some(driver) => driver.clone_from(cx.waker()),
            None => self.driver = Some(cx.waker().clone()),
        }
    }

    /// All that is to be written now; `None` ends the driver's turn.
    pub(super) fn take(&mut self) -> Option<Batch> {
        if self.out.is_empty() {
            self.is_driving = false;
            return None;
        }
        let (batch, waiting) = self.out.take();
        waiting.iter().for_each(Waker::wake_by_ref);
        Some(batch)
    }

    /// The socket takes no more for now.
    pub(super) fn end_turn(&mut self) {
        self.is_driving = false;
    }

    fn wake_driver(&mut self) {
        if !self.is_driving
            && let Some(driver) = &self.driver
        {
            self.is_driving = true;
            driver.wake_by_ref();
        }
    }

    /// Ends the connection: all streams learn why. The first reason stays.
    pub(super) fn fail(&mut self, error: ConnectionError) {
        if self.failure.is_some() {
            return;
        }
        let told = error.to_string();
        for stream in self.streams.iter_mut() {
            stream.broken(StreamError::Broken(told.clone()));
        }
        self.arrived.clear();
        self.failure = Some(error);
    }

    /// GOAWAY with what went wrong, as the last frame.
    pub(super) fn say_goodbye(&mut self, reason: Reason) {
        frame::put_goaway(&mut self.out.control, self.last, reason);
        self.leaving = Leaving::Named;
    }

    /// Tells the peer to open its streams elsewhere; those it has may go on.
    pub(super) fn leave(&mut self) {
        if self.leaving == Leaving::No {
            self.leaving = Leaving::Announced;
            frame::put_goaway(&mut self.out.control, (1 << 31) - 1, Reason::NO_ERROR);
            frame::put(&mut self.out.control, frame::kind::PING, 0, 0, &LEAVE);
        }
    }

    /// Whether one side has left, so that no stream will be opened, and the last one has ended.
    pub(super) fn has_left(&self) -> bool {
        let leaves = self.leaving == Leaving::Named || self.peer.is_going_away();
        leaves && self.streams.open() == 0 && self.failure.is_none()
    }

    pub(super) fn ping(&mut self) {
        self.ping.awaited = true;
        frame::put(&mut self.out.control, frame::kind::PING, 0, 0, &ALIVE);
    }

    pub(super) fn is_ping_awaited(&self) -> bool {
        self.ping.awaited
    }

    /// Whether the client's preface has come.
    pub(super) fn has_preface(&self) -> bool {
        self.preface.is_empty()
    }

    /// The next request, with its stream.
    pub(super) fn accept(&mut self) -> Option<Arrived> {
        loop {
            let arrived = self.arrived.pop_front()?;
            if self.streams.is_open(arrived.stream) {
                return Some(arrived);
            }
            self.withdrawn = self.withdrawn.saturating_sub(1);
            self.streams.forget(arrived.stream);
        }
    }

    fn put_headers(&mut self, id: u32, end: bool, block: &[u8]) {
        let control = &mut self.out.control;
        match std::mem::take(&mut self.tells_table) {
            true => {
                let block = [&[hpack::NO_TABLE], block].concat();
                frame::put_headers(control, id, end, &block, self.send_frame);
            }
            false => frame::put_headers(control, id, end, block, self.send_frame),
        }
    }

    /// Opens a stream with this header block, as a client.
    pub(super) fn open(&mut self, block: &[u8]) -> Result<u32, ConnectionError> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        if self.peer.is_going_away() || self.next >= 1 << 31 {
            return Err(ConnectionError::Ended);
        }
        let id = self.next;
        self.next += 2;
        let stream = Stream::new(self.send_initial, self.first_window());
        self.streams.insert(id, stream);
        self.put_headers(id, false, block);
        self.wake_driver();
        Ok(id)
    }

    /// Answers a request; `end` without a body.
    pub(super) fn answer(
        &mut self,
        id: u32,
        status: http::StatusCode,
        headers: &HeaderMap,
        end: bool,
    ) -> Result<(), StreamError> {
        if let Some(stream) = self.streams.get(id)
            && let Some(error) = stream.reset()
        {
            return Err(error.clone());
        }
        let block = headers::answer(status, headers);
        self.put_headers(id, end, &block);
        if end {
            self.streams.finish_sending(id);
        }
        self.wake_driver();
        Ok(())
    }

    /// The answer to a request of ours.
    pub(super) fn poll_answer(
        &mut self,
        cx: &Context<'_>,
        id: u32,
    ) -> Poll<Result<Head, StreamError>> {
        self.streams.poll_answer(cx, id)
    }

    /// Whether the peer promised that it has not acted on the stream (RFC 9113 section 8.7).
    pub(super) fn is_unprocessed(&self, id: u32) -> bool {
        self.streams.get(id).is_some_and(Stream::is_unprocessed)
    }

    /// Hands what arrives on the stream to `sink`, as long as nothing waits before it.
    pub(super) fn deliver_to(&mut self, id: u32, sink: Arc<dyn Sink>) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.deliver_to(sink);
        }
    }

    pub(super) fn stream(&mut self, id: u32) -> Option<&mut Stream> {
        self.streams.get_mut(id)
    }
}

#[cfg(test)]
mod tests;
