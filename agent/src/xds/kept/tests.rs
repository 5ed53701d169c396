#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;

use tempfile::TempDir;

use super::*;

const HOUR: Duration = Duration::from_secs(3600);

fn scope() -> Scope {
    Scope { cluster_id: "c1".to_owned(), on_demand: false }
}

fn store(directory: &TempDir) -> Store {
    Store::new(&directory.path().join("state"), scope())
}

fn content() -> Content {
    let mut content = Content::default();
    content.put(Item::Workload, "a/x".into(), Version::new("1f"), Bytes::from_static(b"workload"));
    content.put(Item::Service, "a/x".into(), Version::new("v2"), Bytes::from_static(b"service"));
    content.put(Item::Policy, "a/p".into(), Version::new(""), Bytes::new());
    content.put(Item::Policy, "a/q".into(), Version::new(""), Bytes::from_static(b"gone"));
    content.remove(Some(Item::Policy), "a/q");
    content.remove(None, "a/p");
    content
}

#[test]
fn what_is_written_is_read_back_by_the_owner_only() {
    let directory = TempDir::new().unwrap();
    let (store, now) = (store(&directory), UNIX_EPOCH + HOUR);
    assert!(store.load(HOUR, now).unwrap().is_none());
    store.write(&Content::default(), now).unwrap();
    store.write(&content(), now).unwrap();
    let mode = fs::metadata(&store.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);

    let state = store.load(HOUR, now + HOUR).unwrap().unwrap();
    assert_eq!(state.current, now);
    let mut read: Vec<_> = state
        .map(|it| (it.kind().unwrap() == Kind::Address, it.name, it.version, it.value))
        .collect();
    read.sort();
    let expected = [
        (false, "a/p", "", &b""[..]),
        (true, "a/x", "1f", b"workload"),
        (true, "a/x", "v2", b"service"),
    ];
    assert_eq!(
        read,
        expected.map(|(address, name, version, value)| {
            (address, name.to_owned(), version.to_owned(), Bytes::from_static(value))
        })
    );
}

#[test]
fn renewing_makes_it_young_again_without_touching_the_content() {
    let directory = TempDir::new().unwrap();
    let (store, now) = (store(&directory), UNIX_EPOCH + HOUR);
    store.write(&content(), now).unwrap();
    let late = now + 2 * HOUR;
    let error = store.load(HOUR, late).unwrap_err().to_string();
    assert!(error.contains("state: it is 7200s old, more than 3600s"), "{error}");
    store.renew(late).unwrap();
    assert_eq!(store.load(HOUR, late).unwrap().unwrap().count(), 3);
}

#[test]
fn a_state_of_the_future_or_of_another_cluster_is_not_used() {
    let directory = TempDir::new().unwrap();
    let (store, now) = (store(&directory), UNIX_EPOCH + HOUR);
    store.write(&content(), now).unwrap();
    assert!(store.load(HOUR, now - FUTURE).unwrap().is_some());
    let error = store.load(HOUR, now - 2 * FUTURE).unwrap_err().to_string();
    assert!(error.contains("it is from the future"), "{error}");
    for other in
        [Scope { cluster_id: "c2".to_owned(), ..scope() }, Scope { on_demand: true, ..scope() }]
    {
        let error = Store::new(&store.path, other).load(HOUR, now).unwrap_err().to_string();
        assert!(error.contains("another cluster"), "{error}");
    }
}

#[test]
fn any_changed_or_missing_byte_is_noticed() {
    let directory = TempDir::new().unwrap();
    let (store, now) = (store(&directory), UNIX_EPOCH + HOUR);
    store.write(&content(), now).unwrap();
    let good = fs::read(&store.path).unwrap();
    for index in 0..good.len() {
        let mut bad = good.clone();
        bad[index] ^= 1;
        fs::write(&store.path, &bad).unwrap();
        assert!(store.load(100 * HOUR, now).is_err(), "byte {index}");
        fs::write(&store.path, &good[..index]).unwrap();
        assert!(store.load(100 * HOUR, now).is_err(), "cut at {index}");
    }
    fs::write(&store.path, &good).unwrap();
    assert!(store.load(HOUR, now).unwrap().is_some());
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let store = Store::new(Path::new("/nonexistent/state"), scope());
    let error = store.write(&content(), UNIX_EPOCH).unwrap_err().to_string();
    assert!(error.starts_with("/nonexistent/state: No such file"), "{error}");
}
