//! When to ask a certificate authority again: functions of times and a random number, nothing else.

use std::time::Duration;

use time::OffsetDateTime;

/// The first delay after a failure.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// No delay after a failure is longer.
const LONGEST_DELAY: Duration = Duration::from_secs(150);

/// How far a delay after a failure varies to either side, as a part of it.
const DELAY_JITTER: f64 = 0.2;

/// How far the moment of a refresh varies to either side, as a part of the time from the certificate's
/// beginning to its half life: 36 minutes for a certificate of a day. Nodes that were started together
/// do not renew together.
const REFRESH_JITTER: f64 = 0.05;

/// Between two successful requests for one identity, whatever the lifetime of what is issued.
const SHORTEST_PAUSE: time::Duration = time::Duration::SECOND;

/// The half life of a certificate: when it is to be replaced.
///
/// The end of a certificate that ends before it begins.
pub(super) fn half_life(not_before: OffsetDateTime, not_after: OffsetDateTime) -> OffsetDateTime {
    let life = not_after - not_before;
    match life.is_negative() {
        true => not_after,
        // Half of a difference of two representable times, added to the earlier one, lies between them.
        false => not_before + life / 2,
    }
}

/// The half life, moved by up to [`REFRESH_JITTER`] to either side; `spread` is from -1 to 1.
///
/// A certificate that comes with its half life over is refreshed after half of what it has left: an
/// authority that hands out the same certificate again is not asked without pause.
pub(super) fn refresh_at(
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
    now: OffsetDateTime,
    spread: f64,
) -> OffsetDateTime {
    let half = half_life(not_before, not_after);
    let moved = half.checked_add((half - not_before) * (spread * REFRESH_JITTER)).unwrap_or(half);
    match moved > now {
        true => moved,
        false => {
            let pause: time::Duration = (not_after - now) / 2_i32;
            now.saturating_add(pause.max(SHORTEST_PAUSE))
        }
    }
}

/// The delay after the given number of failures in a row (from 1), moved by up to [`DELAY_JITTER`] to
/// either side; `spread` is from -1 to 1.
pub(super) fn back_off(failures: u32, spread: f64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let delay = FIRST_DELAY * 2u32.pow(doublings);
    delay.min(LONGEST_DELAY).mul_f64(1.0 + spread * DELAY_JITTER).min(LONGEST_DELAY)
}

/// [`back_off`], but not beyond the end of a certificate that is still valid.
pub(super) fn retry_in(
    failures: u32,
    spread: f64,
    now: OffsetDateTime,
    still_valid_until: Option<OffsetDateTime>,
) -> Duration {
    let delay = back_off(failures, spread);
    match still_valid_until {
        Some(end) => delay.min(until(now, end)),
        None => delay,
    }
}

/// The time from `now` to `at`, none if that has passed.
pub(super) fn until(now: OffsetDateTime, at: OffsetDateTime) -> Duration {
    (at - now).try_into().unwrap_or(Duration::ZERO)
}

#[cfg(test)]
mod tests;
