#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{BoxFuture, join_all};
use rand::SeedableRng as _;
use tokio::sync::Semaphore;

use super::super::{Refusal, State};
use super::*;
use crate::tls::testing::Authority;

const BEGAN: OffsetDateTime = time::macros::datetime!(2026-11-21 12:00 UTC);
const HOUR: Duration = Duration::from_secs(3600);
const MOMENT: Duration = Duration::from_millis(1);

/// What the fake authority does with a request.
enum Answer {
    Issue(Duration),
    IssueFor(Identity),
    Fail,
    Refuse,
    Panic,
    Never,
    /// Valid in an hour from now.
    Early,
    /// With a root that did not sign it.
    OtherRoot,
}

type Behaviour = Box<dyn Fn(&Identity, usize) -> Answer + Send + Sync>;

/// An authority that does as it is told, lets each answer wait for a permit, and keeps a record.
struct Fake {
    authority: Authority,
    began: Instant,
    behaviour: Behaviour,
    permits: Semaphore,
    requests: Mutex<Vec<(Identity, Duration)>>,
    flying: AtomicUsize,
    most_flying: AtomicUsize,
}

impl Fake {
    /// The behaviour gets the identity and the number of the request for it, from 1.
    fn new(behaviour: impl Fn(&Identity, usize) -> Answer + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self {
            authority: Authority::root("fake"),
            began: Instant::now(),
            behaviour: Box::new(behaviour),
            permits: Semaphore::new(Semaphore::MAX_PERMITS),
            requests: Mutex::default(),
            flying: AtomicUsize::new(0),
            most_flying: AtomicUsize::new(0),
        })
    }

    fn holding_back(
        behaviour: impl Fn(&Identity, usize) -> Answer + Send + Sync + 'static,
    ) -> Arc<Self> {
        let fake = Self::new(behaviour);
        fake.permits.forget_permits(Semaphore::MAX_PERMITS);
        fake
    }

    fn cache(self: &Arc<Self>) -> Certificates {
        let began = self.began;
        let clock: Clock = Arc::new(move || BEGAN + began.elapsed());
        Certificates::start(self.clone(), Trust::default(), clock, StdRng::seed_from_u64(7))
    }

    /// The times of the requests for an identity since the beginning.
    fn times(&self, identity: &Identity) -> Vec<Duration> {
        let requests = self.requests.lock();
        requests.iter().filter(|(asked, _)| asked == identity).map(|(_, at)| *at).collect()
    }

    fn asked(&self) -> Vec<Identity> {
        self.requests.lock().iter().map(|(identity, _)| identity.clone()).collect()
    }

    async fn answer(&self, identity: &Identity) -> Result<Issued, CaError> {
        let number = {
            let mut requests = self.requests.lock();
            requests.push((identity.clone(), self.began.elapsed()));
            requests.iter().filter(|(asked, _)| asked == identity).count()
        };
        self.permits.acquire().await.unwrap().forget();
        let now = BEGAN + self.began.elapsed();
        match (self.behaviour)(identity, number) {
            Answer::Issue(life) => Ok(self.authority.valid(identity, now, now + life)),
            Answer::IssueFor(other) => Ok(self.authority.valid(&other, now, now + HOUR)),
            Answer::Fail => Err(failure(identity)),
            Answer::Refuse => {
                Err(CaError::Refused { identity: identity.clone(), reason: Refusal::NotOfThisNode })
            }
            Answer::Panic => panic!("as told"),
            Answer::Never => std::future::pending().await,
            Answer::Early => Ok(self.authority.valid(identity, now + HOUR, now + 2 * HOUR)),
            Answer::OtherRoot => {
                let issued = self.authority.valid(identity, now, now + HOUR);
                Ok(Issued { roots: vec![Authority::root("other").der], ..issued })
            }
        }
    }
}

impl IdentitySource for Fake {
    fn authority(&self) -> Arc<str> {
        "fake".into()
    }

    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, CaError>> {
        Box::pin(async move {
            let flying = self.flying.fetch_add(1, Ordering::Relaxed) + 1;
            self.most_flying.fetch_max(flying, Ordering::Relaxed);
            let answer = self.answer(identity).await;
            self.flying.fetch_sub(1, Ordering::Relaxed);
            answer
        })
    }
}

