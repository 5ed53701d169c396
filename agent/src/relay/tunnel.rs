//! Between TCP and an HBONE stream.
//!
//! Both directions live in one task: a message costs one wake-up less than with two, and a reset on
//! either side ends both at once.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use super::tcp::{self, Tcp};
use super::{Counters, RelayError};
use crate::hbone::{HboneStream, Reason, Sink, StreamError, TransferError};

/// The largest DATA frame sent. With its header it fills four TLS records. Larger ones gain nothing
/// measurable, and delay other streams' small messages that wait behind them.
const CHUNK: usize = (64 << 10) - 9;

/// Reads ask for this much; one that gets it turns to bulk reads.
const SMALL: usize = 16 << 10;

/// Chunks that one direction may move before others get their turn.
const TURN: usize = 16;

/// Chunks written with one system call.
const SLICES: usize = 16;

/// Which side of the relayed connection the application is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Side {
    /// It opened the connection.
    Client,
    Server,
}

enum End<C> {
    Tcp(io::Error),
    Tunnel(StreamError),
    Closed(C),
}

enum Failure {
    Tcp(io::Error),
    Tunnel(StreamError),
}

/// The application's connection. It takes what comes out of the tunnel as it comes.
struct Application<K> {
    tcp: Tcp,
    side: Side,
    counters: Arc<K>,
}

impl<K: Counters> Application<K> {
    /// `bytes` went into the tunnel.
    fn uploaded(&self, bytes: usize) {
        match self.side {
            Side::Client => self.counters.received(bytes as u64),
            Side::Server => self.counters.sent(bytes as u64),
        }
    }

    /// `bytes` came out of the tunnel.
    fn downloaded(&self, bytes: usize) {
        match self.side {
            Side::Client => self.counters.sent(bytes as u64),
            Side::Server => self.counters.received(bytes as u64),
        }
    }
}

