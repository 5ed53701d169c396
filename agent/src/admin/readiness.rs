//! Whether the agent is ready: no task that readiness waits for is open.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use parking_lot::Mutex;

use super::http;

/// Open until the first full configuration is taken over.
pub const STATE_MANAGER: &str = "state manager";
/// Open until start-up has ended.
pub const PROXY: &str = "proxy";
/// Open until start-up has ended, where the agent answers pods' questions for names.
pub const DNS_PROXY: &str = "dns proxy";
/// Open until no known pod waits to be enrolled, and again when one does.
pub const WORKLOAD_PROXY_MANAGER: &str = "workload proxy manager";
/// Open until all that an earlier agent let the kernel admit is decided anew.
pub const VERDICTS: &str = "verdicts of an earlier agent";

/// Open from when another agent has taken over.
pub const HANDED_OVER: &str = "another agent has taken over";

/// The tasks that stand between the agent and readiness. Cloning copies a pointer.
#[derive(Clone, Debug, Default)]
pub struct Readiness(Arc<Mutex<BTreeMap<&'static str, usize>>>);

/// Keeps the agent from being ready until dropped.
#[derive(Debug)]
pub struct OpenTask {
    readiness: Readiness,
    name: &'static str,
}

impl Readiness {
    /// Opens a task, or opens it again. Until all guards of a name are dropped it is pending.
    pub fn open(&self, name: &'static str) -> OpenTask {
        *self.0.lock().entry(name).or_default() += 1;
        OpenTask { readiness: self.clone(), name }
    }

    /// The open tasks, sorted.
    pub fn pending(&self) -> Vec<&'static str> {
        self.0.lock().keys().copied().collect()
    }
}

impl Drop for OpenTask {
    fn drop(&mut self) {
        let mut tasks = self.readiness.0.lock();
        if let Some(count) = tasks.get_mut(self.name) {
            *count -= 1;
            if *count == 0 {
                tasks.remove(self.name);
            }
        }
    }
}

pub(super) fn respond(readiness: &Readiness, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    match (request.uri().path(), request.method()) {
        ("/healthz/ready", &Method::GET) => {
            let pending = readiness.pending();
            if pending.is_empty() {
                return http::text(StatusCode::OK, "ready\n");
            }
            let body = format!("not ready, pending: {}\n", pending.join(", "));
            http::text(StatusCode::INTERNAL_SERVER_ERROR, body)
        }
        ("/healthz/ready", _) => http::only(&Method::GET),
        (_, _) => http::empty(StatusCode::NOT_FOUND),
    }
}
