//! The server role on one tunnel connection.

use std::future::Future;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::request::Parts;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;
use tokio::time::{Instant, Interval, MissedTickBehavior, Sleep};

use super::keepalive::KeepAlive;
use super::stream::{HboneStream, StreamError};
use super::windows::PeerWindows;
use super::wire::{Flusher, Wire, wire};
use super::{REMEMBER_RESETS, REMEMBERED_RESETS, SEND_BUFFER, Settings};

/// Bytes of the client's connection preface (RFC 9113 section 3.4).
const PREFACE: u64 = 24;

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
    Handshake(h2::Error),
    #[error("h2 failed: {0}")]
    Connection(h2::Error),
    #[error("tunnel connection broke: {0}")]
    Io(io::Error),
    #[error("the peer left a ping unanswered for {0:?}")]
    PingTimeout(Duration),
}

impl ServeError {
    /// Whether the peer broke the protocol, instead of leaving or being cut off.
    pub fn is_fault_of_peer(&self) -> bool {
        match self {
            Self::NoPreface(_) => true,
            Self::Handshake(error) | Self::Connection(error) => {
                !error.is_io() && !error.is_remote()
            }
            Self::Io(_) | Self::PingTimeout(_) => false,
        }
    }
}

/// A request as it came. Nothing has been answered yet.
///
/// Dropped without an answer it is reset.
pub struct Request {
    head: Parts,
    recv: RecvStream,
    respond: SendResponse<Bytes>,
    peer: Arc<PeerWindows>,
}

impl Request {
    /// Anything but CONNECT deserves a 400.
    pub fn method(&self) -> &Method {
        &self.head.method
    }

    /// `:authority` as the peer wrote it; empty if there was none.
    pub fn authority(&self) -> &str {
        self.head.uri.authority().map_or("", |authority| authority.as_str())
    }

    pub fn headers(&self) -> &HeaderMap {
        &self.head.headers
    }

    /// Ready when the peer has given the request up before it was answered.
    pub fn poll_withdrawn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.respond.poll_reset(cx).map(|_| ())
    }

    /// Answers 200; `baggage` describes the destination workload.
    pub fn accept(mut self, baggage: Option<&str>) -> Result<HboneStream, StreamError> {
        let mut response = Response::new(());
        if let Some(Ok(baggage)) = baggage.map(HeaderValue::from_str) {
            response.headers_mut().insert(HeaderName::from_static("baggage"), baggage);
        }
        let sent = self.respond.send_response(response, false);
        let send = sent.map_err(|error| StreamError::from_h2(&error))?;
        Ok(HboneStream::new(send, self.recv, self.peer, None))
    }

    /// Answers with HEADERS and END_STREAM.
    pub fn refuse(mut self, status: StatusCode, headers: HeaderMap) {
        let mut response = Response::new(());
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        // Fails only if the peer has withdrawn the request or is gone.
        let _ = self.respond.send_response(response, true);
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
    let mut server = Server::handshake(io, settings).await?;
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
                server.connection.graceful_shutdown();
                server.deadline = Some(Box::pin(tokio::time::sleep_until(deadline)));
            }
            Event::Stalled => {
                server.stall_check = None;
                server.connection.graceful_shutdown();
            }
            Event::Deadline => {
                server.say_goodbye().await;
                return Ok(());
            }
            Event::PingTimeout => {
                server.say_goodbye().await;
                return Err(ServeError::PingTimeout(settings.ping_timeout));
            }
            Event::Closed(Ok(())) => {
                server.finish_tasks().await;
                return Ok(());
            }
            Event::Closed(Err(error)) => return Err(error),
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
    Closed(Result<(), ServeError>),
}

