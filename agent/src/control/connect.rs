//! One connection to one address of the control plane: resolve, connect, shake hands.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::Uri;
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use rustls::version::TLS13;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower_service::Service;

use super::ControlError;
use super::roots::{self, ServerVerifier};
use crate::config::{ControlPlane, Roots};
use crate::tls;

/// How long each step may take: resolving the name, connecting to one address of it, the handshake.
const STEP_LIMIT: Duration = Duration::from_secs(5);
/// tcp(7): idle time before the first probe, time between probes, and how many.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(300), Duration::from_secs(75), 9);
const ALPN_H2: &[u8] = b"h2";
const DEFAULT_PORT: u16 = 443;

/// Makes connections for the HTTP/2 layer, which calls it again when one was lost.
#[derive(Clone)]
pub(super) struct Connector {
    roots: Arc<Roots>,
    alternative: Option<Arc<str>>,
}

impl Connector {
    pub fn new(settings: &ControlPlane) -> Self {
        Self {
            roots: Arc::new(settings.roots.clone()),
            alternative: settings.alt_hostname.as_deref().map(Into::into),
        }
    }

    async fn connect(self, uri: Uri) -> Result<TlsStream<TcpStream>, ControlError> {
        let address = uri.authority().map(ToString::to_string).unwrap_or_default();
        // Brackets around an IPv6 address belong to the URI, not to the address.
        let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
        let invalid = |name: &str| ControlError::InvalidAddress {
            address: address.clone(),
            why: format!("{name:?} is not the name of a host"),
        };
        let name = server_name(host).ok_or_else(|| invalid(host))?;
        let alternative = match &self.alternative {
            Some(text) => Some(server_name(text).ok_or_else(|| invalid(text))?),
            None => None,
        };
        // First, because it needs no network: what an operator has to mend shows also without one.
        let config = tls_config(&self.roots, alternative).await?;
        let port = uri.port_u16().unwrap_or(DEFAULT_PORT);
        let tcp = dial(&address, host, port).await?;
        let failed = |error| ControlError::unreachable(&address, "tls", error);
        let handshake = TlsConnector::from(Arc::new(config)).connect(name, tcp);
        let stream = within(handshake).await.map_err(failed)?;
        match stream.get_ref().1.alpn_protocol() {
            Some(ALPN_H2) => Ok(stream),
            _ => Err(failed(io::Error::other("the server does not speak http/2"))),
        }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = ControlError;
    type Future = BoxFuture<'static, Result<Self::Response, ControlError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ControlError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connector = self.clone();
        async move { connector.connect(uri).await.map(TokioIo::new) }.boxed()
    }
}

fn server_name(host: &str) -> Option<ServerName<'static>> {
    ServerName::try_from(host.to_owned()).ok()
}

async fn dial(address: &str, host: &str, port: u16) -> Result<TcpStream, ControlError> {
    let failed = |step, error| ControlError::unreachable(address, step, error);
    let found = within(tokio::net::lookup_host((host, port))).await;
    let found: Vec<SocketAddr> = found.map_err(|error| failed("dns", error))?.collect();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for addr in found {
        match within(TcpStream::connect(addr)).await {
            Ok(stream) => {
                set_options(&stream).map_err(|error| failed("socket options", error))?;
                return Ok(stream);
            }
            Err(error) => last = io::Error::new(error.kind(), format!("{addr}: {error}")),
        }
    }
    Err(failed("connect", last))
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    let (time, interval, retries) = KEEPALIVE;
    stream.set_nodelay(true)?;
    let keepalive =
        TcpKeepalive::new().with_time(time).with_interval(interval).with_retries(retries);
    SockRef::from(stream).set_tcp_keepalive(&keepalive)
}

/// Server authentication only: the agent proves itself by its token.
async fn tls_config(
    roots: &Roots,
    alternative: Option<ServerName<'static>>,
) -> Result<ClientConfig, ControlError> {
    let store = roots::load(roots).await?;
    let unusable =
        |why: String| ControlError::Roots { from: "made into a verifier".to_owned(), why };
    let provider = Arc::new(tls::provider());
    let verifier = ServerVerifier::new(store, provider.clone(), alternative)
        .map_err(|error| unusable(error.to_string()))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

async fn within<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    match tokio::time::timeout(STEP_LIMIT, step).await {
        Ok(outcome) => outcome,
        Err(_) => {
            let what = format!("not finished within {STEP_LIMIT:?}");
            Err(io::Error::new(io::ErrorKind::TimedOut, what))
        }
    }
}
