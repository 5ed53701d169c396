//! Ending gracefully: everybody who serves connections is told, and given until a deadline.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

/// Both ends of a drain that has not begun.
///
/// The trigger waits for every clone of the watch: whoever holds one must drop it when done.
pub fn drain() -> (DrainTrigger, DrainWatch) {
    let (sender, receiver) = watch::channel(None);
    (DrainTrigger { begun: sender }, DrainWatch { begun: receiver })
}

/// Begins the drain and waits for its end.
#[derive(Debug)]
pub struct DrainTrigger {
    begun: watch::Sender<Option<Instant>>,
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
        let wanted = Instant::now() + grace;
        let mut deadline = wanted;
        self.begun.send_modify(|begun| {
            deadline = begun.map_or(wanted, |earlier| earlier.min(wanted));
            *begun = Some(deadline);
        });
        match timeout_at(deadline, self.begun.closed()).await {
            Ok(()) => DrainEnd::Complete,
            Err(_) => DrainEnd::Expired,
        }
    }
}

/// Learns that a drain has begun. Held as long as there is something to finish; a clone copies a
/// pointer.
#[derive(Clone, Debug)]
pub struct DrainWatch {
    begun: watch::Receiver<Option<Instant>>,
}

impl DrainWatch {
    /// Waits until the drain begins: accept nothing new from then on. Gives the deadline.
    ///
    /// A trigger that was dropped without beginning counts as a drain without grace.
    pub async fn begun(&mut self) -> Instant {
        match self.begun.wait_for(Option::is_some).await {
            Ok(deadline) => deadline.unwrap_or_else(Instant::now),
            Err(_) => Instant::now(),
        }
    }

    /// Waits until the drain's deadline: cut what is left. Follows a deadline brought forward.
    pub async fn expired(&mut self) {
        let mut deadline = self.begun().await;
        while let Ok(Ok(())) = timeout_at(deadline, self.begun.changed()).await {
            deadline = self.begun.borrow().unwrap_or(deadline);
        }
        tokio::time::sleep_until(deadline).await;
    }

    /// Whether the drain has begun.
    pub fn is_begun(&self) -> bool {
        self.begun.borrow().is_some() || self.begun.has_changed().is_err()
    }
}

#[cfg(test)]
mod tests;
