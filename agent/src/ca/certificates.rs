//! The certificates of this node's identities: fetched once, shared, and renewed before they end.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::Identity;
use parking_lot::Mutex;
use rand::rngs::StdRng;
use time::OffsetDateTime;
use tokio::sync::Notify;
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::entries::{CertificateState, Entries, Found, Now, Request};
use super::{AnswerFault, CaError, IdentityChanges, IdentitySource};
use crate::tls::{Issued, Trust, WorkloadCertificate};

/// Requests to the authority at one time.
pub(super) const MAX_REQUESTS: usize = 8;

/// How long the authority may take for one request.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// The longest time without a look at the wall clock, which may be set and runs on while the machine
/// sleeps; timers do neither.
const LONGEST_SLEEP: Duration = Duration::from_secs(60);

/// The wall clock; `Arc::new(OffsetDateTime::now_utc)` outside tests.
pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

/// The cache of workload certificates, by identity.
///
/// An identity is known from its first [`fetch`](Self::fetch) or [`prefetch`](Self::prefetch) until
/// [`forget`](Self::forget). One that was never prefetched, or fetched after it was forgotten, is also
/// dropped when nobody asks for it any more. While known, its certificate is renewed around its half life, and asked for
/// again after failures; an old certificate serves as long as it is valid. What is past its end is never
/// handed out. Dropping the cache ends all of its requests.
pub struct Certificates {
    shared: Arc<Shared>,
    _worker: AbortOnDropHandle<()>,
}

struct Shared {
    entries: Mutex<Entries>,
    clock: Clock,
    trust: Trust,
    /// Woken when there may be something to request earlier than the worker thinks.
    asked: Notify,
}

impl Certificates {
    /// Starts the cache's worker on the current tokio runtime. `trust` goes into every certificate;
    /// `random` spreads requests over time.
    pub fn start(
        source: Arc<dyn IdentitySource>,
        trust: Trust,
        clock: Clock,
        random: StdRng,
    ) -> Self {
        let entries = Mutex::new(Entries::new(random));
        let shared = Arc::new(Shared { entries, clock, trust, asked: Notify::new() });
        let worker = Worker {
            shared: shared.clone(),
            source,
            requests: JoinSet::new(),
            running: HashMap::new(),
        };
        Self { shared, _worker: AbortOnDropHandle::new(tokio::spawn(worker.run())) }
    }

    /// The certificate of `identity`, for a connection that waits for it.
    ///
    /// Waits only for the first answer about an identity. When the last request failed and nothing valid
    /// is cached, fails at once with that failure; retries go on without callers.
    pub async fn fetch(
        &self,
        identity: &Identity,
    ) -> Result<Arc<WorkloadCertificate>, Arc<CaError>> {
        loop {
            let found = self.shared.entries.lock().find(identity, self.shared.now());
            let mut answered = match found {
                Found::Certificate(certificate) => return Ok(certificate),
                Found::Failure(failure) => return Err(failure),
                Found::Awaited(answered) => answered,
            };
            self.shared.asked.notify_one();
            if answered.changed().await.is_err() {
                return Err(Arc::new(CaError::Forgotten { identity: identity.clone() }));
            }
        }
    }

    /// For how long the certificate of `identity` that is cached is still valid; `None` when there is
    /// none. Asks for nothing.
    pub fn remaining(&self, identity: &Identity) -> Option<Duration> {
        let now = self.shared.now();
        let end = self.shared.entries.lock().end(identity, now)?;
        Duration::try_from(end - now.wall).ok()
    }

    /// Asks for the certificate of an identity that connections will soon need: a workload of it came.
    ///
    /// What was refused before is asked for again at once, because the workload may have been the reason.
    pub fn prefetch(&self, identity: &Identity) {
        let now = self.shared.now();
        self.shared.entries.lock().expect_use(identity, now);
        self.shared.asked.notify_one();
    }

    /// Drops an identity that no workload of this node has any more; who waits for it gets an error.
    pub fn forget(&self, identity: &Identity) {
        self.shared.entries.lock().forget(identity);
    }

    /// Prefetches and forgets what a step of the mesh made needed and unneeded.
    pub fn settle(&self, due: &IdentityChanges) {
        due.prefetch.iter().for_each(|identity| self.prefetch(identity));
        due.forget.iter().for_each(|identity| self.forget(identity));
    }

