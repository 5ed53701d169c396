//! How the agent ends: it takes no new connections, and lets open ones finish.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;

use super::duty::Follower;
use super::state::State;
use crate::admin::Sources;
use crate::admin::readiness::HANDED_OVER;
use crate::capture;
use crate::drain::{DrainEnd, DrainTrigger, Queued};
use crate::handover::{Asked, Greeting};

/// How long connections may go on while nobody has told the agent to end.
const UNLIMITED: Duration = Duration::from_secs(365 * 24 * 60 * 60);
/// How often an agent that has handed over looks whether somebody serves.
const LOOK_AFTER_PINS: Duration = Duration::from_secs(10);
/// How long idle tunnels may take to close.
const GOODBYE: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(10);
/// How long the listeners of pods may take to close, which they do once their tasks have heard of it.
const CLOSING: Duration = Duration::from_secs(2);
/// How long connections that are cut have to tell of their end.
const CUT: Duration = Duration::from_millis(100);

/// Why an agent ends.
pub(super) enum End {
    Told,
    /// Another one accepts connections now; also those of the agent's own servers, or not.
    HandedOver {
        to: Greeting,
        servers_too: bool,
    },
    /// Another one waits until this one has let go.
    LetGo(Asked),
}

pub(super) struct Ending {
    pub state: Arc<State>,
    pub trigger: DrainTrigger,
    /// That of the agent's own servers.
    pub closing: DrainTrigger,
    pub serving: JoinHandle<()>,
    /// Those who accept connections of pods.
    pub accepting: TaskTracker,
    pub sources: Sources,
}

/// Somebody took over, and is gone.
#[derive(Debug, thiserror::Error)]
#[error("the agent that took over has ended and none came after it: this one ends to begin anew")]
struct Abandoned;

impl Ending {
    /// Lets connections finish. In Kubernetes who ends is started again, and would take over again:
    /// there the agent waits until it is told to end, and connections may go on as long.
    pub async fn finish(mut self, end: End, follower: &mut Follower) -> anyhow::Result<()> {
        let kernel = self.state.node.capture.kernel();
        if let (End::HandedOver { .. }, Some(kernel)) = (&end, kernel) {
            kernel.give_away();
        }
        let config = self.state.config.clone();
        let is_replaced = !matches!(end, End::Told);
        let stays = config.in_kubernetes && is_replaced;
        // Metrics and status of an agent that stays can still be asked for, unless at the next one.
        let servers_stay = stays && !matches!(end, End::HandedOver { servers_too: true, .. });
        let deadline = match is_replaced {
            true => config.handed_over_deadline,
            false => config.drain_deadline,
        };
        let grace = if stays { UNLIMITED } else { deadline };
        self.tell(&end, (!stays).then_some(deadline));
        let (queued, mut asked) = match end {
            End::Told => (Queued::Taken, None),
            End::HandedOver { .. } => (Queued::Left, None),
            End::LetGo(asked) => (Queued::Taken, Some(asked)),
        };
        let _unready = is_replaced.then(|| self.sources.readiness.open(HANDED_OVER));
        let (trigger, closing, serving) = (&self.trigger, &self.closing, &mut self.serving);
        let accepting = &self.accepting;
        let drained = async {
            match queued {
                Queued::Left => trigger.hand_over(grace).await,
                Queued::Taken => trigger.begin(grace).await,
            }
        };
        let closed = async {
            if !servers_stay {
                closing.begin(grace).await;
            }
        };
        let let_go = async {
            if !servers_stay {
                // The next agent listens where this one does.
                let _ = serving.await;
            }
            accepting.close();
            let _ = timeout(CLOSING, accepting.wait()).await;
            if let Some(kernel) = kernel {
                kernel.let_go();
            }
            // Who waits for that hears it by the end of the connection.
            drop(asked.take());
        };
        let finished = async { tokio::join!(drained, closed, let_go).0 };
        let drained = match stays {
            false => finished.await,
            true => {
                let finished = async {
                    finished.await;
                    std::future::pending().await
                };
                tokio::select! {
                    drained = finished => drained,
                    () = follower.told() => {}
                    () = abandoned(&config.pin_path) => return Err(Abandoned.into()),
                }
                tracing::info!(?deadline, "told to end");
                tokio::join!(self.trigger.begin(deadline), self.closing.begin(deadline)).0
            }
        };
        match drained {
            DrainEnd::Complete => self.close_tunnels().await,
            DrainEnd::Expired => {
                tracing::info!("the drain's deadline has passed: open connections are reset");
                // They tell of their end themselves.
                let _ = timeout(CUT, self.trigger.finished()).await;
            }
        }
        Ok(())
    }

    fn tell(&self, end: &End, deadline: Option<Duration>) {
        let deadline = match deadline {
            Some(deadline) => format!("{deadline:?}"),
            None => "after this agent is told to end".to_owned(),
        };
        match end {
            End::Told => tracing::info!(deadline, "draining: no new connections"),
            End::HandedOver { to, .. } => {
                tracing::info!(%to, deadline, "draining: new connections are another agent's");
            }
            End::LetGo(asked) => {
                let to = &asked.by;
                tracing::warn!(
                    %to, deadline,
                    "draining: no new connections until another agent has begun, which cannot use \
                     what this one has in the kernel"
                );
            }
        }
    }

    /// No stream is on them any more.
    async fn close_tunnels(&self) {
        let pods = self.state.node.mesh.pods();
        pods.iter().for_each(|(pod, _)| pod.pool.drain());
        let limit = Instant::now() + GOODBYE;
        while pods.iter().any(|(pod, _)| pod.pool.connections() > 0) && Instant::now() < limit {
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Ready when twice in a row nobody had the pins: between two agents they are free for a moment.
async fn abandoned(pin_path: &Path) {
    let mut free = 0;
    while free < 2 {
        tokio::time::sleep(LOOK_AFTER_PINS).await;
        free = if capture::is_unattended(pin_path) { free + 1 } else { 0 };
    }
}
