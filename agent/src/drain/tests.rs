#![allow(clippy::unwrap_used)]

use super::*;

const GRACE: Duration = Duration::from_secs(30);

#[tokio::test(start_paused = true)]
async fn ends_as_soon_as_all_watches_are_dropped() {
    let (trigger, watch) = drain();
    let served = tokio::spawn({
        let mut watch = watch.clone();
        async move { watch.begun().await }
    });
    drop(watch);
    let before = Instant::now();
    assert_eq!(trigger.begin(GRACE).await, DrainEnd::Complete);
    assert_eq!(Instant::now(), before);
    assert_eq!(served.await.unwrap(), before + GRACE);
}

#[tokio::test(start_paused = true)]
async fn expires_at_the_deadline_for_trigger_and_watch_alike() {
    let (trigger, watch) = drain();
    assert!(!watch.is_begun());
    let before = Instant::now();
    let (end, ()) = tokio::join!(trigger.begin(GRACE), watch.expired());
    assert_eq!(end, DrainEnd::Expired);
    assert_eq!(Instant::now(), before + GRACE);
    assert!(watch.is_begun());
}

#[tokio::test(start_paused = true)]
async fn a_second_call_shortens_the_time() {
    let (trigger, watch) = drain();
    let before = Instant::now();
    let cut = tokio::spawn(async move {
        watch.expired().await;
        Instant::now()
    });
    let short = Duration::from_secs(1);
    let (first, second) = tokio::join!(trigger.begin(GRACE), trigger.begin(short));
    assert_eq!((first, second), (DrainEnd::Complete, DrainEnd::Expired));
    assert_eq!(cut.await.unwrap(), before + short);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_trigger_counts_as_begun_without_grace() {
    let (trigger, mut watch) = drain();
    drop(trigger);
    let before = Instant::now();
    watch.begun().await;
    watch.expired().await;
    assert_eq!(Instant::now(), before);
    assert!(watch.is_begun());
}

#[tokio::test(start_paused = true)]
async fn after_a_hand_over_queues_stay_another_agents_whatever_the_time_becomes() {
    let (trigger, watch) = drain();
    assert_eq!(watch.queued(), Queued::Taken);
    let short = Duration::from_secs(1);
    let (first, second) = tokio::join!(trigger.hand_over(GRACE), trigger.begin(short));
    assert_eq!((first, second), (DrainEnd::Expired, DrainEnd::Expired));
    assert_eq!(watch.queued(), Queued::Left);
}
