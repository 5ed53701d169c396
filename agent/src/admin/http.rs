//! One small HTTP/1.1 server, bounded in connections, header size and time.

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use crate::drain::DrainWatch;

/// More connections to one server are closed as they come.
const MAX_CONNECTIONS: usize = 64;
/// For a request's line and headers, and between two requests.
const HEADER_TIME: Duration = Duration::from_secs(30);
const MAX_HEADER_SIZE: usize = 16 * 1024;
/// After this a connection ends with its current response.
const LIFETIME: Duration = Duration::from_secs(600);
/// For that last response.
const FINISH_TIME: Duration = Duration::from_secs(10);
/// Before accepting again after an error such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Answers requests on all listeners until the drain begins.
///
/// Bodies of requests are never read: no request here has one.
pub(super) async fn serve<H, F>(listeners: Vec<TcpListener>, handler: H, drain: DrainWatch)
where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let free = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accepting = listeners
        .into_iter()
        .map(|listener| accept(listener, handler.clone(), free.clone(), drain.clone()));
    join_all(accepting).await;
}

async fn accept<H, F>(
    listener: TcpListener,
    handler: H,
    free: Arc<Semaphore>,
    mut drain: DrainWatch,
) where
    H: Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let watch = drain.clone();
    let mut begun = pin!(drain.begun());
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = &mut begun => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let Ok(permit) = free.clone().try_acquire_owned() else { continue };
                let (handler, watch) = (handler.clone(), watch.clone());
                tokio::spawn(async move {
                    connection(stream, handler, watch).await;
                    drop(permit);
                });
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn connection<H, F>(stream: TcpStream, handler: H, mut drain: DrainWatch)
where
    H: Fn(Request<Incoming>) -> F,
    F: Future<Output = Response<Full<Bytes>>>,
{
    let answer = |request| {
        let response = handler(request);
        async move { Ok::<_, Infallible>(response.await) }
    };
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME)
        .max_header_size(MAX_HEADER_SIZE)
        .serve_connection(TokioIo::new(stream), service_fn(answer));
    let mut serving = pin!(serving);
    let ended = tokio::select! {
        ended = serving.as_mut() => ended,
        () = end(&mut drain) => {
            serving.as_mut().graceful_shutdown();
            match tokio::time::timeout(FINISH_TIME, serving).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection to the agent's own server broke");
    }
}

async fn end(drain: &mut DrainWatch) {
    tokio::select! {
        _ = drain.begun() => {}
        () = tokio::time::sleep(LIFETIME) => {}
    }
}

/// The connection failed before it was accepted; the listener is well.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
    )
}

/// A response of plain text.
pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    typed(status, "text/plain; charset=utf-8", body)
}

/// A response of JSON text.
pub(super) fn json(body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    typed(StatusCode::OK, "application/json", body)
}

/// A response with its content type.
pub(super) fn typed(
    status: StatusCode,
    content_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = empty(status);
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    *response.body_mut() = Full::new(body.into());
    response
}

/// A response without a body.
pub(super) fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

/// 405, naming the one method there is (RFC 9110 section 15.5.6).
pub(super) fn only(method: &Method) -> Response<Full<Bytes>> {
    let mut response = empty(StatusCode::METHOD_NOT_ALLOWED);
    if let Ok(value) = hyper::header::HeaderValue::from_str(method.as_str()) {
        response.headers_mut().insert(ALLOW, value);
    }
    response
}

/// The value of the first `name=value` in a query, percent-decoded; empty for a bare `name`.
pub(super) fn query(uri: &hyper::Uri, name: &str) -> Option<String> {
    let parameter = uri.query()?.split('&').find_map(|parameter| {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        (key == name).then_some(value)
    })?;
    Some(percent_encoding::percent_decode_str(parameter).decode_utf8_lossy().into_owned())
}
