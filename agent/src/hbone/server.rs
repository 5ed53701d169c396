//! The server role on one tunnel connection.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep};

use super::Settings;
use super::drive::Drive;
use super::frame::Reason;
use super::keepalive::KeepAlive;
use super::mux::{Arrived, ConnectionError, Mux, Role};
use super::stream::{Handle, HboneStream, StreamError};

/// Time for a last GOAWAY to leave.
const GOODBYE: Duration = Duration::from_secs(1);

/// A stream that has waited this long for the client's window is stalled.
const STALLED: Duration = Duration::from_secs(1);

/// Why a tunnel connection ended otherwise than by its client's wish.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("no http2 preface within {0:?}")]
    NoPreface(Duration),
    #[error("http2 handshake failed: {0}")]
    Handshake(ConnectionError),
    #[error("h2 failed: {0}")]
    Connection(ConnectionError),
    #[error("the peer left a ping unanswered for {0:?}")]
    PingTimeout(Duration),
}

impl ServeError {
    /// Whether the peer broke the protocol, instead of leaving or being cut off.
    pub fn is_fault_of_peer(&self) -> bool {
        match self {
            Self::NoPreface(_) => true,
            Self::Handshake(error) | Self::Connection(error) => error.is_fault(),
            Self::PingTimeout(_) => false,
        }
    }
}

/// A request as it came. Nothing has been answered yet.
///
/// Dropped without an answer it is reset.
pub struct Request {
    method: Method,
    authority: String,
    headers: HeaderMap,
    stream: Handle,
}

impl Request {
    /// Anything but CONNECT deserves a 400.
    pub fn method(&self) -> &Method {
        &self.method
    }

    /// `:authority` as the peer wrote it; empty if there was none.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// Ready when the peer has given the request up before it was answered.
    pub fn poll_withdrawn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match self.stream.mux.lock().stream(self.stream.id) {
            Some(stream) => stream.poll_reset(cx).map(|_| ()),
            None => Poll::Ready(()),
        }
    }

    /// Answers 200; `baggage` describes the destination workload.
    pub fn accept(self, baggage: Option<&str>) -> Result<HboneStream, StreamError> {
        let mut headers = HeaderMap::new();
        if let Some(Ok(baggage)) = baggage.map(HeaderValue::from_str) {
            headers.insert(HeaderName::from_static("baggage"), baggage);
        }
        let stream = self.stream;
        stream.mux.lock().answer(stream.id, StatusCode::OK, &headers, false)?;
        Ok(HboneStream::new(stream, None))
    }

    /// Answers with HEADERS and END_STREAM.
    pub fn refuse(self, status: StatusCode, headers: HeaderMap) {
        let Handle { mux, id, .. } = &self.stream;
        let mut state = mux.lock();
        // Fails only if the peer has withdrawn the request or is gone.
        let _ = state.answer(*id, status, &headers, true);
        // What else it would send is not read (RFC 9113 section 8.1).
        state.reset(*id, Reason::NO_ERROR);
    }
}

/// Serves one verified TLS connection until it ends; each request goes to `handler` in a task of
/// its own, at most [`Settings::max_streams`] at a time.
///
/// When `drain` is ready, the client is told to go elsewhere and streams go on until the instant
/// that it yields. Dropping the future ends all streams abnormally at once.
pub async fn serve<T, H, F>(
    io: T,
    settings: &Settings,
    handler: H,
    drain: impl Future<Output = Instant>,
) -> Result<(), ServeError>
where
    T: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Request) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let mut server = Server::new(io, settings);
    let mut drain = pin!(drain);
    let mut draining = false;
    loop {
        let event = std::future::poll_fn(|cx| match draining {
            false => match drain.as_mut().poll(cx) {
                Poll::Ready(deadline) => Poll::Ready(Event::Drain(deadline)),
                Poll::Pending => server.poll(cx),
            },
            true => server.poll(cx),
        })
        .await;
        match event {
            Event::Request(request) => {
                server.tasks.spawn(handler(*request));
            }
            Event::Drain(deadline) => {
                draining = true;
                server.mux.lock().leave();
                server.deadline = Some(Box::pin(tokio::time::sleep_until(deadline)));
            }
            Event::Stalled => {
                server.stall_check = None;
                server.mux.lock().leave();
            }
            Event::Deadline => {
                server.say_goodbye().await;
                return Ok(());
            }
            Event::PingTimeout => {
                server.say_goodbye().await;
                return Err(ServeError::PingTimeout(settings.ping_timeout));
            }
            Event::NoPreface => return Err(ServeError::NoPreface(settings.preface)),
            Event::Left => {
                server.shut_down().await;
                server.finish_tasks().await;
                return Ok(());
            }
            Event::Failed(ConnectionError::Closed) => {
                server.finish_tasks().await;
                return Ok(());
            }
            Event::Failed(error) => return Err(server.failed(error).await),
        }
    }
}

