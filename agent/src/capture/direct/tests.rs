#![allow(clippy::unwrap_used)]

use std::time::Duration;

use culvert_core::tables::{Backend, MAX_BACKENDS, NetnsCookie, Verdict, VerdictId, VerdictKey};

use super::layout::{key_of, verdict_key, verdict_of, verdict_value};

fn backend(number: u8, weight: u32) -> Backend {
    let to = ([10, 0, 0, number], 8080).into();
    Backend { to, netns: NetnsCookie(number.into()), weight, accelerated: number.is_multiple_of(2) }
}

fn verdict(backends: Vec<Backend>, elsewhere: u32) -> Verdict {
    Verdict { id: VerdictId(7), expires: Duration::from_secs(60), backends, elsewhere }
}

#[test]
fn verdict_survives_the_kernels_layout() {
    for verdict in [
        verdict(vec![backend(1, 1)], 0),
        verdict(vec![backend(1, 3), backend(2, 0), backend(3, 9)], 11),
        verdict((0..MAX_BACKENDS as u8).map(|n| backend(n, n.into())).collect(), 1),
    ] {
        assert_eq!(verdict_of(&verdict_value(&verdict)), verdict);
    }
}

#[test]
fn key_survives_the_kernels_layout() {
    for destination in ["10.0.0.1:80", "[fd00::1]:65535"] {
        let key = VerdictKey { source: NetnsCookie(9), destination: destination.parse().unwrap() };
        assert_eq!(key_of(&verdict_key(&key)), key);
    }
}

#[test]
fn backends_beyond_the_bound_count_as_elsewhere() {
    let many = verdict((0..40).map(|n| backend(n, 10)).collect(), 5);
    let kept = verdict_of(&verdict_value(&many));
    assert_eq!(kept.backends, many.backends[..MAX_BACKENDS]);
    assert_eq!(kept.elsewhere, 5 + 8 * 10);
}

#[test]
fn weights_that_overflow_count_as_elsewhere() {
    let heavy = verdict(vec![backend(1, u32::MAX - 1), backend(2, u32::MAX)], 1);
    let kept = verdict_of(&verdict_value(&heavy));
    assert_eq!(kept.backends, heavy.backends[..1]);
    assert_eq!(kept.elsewhere, 1);
}
