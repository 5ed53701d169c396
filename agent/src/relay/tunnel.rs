//! Between TCP and an HBONE stream.
//!
//! Both directions live in one task: a message costs one wake-up less than with two, and a reset on
//! either side ends both at once.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use tokio::net::TcpStream;

use super::tcp::{self, Tcp};
use super::{Count, RelayError};
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

pub(super) enum End<C> {
    Tcp(io::Error),
    Tunnel(StreamError),
    Closed(C),
}

impl<C> End<C> {
    /// As the relay's error, with `tcp` saying which side the TCP connection is.
    pub(super) fn with(self, tcp: impl FnOnce(io::Error) -> RelayError<C>) -> RelayError<C> {
        match self {
            End::Tcp(error) => tcp(error),
            End::Tunnel(error) => RelayError::Tunnel(error),
            End::Closed(reason) => RelayError::Closed(reason),
        }
    }
}

enum Side {
    Tcp(io::Error),
    Tunnel(StreamError),
}

/// Takes what comes out of a tunnel straight to the application.
struct Downloads<D> {
    tcp: Arc<Tcp>,
    count: D,
}

impl<D: Fn(u64) + Send + Sync> Sink for Downloads<D> {
    fn take(&self, bytes: &[u8]) -> io::Result<usize> {
        match self.tcp.stream().try_write(bytes) {
            Ok(count) => {
                (self.count)(count as u64);
                Ok(count)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            Err(error) => Err(error),
        }
    }
}

/// Relays until both directions have finished or one has failed. `upload` counts bytes that went
/// into the tunnel, `download` those that came out.
pub(super) async fn relay<C>(
    tcp: Tcp,
    mut stream: HboneStream,
    upload: impl Fn(u64),
    download: impl Count,
    closing: impl Future<Output = C>,
) -> Result<(), End<C>> {
    let tcp = Arc::new(tcp);
    stream.deliver_to(Arc::new(Downloads { tcp: tcp.clone(), count: download.clone() }));
    let mut relay = Relay {
        tcp: tcp.stream(),
        stream,
        upload,
        download,
        uploading: true,
        downloading: true,
        bulk: false,
    };
    let mut closing = pin!(closing);
    let mut broken = pin!(tcp::broken(tcp.stream()));
    let result = std::future::poll_fn(|cx| {
        if let Poll::Ready(reason) = closing.as_mut().poll(cx) {
            return Poll::Ready(Err(End::Closed(reason)));
        }
        match relay.poll(cx) {
            Poll::Ready(Err(Side::Tcp(error))) => return Poll::Ready(Err(End::Tcp(error))),
            Poll::Ready(Err(Side::Tunnel(error))) => return Poll::Ready(Err(End::Tunnel(error))),
            Poll::Ready(Ok(())) => return Poll::Ready(Ok(())),
            Poll::Pending => {}
        }
        broken.as_mut().poll(cx).map(|error| Err(End::Tcp(error)))
    })
    .await;
    match &result {
        Ok(()) => tcp.finished(),
        Err(End::Tcp(_)) => {
            relay.upload_rest();
            relay.stream.reset(Reason::CONNECT_ERROR);
        }
        Err(End::Closed(_)) => {
            relay.stream.reset(Reason::CANCEL);
            Box::pin(tcp.reset_last()).await;
        }
        Err(End::Tunnel(_)) => {
            relay.download_rest();
            Box::pin(tcp.reset_last()).await;
        }
    }
    result
}

impl From<TransferError> for Side {
    fn from(error: TransferError) -> Self {
        match error {
            TransferError::User(error) => Side::Tcp(error),
            TransferError::Stream(error) => Side::Tunnel(error),
        }
    }
}

struct Relay<'a, U, D> {
    tcp: &'a TcpStream,
    stream: HboneStream,
    upload: U,
    download: D,
    uploading: bool,
    downloading: bool,
    bulk: bool,
}

