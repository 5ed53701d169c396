//! What the certificate cache knows of each identity, and what it asks for next.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::Identity;
use rand::RngExt as _;
use rand::rngs::StdRng;
use time::OffsetDateTime;
use tokio::sync::watch;
use tokio::time::Instant;

use super::CaError;
use super::schedule::{refresh_at, retry_in, until};
use crate::tls::{CertificateSummary, WorkloadCertificate};

/// Failures in a row, some eight minutes, after which nobody is taken to wait for an identity that no
/// workload of this node has.
const ABANDONED_AFTER: u32 = 10;

/// A timer for a moment further away than this is set to it; certificates may last for centuries.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// One moment on both clocks: timers measure delays, the wall clock measures certificates.
#[derive(Clone, Copy)]
pub(super) struct Now {
    pub(super) timer: Instant,
    pub(super) wall: OffsetDateTime,
}

/// How much a request matters, least first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Priority {
    /// A renewal or a retry.
    Background,
    /// A connection is likely to come.
    Warmup,
    /// A connection waits.
    RealTime,
}

/// A request that was started. An identity that is forgotten and comes back is another one then.
pub(super) struct Request {
    pub(super) identity: Identity,
    birth: u64,
}

/// What a connection finds.
pub(super) enum Found {
    Certificate(Arc<WorkloadCertificate>),
    Failure(Arc<CaError>),
    /// Changes with the next answer; closed when the identity is forgotten.
    Awaited(watch::Receiver<()>),
}

/// What the cache has for one identity.
#[derive(Clone, Debug)]
pub struct CertificateState {
    pub identity: Identity,
    pub state: State,
    /// The leaf, then the intermediates; empty unless available.
    pub cert_chain: Vec<CertificateSummary>,
    /// Empty unless available.
    pub roots: Vec<CertificateSummary>,
}

/// Whether connections of an identity can be made; its text is that of the configuration dump.
#[derive(Clone, Debug)]
pub enum State {
    /// The first request has not been answered.
    Initializing,
    /// A certificate is cached and valid.
    Available,
    /// Nothing valid is cached, for this reason.
    Unavailable(Arc<CaError>),
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Initializing => f.write_str("Initializing"),
            Self::Available => f.write_str("Available"),
            Self::Unavailable(error) => write!(f, "Unavailable: {error}"),
        }
    }
}

/// All known identities. Each is either queued or its request is running, never both, never neither.
pub(super) struct Entries {
    by_identity: HashMap<Identity, Entry>,
    births: u64,
    /// Requests that failed, of all identities.
    failed: u64,
    random: StdRng,
}

struct Entry {
    birth: u64,
    certificate: Option<Arc<WorkloadCertificate>>,
    /// The last failure, until a success.
    failure: Option<Arc<CaError>>,
    /// Failures in a row.
    failures: u32,
    /// A workload of this node has the identity.
    expected: bool,
    /// Somebody asked for it since the last answer.
    used: bool,
    /// The next request; none while one runs.
    queued: Option<Queued>,
    answered: watch::Sender<()>,
}

struct Queued {
    priority: Priority,
    due: Instant,
    /// Also due when the wall clock reaches this.
    renewal: Option<OffsetDateTime>,
}

impl Queued {
    fn is_due(&self, now: Now) -> bool {
        self.due <= now.timer || self.renewal.is_some_and(|renewal| renewal <= now.wall)
    }
}

impl Entries {
    pub(super) fn new(random: StdRng) -> Self {
        Self { by_identity: HashMap::new(), births: 0, failed: 0, random }
    }

    /// What a connection gets now; asks for it if that is neither a certificate nor a failure.
    pub(super) fn find(&mut self, identity: &Identity, now: Now) -> Found {
        if let Some(entry) = self.by_identity.get_mut(identity) {
            entry.used = true;
            match (entry.valid(now), &entry.failure) {
                (Some(certificate), _) => return Found::Certificate(certificate.clone()),
                (None, Some(failure)) => return Found::Failure(failure.clone()),
                (None, None) => {}
            }
        }
        let entry = self.ask(identity, Priority::RealTime, now);
        entry.used = true;
        // A certificate that expired before its renewal does not wait for that.
        if let Some(queued) = entry.queued.as_mut() {
            queued.due = queued.due.min(now.timer);
        }
        Found::Awaited(entry.answered.subscribe())
    }

    /// When the certificate that is valid now ends.
    pub(super) fn end(&self, identity: &Identity, now: Now) -> Option<OffsetDateTime> {
        let certificate = self.by_identity.get(identity)?.valid(now)?;
        Some(certificate.not_after())
    }

    /// Asks for it without anyone waiting. A refusal is no reason to wait for the next retry.
    pub(super) fn expect_use(&mut self, identity: &Identity, now: Now) {
        let entry = self.ask(identity, Priority::Warmup, now);
        entry.expected = true;
        let refused = matches!(entry.failure.as_deref(), Some(CaError::Refused { .. }));
        if let Some(queued) = entry.queued.as_mut().filter(|_| refused) {
            queued.due = queued.due.min(now.timer);
        }
    }

