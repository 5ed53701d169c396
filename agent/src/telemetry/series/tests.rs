#![allow(clippy::unwrap_used)]

use super::*;
use crate::telemetry::context::Baggage;
use crate::telemetry::testing::stranger;

fn context(workload_name: &str) -> ConnectionContext {
    let baggage = Baggage { workload_name: Some(workload_name.into()), ..Baggage::default() };
    ConnectionContext { baggage: Some(Box::new(baggage)), ..stranger() }
}

#[test]
fn live_and_ended_connections_add_up_in_any_order_of_ending() {
    let series = Series::new(Arc::new(TcpLabels::of(&stranger())));
    let counters: Vec<_> = (0..5).map(|_| series.open()).collect();
    for (n, counters) in (1..).zip(&counters) {
        counters.add_received(n);
        counters.add_sent(10 * n);
    }
    for order in [2, 0, 4, 1, 3] {
        assert_eq!(series.received_and_sent(), (15, 150));
        series.close(&counters[order], ResponseFlag::None);
    }
    assert_eq!(series.received_and_sent(), (15, 150));
    assert!(series.bytes.lock().live.is_empty());
}

#[test]
fn closing_twice_counts_the_bytes_once() {
    let series = Series::new(Arc::new(TcpLabels::of(&stranger())));
    let (one, other) = (series.open(), series.open());
    one.add_received(1);
    other.add_received(2);
    series.close(&one, ResponseFlag::None);
    series.close(&one, ResponseFlag::None);
    assert_eq!(series.received_and_sent(), (3, 0));
    assert_eq!(series.bytes.lock().live.len(), 1);
}

#[test]
fn the_same_parties_share_a_series_with_and_without_the_shortcut() {
    let store = SeriesStore::new(100);
    let first = store.series(&stranger());
    assert!(Arc::ptr_eq(&first, &store.series(&stranger())));
    assert_eq!(store.recent.read().len(), 1);
    let told = store.series(&context("teller"));
    assert!(Arc::ptr_eq(&told, &store.series(&context("teller"))));
    assert!(!Arc::ptr_eq(&told, &first));
    assert_eq!(store.recent.read().len(), 1);
}

#[test]
fn the_number_of_series_is_bounded_and_live_ones_stay() {
    let store = SeriesStore::new(4);
    let live = store.series(&context("live"));
    let counters = live.open();
    counters.add_received(5);
    for n in 0..100 {
        store.series(&context(&format!("short-{n}")));
    }
    assert!(store.by_labels.read().len() <= 4);
    assert!(Arc::ptr_eq(&live, &store.series(&context("live"))));
    assert_eq!(live.received_and_sent(), (5, 0));
}

#[test]
fn with_all_series_live_further_ones_share_the_overflow() {
    let store = SeriesStore::new(2);
    let held: Vec<_> = (0..4).map(|n| store.series(&context(&format!("held-{n}")))).collect();
    assert!(Arc::ptr_eq(&held[2], &held[3]));
    assert_eq!(held[2].labels, Arc::new(TcpLabels::overflow(Reporter::Destination)));
    assert!(!Arc::ptr_eq(&held[0], &held[1]));
}
