//! When the state is written to disk.

use std::time::{Duration, SystemTime};

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

use super::kept::{Content, KeptError, Store};

/// How long changes are collected before they are written.
const COLLECT: Duration = Duration::from_secs(1);
/// Least time from the end of one writing to the next one.
const PAUSE: Duration = Duration::from_secs(10);

/// What is to be done next.
#[derive(Debug)]
pub(super) enum Turn {
    Write,
    Renew,
    Done,
}

/// One writing at a time, never in the way of the stream.
#[derive(Debug)]
pub(super) struct Keeper {
    store: Store,
    changed: Option<Instant>,
    not_before: Instant,
    renew_every: Duration,
    renew_at: Instant,
    working: Option<JoinHandle<Result<(), KeptError>>>,
}

impl Keeper {
    pub fn new(store: Store, max_age: Duration) -> Self {
        let now = Instant::now();
        let renew_every = (max_age / 8).clamp(Duration::from_millis(100), Duration::from_secs(60));
        Self {
            store,
            changed: None,
            not_before: now,
            renew_every,
            renew_at: now + renew_every,
            working: None,
        }
    }

    /// Notes that what is on disk is not the state any more.
    pub fn changed(&mut self) {
        self.changed.get_or_insert_with(Instant::now);
    }

    /// Waits for the next thing to do. `renewing`: the state is known to be current. Nothing is
    /// lost when the future is dropped.
    pub async fn turn(&mut self, renewing: bool) -> Turn {
        if let Some(working) = &mut self.working {
            match working.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the state could not be kept"),
                Err(error) => tracing::warn!(%error, "the state could not be kept"),
            }
            self.working = None;
            self.not_before = Instant::now() + PAUSE;
            return Turn::Done;
        }
        let write_at = self.changed.map(|at| (at + COLLECT).max(self.not_before));
        match (write_at, renewing) {
            (Some(at), _) => {
                sleep_until(at).await;
                Turn::Write
            }
            (None, true) => {
                sleep_until(self.renew_at).await;
                Turn::Renew
            }
            (None, false) => std::future::pending().await,
        }
    }

    /// Begins to write.
    pub fn write(&mut self, content: Content) {
        let store = self.store.clone();
        self.changed = None;
        self.renew_at = Instant::now() + self.renew_every;
        let resources = content.len();
        tracing::debug!(resources, "keeping the state on disk");
        let write = move || store.write(&content, SystemTime::now());
        self.working = Some(tokio::task::spawn_blocking(write));
    }

    /// Begins to tell that the state on disk is current.
    pub fn renew(&mut self) {
        let store = self.store.clone();
        self.renew_at = Instant::now() + self.renew_every;
        self.working = Some(tokio::task::spawn_blocking(move || store.renew(SystemTime::now())));
    }
}
