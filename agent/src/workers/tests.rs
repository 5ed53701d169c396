#![allow(clippy::unwrap_used)]

use std::sync::mpsc::sync_channel;

use super::*;

#[test]
fn tasks_of_one_pod_stay_on_one_thread() {
    let (workers, _guard) = Workers::start(NonZeroUsize::new(2).unwrap()).unwrap();
    let (told, names) = sync_channel(8);
    for _ in 0..2 {
        let pod = workers.next();
        let told = told.clone();
        pod.spawn(async move {
            let name = || thread::current().name().unwrap().to_owned();
            let first = name();
            let second = tokio::spawn(async move { name() }).await.unwrap();
            told.send((first, second)).unwrap();
        });
    }
    let mut seen: Vec<_> = (0..2).map(|_| names.recv().unwrap()).collect();
    seen.sort();
    assert_eq!(seen[0], ("culvert-0".to_owned(), "culvert-0".to_owned()));
    assert_eq!(seen[1], ("culvert-1".to_owned(), "culvert-1".to_owned()));
}

#[test]
fn what_runs_ends_with_the_guard() {
    struct Told(std::sync::mpsc::SyncSender<()>);
    impl Drop for Told {
        fn drop(&mut self) {
            self.0.send(()).unwrap();
        }
    }
    let (workers, guard) = Workers::start(NonZeroUsize::MIN).unwrap();
    let (told, dropped) = sync_channel(1);
    let told = Told(told);
    workers.next().spawn(async move {
        let _told = told;
        std::future::pending::<()>().await;
    });
    drop(guard);
    dropped.recv().unwrap();
}