    /// Makes the identity known if it was not; a request that has not started can only gain priority.
    fn ask(&mut self, identity: &Identity, priority: Priority, now: Now) -> &mut Entry {
        let births = &mut self.births;
        let entry = self.by_identity.entry(identity.clone()).or_insert_with(|| {
            *births += 1;
            Entry {
                birth: *births,
                certificate: None,
                failure: None,
                failures: 0,
                expected: false,
                used: false,
                queued: Some(Queued { priority, due: now.timer, renewal: None }),
                answered: watch::Sender::new(()),
            }
        });
        if let Some(queued) = entry.queued.as_mut() {
            queued.priority = queued.priority.max(priority);
        }
        entry
    }

    /// Drops an identity. Who waits for it learns so, and the result of a running request is discarded.
    pub(super) fn forget(&mut self, identity: &Identity) {
        self.by_identity.remove(identity);
    }

    /// Takes the request that matters most of those that are due: by priority, then the longest due.
    pub(super) fn start_next(&mut self, now: Now) -> Option<Request> {
        let due = self.by_identity.iter_mut().filter_map(|(identity, entry)| {
            let queued = entry.queued.as_ref().filter(|queued| queued.is_due(now))?;
            let rank = (queued.priority, Reverse(queued.due), Reverse(entry.birth));
            Some((rank, identity, entry))
        });
        let (_, identity, entry) = due.max_by_key(|(rank, ..)| *rank)?;
        entry.queued = None;
        Some(Request { identity: identity.clone(), birth: entry.birth })
    }

    /// The time until a queued request is due by its timer; none if none is queued.
    pub(super) fn until_next(&self, now: Now) -> Option<Duration> {
        let queued = self.by_identity.values().filter_map(|entry| entry.queued.as_ref());
        queued.map(|queued| queued.due.saturating_duration_since(now.timer)).min()
    }

    /// Notes the answer to a request, queues the next one, and wakes who waits.
    pub(super) fn finish(
        &mut self,
        request: &Request,
        answer: Result<WorkloadCertificate, CaError>,
        now: Now,
    ) {
        let identity = &request.identity;
        let Some(entry) = self.by_identity.get_mut(identity) else { return };
        if entry.birth != request.birth {
            return;
        }
        if entry.is_abandoned() {
            tracing::debug!(%identity, "nobody asks for the certificate any more");
            self.by_identity.remove(identity);
            return;
        }
        entry.used = false;
        let spread = self.random.random_range(-1.0..=1.0);
        match answer {
            Ok(certificate) => {
                let (begin, end) = (certificate.not_before(), certificate.not_after());
                let renewal = refresh_at(begin, end, now.wall, spread);
                tracing::debug!(%identity, %renewal, "certificate issued");
                entry.renew_at(renewal, now);
                entry.certificate = Some(Arc::new(certificate));
                (entry.failure, entry.failures) = (None, 0);
            }
            Err(error) => {
                self.failed += 1;
                entry.failures = entry.failures.saturating_add(1);
                let valid_until = entry.valid(now).map(|certificate| certificate.not_after());
                let delay = retry_in(entry.failures, spread, now.wall, valid_until);
                let old_serves = valid_until.is_some();
                tracing::warn!(%identity, %error, ?delay, old_serves, "no new certificate");
                entry.failure = Some(Arc::new(error));
                entry.retry_in(delay, now);
            }
        }
        entry.answered.send_replace(());
    }

    /// How many requests failed so far.
    pub(super) fn failed(&self) -> u64 {
        self.failed
    }

    pub(super) fn states(&self, now: Now) -> Vec<CertificateState> {
        let state = |(identity, entry): (&Identity, &Entry)| entry.state(identity.clone(), now);
        let mut states: Vec<_> = self.by_identity.iter().map(state).collect();
        states.sort_by(|a, b| a.identity.cmp(&b.identity));
        states
    }
}

impl Entry {
    /// A connection that outlived its workload may have asked after the identity was forgotten. Such an
    /// entry ends with its certificate, or when it has failed for a while.
    fn is_abandoned(&self) -> bool {
        let for_long = self.certificate.is_some() || self.failures >= ABANDONED_AFTER;
        !self.expected && !self.used && for_long
    }

    fn renew_at(&mut self, renewal: OffsetDateTime, now: Now) {
        let due = now.timer + until(now.wall, renewal).min(FAR);
        self.queued = Some(Queued { priority: Priority::Background, due, renewal: Some(renewal) });
    }

    fn retry_in(&mut self, delay: Duration, now: Now) {
        let due = now.timer + delay;
        self.queued = Some(Queued { priority: Priority::Background, due, renewal: None });
    }

    fn valid(&self, now: Now) -> Option<&Arc<WorkloadCertificate>> {
        self.certificate.as_ref().filter(|certificate| now.wall < certificate.not_after())
    }

    fn state(&self, identity: Identity, now: Now) -> CertificateState {
        let (state, certificate) = match (self.valid(now), &self.failure, &self.certificate) {
            (Some(valid), _, _) => (State::Available, Some(valid)),
            (None, Some(failure), _) => (State::Unavailable(failure.clone()), None),
            (None, None, Some(_)) => {
                let expired = CaError::Expired { identity: identity.clone() };
                (State::Unavailable(Arc::new(expired)), None)
            }
            (None, None, None) => (State::Initializing, None),
        };
        let cert_chain = certificate.map(|certificate| certificate.chain()).unwrap_or_default();
        let roots = certificate.map(|certificate| certificate.roots()).unwrap_or_default();
        CertificateState { identity, state, cert_chain, roots }
    }
}