fn failure(identity: &Identity) -> CaError {
    CaError::Failed { identity: identity.clone(), ca: "fake".into(), reason: "as told".into() }
}

fn fault(error: &CaError) -> &AnswerFault {
    match error {
        CaError::Answer { fault, .. } => fault,
        other => panic!("not about the answer: {other}"),
    }
}

fn id(name: &str) -> Identity {
    Identity::new("td1", "a", name)
}

/// Asserts that gaps between times are about the wanted seconds, ±20 %.
fn assert_gaps(times: &[Duration], seconds: &[u64]) {
    let gaps: Vec<f64> = times.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()).collect();
    assert_eq!(gaps.len(), seconds.len(), "{gaps:?}");
    for (gap, wanted) in gaps.iter().zip(seconds) {
        let wanted = *wanted as f64;
        assert!((wanted * 0.8 - 0.01..=wanted * 1.2 + 0.01).contains(gap), "{gap} for {wanted}");
    }
}

#[tokio::test(start_paused = true)]
async fn certificate_is_cached_and_renewed_around_its_half_life() {
    let fake = Fake::new(|_, _| Answer::Issue(24 * HOUR));
    let cache = fake.cache();
    let first = cache.fetch(&id("x")).await.unwrap();
    sleep(11 * HOUR).await;
    assert!(Arc::ptr_eq(&first, &cache.fetch(&id("x")).await.unwrap()));
    assert_eq!(fake.times(&id("x")).len(), 1);
    sleep(2 * HOUR).await;
    let second = cache.fetch(&id("x")).await.unwrap();
    assert!(!Arc::ptr_eq(&first, &second));
    let renewed = fake.times(&id("x"))[1];
    let half = 12 * HOUR;
    assert!(renewed > half.mul_f64(0.949) && renewed < half.mul_f64(1.051), "{renewed:?}");
}

#[tokio::test(start_paused = true)]
async fn nodes_started_together_do_not_renew_together() {
    let fake = Fake::new(|_, _| Answer::Issue(24 * HOUR));
    let cache = fake.cache();
    let identities: Vec<_> = (0..20).map(|number| id(&number.to_string())).collect();
    identities.iter().for_each(|identity| cache.prefetch(identity));
    sleep(13 * HOUR).await;
    let mut renewals: Vec<u64> =
        identities.iter().map(|identity| fake.times(identity)[1].as_secs()).collect();
    renewals.sort();
    renewals.dedup();
    assert!(renewals.len() > 15, "{renewals:?}");
}

