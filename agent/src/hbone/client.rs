//! The client role on one tunnel connection.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};

use http::{HeaderMap, Request, StatusCode};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;

use super::Settings;
use super::drive::Drive;
use super::first::First;
use super::frame::Reason;
use super::keepalive::KeepAlive;
use super::mux::{ConnectionError, Mux, Role, request_block};
use super::stream::{Handle, HboneStream, StreamError};
use super::windows::PeerWindows;

/// How long a fresh connection may keep others waiting for the peer's SETTINGS.
const SETTLE: std::time::Duration = std::time::Duration::from_millis(100);

/// How long an idle connection has to say good-bye.
const GOODBYE: std::time::Duration = std::time::Duration::from_secs(5);

/// How long the streams of a connection that is cut off have to end by themselves.
const CUT_OFF: std::time::Duration = std::time::Duration::from_secs(1);

/// A CONNECT that did not lead to a stream.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The peer answered, but not with 200.
    #[error("http status: {status}")]
    Refused { status: StatusCode, headers: Box<HeaderMap> },
    /// The connection is going away and has not seen the request, or refused the stream unseen
    /// (RFC 9113 section 8.7): it may be repeated elsewhere.
    #[error("h2 failed: {0}")]
    Unprocessed(StreamError),
    #[error("h2 failed: {0}")]
    Failed(StreamError),
    /// The connection was cut off before the answer; see [`Driver::run`].
    #[error("the tunnel connection was cut off")]
    CutOff,
    /// Whoever the stream is for has failed before the answer.
    #[error(transparent)]
    Source(io::Error),
}

/// An accepted CONNECT.
pub struct Accepted {
    pub stream: HboneStream,
    /// The headers of the 200.
    pub headers: HeaderMap,
    /// Cancelled when the connection is cut off and the stream has to end at once.
    pub cut_off: CancellationToken,
}

/// A handle to one connection; its streams go on when it is dropped.
pub struct Connection {
    pub(super) shared: Arc<Shared>,
}

/// What the handle, its streams and its driver share.
pub(super) struct Shared {
    mux: Arc<Mux>,
    pub(super) peer: Arc<PeerWindows>,
    /// How many [`Connection`]s there are: without any, the connection ends with its last stream.
    handles: AtomicUsize,
    open: AtomicUsize,
    ended: AtomicBool,
    streams_per_connection: usize,
    /// Told whenever a stream ends.
    freed: Arc<Notify>,
    cut_off: CancellationToken,
}

impl Clone for Connection {
    fn clone(&self) -> Self {
        self.shared.handles.fetch_add(1, Relaxed);
        Self { shared: self.shared.clone() }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if self.shared.handles.fetch_sub(1, Relaxed) == 1 {
            self.shared.mux.wake_driver();
        }
    }
}

impl Shared {
    /// Streams that may be open now such that none can stall another.
    pub(super) fn safe_limit(&self) -> usize {
        self.peer.safe_streams().min(self.limit())
    }

    /// Streams that we and the peer allow on the connection.
    pub(super) fn limit(&self) -> usize {
        self.peer.max_streams().min(self.streams_per_connection)
    }

    pub(super) fn open_streams(&self) -> usize {
        self.open.load(Relaxed)
    }

    /// Streams that have been waiting for the peer's window for at least `time`.
    pub(super) fn stalled_streams(&self, time: std::time::Duration) -> usize {
        self.mux.stalled_streams(time)
    }

    /// Nobody will open another stream, and the last one has ended.
    fn is_abandoned(&self) -> bool {
        self.handles.load(Relaxed) == 0 && self.open_streams() == 0
    }

    pub(super) fn is_usable(&self) -> bool {
        !self.ended.load(Relaxed) && !self.peer.is_going_away()
    }

    /// Takes a place on the connection. Callers serialise limit checks themselves.
    pub(super) fn take_place(self: &Arc<Self>) -> TakenPlace {
        self.open.fetch_add(1, Relaxed);
        TakenPlace(self.clone())
    }
}

/// A stream's place on its connection, given back when dropped.
pub(super) struct TakenPlace(Arc<Shared>);

impl Drop for TakenPlace {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Relaxed);
        self.0.freed.notify_waiters();
        self.0.mux.wake_driver();
    }
}

impl Connection {
    /// Opens a stream on a connection that is not shared (the inner tunnel of a cross-network
    /// call).
    pub async fn connect(
        &self,
        request: Request<()>,
        first: &mut First<'_>,
    ) -> Result<Accepted, RequestError> {
        self.connect_at(request, self.shared.take_place(), first).await
    }

    pub(super) async fn connect_at(
        &self,
        request: Request<()>,
        place: TakenPlace,
        first: &mut First<'_>,
    ) -> Result<Accepted, RequestError> {
        let mux = &self.shared.mux;
        let unprocessed = |error: ConnectionError| {
            RequestError::Unprocessed(StreamError::Broken(error.to_string()))
        };
        let id = mux.lock().open(&request_block(&request)).map_err(unprocessed)?;
        let handle = Handle { mux: mux.clone(), id, held: 0 };
        let mut stream = HboneStream::new(handle, Some(place));
        let mut first = first.on_stream();
        let answer = std::future::poll_fn(|cx| {
            let answer = mux.lock().poll_answer(cx, id);
            if answer.is_pending() {
                first.poll(cx, &mut stream).map_err(RequestError::Source)?;
            }
            answer.map(|answer| {
                answer.map_err(|error| match mux.lock().is_unprocessed(id) {
                    true => RequestError::Unprocessed(error),
                    false => RequestError::Failed(error),
                })
            })
        });
        let head = tokio::select! {
            answer = answer => answer?,
            () = self.shared.cut_off.cancelled() => return Err(RequestError::CutOff),
        };
        if head.status != StatusCode::OK {
            let headers = Box::new(head.headers);
            return Err(RequestError::Refused { status: head.status, headers });
        }
        std::future::poll_fn(|cx| first.poll_again(cx, &mut stream)).await;
        let cut_off = self.shared.cut_off.clone();
        Ok(Accepted { stream, headers: head.headers, cut_off })
    }
}

