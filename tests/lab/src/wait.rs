//! Waiting for a condition with a bound, never for a fixed time.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything that should happen at once, even on a loaded machine.
pub const SOON: Duration = Duration::from_secs(30);

/// Asks `probe` until it says yes; an error names `what` was waited for.
pub fn until(what: impl Display, limit: Duration, mut probe: impl FnMut() -> bool) -> Result<()> {
    until_some(what, limit, || if probe() { Ok(()) } else { Err("not yet") })
}

/// Asks `probe` until it has an answer, and gives it; an error tells the last reason why not.
pub fn until_some<T, E: Display>(
    what: impl Display,
    limit: Duration,
    probe: impl FnMut() -> Result<T, E>,
) -> Result<T> {
    until_some_within(what, limit, Duration::from_millis(50), probe)
}

/// The same, with no more than `longest` between two probes: for who measures how long it takes.
pub fn until_some_within<T, E: Display>(
    what: impl Display,
    limit: Duration,
    longest: Duration,
    mut probe: impl FnMut() -> Result<T, E>,
) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(reason) if start.elapsed() >= limit => {
                bail!("waited {limit:?} for {what}: {reason:#}")
            }
            Err(_) => pass(pause),
        }
        pause = (pause * 2).min(longest);
    }
}

/// Lets time pass between two things that a scenario does, or in which it watches that something does
/// not happen. Not to wait for anything.
#[allow(clippy::disallowed_methods, reason = "the one place where the lab sleeps")]
pub fn pass(time: Duration) {
    std::thread::sleep(time);
}
