//! The streams of a connection, as its shared state knows them.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use hashbrown::HashMap;
use tokio::time::Instant;

use super::super::stream::StreamError;
use super::headers::Head;

/// Room of a chunk for bytes that wait, at least: a stalled reader's many small messages do not
/// cost much more than their size.
const CHUNK: usize = 4 << 10;

/// Whoever takes the bytes of a stream as they arrive.
pub trait Sink: Send + Sync {
    /// Takes what it can of `bytes` without waiting. After an error it is not asked again, and the
    /// stream's handle is told.
    fn take(&self, bytes: &[u8]) -> io::Result<usize>;
}

/// One stream.
pub(in crate::hbone) struct Stream {
    /// Bytes that the peer allows us.
    pub(super) send_window: i64,
    /// Bytes that we allow the peer.
    pub(super) receive_window: i64,
    unreturned: u32,
    /// Arrived and not handed on.
    queue: VecDeque<BytesMut>,
    queued: u32,
    /// The handle has bytes that come before those of the queue.
    is_held: bool,
    receiving: Receiving,
    sending: Sending,
    reset: Option<StreamError>,
    /// The peer has not acted on it.
    unprocessed: bool,
    answer: Option<Box<Head>>,
    answered: bool,
    sink: Option<Arc<dyn Sink>>,
    sink_error: Option<io::Error>,
    waiting_since: Option<Instant>,
    pub(super) reader: Option<Waker>,
    pub(super) writer: Option<Waker>,
    watcher: Option<Waker>,
    /// Counted as ended.
    closed: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Receiving {
    Open,
    Finished,
}

#[derive(Debug, PartialEq, Eq)]
enum Sending {
    Open,
    Finished,
}

/// What a look at the receiving direction finds.
#[derive(Debug)]
pub(in crate::hbone) enum Received {
    /// More may come.
    Open,
    Finished,
    Failed(StreamError),
    Undelivered(io::Error),
}

impl Stream {
    pub(super) fn new(send_window: i64, receive_window: u32) -> Self {
        Self {
            send_window,
            receive_window: receive_window.into(),
            unreturned: 0,
            queue: VecDeque::new(),
            queued: 0,
            is_held: false,
            receiving: Receiving::Open,
            sending: Sending::Open,
            reset: None,
            unprocessed: false,
            answer: None,
            answered: false,
            sink: None,
            sink_error: None,
            waiting_since: None,
            reader: None,
            writer: None,
            watcher: None,
            closed: false,
        }
    }

    /// Neither reset nor ended in both directions.
    pub(super) fn is_open(&self) -> bool {
        let ended = self.receiving == Receiving::Finished && self.sending == Sending::Finished;
        self.reset.is_none() && !ended
    }

    pub(super) fn is_receiving(&self) -> bool {
        self.reset.is_none() && self.receiving == Receiving::Open
    }

    pub(super) fn reset(&self) -> Option<&StreamError> {
        self.reset.as_ref()
    }

    pub(super) fn is_unprocessed(&self) -> bool {
        self.unprocessed
    }

    pub(super) fn deliver_to(&mut self, sink: Arc<dyn Sink>) {
        self.sink = Some(sink);
    }

    /// Takes in DATA: by the sink, or else into the queue. Gives how many bytes were consumed.
    pub(super) fn take_in(&mut self, bytes: &[u8]) -> u32 {
        let mut taken = 0;
        if let Some(sink) = &self.sink
            && self.queue.is_empty()
            && !self.is_held
            && self.sink_error.is_none()
        {
            match sink.take(bytes) {
                Ok(count) => taken = count,
                Err(error) => self.sink_error = Some(error),
            }
        }
        let rest = bytes.get(taken..).unwrap_or_default();
        if !rest.is_empty() {
            self.queue(rest);
            self.wake_reader();
        }
        u32::try_from(taken).unwrap_or(u32::MAX)
    }

    fn queue(&mut self, bytes: &[u8]) {
        self.queued += u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        let mut rest = bytes;
        if let Some(last) = self.queue.back_mut() {
            let room = (last.capacity() - last.len()).min(rest.len());
            let (now, later) = rest.split_at(room);
            last.put_slice(now);
            rest = later;
        }
        if !rest.is_empty() {
            let mut chunk = BytesMut::with_capacity(rest.len().max(CHUNK));
            chunk.put_slice(rest);
            self.queue.push_back(chunk);
        }
    }

    /// Hands all that waits to the handle; gives how many bytes that are.
    pub(in crate::hbone) fn take_queue(&mut self, into: &mut VecDeque<BytesMut>) -> u32 {
        into.append(&mut self.queue);
        self.queue.shrink_to(0);
        self.is_held = !into.is_empty();
        std::mem::take(&mut self.queued)
    }

    /// Whether more may come.
    pub(in crate::hbone) fn poll_receive(&mut self, cx: &Context<'_>) -> Received {
        if let Some(error) = self.sink_error.take() {
            return Received::Undelivered(error);
        }
        if self.receiving == Receiving::Finished {
            return Received::Finished;
        }
        if let Some(error) = &self.reset {
            return Received::Failed(error.clone());
        }
        keep(&mut self.reader, cx);
        Received::Open
    }

    /// The handle has handed on all it had.
    pub(in crate::hbone) fn is_drained(&mut self) {
        self.is_held = false;
    }