    /// All known identities, sorted, with what is cached for each.
    pub fn states(&self) -> Vec<CertificateState> {
        let now = self.shared.now();
        self.shared.entries.lock().states(now)
    }

    /// How many requests failed so far, refused or answered wrongly ones among them.
    pub fn failed_requests(&self) -> u64 {
        self.shared.entries.lock().failed()
    }
}

impl Shared {
    fn now(&self) -> Now {
        Now { timer: Instant::now(), wall: (self.clock)() }
    }
}

/// Makes the requests, best first, at most [`MAX_REQUESTS`] at a time.
struct Worker {
    shared: Arc<Shared>,
    source: Arc<dyn IdentitySource>,
    requests: JoinSet<Result<WorkloadCertificate, CaError>>,
    running: HashMap<Id, Request>,
}

impl Worker {
    async fn run(mut self) {
        loop {
            let pause = self.start_requests();
            tokio::select! {
                () = self.shared.asked.notified() => {}
                Some(ended) = self.requests.join_next_with_id() => self.finish(ended),
                () = sleep(pause) => {}
            }
        }
    }

    /// Starts what is due as far as there is room; returns the time until there may be more.
    fn start_requests(&mut self) -> Duration {
        let now = self.shared.now();
        let mut entries = self.shared.entries.lock();
        while self.requests.len() < MAX_REQUESTS
            && let Some(request) = entries.start_next(now)
        {
            let shared = self.shared.clone();
            let issued = issue(shared, self.source.clone(), request.identity.clone());
            self.running.insert(self.requests.spawn(issued).id(), request);
        }
        match self.requests.len() < MAX_REQUESTS {
            true => entries.until_next(now).map_or(LONGEST_SLEEP, |next| next.min(LONGEST_SLEEP)),
            // The end of a request comes first.
            false => LONGEST_SLEEP,
        }
    }

    fn finish(&mut self, ended: Result<(Id, Result<WorkloadCertificate, CaError>), JoinError>) {
        let (id, answer) = match ended {
            Ok((id, answer)) => (id, answer.map_err(Some)),
            Err(error) => (error.id(), Err(None)),
        };
        let Some(request) = self.running.remove(&id) else { return };
        let answer = answer.map_err(|error| {
            error.unwrap_or_else(|| CaError::Failed {
                identity: request.identity.clone(),
                ca: self.source.authority(),
                reason: "the request panicked".to_owned(),
            })
        });
        let now = self.shared.now();
        self.shared.entries.lock().finish(&request, answer, now);
    }
}

/// Asks the source, and accepts only what was asked for.
async fn issue(
    shared: Arc<Shared>,
    source: Arc<dyn IdentitySource>,
    identity: Identity,
) -> Result<WorkloadCertificate, CaError> {
    match timeout(REQUEST_LIMIT, source.issue(&identity)).await {
        Ok(answer) => {
            let now = shared.now().wall;
            accept(&identity, answer?, &shared.trust, now).map_err(|fault| CaError::Answer {
                identity,
                ca: source.authority(),
                fault,
            })
        }
        Err(_) => {
            let (ca, seconds) = (source.authority(), REQUEST_LIMIT.as_secs());
            Err(CaError::TimedOut { identity, ca, seconds })
        }
    }
}

/// An authority may sign what nobody asked for; a connection of this node must not prove it.
fn accept(
    wanted: &Identity,
    issued: Issued,
    trust: &Trust,
    now: OffsetDateTime,
) -> Result<WorkloadCertificate, AnswerFault> {
    let certificate = WorkloadCertificate::new(issued, trust)
        .map_err(|reason| AnswerFault::Unusable(reason.into()))?;
    if certificate.identity() != wanted {
        return Err(AnswerFault::WrongIdentity(certificate.identity().clone()));
    }
    let (begin, end) = (certificate.not_before(), certificate.not_after());
    if now < begin {
        return Err(AnswerFault::NotYetValid { from: begin, now });
    }
    if now >= end {
        return Err(AnswerFault::Expired { at: end });
    }
    certificate.verify_own_path(now).map_err(AnswerFault::Path)?;
    Ok(certificate)
}

#[cfg(test)]
mod tests;
