use proptest::prelude::*;
use time::macros::datetime;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn day_long_certificate_is_refreshed_after_half_a_day() {
    let (begin, end) = (datetime!(2026-11-21 12:00 UTC), datetime!(2026-11-22 12:00 UTC));
    assert_eq!(half_life(begin, end), datetime!(2026-11-22 00:00 UTC));
    assert_eq!(refresh_at(begin, end, begin, 0.0), datetime!(2026-11-22 00:00 UTC));
}

#[test]
fn backdated_certificate_counts_from_its_beginning() {
    let (begin, end) = (datetime!(2026-11-21 11:58 UTC), datetime!(2026-11-22 12:00 UTC));
    assert_eq!(half_life(begin, end) - begin, time::Duration::minutes(12 * 60 + 1));
}

#[test]
fn refresh_varies_a_little_to_both_sides() {
    let (begin, end) = (datetime!(2026-11-21 12:00 UTC), datetime!(2026-11-22 12:00 UTC));
    assert_eq!(refresh_at(begin, end, begin, -1.0), datetime!(2026-11-21 23:24 UTC));
    assert_eq!(refresh_at(begin, end, begin, 1.0), datetime!(2026-11-22 00:36 UTC));
}

#[test]
fn certificate_that_ends_before_it_begins_is_refreshed_at_its_end_but_not_at_once() {
    let (begin, end) = (datetime!(2026-11-21 12:00 UTC), datetime!(2026-11-20 12:00 UTC));
    assert_eq!(half_life(begin, end), end);
    assert_eq!(refresh_at(begin, end, begin, 0.0), begin + SECOND);
}

#[test]
fn delays_double_up_to_two_and_a_half_minutes() {
    let delays: Vec<u64> = (1..=10).map(|failures| back_off(failures, 0.0).as_secs()).collect();
    assert_eq!(delays, [1, 2, 4, 8, 16, 32, 64, 128, 150, 150]);
    assert_eq!(back_off(u32::MAX, 1.0), LONGEST_DELAY);
    assert_eq!(back_off(5, -1.0), Duration::from_millis(12_800));
    assert_eq!(back_off(5, 1.0), Duration::from_millis(19_200));
}

#[test]
fn retry_comes_before_a_valid_certificate_ends() {
    let now = datetime!(2026-11-21 12:00 UTC);
    assert_eq!(retry_in(7, 0.0, now, Some(now + 10 * SECOND)), 10 * SECOND);
    assert_eq!(retry_in(7, 0.0, now, None), 64 * SECOND);
    assert_eq!(retry_in(1, 0.0, now, Some(now + 10 * SECOND)), SECOND);
}

#[test]
fn certificate_that_comes_past_its_half_life_is_refreshed_halfway_to_its_end() {
    let (begin, end) = (datetime!(2026-11-21 12:00 UTC), datetime!(2026-11-22 12:00 UTC));
    let now = datetime!(2026-11-22 10:00 UTC);
    assert_eq!(refresh_at(begin, end, now, 0.0), datetime!(2026-11-22 11:00 UTC));
}

proptest! {
    #[test]
    fn delay_stays_within_its_bounds(failures in 1u32.., spread in -1.0f64..=1.0) {
        let delay = back_off(failures, spread);
        prop_assert!(delay >= FIRST_DELAY.mul_f64(0.8));
        prop_assert!(delay <= LONGEST_DELAY);
    }

    #[test]
    fn refresh_lies_between_now_and_the_end(life in 60i64..10_000_000, age in 0.0f64..0.4, spread in -1.0f64..=1.0) {
        let begin = datetime!(2026-11-21 12:00 UTC);
        let end = begin + time::Duration::seconds(life);
        let now = begin + time::Duration::seconds_f64(life as f64 * age);
        let at = refresh_at(begin, end, now, spread);
        prop_assert!(now < at && at < end);
    }
}
