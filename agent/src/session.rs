//! What every relayed connection shares: what may end it early, and how its end is told.

use std::io;
use std::pin::Pin;

use culvert_core::admit::Admission;
use culvert_core::authorize::{Denied, Permit};
use futures_util::future::{BoxFuture, OptionFuture};
use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use crate::connections::{CloseReason, Guard};
use crate::dial;
use crate::drain::DrainWatch;
use crate::pods::Pod;
use crate::relay::{Counters, RelayError};
use crate::telemetry::{ByteCounters, Failure, ResponseFlag};

/// Header of a 401 that names the policy and rule that decided.
pub const DENIED_BY: HeaderName = HeaderName::from_static("x-culvert-denied-by");

/// The headers of a 401.
pub fn denied_headers(denied: &Denied) -> HeaderMap {
    let text = match denied.rule() {
        Some(rule) => format!("{denied}, rule {rule}"),
        None => denied.to_string(),
    };
    let value = HeaderValue::from_str(&text);
    value.into_iter().map(|value| (DENIED_BY, value)).collect()
}

/// What carries a connection once it is open.
pub type Carrying = BoxFuture<'static, ()>;

/// Runs what opens a connection, and then what it gives, in a task of its own.
pub fn spawn(opening: impl Future<Output = Option<Carrying>> + Send + 'static) {
    tokio::spawn(carry(Box::pin(opening)));
}

/// What opening needs, with handshakes in it, is not kept for as long as the connection lives: many
/// do nothing most of the time.
pub async fn carry(opening: Pin<Box<impl Future<Output = Option<Carrying>>>>) {
    let carrying = opening.await;
    if let Some(carrying) = carrying {
        carrying.await;
    }
}

/// The connection to the application, which has been told first what it is to be told.
///
/// It takes the proof that the connection was authorized.
pub async fn deliver(
    pod: &Pod,
    admission: &Admission,
    _authorized: Permit,
) -> io::Result<TcpStream> {
    let to = admission.to.addr();
    let mut server = dial::dial_application(&pod.netns, to, admission.from).await?;
    if let Some(header) = &admission.proxy {
        server.write_all(&header.to_bytes()).await?;
    }
    Ok(server)
}

/// All that may end a relayed connection before its own end.
pub struct Ends<'a> {
    guard: &'a Guard,
    pod: &'a Pod,
    /// The drain waits until it is dropped.
    _drain: DrainWatch,
    /// Cancelled when the peer of the tunnel is revoked.
    revoked: Option<CancellationToken>,
}

impl<'a> Ends<'a> {
    pub fn of(guard: &'a Guard, drain: DrainWatch, pod: &'a Pod) -> Self {
        Self { guard, pod, _drain: drain, revoked: None }
    }

    /// The same within a tunnel whose connection may be cut off.
    pub fn in_tunnel(self, revoked: CancellationToken) -> Self {
        Self { revoked: Some(revoked), ..self }
    }

    pub async fn wait(&self) -> CloseReason {
        let revoked = OptionFuture::from(self.revoked.as_ref().map(|revoked| revoked.cancelled()));
        tokio::select! {
            reason = self.guard.closed() => reason,
            reason = self.pod.is_cut() => reason,
            Some(()) = revoked => CloseReason::PeerRevoked,
        }
    }
}

/// How the end of a relay is told. An endpoint that resets its connection is no failure of ours.
pub fn outcome(relayed: Result<(), RelayError<CloseReason>>) -> Result<(), Failure> {
    match relayed {
        Ok(()) => Ok(()),
        Err(RelayError::Closed(reason)) => Err(reason.into()),
        Err(error) if error.is_reset() => Ok(()),
        Err(error) => Err(Failure::new(ResponseFlag::Connect, error.to_string())),
    }
}

/// What the source tells of a failure: a policy is the destination's and counts there, and the source
/// saw a connection that broke.
pub fn as_source(failure: Failure) -> Failure {
    match failure.denial {
        Some(_) => Failure::new(ResponseFlag::Connect, failure.error),
        None => failure,
    }
}

impl Counters for ByteCounters {
    fn received(&self, bytes: u64) {
        self.add_received(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.add_sent(bytes);
    }
}

/// Counts for both reporters of a connection that stays on this node.
#[derive(Debug)]
pub struct Both<'a>(pub &'a ByteCounters, pub &'a ByteCounters);

impl Counters for Both<'_> {
    fn received(&self, bytes: u64) {
        self.0.add_received(bytes);
        self.1.add_received(bytes);
    }

    fn sent(&self, bytes: u64) {
        self.0.add_sent(bytes);
        self.1.add_sent(bytes);
    }
}
