//! The metrics endpoint.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_ENCODING, HeaderName, HeaderValue, VARY};
use hyper::{Request, Response, StatusCode};

use super::http;
use crate::telemetry::Telemetry;

const OPENMETRICS: &str = "application/openmetrics-text;charset=utf-8;version=1.0.0";
const PLAIN: &str = "text/plain; charset=utf-8";

pub(super) async fn respond(
    telemetry: &Telemetry,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    match request.uri().path() {
        "/metrics" | "/stats/prometheus" => metrics(telemetry, &request).await,
        _ => http::empty(StatusCode::NOT_FOUND),
    }
}

async fn metrics(telemetry: &Telemetry, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    // The body is OpenMetrics text under both names; Prometheus reads it as either.
    let wanted = |part: &str| media_type(part).eq_ignore_ascii_case("application/openmetrics-text");
    let content_type = if list(request, &ACCEPT).any(wanted) { OPENMETRICS } else { PLAIN };
    let gzip = list(request, &ACCEPT_ENCODING).any(accepts_gzip);
    let telemetry = telemetry.clone();
    // Many series take long to write: not on a thread that carries connections.
    let written = tokio::task::spawn_blocking(move || {
        let text = telemetry.encode().ok()?;
        let compressed = if gzip { compress(&text) } else { None };
        Some((text, compressed))
    });
    let mut response = match written.await {
        Ok(Some((_, Some(compressed)))) => {
            let mut response = http::typed(StatusCode::OK, content_type, compressed);
            let headers = response.headers_mut();
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
            response
        }
        Ok(Some((text, None))) => http::typed(StatusCode::OK, content_type, text),
        Ok(None) | Err(_) => {
            tracing::warn!("cannot write the metrics");
            return http::empty(StatusCode::INTERNAL_SERVER_ERROR);
        }
    };
    response.headers_mut().insert(VARY, HeaderValue::from_static("accept, accept-encoding"));
    response
}

/// The elements of a list header, over all its lines.
fn list<'a>(
    request: &'a Request<Incoming>,
    name: &'a HeaderName,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let lines = request.headers().get_all(name).iter();
    lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.split(','))
}

fn media_type(element: &str) -> &str {
    element.split(';').next().unwrap_or_default().trim()
}

/// `gzip` without `q=0` (RFC 9110 section 12.5.3).
fn accepts_gzip(element: &str) -> bool {
    let refused = element.split(';').skip(1).any(|parameter| {
        let quality = parameter.trim().strip_prefix("q=").and_then(|q| q.parse::<f32>().ok());
        quality == Some(0.0)
    });
    media_type(element).eq_ignore_ascii_case("gzip") && !refused
}

fn compress(text: &str) -> Option<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(text.as_bytes()).ok()?;
    encoder.finish().ok()
}
