//! How the workload API stands, for readiness, metrics and people.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::intake::Outcome;
use super::session::{Kind, Session};

/// The stream to the control plane.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum XdsConnection {
    #[default]
    Connecting,
    Open {
        address: Arc<str>,
    },
    /// Until the next attempt.
    Waiting,
}

/// The state of the client.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct XdsStatus {
    pub connection: XdsConnection,
    /// There is a whole state to decide on: each type was once taken over in full, or a kept state
    /// is served.
    pub ready: bool,
    /// Until when the state that is served from disk was current; `None` once the control plane
    /// sent something.
    pub kept: Option<SystemTime>,
    /// When the state was last known to be current; the present while a stream is open.
    pub current: Option<SystemTime>,
    /// When something was last taken over.
    pub last_push: Option<SystemTime>,
    /// Workloads and services.
    pub addresses: usize,
    pub authorizations: usize,
    /// Responses that were taken over in full, and those of which a part was rejected.
    pub acks: u64,
    pub nacks: u64,
    /// Resources that were rejected.
    pub rejected: u64,
    /// The last of them, with the reason.
    pub last_rejected: Option<String>,
    /// Attempts and streams that ended with an error, and the last one.
    pub errors: u64,
    pub last_error: Option<String>,
}

impl XdsStatus {
    /// How long ago the state was last known to be current.
    pub fn age(&self, now: SystemTime) -> Option<Duration> {
        match (&self.connection, self.current) {
            (XdsConnection::Open { .. }, Some(_)) => Some(Duration::ZERO),
            // A clock that was set back makes nothing older.
            (_, current) => current.map(|at| now.duration_since(at).unwrap_or_default()),
        }
    }

    pub(super) fn restored(&mut self, current: SystemTime, session: &Session) {
        (self.kept, self.current, self.ready) = (Some(current), Some(current), true);
        self.count(session);
    }

    pub(super) fn pushed(&mut self, outcome: &Outcome, session: &Session, now: SystemTime) {
        (self.kept, self.current, self.last_push) = (None, Some(now), Some(now));
        match outcome.rejected.last() {
            None => self.acks += 1,
            Some((name, why)) => {
                self.nacks += 1;
                self.last_rejected = Some(format!("{name}: {why}"));
            }
        }
        self.rejected += outcome.rejected.len() as u64;
        self.ready |= session.is_ready();
        self.count(session);
    }

    pub(super) fn ended(&mut self, error: Option<&str>, now: SystemTime) {
        if matches!(self.connection, XdsConnection::Open { .. }) && self.current.is_some() {
            self.current = Some(now);
        }
        self.connection = XdsConnection::Waiting;
        if let Some(error) = error {
            self.errors += 1;
            self.last_error = Some(error.to_owned());
        }
    }

    fn count(&mut self, session: &Session) {
        self.addresses = session.names(Kind::Address).len();
        self.authorizations = session.names(Kind::Authorization).len();
    }
}
