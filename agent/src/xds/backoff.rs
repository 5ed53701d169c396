//! How long to wait before the next attempt.

use std::time::Duration;

use rand::{Rng, RngExt};

const FIRST: Duration = Duration::from_millis(10);
const LONGEST: Duration = Duration::from_secs(15);

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Before there was a stream: nobody there, or refused.
    Unopened,
    /// A stream that had brought something ended the way connections end in a living cluster.
    Broken,
    /// A stream ended with an error, or without having brought anything.
    Failed,
    /// A stream that had brought something was closed in good order.
    Complete,
}

#[derive(Debug)]
pub(super) struct Backoff {
    last: Duration,
}

impl Backoff {
    pub fn new() -> Self {
        Self { last: Duration::ZERO }
    }

    /// Between half and the whole of the time, so that the agents of a cluster do not return to a
    /// new control plane all at once.
    pub fn after(&mut self, end: End, random: &mut impl Rng) -> Duration {
        self.last = match end {
            End::Complete => Duration::ZERO,
            End::Broken => FIRST,
            End::Unopened | End::Failed => (self.last * 2).clamp(FIRST, LONGEST),
        };
        self.last.mul_f64(random.random_range(0.5..=1.0))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    #[test]
    fn delays_double_up_to_the_longest_and_start_again_after_a_good_stream() {
        let mut random = StdRng::seed_from_u64(1);
        let mut backoff = Backoff::new();
        let mut expect = |backoff: &mut Backoff, end, millis: u64| {
            let (delay, whole) = (backoff.after(end, &mut random), Duration::from_millis(millis));
            assert!(delay >= whole / 2 && delay <= whole, "{end:?}: {delay:?} of {whole:?}");
        };
        for millis in [10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 15000, 15000] {
            expect(&mut backoff, End::Unopened, millis);
        }
        expect(&mut backoff, End::Failed, 15000);
        expect(&mut backoff, End::Broken, 10);
        expect(&mut backoff, End::Failed, 20);
        expect(&mut backoff, End::Complete, 0);
        expect(&mut backoff, End::Unopened, 10);
    }
}