impl<U: Fn(u64), D: Count> Relay<'_, U, D> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        if self.downloading && self.poll_download(cx)?.is_ready() {
            self.downloading = false;
        }
        if self.uploading && self.poll_upload(cx)?.is_ready() {
            self.uploading = false;
        }
        if self.uploading || self.downloading { Poll::Pending } else { Poll::Ready(Ok(())) }
    }

    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        for _ in 0..TURN {
            let readable = self.tcp.poll_read_ready(cx).map_err(Side::Tcp)?;
            if readable.is_pending() {
                self.bulk = false;
                return self.poll_reset_while_idle(cx);
            }
            let wanted = if self.bulk { CHUNK } else { SMALL };
            let tcp = self.tcp;
            match ready!(self.stream.poll_send(cx, wanted, |buffer| tcp::read(tcp, buffer))) {
                Ok(0) => {
                    return Poll::Ready(match self.stream.finish() {
                        Ok(()) => Ok(()),
                        Err(error) => self.upload_failure(error),
                    });
                }
                Ok(count) => {
                    self.bulk = count >= SMALL;
                    (self.upload)(count as u64);
                }
                Err(TransferError::User(error)) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(TransferError::User(error)) => return Poll::Ready(Err(Side::Tcp(error))),
                Err(TransferError::Stream(error)) => {
                    return Poll::Ready(self.upload_failure(error));
                }
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The receiving direction reports a reset by itself, until it has finished.
    fn poll_reset_while_idle(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        if !self.stream.is_receiving_finished() {
            return Poll::Pending;
        }
        let error = ready!(self.stream.poll_peer_reset(cx));
        Poll::Ready(self.upload_failure(error))
    }

    /// A peer that has sent all it had may say that it needs no more from us (RFC 9113 section
    /// 8.1). The application notices when it writes to a closed connection.
    fn upload_failure(&self, error: StreamError) -> Result<(), Side> {
        match error {
            StreamError::Reset(Reason::NO_ERROR) if self.stream.is_receiving_finished() => Ok(()),
            error => Err(Side::Tunnel(error)),
        }
    }

    /// Passes on what the application sent before its connection failed, as far as the tunnel takes
    /// it at once. It may have come together with the failure, which was noticed first.
    fn upload_rest(&mut self) {
        if !self.uploading {
            return;
        }
        let mut cx = Context::from_waker(Waker::noop());
        let tcp = self.tcp;
        for _ in 0..TURN {
            let read = |buffer: &mut [u8]| Ok(tcp::read_now(tcp, buffer).unwrap_or_default());
            match self.stream.poll_send(&mut cx, SMALL, read) {
                Poll::Ready(Ok(count)) if count > 0 => (self.upload)(count as u64),
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
            let Some(count) = tcp::write_now(self.tcp, &data) else { return };
            self.stream.consume(count);
            (self.download)(count as u64);
        }
    }

    fn poll_download(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Side>> {
        for _ in 0..TURN {
            // Taken in also while the application is slow, to learn of a reset.
            let end = self.stream.poll_fill(cx);
            if !self.stream.has_received() {
                ready!(end).map_err(Side::from)?;
                return Poll::Ready(match tcp::shutdown_write(self.tcp) {
                    Err(error) if error.kind() != io::ErrorKind::NotConnected => {
                        Err(Side::Tcp(error))
                    }
                    _ => Ok(()),
                });
            }
            let mut slices = [IoSlice::new(&[]); SLICES];
            let filled = self.stream.received(&mut slices);
            match self.tcp.try_write_vectored(slices.get(..filled).unwrap_or_default()) {
                Ok(count) => {
                    self.stream.consume(count);
                    (self.download)(count as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Poll::Ready(Err(error)) = end {
                        return Poll::Ready(Err(error.into()));
                    }
                    ready!(self.tcp.poll_write_ready(cx)).map_err(Side::Tcp)?;
                }
                Err(error) => return Poll::Ready(Err(Side::Tcp(error))),
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