enum Event {
    Request(Box<Request>),
    Drain(Instant),
    /// Stalled streams hold the client's connection window.
    Stalled,
    Deadline,
    PingTimeout,
    NoPreface,
    /// We have left, and the last stream has ended.
    Left,
    Failed(ConnectionError),
}

struct Server<T> {
    drive: Drive<T>,
    mux: Arc<Mux>,
    keepalive: KeepAlive,
    tasks: JoinSet<()>,
    max_tasks: usize,
    /// Until when the client's preface has to come; gone once it has.
    preface: Option<Pin<Box<Sleep>>>,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Gone once the connection was retired.
    stall_check: Option<Interval>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Server<T> {
    fn new(io: T, settings: &Settings) -> Self {
        let mux = Mux::new(Role::Server, settings);
        let mut stall_check = tokio::time::interval(STALLED);
        stall_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            drive: Drive::new(io, mux.clone()),
            mux,
            keepalive: KeepAlive::new(settings.ping_interval, settings.ping_timeout),
            tasks: JoinSet::new(),
            max_tasks: settings.max_streams as usize,
            preface: Some(Box::pin(tokio::time::sleep(settings.preface))),
            deadline: None,
            stall_check: Some(stall_check),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        while let Poll::Ready(Some(_)) = self.tasks.poll_join_next(cx) {}
        let read = self.drive.poll_read(cx);
        let silent =
            self.preface.is_none() && self.keepalive.poll_unanswered(cx, &self.mux).is_ready();
        let _again_when_there_is_room = self.drive.poll_write(cx);
        if let Some(event) = self.next_event() {
            return Poll::Ready(event);
        }
        if let Poll::Ready(error) = read {
            return Poll::Ready(Event::Failed(error));
        }
        if silent {
            return Poll::Ready(Event::PingTimeout);
        }
        if self.preface.as_mut().is_some_and(|preface| preface.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Event::NoPreface);
        }
        if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Event::Deadline);
        }
        self.poll_stalled(cx)
    }

    /// A client may have many more tasks running here than streams open, when it resets streams
    /// that are being connected. No more are accepted then.
    fn next_event(&mut self) -> Option<Event> {
        let mut state = self.mux.lock();
        if self.preface.is_some() && state.has_preface() {
            self.preface = None;
        }
        let accepted = if self.tasks.len() < self.max_tasks { state.accept() } else { None };
        if let Some(Arrived { stream, method, authority, headers }) = accepted {
            let stream = Handle { mux: self.mux.clone(), id: stream, held: 0 };
            let request = Request { method, authority, headers, stream };
            return Some(Event::Request(Box::new(request)));
        }
        state.has_left().then_some(Event::Left)
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let peer = self.mux.lock().peer.clone();
        let Some(check) = self.stall_check.as_mut().filter(|_| peer.is_scarce()) else {
            return Poll::Pending;
        };
        while check.poll_tick(cx).is_ready() {
            if self.mux.stalled_streams(STALLED) >= (peer.safe_streams() - 1).max(1) {
                return Poll::Ready(Event::Stalled);
            }
        }
        Poll::Pending
    }

    /// The connection has closed in order: what already arrived is still delivered.
    async fn finish_tasks(&mut self) {
        let tasks = async { while self.tasks.join_next().await.is_some() {} };
        match self.deadline.as_mut() {
            None => tasks.await,
            Some(deadline) => tokio::select! {
                () = tasks => {}
                () = deadline => {}
            },
        }
    }

    /// GOAWAY, and all streams end abnormally.
    async fn say_goodbye(&mut self) {
        {
            let mut state = self.mux.lock();
            state.say_goodbye(Reason::NO_ERROR);
            state.fail(ConnectionError::Ended);
        }
        self.shut_down().await;
    }

    async fn failed(&mut self, error: ConnectionError) -> ServeError {
        if error.is_fault() {
            self.shut_down().await;
        }
        match self.preface {
            Some(_) => ServeError::Handshake(error),
            None => ServeError::Connection(error),
        }
    }

    async fn shut_down(&mut self) {
        let shut_down = std::future::poll_fn(|cx| self.drive.poll_shutdown(cx));
        let _ = tokio::time::timeout(GOODBYE, shut_down).await;
    }
}

impl<T> Drop for Server<T> {
    /// What runs on the connection learns that it is gone.
    fn drop(&mut self) {
        self.mux.lock().fail(ConnectionError::Ended);
    }
}

#[cfg(test)]
mod tests;
