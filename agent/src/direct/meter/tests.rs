#![allow(clippy::unwrap_used)]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use culvert_core::tables::VerdictId;

use super::*;
use crate::capture::direct::Arrival;

fn meter() -> (Meter, Arc<ByteCounters>) {
    let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let flow = DirectFlow {
        client: at(1),
        server: at(2),
        original: at(2),
        source: NetnsCookie(1),
        destination: NetnsCookie(2),
        verdict: VerdictId(1),
        socket: SocketCookie(1),
        arrival: Some(Arrival::Admitted),
        connected_at: Duration::ZERO,
        established_at: None,
    };
    let counters = Arc::new(ByteCounters::default());
    (Meter::new(flow, vec![counters.clone()]), counters)
}

#[test]
fn each_byte_counts_once() {
    let (meter, counters) = meter();
    for (sent, received) in [(10, 5), (10, 5), (30, 5), (30, 8)] {
        meter.advance(Carried { sent, received });
        assert_eq!((counters.received(), counters.sent()), (sent, received));
    }
}

#[test]
fn old_news_count_nothing() {
    let (meter, counters) = meter();
    meter.advance(Carried { sent: 10, received: 5 });
    meter.advance(Carried { sent: 4, received: 7 });
    assert_eq!((counters.received(), counters.sent()), (10, 7));
}