struct Server<T> {
    connection: h2::server::Connection<Wire<T>, Bytes>,
    flusher: Flusher<T>,
    peer: Arc<PeerWindows>,
    keepalive: KeepAlive,
    tasks: JoinSet<()>,
    max_tasks: usize,
    deadline: Option<Pin<Box<Sleep>>>,
    /// Gone once the connection was retired.
    stall_check: Option<Interval>,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Server<T> {
    async fn handshake(io: T, settings: &Settings) -> Result<Self, ServeError> {
        let peer = PeerWindows::new(settings.stream_window, settings.streams_per_connection);
        let (wire, flusher) = wire(io, PREFACE, peer.clone());
        let handshake = h2::server::Builder::new()
            .initial_window_size(settings.stream_window)
            .initial_connection_window_size(settings.connection_window())
            .max_concurrent_streams(settings.max_streams)
            .max_frame_size(settings.max_frame)
            .max_header_list_size(settings.server_header_list)
            .max_send_buffer_size(SEND_BUFFER)
            .max_concurrent_reset_streams(REMEMBERED_RESETS)
            .reset_stream_duration(REMEMBER_RESETS)
            .max_pending_accept_reset_streams(settings.max_streams as usize)
            .data_frame_budget(settings.connection_window() as usize)
            .handshake::<_, Bytes>(wire);
        let mut handshake = pin!(handshake);
        // Our SETTINGS leave before the client's preface has come.
        let handshake = std::future::poll_fn(|cx| {
            let done = handshake.as_mut().poll(cx);
            if let Poll::Ready(Err(error)) = flusher.poll_flush(cx) {
                return Poll::Ready(Err(ServeError::Io(error)));
            }
            done.map_err(ServeError::Handshake)
        });
        let mut connection = tokio::time::timeout(settings.preface, handshake)
            .await
            .unwrap_or(Err(ServeError::NoPreface(settings.preface)))?;
        let keepalive =
            KeepAlive::new(connection.ping_pong(), settings.ping_interval, settings.ping_timeout);
        let mut stall_check = tokio::time::interval(STALLED);
        stall_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Ok(Self {
            connection,
            flusher,
            peer,
            keepalive,
            tasks: JoinSet::new(),
            max_tasks: settings.max_streams as usize,
            deadline: None,
            stall_check: Some(stall_check),
        })
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        while let Poll::Ready(Some(_)) = self.tasks.poll_join_next(cx) {}
        self.peer.driver.register(cx.waker());
        let moved = self.poll_connection(cx);
        self.peer.resets.send();
        if let Poll::Ready(Err(error)) = self.flusher.poll_flush(cx) {
            return Poll::Ready(Event::Closed(Err(ServeError::Io(error))));
        }
        if moved.is_ready() {
            return moved;
        }
        if self.keepalive.poll_unanswered(cx).is_ready() {
            return Poll::Ready(Event::PingTimeout);
        }
        if self.deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(Event::Deadline);
        }
        self.poll_stalled(cx)
    }

    /// A client may have many more tasks running here than streams open, when it resets streams
    /// that are being connected. No more are accepted then.
    fn poll_connection(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let closed =
            |result: Result<(), h2::Error>| Event::Closed(result.map_err(ServeError::Connection));
        if self.tasks.len() >= self.max_tasks {
            return self.connection.poll_closed(cx).map(closed);
        }
        match ready!(self.connection.poll_accept(cx)) {
            None => Poll::Ready(closed(Ok(()))),
            Some(Err(error)) => Poll::Ready(closed(Err(error))),
            Some(Ok((request, respond))) => {
                let (head, recv) = request.into_parts();
                let peer = self.peer.clone();
                Poll::Ready(Event::Request(Box::new(Request { head, recv, respond, peer })))
            }
        }
    }

    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let safe = self.peer.safe_streams();
        let Some(check) = self.stall_check.as_mut().filter(|_| self.peer.is_scarce()) else {
            return Poll::Pending;
        };
        while check.poll_tick(cx).is_ready() {
            if self.peer.stalled_streams(STALLED) >= (safe - 1).max(1) {
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
        self.connection.abrupt_shutdown(Reason::NO_ERROR);
        let closed = std::future::poll_fn(|cx| {
            let closed = self.connection.poll_closed(cx);
            let flushed = self.flusher.poll_flush(cx);
            if closed.is_ready() || matches!(flushed, Poll::Ready(Err(_))) {
                return Poll::Ready(());
            }
            Poll::Pending
        });
        let _ = tokio::time::timeout(GOODBYE, closed).await;
    }
}

#[cfg(test)]
mod tests;