    /// Notes consumed bytes; gives the window to return once it is worth a frame. A stream that
    /// receives nothing more needs none.
    pub(super) fn returned(&mut self, count: u32, enough: u32) -> u32 {
        self.unreturned += count;
        if !self.is_receiving() || self.unreturned < enough {
            return 0;
        }
        let increment = std::mem::take(&mut self.unreturned);
        self.receive_window += i64::from(increment);
        increment
    }

    pub(in crate::hbone) fn poll_reset(&mut self, cx: &Context<'_>) -> Poll<StreamError> {
        match &self.reset {
            Some(error) => Poll::Ready(error.clone()),
            None => {
                keep(&mut self.watcher, cx);
                Poll::Pending
            }
        }
    }

    pub(super) fn finish_receiving(&mut self) {
        self.receiving = Receiving::Finished;
        self.wake_reader();
    }

    /// The peer ends the stream abnormally. What arrived before stays readable.
    pub(super) fn broken(&mut self, error: StreamError) {
        if self.reset.is_none() {
            self.reset = Some(error);
            self.waiting_since = None;
            let wakers = [self.reader.take(), self.writer.take(), self.watcher.take()];
            wakers.into_iter().flatten().for_each(Waker::wake);
        }
    }

    pub(super) fn refused_unseen(&mut self, error: StreamError) {
        self.unprocessed = true;
        self.broken(error);
    }

    /// We end it: what waits is of no use. Gives how many bytes that were.
    pub(super) fn cancel(&mut self, error: StreamError) -> u32 {
        self.broken(error);
        self.queue = VecDeque::new();
        std::mem::take(&mut self.queued)
    }

    pub(super) fn set_answer(&mut self, head: Head) {
        self.answer = Some(Box::new(head));
        self.answered = true;
        self.wake_reader();
    }

    pub(super) fn is_answered(&self) -> bool {
        self.answered
    }

    fn wake_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
    }

    pub(super) fn wake_writer(&mut self) {
        if let Some(writer) = self.writer.take() {
            writer.wake();
        }
    }

    /// Notes whether the stream waits for the peer's window.
    pub(super) fn set_waiting(&mut self, waiting: bool) {
        match waiting {
            true => self.waiting_since = self.waiting_since.or_else(|| Some(Instant::now())),
            false => self.waiting_since = None,
        }
    }
}

fn keep(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}

/// All streams that have a handle, or bytes or an answer for one to come.
#[derive(Default)]
pub(super) struct Streams {
    by_id: HashMap<u32, Box<Stream>>,
    open: usize,
}

impl Streams {
    pub(super) fn insert(&mut self, id: u32, stream: Stream) {
        self.open += 1;
        self.by_id.insert(id, Box::new(stream));
    }

    pub(super) fn get(&self, id: u32) -> Option<&Stream> {
        self.by_id.get(&id).map(Box::as_ref)
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Stream> {
        self.by_id.get_mut(&id).map(Box::as_mut)
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut Stream> {
        self.by_id.values_mut().map(Box::as_mut)
    }

    pub(super) fn with_ids(&mut self) -> impl Iterator<Item = (u32, &mut Stream)> {
        self.by_id.iter_mut().map(|(id, stream)| (*id, stream.as_mut()))
    }

    /// Streams that have not ended.
    pub(super) fn open(&self) -> usize {
        self.open
    }

    pub(super) fn is_open(&self, id: u32) -> bool {
        self.get(id).is_some_and(Stream::is_open)
    }

    /// Counts a stream as ended if it is.
    pub(super) fn note_closed(&mut self, id: u32) {
        if let Some(stream) = self.by_id.get_mut(&id)
            && !stream.closed
            && !stream.is_open()
        {
            stream.closed = true;
            self.open = self.open.saturating_sub(1);
        }
    }

    /// Removes a stream; gives how many bytes waited on it.
    pub(super) fn forget(&mut self, id: u32) -> u32 {
        let Some(stream) = self.by_id.remove(&id) else { return 0 };
        if !stream.closed {
            self.open = self.open.saturating_sub(1);
        }
        stream.queued
    }

    pub(super) fn finish_sending(&mut self, id: u32) {
        if let Some(stream) = self.get_mut(id) {
            stream.sending = Sending::Finished;
        }
        self.note_closed(id);
    }

    /// Why nothing can be sent on the stream, if so.
    pub(super) fn sending_error(&self, id: u32) -> Option<StreamError> {
        let Some(stream) = self.get(id) else { return Some(StreamError::Finished) };
        match (&stream.sending, &stream.reset) {
            (Sending::Finished, _) => Some(StreamError::Finished),
            (Sending::Open, reset) => reset.clone(),
        }
    }

    pub(super) fn poll_answer(
        &mut self,
        cx: &Context<'_>,
        id: u32,
    ) -> Poll<Result<Head, StreamError>> {
        let Some(stream) = self.get_mut(id) else {
            return Poll::Ready(Err(StreamError::Finished));
        };
        if let Some(head) = stream.answer.take() {
            return Poll::Ready(Ok(*head));
        }
        match &stream.reset {
            Some(error) => Poll::Ready(Err(error.clone())),
            None => {
                keep(&mut stream.reader, cx);
                Poll::Pending
            }
        }
    }

    /// Streams that have been waiting for the peer's window for at least `time`.
    pub(super) fn stalled(&self, time: Duration) -> usize {
        let waits =
            |stream: &Stream| stream.waiting_since.is_some_and(|since| since.elapsed() >= time);
        self.by_id.values().filter(|stream| waits(stream)).count()
    }
}
