#![allow(clippy::unwrap_used)]

use futures_util::FutureExt;

use super::*;

#[tokio::test(start_paused = true)]
async fn a_key_is_asked_for_once_and_an_answer_by_any_name_releases_all_waiters() {
    let needs = Arc::new(Needs::new(true));
    let wait = |key: &'static str| {
        let needs = needs.clone();
        tokio::spawn(async move { needs.need(key).await })
    };
    let waiters = [wait("/10.0.0.1"), wait("/10.0.0.1"), wait("ns/host")];
    tokio::task::yield_now().await;
    let (mut wanted, given_up) = needs.wanted().await;
    wanted.sort();
    assert_eq!(wanted, ["/10.0.0.1".into(), Arc::<str>::from("ns/host")]);
    assert!(given_up.is_empty());
    assert!(needs.wanted().now_or_never().is_none());

    // The canonical name alone releases nobody; the alias does, and so does a removal.
    needs.answered(&[("c1//Pod/a/x".to_owned(), Found::Known)]);
    tokio::task::yield_now().await;
    assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
    needs.answered(&[
        ("/10.0.0.1".to_owned(), Found::Known),
        ("ns/host".to_owned(), Found::Nothing),
    ]);
    for waiter in waiters {
        assert!(waiter.await.unwrap());
    }
    assert!(needs.need("/10.0.0.1").now_or_never().unwrap());
    assert!(needs.wanted().now_or_never().is_none());
}

#[tokio::test(start_paused = true)]
async fn the_wait_is_bounded_from_the_first_asking() {
    let needs = Needs::new(true);
    let began = Instant::now();
    assert!(!needs.need("k").await);
    assert_eq!(began.elapsed().as_secs(), WAIT.as_secs());
    assert!(!needs.need("k").await);
    assert_eq!(began.elapsed().as_secs(), WAIT.as_secs());
}

#[tokio::test(start_paused = true)]
async fn a_new_stream_asks_again_for_what_it_has_no_resource_of() {
    let needs = Needs::new(true);
    for key in ["held", "alias", "nothing", "waiting"] {
        assert!(needs.need(key).now_or_never().is_none());
    }
    needs.wanted().await;
    needs.answered(&[
        ("held".to_owned(), Found::Known),
        ("alias".to_owned(), Found::Known),
        ("nothing".to_owned(), Found::Nothing),
    ]);
    needs.reopened(|name| name == "held");
    let (mut wanted, _) = needs.wanted().await;
    wanted.sort();
    assert_eq!(wanted, ["alias", "nothing", "waiting"].map(Arc::<str>::from));
}

#[tokio::test]
async fn without_on_demand_nothing_is_waited_for() {
    assert!(Needs::new(false).need("k").now_or_never().unwrap());
}

#[tokio::test(start_paused = true)]
async fn keys_with_nothing_behind_are_given_up_in_the_end() {
    let needs = Needs::new(true);
    for index in 0..NOTHING_BEHIND + 2 {
        let key = format!("/{index}");
        assert!(needs.need(&key).now_or_never().is_none());
        needs.answered(&[(key, Found::Nothing)]);
    }
    let (wanted, given_up) = needs.wanted().await;
    assert_eq!(wanted.len(), NOTHING_BEHIND + 2);
    assert_eq!(given_up, ["/0".into(), Arc::<str>::from("/1")]);
    assert!(needs.need("/0").now_or_never().is_none());
}
