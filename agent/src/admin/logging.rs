//! `/logging`: reading and changing which lines the log holds.

use bytes::Bytes;
use http_body_util::Full;
use hyper::{Method, Response, StatusCode, Uri};

use super::http;
use crate::telemetry::logging::{Directives, LogControl, LogEnded};

const USAGE: &str = "\
usage: POST /logging                     (the current levels)
usage: POST /logging?level=<level>       (the level of everything)
usage: POST /logging?level=<scope>=<level>,<scope>:<level>
                                         (the levels of scopes, e.g. access=debug,hbone=trace)
usage: POST /logging?reset               (back to the levels of the start; may stand beside level)

levels: off, error, warn, info, debug, trace
";

pub(super) fn respond(log: &LogControl, method: &Method, uri: &Uri) -> Response<Full<Bytes>> {
    if method != Method::POST {
        return http::only(&Method::POST);
    }
    let text = http::query(uri, "level").unwrap_or_default();
    let changes: Directives = match text.parse() {
        Ok(changes) => changes,
        Err(invalid) => {
            let body = format!("Invalid level provided: {invalid}\n{USAGE}");
            return http::text(StatusCode::BAD_REQUEST, body);
        }
    };
    let reset = http::query(uri, "reset").is_some();
    match apply(log, reset, &changes) {
        Ok(current) => http::text(StatusCode::OK, format!("current log level is {current}\n")),
        Err(ended) => http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{ended}\n")),
    }
}

fn apply(log: &LogControl, reset: bool, changes: &Directives) -> Result<Directives, LogEnded> {
    let mut current = if reset { log.reset()? } else { log.current() };
    if !changes.is_empty() {
        current = log.change(changes)?;
    }
    Ok(current)
}
