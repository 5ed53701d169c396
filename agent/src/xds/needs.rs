//! Addresses that are asked for when a connection needs them, and who waits for which.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// How long a connection waits for an answer, counted from when the key was first asked for.
pub const WAIT: Duration = Duration::from_secs(5);
/// How many keys that nothing is behind are remembered, and stay subscribed.
const NOTHING_BEHIND: usize = 10_000;

/// What an answer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    Known,
    Nothing,
}

/// Empty and without effect unless addresses are subscribed to on demand.
#[derive(Debug)]
pub(super) struct Needs {
    asked: bool,
    keys: Mutex<Keys>,
    fresh: Notify,
}

#[derive(Debug, Default)]
struct Keys {
    by_key: HashMap<Arc<str>, Key>,
    /// To be asked for on the current stream.
    wanted: Vec<Arc<str>>,
    /// To be unsubscribed from.
    given_up: Vec<Arc<str>>,
    /// Those with nothing behind, the oldest first.
    nothing: VecDeque<Arc<str>>,
}

#[derive(Debug)]
enum Key {
    /// Dropping the sender wakes who waits.
    Waiting {
        since: Instant,
        answer: watch::Sender<()>,
    },
    Answered(Found),
}

impl Needs {
    pub fn new(on_demand: bool) -> Self {
        Self { asked: on_demand, keys: Mutex::default(), fresh: Notify::new() }
    }

    pub fn are_asked(&self) -> bool {
        self.asked
    }

    /// Waits until the control plane answered for `key`, or for [`WAIT`]; whether it did.
    pub async fn need(&self, key: &str) -> bool {
        if !self.asked {
            return true;
        }
        let (since, mut answer) = {
            let mut keys = self.keys.lock();
            match keys.by_key.get(key) {
                Some(Key::Answered(_)) => return true,
                Some(Key::Waiting { since, answer }) => (*since, answer.subscribe()),
                None => {
                    let (sender, receiver) = watch::channel(());
                    let (key, since) = (Arc::<str>::from(key), Instant::now());
                    keys.by_key.insert(key.clone(), Key::Waiting { since, answer: sender });
                    keys.wanted.push(key);
                    self.fresh.notify_one();
                    (since, receiver)
                }
            }
        };
        // The sender never sends: it is dropped with the answer.
        tokio::time::timeout_at(since + WAIT, answer.changed()).await.is_ok()
    }

    /// What to subscribe to and what to give up; waits until there is any.
    pub async fn wanted(&self) -> (Vec<Arc<str>>, Vec<Arc<str>>) {
        loop {
            {
                let mut keys = self.keys.lock();
                if !keys.wanted.is_empty() || !keys.given_up.is_empty() {
                    let Keys { wanted, given_up, .. } = &mut *keys;
                    return (std::mem::take(wanted), std::mem::take(given_up));
                }
            }
            self.fresh.notified().await;
        }
    }

    /// A new stream knows of no subscription but those of the names that are held, which it was
    /// opened with.
    pub fn reopened(&self, is_held: impl Fn(&str) -> bool) {
        let mut keys = self.keys.lock();
        let unheld = keys.by_key.keys().filter(|key| !is_held(key));
        keys.wanted = unheld.cloned().collect();
        keys.given_up.clear();
        if !keys.wanted.is_empty() {
            self.fresh.notify_one();
        }
    }

    /// Notes answers. Keys that nobody asked for are other names of a resource.
    pub fn answered(&self, names: &[(String, Found)]) {
        if names.is_empty() {
            return;
        }
        let mut keys = self.keys.lock();
        for (name, found) in names {
            let Some(key) = keys.by_key.get_mut(name.as_str()) else { continue };
            let before = std::mem::replace(key, Key::Answered(*found));
            let was_nothing = matches!(before, Key::Answered(Found::Nothing));
            if *found == Found::Nothing && !was_nothing {
                let name: Arc<str> = name.as_str().into();
                keys.nothing.push_back(name);
            }
        }
        if keys.forget() {
            self.fresh.notify_one();
        }
    }
}

impl Keys {
    /// Keeps the memory within bounds whatever applications connect to.
    fn forget(&mut self) -> bool {
        while self.nothing.len() > NOTHING_BEHIND {
            let Some(oldest) = self.nothing.pop_front() else { break };
            // It may have come into being since.
            if let Some(Key::Answered(Found::Nothing)) = self.by_key.get(&oldest) {
                self.by_key.remove(&oldest);
                self.given_up.push(oldest);
            }
        }
        !self.given_up.is_empty()
    }
}

#[cfg(test)]
mod tests;
