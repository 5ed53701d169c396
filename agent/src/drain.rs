//! Ending gracefully: everybody who serves connections is told, and given until a deadline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

/// Both ends of a drain that has not begun.
///
/// The trigger waits for every clone of the watch: whoever holds one must drop it when done.
pub fn drain() -> (DrainTrigger, DrainWatch) {
    let (sender, receiver) = watch::channel(None);
    let expired = CancellationToken::new();
    let watch = DrainWatch { begun: receiver, expired: expired.clone() };
    (DrainTrigger { begun: sender, expired }, watch)
}

/// Begins the drain and waits for its end.
#[derive(Debug)]
pub struct DrainTrigger {
    begun: watch::Sender<Option<Begun>>,
    expired: CancellationToken,
}

#[derive(Clone, Copy, Debug)]
struct Begun {
    deadline: Instant,
    queued: Queued,
}

/// Whose the connections are that wait in the queues of listeners when the drain begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Queued {
    /// Nobody else's: they are still taken.
    Taken,
    /// Another agent's, which has the same listeners.
    Left,
}

/// How a drain ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainEnd {
    /// All watches were dropped in time.
    Complete,
    /// The deadline came first; what is left is to be cut.
    Expired,
}

impl DrainTrigger {
    /// Tells all watches that they have `grace` to finish, and waits until they are dropped or the
    /// time is over. A second call can only shorten the time.
    pub async fn begin(&self, grace: Duration) -> DrainEnd {
        self.begin_with(grace, Queued::Taken).await
    }

    /// The same, when another agent goes on with the listeners.
    pub async fn hand_over(&self, grace: Duration) -> DrainEnd {
        self.begin_with(grace, Queued::Left).await
    }

    async fn begin_with(&self, grace: Duration, queued: Queued) -> DrainEnd {
        let wanted = Begun { deadline: Instant::now() + grace, queued };
        let mut deadline = wanted.deadline;
        self.begun.send_modify(|begun| {
            let first = begun.unwrap_or(wanted);
            deadline = first.deadline.min(deadline);
            *begun = Some(Begun { deadline, ..first });
        });
        match timeout_at(deadline, self.begun.closed()).await {
            Ok(()) => DrainEnd::Complete,
            Err(_) => {
                self.expired.cancel();
                DrainEnd::Expired
            }
        }
    }

    /// Waits until all watches are dropped.
    pub async fn finished(&self) {
        self.begun.closed().await;
    }
}

impl Drop for DrainTrigger {
    fn drop(&mut self) {
        self.expired.cancel();
    }
}

/// Learns that a drain has begun. Held as long as there is something to finish; a clone copies a
/// pointer.
#[derive(Clone, Debug)]
pub struct DrainWatch {
    begun: watch::Receiver<Option<Begun>>,
    expired: CancellationToken,
}

impl DrainWatch {
    /// Waits until the drain begins: accept nothing new from then on. Gives the deadline.
    ///
    /// A trigger that was dropped without beginning counts as a drain without grace.
    pub async fn begun(&mut self) -> Instant {
        match self.begun.wait_for(Option::is_some).await {
            Ok(begun) => begun.map_or_else(Instant::now, |begun| begun.deadline),
            Err(_) => Instant::now(),
        }
    }

    /// What becomes of queued connections, once the drain has begun.
    pub fn queued(&self) -> Queued {
        self.begun.borrow().map_or(Queued::Taken, |begun| begun.queued)
    }

    /// Waits until the drain's deadline: cut what is left. Follows a deadline brought forward.
    pub async fn expired(&self) {
        self.expired.cancelled().await;
    }

    /// Cancelled at the drain's deadline. It does not keep the drain from its end.
    pub fn expiry(&self) -> CancellationToken {
        self.expired.child_token()
    }

    /// Whether the drain has begun.
    pub fn is_begun(&self) -> bool {
        self.begun.borrow().is_some() || self.begun.has_changed().is_err()
    }
}

#[cfg(test)]
mod tests;