/// Starts HTTP/2 on a verified TLS stream. The driver must be run for the connection to move.
pub fn handshake<T>(io: T, settings: &Settings) -> (Connection, Driver<T>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    handshake_with(io, settings, Arc::default())
}

pub(super) fn handshake_with<T>(
    io: T,
    settings: &Settings,
    freed: Arc<Notify>,
) -> (Connection, Driver<T>)
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mux = Mux::new(Role::Client, settings);
    let peer = mux.lock().peer.clone();
    let shared = Arc::new(Shared {
        mux: mux.clone(),
        peer,
        handles: AtomicUsize::new(1),
        open: AtomicUsize::new(0),
        ended: AtomicBool::new(false),
        streams_per_connection: settings.streams_per_connection,
        freed,
        cut_off: CancellationToken::new(),
    });
    let driver = Driver {
        drive: Drive::new(io, mux),
        keepalive: KeepAlive::new(settings.ping_interval, settings.ping_timeout),
        shared: shared.clone(),
        settling: Some(Settling { _guard: None, alarm: Box::pin(tokio::time::sleep(SETTLE)) }),
        idle: None,
        is_leaving: false,
    };
    (Connection { shared }, driver)
}

/// Moves the frames of one connection. Dropping it resets all streams abnormally.
pub struct Driver<T> {
    drive: Drive<T>,
    keepalive: KeepAlive,
    shared: Arc<Shared>,
    settling: Option<Settling>,
    idle: Option<Idle>,
    /// The peer has been told that nothing more comes.
    is_leaving: bool,
}

struct Settling {
    _guard: Option<Box<dyn Send>>,
    alarm: Pin<Box<Sleep>>,
}

/// Closes a connection that has had no streams for a while.
struct Idle {
    after: std::time::Duration,
    alarm: Pin<Box<Sleep>>,
    armed: bool,
    /// Takes the connection out of the pool; `false` if it has just been used again.
    retire: Box<dyn FnMut() -> bool + Send>,
    retired: bool,
}

impl<T> Driver<T> {
    /// Keeps `guard` until the peer's limits are known, at most 100 ms.
    pub(super) fn hold_until_settled(&mut self, guard: Box<dyn Send>) {
        if let Some(settling) = &mut self.settling {
            settling._guard = Some(guard);
        }
    }

    pub(super) fn retire_when_idle(
        &mut self,
        after: std::time::Duration,
        retire: Box<dyn FnMut() -> bool + Send>,
    ) {
        let alarm = Box::pin(tokio::time::sleep(after));
        self.idle = Some(Idle { after, alarm, armed: false, retire, retired: false });
    }

    fn poll_settled(&mut self, cx: &mut Context<'_>) {
        let Some(settling) = &mut self.settling else { return };
        if self.shared.peer.is_settled() || settling.alarm.as_mut().poll(cx).is_ready() {
            self.settling = None;
        }
    }

    fn poll_idle(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(idle) = &mut self.idle else { return Poll::Pending };
        if idle.retired {
            return idle.alarm.as_mut().poll(cx);
        }
        if self.shared.open_streams() > 0 {
            idle.armed = false;
            return Poll::Pending;
        }
        if !idle.armed {
            idle.armed = true;
            idle.alarm.as_mut().reset(Instant::now() + idle.after);
        }
        while idle.alarm.as_mut().poll(cx).is_ready() {
            if idle.retired {
                return Poll::Ready(());
            }
            idle.retired = (idle.retire)();
            let next = if idle.retired { GOODBYE } else { idle.after };
            idle.alarm.as_mut().reset(Instant::now() + next);
        }
        Poll::Pending
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<T> {
    /// Moves the connection until it ends, or until it is to be cut off.
    ///
    /// Then nothing new is opened on it, its streams are told ([`Accepted::cut_off`]), and it is
    /// dropped as soon as they have ended, at the latest after a second.
    pub async fn run(mut self, cut_off: impl Future<Output = ()>) {
        tokio::select! {
            () = &mut self => return,
            () = cut_off => {}
        }
        self.shared.ended.store(true, Relaxed);
        self.shared.freed.notify_waiters();
        self.shared.cut_off.cancel();
        let _ = tokio::time::timeout(CUT_OFF, self).await;
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> Future for Driver<T> {
    /// The connection has ended; its streams know why.
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        let failed = this.drive.poll_read(cx).is_ready();
        let silent = this.keepalive.poll_unanswered(cx, &this.shared.mux).is_ready();
        let idle = this.poll_idle(cx).is_ready();
        let cut_off = this.shared.cut_off.is_cancelled() && this.shared.open_streams() == 0;
        if this.shared.is_abandoned() && !this.is_leaving {
            this.is_leaving = true;
            this.shared.mux.lock().say_goodbye(Reason::NO_ERROR);
        }
        let left = this.is_leaving && this.drive.poll_shutdown(cx).is_ready();
        if !this.is_leaving {
            let _again_when_there_is_room = this.drive.poll_write(cx);
        }
        this.poll_settled(cx);
        if failed || silent || idle || cut_off || left {
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        self.shared.ended.store(true, Relaxed);
        self.shared.mux.lock().fail(ConnectionError::Ended);
        self.shared.freed.notify_waiters();
    }
}