#[tokio::test(start_paused = true)]
async fn hundred_waiting_connections_make_one_request() {
    let fake = Fake::holding_back(|_, _| Answer::Issue(HOUR));
    let cache = Arc::new(fake.cache());
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.fetch(&id("x")).await.unwrap() })
        })
        .collect();
    sleep(MOMENT).await;
    assert!(matches!(cache.states()[0].state, State::Initializing));
    fake.permits.add_permits(1);
    let certificates = join_all(waiting).await;
    let first = certificates[0].as_ref().unwrap();
    assert!(certificates.iter().all(|other| Arc::ptr_eq(first, other.as_ref().unwrap())));
    assert_eq!(fake.times(&id("x")).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn at_most_eight_requests_run_at_once() {
    let fake = Fake::holding_back(|_, _| Answer::Issue(HOUR));
    let cache = fake.cache();
    let identities: Vec<_> = (0..20).map(|number| id(&number.to_string())).collect();
    identities.iter().for_each(|identity| cache.prefetch(identity));
    sleep(MOMENT).await;
    assert_eq!(fake.flying.load(Ordering::Relaxed), 8);
    fake.permits.add_permits(20);
    for identity in &identities {
        cache.fetch(identity).await.unwrap();
    }
    assert_eq!(fake.most_flying.load(Ordering::Relaxed), 8);
    assert_eq!(fake.asked().len(), 20);
}

#[tokio::test(start_paused = true)]
async fn connection_raises_the_priority_of_a_queued_prefetch() {
    let fake = Fake::holding_back(|_, _| Answer::Issue(HOUR));
    let cache = fake.cache();
    for number in 0..8 {
        cache.prefetch(&id(&number.to_string()));
    }
    sleep(MOMENT).await;
    for name in ["early", "wanted"] {
        cache.prefetch(&id(name));
        sleep(MOMENT).await;
    }
    let wanted = id("wanted");
    let waiting = cache.fetch(&wanted);
    fake.permits.add_permits(9);
    // The eight that run, then the connection's, although another was queued before it.
    waiting.await.unwrap();
    sleep(MOMENT).await;
    assert_eq!(fake.asked()[8..], [wanted, id("early")]);
}

#[tokio::test(start_paused = true)]
async fn failures_are_retried_with_doubling_delays() {
    let fake = Fake::new(|_, number| match number {
        1..=5 => Answer::Fail,
        _ => Answer::Issue(HOUR),
    });
    let cache = fake.cache();
    let error = cache.fetch(&id("x")).await.unwrap_err();
    assert_eq!(error.to_string(), failure(&id("x")).to_string());
    sleep(Duration::from_secs(60)).await;
    assert_gaps(&fake.times(&id("x")), &[1, 2, 4, 8, 16]);
    cache.fetch(&id("x")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn success_resets_the_delays() {
    let fake = Fake::new(|_, number| match number {
        3 => Answer::Issue(HOUR),
        _ => Answer::Fail,
    });
    let cache = fake.cache();
    cache.prefetch(&id("x"));
    sleep(HOUR / 2 + HOUR / 10).await;
    let times = fake.times(&id("x"));
    assert_gaps(&times[..3], &[1, 2]);
    assert_gaps(&times[3..5], &[1]);
}

#[tokio::test(start_paused = true)]
async fn without_a_valid_certificate_connections_fail_at_once() {
    let fake = Fake::new(|_, _| Answer::Fail);
    let cache = fake.cache();
    cache.fetch(&id("x")).await.unwrap_err();
    let (asked, before) = (fake.asked().len(), Instant::now());
    for _ in 0..10 {
        cache.fetch(&id("x")).await.unwrap_err();
    }
    assert_eq!(before.elapsed(), Duration::ZERO);
    assert_eq!(fake.asked().len(), asked);
    let states = cache.states();
    let text = "Unavailable: certificate authority fake failed for spiffe://td1/ns/a/sa/x: as told";
    assert_eq!(states[0].state.to_string(), text);
    assert!(states[0].cert_chain.is_empty());
}

#[tokio::test(start_paused = true)]
async fn workload_that_comes_ends_the_pause_after_a_refusal() {
    let fake = Fake::new(|_, number| match number {
        1..=9 => Answer::Refuse,
        _ => Answer::Issue(HOUR),
    });
    let cache = fake.cache();
    cache.fetch(&id("x")).await.unwrap_err();
    while fake.asked().len() < 9 {
        sleep(Duration::from_secs(1)).await;
    }
    cache.prefetch(&id("x"));
    sleep(MOMENT).await;
    cache.fetch(&id("x")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn failures_of_one_identity_do_not_delay_others() {
    let bad = id("bad");
    let fake = Fake::new(move |identity, _| match *identity == bad {
        true => Answer::Fail,
        false => Answer::Issue(HOUR),
    });
    let cache = fake.cache();
    cache.fetch(&id("bad")).await.unwrap_err();
    let before = Instant::now();
    cache.fetch(&id("good")).await.unwrap();
    assert_eq!(before.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn old_certificate_serves_through_failures_until_it_ends_and_not_longer() {
    let fake = Fake::new(|_, number| match number {
        1 => Answer::Issue(HOUR),
        _ => Answer::Fail,
    });
    let cache = fake.cache();
    cache.prefetch(&id("x"));
    let first = cache.fetch(&id("x")).await.unwrap();
    sleep(HOUR - Duration::from_secs(1)).await;
    assert!(fake.asked().len() > 5);
    assert!(Arc::ptr_eq(&first, &cache.fetch(&id("x")).await.unwrap()));
    assert!(matches!(cache.states()[0].state, State::Available));
    sleep(Duration::from_secs(2)).await;
    cache.fetch(&id("x")).await.unwrap_err();
    assert!(matches!(cache.states()[0].state, State::Unavailable(_)));
}

#[tokio::test(start_paused = true)]
async fn retry_is_not_later_than_the_end_of_the_old_certificate() {
    let fake = Fake::new(|_, number| match number {
        1 => Answer::Issue(Duration::from_secs(200)),
        _ => Answer::Fail,
    });
    let cache = fake.cache();
    cache.prefetch(&id("x"));
    cache.fetch(&id("x")).await.unwrap();
    // Renewal at about 100 s; then delays of 1, 2, .. 64 s would skip the end at 200 s.
    sleep(Duration::from_millis(200_500)).await;
    let end = Duration::from_secs(200);
    let times = fake.times(&id("x"));
    let at_end = times.iter().filter(|at| **at >= end && **at < end + Duration::from_millis(10));
    assert_eq!(at_end.count(), 1, "{times:?}");
}

#[tokio::test(start_paused = true)]
async fn answer_for_another_identity_is_rejected_and_retried() {
    let fake = Fake::new(|_, number| match number {
        1 => Answer::IssueFor(id("other")),
        _ => Answer::Issue(HOUR),
    });
    let cache = fake.cache();
    let error = cache.fetch(&id("x")).await.unwrap_err();
    let fault = fault(&error);
    assert!(
        matches!(fault, AnswerFault::WrongIdentity(issued) if *issued == id("other")),
        "{fault}"
    );
    sleep(Duration::from_secs(2)).await;
    assert_eq!(cache.fetch(&id("x")).await.unwrap().identity(), &id("x"));
    assert_gaps(&fake.times(&id("x")), &[1]);
}

#[tokio::test(start_paused = true)]
async fn expired_answer_is_a_failure() {
    let fake = Fake::new(|_, _| Answer::Issue(Duration::ZERO));
    let cache = fake.cache();
    let error = cache.fetch(&id("x")).await.unwrap_err();
    assert!(matches!(fault(&error), AnswerFault::Expired { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn identity_forgotten_during_its_request_fails_who_waits() {
    let fake = Fake::holding_back(|_, _| Answer::Issue(HOUR));
    let cache = Arc::new(fake.cache());
    let waiting = tokio::spawn({
        let cache = cache.clone();
        async move { cache.fetch(&id("x")).await }
    });
    sleep(MOMENT).await;
    cache.forget(&id("x"));
    let error = waiting.await.unwrap().unwrap_err();
    assert!(matches!(&*error, CaError::Forgotten { .. }));
    fake.permits.add_permits(1);
    sleep(MOMENT).await;
    assert!(cache.states().is_empty(), "the result is discarded");
    sleep(2 * HOUR).await;
    assert_eq!(fake.asked().len(), 1, "nothing is renewed");
}

#[tokio::test(start_paused = true)]
async fn identity_that_comes_back_does_not_take_the_discarded_result() {
    let fake = Fake::holding_back(|_, number| Answer::Issue(HOUR * number as u32));
    let cache = fake.cache();
    cache.prefetch(&id("x"));
    sleep(MOMENT).await;
    cache.forget(&id("x"));
    cache.prefetch(&id("x"));
    fake.permits.add_permits(1);
    sleep(MOMENT).await;
    assert!(matches!(cache.states()[0].state, State::Initializing));
    fake.permits.add_permits(1);
    cache.fetch(&id("x")).await.unwrap();
    assert_eq!(fake.asked().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn authority_that_never_answers_or_panics_is_a_failure() {
    let fake = Fake::new(|identity, _| match &*identity.service_account {
        "silent" => Answer::Never,
        _ => Answer::Panic,
    });
    let cache = fake.cache();
    let error = cache.fetch(&id("broken")).await.unwrap_err();
    assert!(error.to_string().ends_with("the request panicked"), "{error}");
    let before = Instant::now();
    let error = cache.fetch(&id("silent")).await.unwrap_err();
    assert!(matches!(&*error, CaError::TimedOut { seconds: 30, .. }));
    assert!(before.elapsed() < REQUEST_LIMIT + MOMENT * 2);
}

#[tokio::test(start_paused = true)]
async fn expired_certificate_is_never_handed_out_though_the_timers_slept() {
    let fake = Fake::new(|_, _| Answer::Issue(HOUR));
    let began = fake.began;
    let asleep = Arc::new(Mutex::new(Duration::ZERO));
    let clock: Clock = {
        let asleep = asleep.clone();
        Arc::new(move || BEGAN + began.elapsed() + *asleep.lock())
    };
    // The fake's certificates begin by its own clock, which did not sleep; theirs is an hour.
    let cache =
        Certificates::start(fake.clone(), Trust::default(), clock, StdRng::seed_from_u64(7));
    cache.fetch(&id("x")).await.unwrap();
    *asleep.lock() = 2 * HOUR;
    let state = cache.states().remove(0);
    assert_eq!(
        state.state.to_string(),
        "Unavailable: certificate of spiffe://td1/ns/a/sa/x expired"
    );
    let error = cache.fetch(&id("x")).await.unwrap_err();
    assert!(matches!(fault(&error), AnswerFault::Expired { .. }), "{error}");
    assert_eq!(fake.asked().len(), 2, "it is asked for at once");
}

#[tokio::test(start_paused = true)]
async fn states_are_sorted_and_carry_the_chain_and_roots() {
    let fake = Fake::new(|_, _| Answer::Issue(HOUR));
    let cache = fake.cache();
    for name in ["b", "a"] {
        cache.fetch(&id(name)).await.unwrap();
    }
    let states = cache.states();
    assert_eq!(
        states.iter().map(|state| &state.identity).collect::<Vec<_>>(),
        [&id("a"), &id("b")]
    );
    assert_eq!(states[0].state.to_string(), "Available");
    assert_eq!(states[0].cert_chain[0].valid_from, "2026-11-21T12:00:00Z");
    assert_eq!(states[0].cert_chain[0].expiration, "2026-11-21T13:00:00Z");
    assert_eq!(states[0].roots.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn dropped_cache_ends_its_requests() {
    let fake = Fake::new(|_, _| Answer::Never);
    let cache = fake.cache();
    cache.prefetch(&id("x"));
    sleep(MOMENT).await;
    assert_eq!(Arc::strong_count(&fake), 3, "held by the test, the worker and the request");
    drop(cache);
    sleep(MOMENT).await;
    assert_eq!(Arc::strong_count(&fake), 1);
}

#[tokio::test(start_paused = true)]
async fn answer_that_peers_would_refuse_is_refused_here() {
    let fake = Fake::new(|identity, _| match &*identity.service_account {
        "early" => Answer::Early,
        "rootless" => Answer::OtherRoot,
        _ => Answer::IssueFor(Identity::new("td2", "a", "elsewhere")),
    });
    let cache = fake.cache();
    for (name, text) in [
        ("early", "the certificate is not valid before 2026-11-21 13:00"),
        ("rootless", "does not hold under the roots that came with it: UnknownIssuer"),
        ("elsewhere", "the certificate is for spiffe://td2/ns/a/sa/elsewhere"),
    ] {
        let error = cache.fetch(&id(name)).await.unwrap_err().to_string();
        let begin = format!(
            "certificate authority fake answered wrongly for spiffe://td1/ns/a/sa/{name}: "
        );
        assert!(error.starts_with(&begin) && error.contains(text), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_only_a_late_connection_asked_for_is_not_kept_for_ever() {
    let fake = Fake::new(|identity, _| match &*identity.service_account {
        "refused" => Answer::Refuse,
        _ => Answer::Issue(HOUR),
    });
    let cache = fake.cache();
    cache.fetch(&id("refused")).await.unwrap_err();
    cache.fetch(&id("issued")).await.unwrap();
    cache.prefetch(&id("kept"));
    sleep(2 * HOUR).await;
    let known: Vec<_> = cache.states().into_iter().map(|state| state.identity).collect();
    assert_eq!(known, [id("kept")]);
}
