//! How the agent begins: alone, or in the place of one that runs. And what it gives to the next.

use std::fmt::Display;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use culvert_abi::ABI_VERSION;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::MAX_PODS;
use super::duty::Signals;
use super::enrolment::Enrolment;
use crate::capture::{Capture, CaptureError, CaptureOptions, Netns, Redirection};
use crate::config::{Config, Redirect};
use crate::handover::{
    self, Asked, Bequest, Estate, Greeting, HandoverError, PROTOCOL, Predecessor, Socket,
};
use crate::node::Node;
use crate::telemetry::Handover;

/// How long the pins of an agent that ends may still be taken.
const FREE_LIMIT: Duration = Duration::from_secs(10);
/// The same when no agent answers: one that does not hand over is found to be there soon.
const BUSY_LIMIT: Duration = Duration::from_millis(500);
const LOOK: Duration = Duration::from_millis(10);

/// What the administrator is told of hand-overs. Cloning copies a pointer.
#[derive(Clone, Debug, Default)]
pub(super) struct Story(Arc<Mutex<Option<String>>>);

impl Story {
    pub fn tell(&self, text: impl Display) {
        *self.0.lock() = Some(text.to_string());
    }

    pub fn told(&self) -> Option<String> {
        self.0.lock().clone()
    }
}

/// Before the agent has the kernel's tables.
pub(super) enum Beginning {
    /// Nobody else runs: it has them already, so that nothing is in the way of listening.
    Alone(Redirection),
    /// Another one serves until this one can.
    After(Predecessor),
}

/// The agent has the kernel's tables.
pub(super) struct Begun {
    pub capture: Redirection,
    /// What another agent gives, which still serves.
    pub bequest: Option<Bequest>,
}

impl Beginning {
    pub async fn new(config: &Config, options: &CaptureOptions) -> anyhow::Result<Beginning> {
        if config.redirect == Redirect::Cni {
            return Ok(Beginning::Alone(Redirection::Cni));
        }
        if let Some(predecessor) = predecessor(config).await? {
            return Ok(Beginning::After(predecessor));
        }
        let capture = start_when_free(options, BUSY_LIMIT).await?;
        Ok(Beginning::Alone(Redirection::Ebpf(Arc::new(capture))))
    }

    /// Takes what another agent has, once `ready` says that this one can serve; what is in the way of
    /// that is in no one's way meanwhile. `None` when told to end before.
    pub async fn capture(
        self,
        config: &Config,
        options: &CaptureOptions,
        ready: impl Future<Output = ()>,
        signals: &mut Signals,
    ) -> anyhow::Result<Option<Begun>> {
        let mut predecessor = match self {
            Beginning::Alone(capture) => return Ok(Some(Begun { capture, bequest: None })),
            Beginning::After(predecessor) => predecessor,
        };
        let mut ready = std::pin::pin!(ready);
        let begun = loop {
            let from = &predecessor.greeting;
            tracing::info!(%from, "an agent is running: making ready to take over");
            let is_ready = tokio::select! {
                () = &mut ready => true,
                () = predecessor.ended() => false,
                () = signals.told() => {
                    tracing::info!("told to end before the running agent handed over");
                    return Ok(None);
                }
            };
            match is_ready {
                true => break inherit(predecessor, options).await?,
                false => match self::predecessor(config).await? {
                    Some(next) => predecessor = next,
                    None => {
                        tracing::info!("the running agent has ended before it handed over");
                        break (start_when_free(options, FREE_LIMIT).await?, None);
                    }
                },
            }
        };
        let (capture, bequest) = begun;
        Ok(Some(Begun { capture: Redirection::Ebpf(Arc::new(capture)), bequest }))
    }
}

/// Asks for everything, or for the pins alone where the two agents do not fit together.
async fn inherit(
    predecessor: Predecessor,
    options: &CaptureOptions,
) -> anyhow::Result<(Capture, Option<Bequest>)> {
    let from = predecessor.greeting.clone();
    if let Some(mismatch) = predecessor.mismatch {
        tracing::warn!(
            %from, %mismatch,
            "cannot take over what the running agent has: it is asked to let go, and new connections \
             are refused until this agent has begun"
        );
        let asked = predecessor.ask_to_let_go().await;
        asked.with_context(|| format!("the running agent ({from}) does not let go"))?;
        return Ok((start_when_free(options, FREE_LIMIT).await?, None));
    }
    let goes_on = || format!("cannot take over from the running agent ({from}), which goes on");
    let mut bequest = match predecessor.ask().await {
        Ok(bequest) => bequest,
        Err(HandoverError::Ended) => {
            tracing::info!("the running agent has ended before it handed over");
            return Ok((start_when_free(options, FREE_LIMIT).await?, None));
        }
        Err(error) => return Err(error).with_context(goes_on),
    };
    let started = match bequest.pins.take() {
        Some(lock) => Capture::inherit(options, lock),
        None => start_when_free(options, FREE_LIMIT).await,
    };
    match started {
        Ok(capture) => Ok((capture, Some(bequest))),
        Err(error) => {
            bequest.refuse(&error).await;
            Err(error).with_context(goes_on)
        }
    }
}

