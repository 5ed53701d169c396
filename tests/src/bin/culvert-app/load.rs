//! A load that keeps count: short calls at a fixed rate, and long streams whose every line is
//! numbered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use crate::call::{self, Call, read_line};
use crate::kind::{Failure, Kind};
use crate::names;

/// Losses that are told one by one; the others are only counted.
const TOLD: usize = 20;
/// Calls under way at the same time; a rate that wants more is held up, and shows as a gap.
const AT_ONCE: usize = 400;

/// What to do until told to stop.
#[derive(Clone, Debug, Deserialize)]
pub struct Plan {
    #[serde(default)]
    calls: Option<Calls>,
    #[serde(default)]
    streams: Option<Streams>,
}

#[derive(Clone, Debug, Deserialize)]
struct Calls {
    #[serde(flatten)]
    call: Call,
    per_second: f64,
}

#[derive(Clone, Debug, Deserialize)]
struct Streams {
    to: String,
    count: usize,
    /// Between two lines of one stream.
    pause_ms: u64,
    /// How long a line may take there and back.
    #[serde(default = "half_a_minute")]
    patience_ms: u64,
}

fn half_a_minute() -> u64 {
    30_000
}

/// A loss, and when since the load began.
#[derive(Clone, Debug, Serialize)]
struct Loss {
    at_ms: u64,
    #[serde(flatten)]
    failure: Failure,
}

#[derive(Debug, Default, Serialize)]
struct CallTally {
    made: u64,
    ok: u64,
    lost: BTreeMap<String, u64>,
    losses: Vec<Loss>,
    servers: BTreeMap<String, u64>,
    longest_ms: u64,
    /// The longest time without any call that ended well.
    longest_gap_ms: u64,
    #[serde(skip)]
    last_ok: Option<Instant>,
}

#[derive(Debug, Default, Serialize)]
struct StreamTally {
    opened: usize,
    alive: usize,
    lines: u64,
    losses: Vec<Loss>,
    servers: BTreeMap<String, u64>,
    longest_silence_ms: u64,
}

#[derive(Debug)]
struct Tally {
    start: Instant,
    calls: Mutex<CallTally>,
    streams: Mutex<StreamTally>,
}

impl Tally {
    fn calls(&self) -> MutexGuard<'_, CallTally> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn streams(&self) -> MutexGuard<'_, StreamTally> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn since_start(&self) -> u64 {
        millis(self.start.elapsed())
    }
}

fn millis(time: Duration) -> u64 {
    time.as_millis().try_into().unwrap_or(u64::MAX)
}

/// A load under way.
#[derive(Debug)]
pub struct Load {
    tally: Arc<Tally>,
    stop: watch::Sender<bool>,
    tasks: JoinSet<()>,
}

impl Load {
    /// Begins; returns when every stream has been opened and greeted by its server.
    pub async fn start(plan: Plan) -> Result<Self> {
        let start = Instant::now();
        let tally = Tally { start, calls: Mutex::default(), streams: Mutex::default() };
        let tally = Arc::new(tally);
        let (stop, stopped) = watch::channel(false);
        let mut tasks = JoinSet::new();
        if let Some(streams) = plan.streams {
            for number in 0..streams.count {
                let opened = open(&streams, &tally).await;
                let opened = opened.map_err(|failure| {
                    anyhow::anyhow!("stream {number} to {}: {}", streams.to, failure.error)
                })?;
                let (tally, stopped) = (Arc::clone(&tally), stopped.clone());
                tasks.spawn(keep_talking(opened, streams.clone(), tally, stopped));
            }
        }
        if let Some(calls) = plan.calls {
            ensure!(calls.per_second > 0.0, "a load without calls");
            tasks.spawn(keep_calling(calls, Arc::clone(&tally), stopped));
        }
        Ok(Self { tally, stop, tasks })
    }

    /// How it went so far.
    pub fn report(&self) -> Value {
        report(&self.tally)
    }

    /// Ends it: waits for calls under way, and closes the streams.
    pub async fn stop(mut self) -> Value {
        // Everybody may have ended already.
        let _ = self.stop.send(true);
        while self.tasks.join_next().await.is_some() {}
        report(&self.tally)
    }
}

fn report(tally: &Tally) -> Value {
    json!({ "for_ms": tally.since_start(), "calls": &*tally.calls(), "streams": &*tally.streams() })
}

