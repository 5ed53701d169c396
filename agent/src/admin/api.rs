//! The paths of the administrator's server.

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, Uri};

use super::{Sources, culvert, dump, http, logging};

pub(super) async fn respond(
    sources: &Sources,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let (method, uri) = (request.method(), request.uri());
    match uri.path() {
        "/" => http::typed(StatusCode::OK, "text/html; charset=utf-8", index()),
        "/config_dump" => computed(sources, dump::config_dump).await,
        "/logging" => logging::respond(&sources.log, method, uri),
        "/quitquitquit" => quit(sources, method),
        "/debug/pprof/profile" => profile(uri),
        "/debug/pprof/heap" | "/debug/pprof/heap/profiling" => {
            http::text(StatusCode::NOT_IMPLEMENTED, "heap profiling is not built in\n")
        }
        "/culvert/status" => computed(sources, culvert::status).await,
        "/culvert/pods" => computed(sources, culvert::pods).await,
        "/culvert/connections" => computed(sources, culvert::connections).await,
        "/culvert/explain" => explain(sources, uri).await,
        _ => http::empty(StatusCode::NOT_FOUND),
    }
}

/// A body that takes long enough to make that it must not hold up the runtime.
async fn computed(
    sources: &Sources,
    compute: fn(&Sources) -> serde_json::Result<Vec<u8>>,
) -> Response<Full<Bytes>> {
    let sources = sources.clone();
    match tokio::task::spawn_blocking(move || compute(&sources)).await {
        Ok(Ok(body)) => http::json(body),
        Ok(Err(error)) => failed(&error),
        Err(error) => failed(&error),
    }
}

fn failed(error: &dyn std::fmt::Display) -> Response<Full<Bytes>> {
    tracing::warn!(%error, "cannot answer an administrator's request");
    http::text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n"))
}

fn quit(sources: &Sources, method: &Method) -> Response<Full<Bytes>> {
    if method != Method::POST {
        return http::only(&Method::POST);
    }
    tracing::info!("shutdown requested by an administrator");
    sources.state.shutdown();
    http::text(StatusCode::OK, "shutdown now\n")
}

fn profile(uri: &Uri) -> Response<Full<Bytes>> {
    for (name, limits) in [("seconds", 1..=300_u32), ("frequency", 1..=1000)] {
        let Some(value) = http::query(uri, name) else { continue };
        if !value.parse().is_ok_and(|value| limits.contains(&value)) {
            let (least, most) = limits.into_inner();
            let body = format!("{name} must be a number from {least} to {most}\n");
            return http::text(StatusCode::BAD_REQUEST, body);
        }
    }
    http::text(StatusCode::NOT_IMPLEMENTED, "CPU profiling is not built in; use perf\n")
}

async fn explain(sources: &Sources, uri: &Uri) -> Response<Full<Bytes>> {
    let (Some(src), Some(dst)) = (http::query(uri, "src"), http::query(uri, "dst")) else {
        let usage = "usage: GET /culvert/explain?src=<address, uid or namespace/name>\
                     &dst=<address or host>:<port>\n";
        return http::text(StatusCode::BAD_REQUEST, usage);
    };
    match sources.state.explain(&src, &dst).await {
        Ok(explanation) => match serde_json::to_vec_pretty(&explanation) {
            Ok(body) => http::json(body),
            Err(error) => failed(&error),
        },
        Err(error) => http::text(error.status(), format!("{error}\n")),
    }
}

fn index() -> String {
    let rows: String = [
        ("config_dump", "everything the agent knows and does"),
        ("logging", "the log's levels; POST ?level=… or ?reset changes them"),
        ("quitquitquit", "POST shuts the agent down gracefully"),
        ("debug/pprof/profile", "CPU profile"),
        ("debug/pprof/heap", "heap profile"),
        ("culvert/status", "the agent at a glance"),
        ("culvert/pods", "the pods of this node"),
        ("culvert/connections", "live connections"),
        ("culvert/explain", "what would happen to a connection: ?src=…&dst=…"),
    ]
    .iter()
    .map(|(path, what)| {
        format!("<tr><td><a href=\"/{path}\">{path}</a></td><td>{what}</td></tr>\n")
    })
    .collect();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <title>Culvert</title></head>\n<body>\n<h1>Culvert</h1>\n<table>\n{rows}</table>\n\
         </body>\n</html>\n"
    )
}