impl<K: Counters + Send + Sync> Sink for Application<K> {
    fn take(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.tcp.stream().try_write(bytes) {
            Ok(count) => {
                self.downloaded(count);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }
}

/// Relays between an application's connection and a tunnel.
///
/// Dropping it before [`TunnelRelay::run`] has ended resets both.
pub struct TunnelRelay<K> {
    application: Arc<Application<K>>,
    stream: HboneStream,
    uploading: bool,
    downloading: bool,
    bulk: bool,
    /// Waits for bytes of the application, and so for a reset by it.
    listening: bool,
}

impl<K: Counters + Send + Sync + 'static> TunnelRelay<K> {
    pub(super) fn new(tcp: Tcp, side: Side, mut stream: HboneStream, counters: Arc<K>) -> Self {
        let application = Arc::new(Application { tcp, side, counters });
        stream.deliver_to(application.clone());
        Self {
            application,
            stream,
            uploading: true,
            downloading: true,
            bulk: false,
            listening: false,
        }
    }

    /// Relays until both directions have finished or one has failed, once.
    ///
    /// When `closing` is ready, the stream is reset with CANCEL and the application's connection
    /// reset.
    pub async fn run<C>(&mut self, closing: impl Future<Output = C>) -> Result<(), RelayError<C>> {
        let result = self.run_to_end(closing).await;
        let tcp = &self.application.tcp;
        match &result {
            Ok(()) => tcp.finished(),
            Err(End::Tcp(_)) => {
                self.upload_rest();
                self.stream.reset(Reason::CONNECT_ERROR);
            }
            Err(End::Closed(_)) => {
                self.stream.reset(Reason::CANCEL);
                Box::pin(tcp.reset_last()).await;
            }
            Err(End::Tunnel(_)) => {
                self.download_rest();
                Box::pin(self.application.tcp.reset_last()).await;
            }
        }
        result.map_err(|end| match (end, self.application.side) {
            (End::Tcp(error), Side::Client) => RelayError::Client(error),
            (End::Tcp(error), Side::Server) => RelayError::Server(error),
            (End::Tunnel(error), _) => RelayError::Tunnel(error),
            (End::Closed(reason), _) => RelayError::Closed(reason),
        })
    }

    async fn run_to_end<C>(&mut self, closing: impl Future<Output = C>) -> Result<(), End<C>> {
        let application = self.application.clone();
        let mut closing = pin!(closing);
        // An idle connection needs none.
        let mut broken: Option<Pin<Box<dyn Future<Output = io::Error> + Send>>> = None;
        std::future::poll_fn(|cx| {
            if let Poll::Ready(reason) = closing.as_mut().poll(cx) {
                return Poll::Ready(Err(End::Closed(reason)));
            }
            match self.poll(cx) {
                Poll::Ready(Err(Failure::Tcp(error))) => return Poll::Ready(Err(End::Tcp(error))),
                Poll::Ready(Err(Failure::Tunnel(error))) => {
                    return Poll::Ready(Err(End::Tunnel(error)));
                }
                Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
                Poll::Pending => {}
            }
            if self.uploading && self.listening && broken.is_none() {
                return Poll::Pending;
            }
            let broken =
                broken.get_or_insert_with(|| Box::pin(tcp::broken(application.tcp.stream())));
            broken.as_mut().poll(cx).map(|error| Err(End::Tcp(error)))
        })
        .await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if self.downloading && self.poll_download(cx)?.is_ready() {
            self.downloading = false;
        }
        if self.uploading && self.poll_upload(cx)?.is_ready() {
            self.uploading = false;
        }
        if self.uploading || self.downloading { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        self.listening = false;
        for _ in 0..TURN {
            let readable =
                self.application.tcp.stream().poll_read_ready(cx).map_err(Failure::Tcp)?;
            if readable.is_pending() {
                (self.bulk, self.listening) = (false, true);
                return self.poll_reset_while_idle(cx);
            }
            let wanted = if self.bulk { CHUNK } else { SMALL };
            let tcp = self.application.tcp.stream();
            match ready!(self.stream.poll_send(cx, wanted, |buffer| tcp::read(tcp, buffer))) {
                Ok(0) => {
                    return Poll::Ready(match self.stream.finish() {
                        Ok(()) => Ok(()),
                        Err(error) => self.upload_failure(error),
                    });
                }
                Ok(count) => {
                    self.bulk = count >= SMALL;
                    self.application.uploaded(count);
                }
                Err(TransferError::User(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(TransferError::User(error)) => return Poll::Ready(Err(Failure::Tcp(error))),
                Err(TransferError::Stream(error)) => {
                    return Poll::Ready(self.upload_failure(error));
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The receiving direction reports a reset by itself, until it has finished.
    fn poll_reset_while_idle(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if !self.stream.is_receiving_finished() {
            return Poll::Pending;
        }
        let error = ready!(self.stream.poll_peer_reset(cx));
        Poll::Ready(self.upload_failure(error))
    }

    /// A peer that has sent all it had may say that it needs no more from us (RFC 9113 section
    /// 8.1). The application notices when it writes to a closed connection.
    fn upload_failure(&self, error: StreamError) -> Result<(), Failure> {
        match error {
            StreamError::Reset(Reason::NO_ERROR) if self.stream.is_receiving_finished() => Ok(()),
            error => Err(Failure::Tunnel(error)),
        }
    }

    /// Passes on what the application sent before its connection failed, as far as the tunnel takes
    /// it at once. It may have come together with the failure, which was noticed first.
    fn upload_rest(&mut self) {
        if !self.uploading {
            return;
        }
        let mut cx = Context::from_waker(Waker::noop());
        let tcp = self.application.tcp.stream();
        for _ in 0..TURN {
            let read = |buffer: &mut [u8]| Ok(tcp::read_now(tcp, buffer).unwrap_or_default());
            match self.stream.poll_send(&mut cx, SMALL, read) {
                Poll::Ready(Ok(count)) if count > 0 => self.application.uploaded(count),
                _ => return,
            }
        }
    }

    /// The same for what came out of the tunnel before it failed.
    fn download_rest(&mut self) {
        let mut cx = Context::from_waker(Waker::noop());
        let _ = self.stream.poll_fill(&mut cx);
        while self.stream.has_received() {
            let mut slices = [IoSlice::new(&[])];
            self.stream.received(&mut slices);
            let [data] = slices;
            let Some(count) = tcp::write_now(self.application.tcp.stream(), &data) else { return };
            self.stream.consume(count);
            self.application.downloaded(count);
        }
    }

    fn poll_download(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        for _ in 0..TURN {
            // Taken in also while the application is slow, to learn of a reset.
            let end = self.stream.poll_fill(cx);
            if !self.stream.has_received() {
                ready!(end).map_err(Failure::from)?;
                return Poll::Ready(match tcp::shutdown_write(self.application.tcp.stream()) {
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                        Err(Failure::Tcp(error))
                    }
                    _ => Ok(()),
                });
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.stream.received(&mut slices);
            match self
                .application
                .tcp
                .stream()
                .try_write_vectored(slices.get(..filled).unwrap_or_default())
            {
                Ok(count) => {
                    self.stream.consume(count);
                    self.application.downloaded(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Poll::Ready(Err(error)) = end {
                        return Poll::Ready(Err(error.into()));
                    }
                    ready!(self.application.tcp.stream().poll_write_ready(cx))
                        .map_err(Failure::Tcp)?;
                }
                Err(error) => return Poll::Ready(Err(Failure::Tcp(error))),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::User(error) => Failure::Tcp(error),
            TransferError::Stream(error) => Failure::Tunnel(error),
        }
    }
}