async fn open(streams: &Streams, tally: &Tally) -> Result<BufReader<TcpStream>, Failure> {
    let patience = Duration::from_millis(streams.patience_ms);
    let opening = async {
        let to = *names::resolve(&streams.to).await?.first().ok_or_else(Failure::timeout)?;
        let stream = TcpStream::connect(to).await?;
        stream.set_nodelay(true)?;
        let mut stream = BufReader::new(stream);
        let greeting = read_line(&mut stream).await?;
        let greeting: Value = serde_json::from_str(&greeting).map_err(Failure::wrong)?;
        let server = greeting.get("pod").and_then(Value::as_str).unwrap_or_default().to_owned();
        *tally.streams().servers.entry(server).or_default() += 1;
        Ok(stream)
    };
    let stream = timeout(patience, opening).await.unwrap_or_else(|_| Err(Failure::timeout()))?;
    let mut tally = tally.streams();
    tally.opened += 1;
    tally.alive += 1;
    Ok(stream)
}

async fn keep_talking(
    mut stream: BufReader<TcpStream>,
    plan: Streams,
    tally: Arc<Tally>,
    mut stop: watch::Receiver<bool>,
) {
    let mut turn = interval(Duration::from_millis(plan.pause_ms.max(1)));
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let patience = Duration::from_millis(plan.patience_ms);
    for number in 0u64.. {
        tokio::select! {
            _ = turn.tick() => {}
            _ = stop.changed() => break,
        }
        let asked = Instant::now();
        let done = timeout(patience, there_and_back(&mut stream, number)).await;
        let mut tally_now = tally.streams();
        match done.unwrap_or_else(|_| Err(Failure::timeout())) {
            Ok(()) => {
                tally_now.lines += 1;
                let silence = millis(asked.elapsed());
                tally_now.longest_silence_ms = tally_now.longest_silence_ms.max(silence);
            }
            Err(failure) => {
                tally_now.alive -= 1;
                tally_now.losses.push(Loss { at_ms: tally.since_start(), failure });
                return;
            }
        }
    }
    // Ended by us; the server need not agree.
    let _ = stream.shutdown().await;
}

async fn there_and_back(stream: &mut BufReader<TcpStream>, number: u64) -> Result<(), Failure> {
    stream.write_all(format!("{number}\n").as_bytes()).await?;
    let back = read_line(stream).await?;
    if back != number.to_string() {
        return Err(Failure::wrong(format!("line {back:?} came in place of {number}")));
    }
    Ok(())
}

async fn keep_calling(plan: Calls, tally: Arc<Tally>, mut stop: watch::Receiver<bool>) {
    let mut turn = interval(Duration::from_secs_f64(1.0 / plan.per_second));
    turn.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut calls = JoinSet::new();
    loop {
        tokio::select! {
            _ = turn.tick() => {}
            _ = stop.changed() => break,
        }
        while calls.len() >= AT_ONCE {
            calls.join_next().await;
        }
        while calls.try_join_next().is_some() {}
        let (call, tally) = (plan.call.clone(), Arc::clone(&tally));
        calls.spawn(async move {
            let begun = Instant::now();
            let outcome = call::one(&call).await;
            note(&tally, begun, outcome);
        });
    }
    while calls.join_next().await.is_some() {}
}

fn note(tally: &Tally, begun: Instant, outcome: call::Outcome) {
    let now = Instant::now();
    let at_ms = tally.since_start();
    let server = outcome.server().map(ToOwned::to_owned);
    let mut calls = tally.calls();
    calls.made += 1;
    match outcome.failure() {
        None => {
            calls.ok += 1;
            calls.longest_ms = calls.longest_ms.max(millis(now - begun));
            let gap = millis(now - calls.last_ok.unwrap_or(tally.start));
            calls.longest_gap_ms = calls.longest_gap_ms.max(gap);
            calls.last_ok = Some(now);
            *calls.servers.entry(server.unwrap_or_default()).or_default() += 1;
        }
        Some(failure) => {
            let kind = match failure.kind {
                Kind::Refused => "refused",
                Kind::Reset => "reset",
                Kind::Cut => "cut",
                Kind::Timeout => "timeout",
                Kind::Name => "name",
                Kind::Wrong => "wrong",
                Kind::Other => "other",
            };
            *calls.lost.entry(kind.to_owned()).or_default() += 1;
            if calls.losses.len() < TOLD {
                calls.losses.push(Loss { at_ms, failure });
            }
        }
    }
}