/// An agent that ends gives its pins back a moment after it was heard of last.
async fn start_when_free(
    options: &CaptureOptions,
    limit: Duration,
) -> Result<Capture, CaptureError> {
    let limit = Instant::now() + limit;
    loop {
        match Capture::start(options) {
            Err(CaptureError::Busy(_)) if Instant::now() < limit => {
                tokio::time::sleep(LOOK).await;
            }
            started => return started,
        }
    }
}

/// The agent that runs on the same pins, if one answers. Whether one is there that does not shows by
/// the lock on the pins.
async fn predecessor(config: &Config) -> anyhow::Result<Option<Predecessor>> {
    let Some(path) = &config.handover else { return Ok(None) };
    let own = match greeting(config) {
        Ok(own) => own,
        // Nobody has been here before.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context("the folder of pins"),
    };
    match handover::find(path, &own).await {
        Ok(Some(found)) if !found.greeting.is_of_same_pins(&own) => {
            let other = &found.greeting;
            tracing::warn!(
                %other, path = %path.display(),
                "an agent with another folder of pins has the hand-over socket: CULVERT_HANDOVER must \
                 name another one for each"
            );
            Ok(None)
        }
        Ok(found) => Ok(found),
        Err(error) => {
            tracing::warn!(%error, "no agent is found that could hand over");
            Ok(None)
        }
    }
}

fn greeting(config: &Config) -> io::Result<Greeting> {
    let pins = std::fs::metadata(&config.pin_path)?;
    Ok(Greeting {
        protocol: PROTOCOL,
        abi: ABI_VERSION,
        max_pods: MAX_PODS,
        pins: (pins.dev(), pins.ino()),
        netns: Netns::current().map_err(io::Error::other)?.cookie().0,
        pid: std::process::id(),
        pod: config.pod.name.to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
    })
}

/// Serves with what another agent gave, which serves no more from then on. On an error it goes on.
pub(super) async fn take_over(
    mut bequest: Bequest,
    enrolment: &mut Enrolment,
    node: &Node,
    story: &Story,
) -> anyhow::Result<()> {
    let from = bequest.from.clone();
    let goes_on = || format!("cannot take over from the running agent ({from}), which goes on");
    if let Some(why) = enrolment.lacks() {
        bequest.refuse(&why).await;
        return Err(anyhow::anyhow!(why)).with_context(goes_on);
    }
    bequest.take().await.with_context(goes_on)?;
    if let Some(kernel) = node.capture.kernel() {
        kernel.own()?;
    }
    enrolment.open();
    node.telemetry.handover(Handover::Taken);
    tracing::info!(%from, "taken over from the agent that ran before");
    story.tell(format_args!("taken over from {from}"));
    Ok(())
}

/// Gives everything to a successor, which waits for the word that it is its own.
pub(super) async fn give(
    asked: &Asked,
    enrolment: &Enrolment,
    kernel: &Capture,
    servers: &[OwnedFd],
) -> Result<(), HandoverError> {
    let estate = Estate {
        pins: kernel.lock(),
        pods: enrolment.heirlooms(),
        servers: servers.iter().map(AsFd::as_fd).collect(),
    };
    asked.give(&estate).await
}

/// Begins to listen to successors; gives the own network namespace with what they ask for.
pub(super) fn await_successor(config: &Config) -> (mpsc::Receiver<Asked>, u64) {
    let (asked, asking) = mpsc::channel(1);
    let Some(path) = &config.handover else { return (asking, 0) };
    let own = greeting(config)
        .map_err(|error| HandoverError::Socket { path: config.pin_path.clone(), error });
    match own.and_then(|own| Ok((Socket::bind(path)?, own))) {
        Ok((socket, own)) => {
            let netns = own.netns;
            tokio::spawn(handover::serve(socket, own, asked));
            (asking, netns)
        }
        Err(error) => {
            tracing::warn!(%error, "this agent cannot hand over to the next");
            (asking, 0)
        }
    }
}
