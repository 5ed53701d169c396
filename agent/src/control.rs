//! The channel to the control plane: HTTP/2 over server-authenticated TLS, shared by all that ask it.
//!
//! Nothing is kept between connections: the roots are read for each, the token for each request, so
//! that a rotation of either needs no restart.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response, Uri};
use tonic::Status;
use tonic::body::Body;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service;

use crate::config::ControlPlane;
use connect::Connector;
use credentials::Credentials;

mod connect;
mod credentials;
mod roots;

/// The largest message that is accepted from the control plane, in bytes. To be set on each
/// generated client (`max_decoding_message_size`), whose own limit is 4 MB.
pub const MAX_MESSAGE: usize = 200 << 20;

/// HTTP/2 PING while a stream is open (RFC 9113 section 6.7), and how long its answer may take.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING_LIMIT: Duration = Duration::from_secs(10);

/// Where the control plane is and how it is spoken to. Cloning copies pointers.
#[derive(Clone)]
pub struct Control {
    addresses: Arc<[String]>,
    connector: Connector,
    credentials: Arc<Credentials>,
}

impl Control {
    /// Settings that cannot work are told by the first connection or request.
    pub fn new(settings: &ControlPlane) -> Self {
        Self {
            addresses: settings.addresses.clone().into(),
            connector: Connector::new(settings),
            credentials: Arc::new(Credentials::new(settings)),
        }
    }

    /// How many addresses there are.
    pub fn addresses(&self) -> usize {
        self.addresses.len()
    }

    /// Connects to the first address that can be connected to, in their order.
    pub async fn connect(&self) -> Result<ControlChannel, ControlError> {
        self.try_all(0).await
    }

    /// Like [`Self::connect`], but tries `failed` after all others: for an address that can be
    /// connected to and then gives no answer.
    pub async fn connect_after(&self, failed: &str) -> Result<ControlChannel, ControlError> {
        let failed = self.addresses.iter().position(|address| address == failed);
        self.try_all(failed.map_or(0, |index| index + 1)).await
    }

    async fn try_all(&self, first: usize) -> Result<ControlChannel, ControlError> {
        let count = self.addresses.len();
        let mut errors = Vec::new();
        for address in self.addresses.iter().cycle().skip(first).take(count) {
            match self.connect_to(address).await {
                Ok(channel) => return Ok(channel),
                Err(error) => errors.push(error),
            }
        }
        match errors.pop() {
            None => Err(ControlError::NoAddress),
            Some(only) if errors.is_empty() => Err(only),
            Some(last) => {
                errors.push(last);
                Err(ControlError::Several(errors))
            }
        }
    }

    async fn connect_to(&self, address: &str) -> Result<ControlChannel, ControlError> {
        let invalid = |why: &dyn fmt::Display| ControlError::InvalidAddress {
            address: address.to_owned(),
            why: why.to_string(),
        };
        let uri: Uri = address.parse().map_err(|error: http::uri::InvalidUri| invalid(&error))?;
        if uri.scheme_str() != Some("https") {
            return Err(invalid(&"only https is spoken"));
        }
        let channel = Endpoint::from(uri)
            .user_agent(concat!("culvert/", env!("CARGO_PKG_VERSION")))
            .map_err(|error| invalid(&error))?
            .http2_keep_alive_interval(PING_EVERY)
            .keep_alive_timeout(PING_LIMIT)
            .connect_with_connector(self.connector.clone())
            .await
            .map_err(|error| ControlError::of(address, &error))?;
        Ok(ControlChannel {
            address: address.into(),
            channel,
            credentials: self.credentials.clone(),
        })
    }
}

impl fmt::Debug for Control {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Control").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// A connection, as the service that generated clients are built on. Cloning shares it.
///
/// Each request carries the token and the other metadata. A connection that was lost is made again
/// by the next request, to the same address.
#[derive(Clone)]
pub struct ControlChannel {
    address: Arc<str>,
    channel: Channel,
    credentials: Arc<Credentials>,
}

impl ControlChannel {
    /// The address it leads to, as the settings write it.
    pub fn address(&self) -> &Arc<str> {
        &self.address
    }
}

impl fmt::Debug for ControlChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControlChannel").field("address", &self.address).finish_non_exhaustive()
    }
}

impl Service<Request<Body>> for ControlChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(cx).map_err(status)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The clone has not been polled, so the one that is ready goes with the request.
        let next = self.channel.clone();
        let mut ready = std::mem::replace(&mut self.channel, next);
        let credentials = self.credentials.clone();
        async move {
            let metadata = credentials.metadata().await.map_err(|error| {
                // The peer never sees it; the code is what an absent token would be answered with.
                Status::unauthenticated(error.to_string())
            })?;
            for (name, value) in metadata {
                request.headers_mut().insert(name, value);
            }
            ready.call(request).await.map_err(status)
        }
        .boxed()
    }
}

fn status(error: tonic::transport::Error) -> Status {
    Status::from_error(error.into())
}

/// Why the control plane cannot be spoken to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ControlError {
    #[error("no address of the control plane is set")]
    NoAddress,
    #[error("control plane address {address:?}: {why}")]
    InvalidAddress { address: String, why: String },
    #[error("root certificates of the control plane, {from}: {why}")]
    Roots { from: String, why: String },
    /// Resolving, connecting, the handshake, or the HTTP/2 preface.
    #[error("control plane {address}: {step}: {error}")]
    Unreachable { address: String, step: &'static str, error: Arc<io::Error> },
    #[error("token for the control plane, {from}: {why}")]
    Token { from: String, why: String },
    #[error("metadata for the control plane: {name}: {why}")]
    Metadata { name: String, why: String },
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Several(Vec<ControlError>),
}

impl ControlError {
    /// Reads our own error back out of the transport's.
    fn of(address: &str, error: &tonic::transport::Error) -> Self {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        let mut innermost = error.to_string();
        while let Some(current) = cause {
            if let Some(own) = current.downcast_ref::<ControlError>() {
                return own.clone();
            }
            innermost = current.to_string();
            cause = current.source();
        }
        Self::unreachable(address, "http/2", io::Error::other(innermost))
    }

    fn unreachable(address: &str, step: &'static str, error: io::Error) -> Self {
        Self::Unreachable { address: address.to_owned(), step, error: Arc::new(error) }
    }
}

fn of_file(path: &Path) -> String {
    format!("file {}", path.display())
}

#[cfg(test)]
mod tests;
