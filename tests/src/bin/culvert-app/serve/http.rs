//! The HTTP ports: who asked, what it sent, and whether this pod is ready.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;

use super::Shared;
use crate::place::Greeting;

pub async fn serve(stream: TcpStream, remote: SocketAddr, shared: Arc<Shared>) {
    let greeting = shared.greeting(&stream, remote);
    let service = service_fn(|request| {
        let answer = answer(&request, &greeting, &shared);
        async { Ok::<_, Infallible>(answer) }
    });
    // A caller that breaks its connection needs no answer.
    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}

fn answer(
    request: &Request<Incoming>,
    greeting: &Greeting,
    shared: &Shared,
) -> Response<Full<Bytes>> {
    let path = request.uri().path();
    match path {
        "/ready" if shared.ready.load(Ordering::Relaxed) => plain(StatusCode::OK, "ready\n"),
        "/ready" => plain(StatusCode::SERVICE_UNAVAILABLE, "ending\n"),
        "/live" => plain(StatusCode::OK, "alive\n"),
        _ => {
            let mut status = StatusCode::OK;
            if let Some(code) = path.strip_prefix("/status/") {
                status = code.parse().unwrap_or(StatusCode::BAD_REQUEST);
            }
            let told = told(request, greeting);
            let mut response = plain(status, &format!("{told}\n"));
            response
                .headers_mut()
                .insert("content-type", http::HeaderValue::from_static("application/json"));
            response
        }
    }
}

fn told(request: &Request<Incoming>, greeting: &Greeting) -> Value {
    let mut headers = Map::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
        headers.insert(name.as_str().to_owned(), value.into());
    }
    json!({
        "pod": greeting.place.pod, "node": greeting.place.node, "version": greeting.place.version,
        "remote": greeting.remote, "local": greeting.local,
        "method": request.method().as_str(), "path": request.uri().path(), "headers": headers,
    })
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *response.status_mut() = status;
    response
}
