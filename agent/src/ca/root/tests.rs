#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt as _;
use std::sync::Barrier;
use std::thread;

use super::*;
use crate::tls::testing::{Authority, Wanted};

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

fn error(directory: &Path) -> RootError {
    Root::open(directory, "td1").err().unwrap()
}

#[test]
fn first_start_makes_a_private_root_and_the_next_uses_it() {
    let state = tempfile::tempdir().unwrap();
    let directory = state.path().join("state/ca");
    let first = Root::open(&directory, "td1").unwrap();
    assert_eq!(mode(&directory), 0o700);
    assert_eq!(mode(&directory.join(KEY_FILE)), 0o600);
    let second = Root::open(&directory, "td1").unwrap();
    assert_eq!(first.certificate, second.certificate);
    let files = fs::read_dir(&directory).unwrap().count();
    assert_eq!(files, 2, "no draft stays behind");
    let years = (first.not_after - OffsetDateTime::now_utc()).whole_days() / 365;
    assert_eq!(years, 9);
}

#[test]
fn agents_that_start_together_share_one_root() {
    let state = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let directory = state.path().join(round.to_string());
        let barrier = Barrier::new(8);
        let opened: Vec<_> = thread::scope(|scope| {
            let open = || {
                barrier.wait();
                Root::open(&directory, "td1").unwrap().certificate
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(opened.windows(2).all(|pair| pair[0] == pair[1]));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    }
}

#[test]
fn interrupted_first_start_is_completed() {
    let state = tempfile::tempdir().unwrap();
    Root::open(state.path(), "td1").unwrap();
    let key = fs::read(state.path().join(KEY_FILE)).unwrap();
    fs::remove_file(state.path().join(CERTIFICATE_FILE)).unwrap();
    Root::open(state.path(), "td1").unwrap();
    assert_eq!(fs::read(state.path().join(KEY_FILE)).unwrap(), key);
}

#[test]
fn key_that_others_may_read_is_refused() {
    let state = tempfile::tempdir().unwrap();
    Root::open(state.path(), "td1").unwrap();
    let key = state.path().join(KEY_FILE);
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    let text = error(state.path()).to_string();
    assert_eq!(text, format!("{} has mode 0640, others than its owner may use it", key.display()));
}

#[test]
fn directory_that_others_may_write_is_refused() {
    let state = tempfile::tempdir().unwrap();
    fs::set_permissions(state.path(), fs::Permissions::from_mode(0o770)).unwrap();
    assert!(matches!(error(state.path()), RootError::Exposed { mode: 0o770, .. }));
}

#[test]
fn certificate_and_key_that_do_not_belong_together_are_refused() {
    let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    Root::open(one.path(), "td1").unwrap();
    Root::open(other.path(), "td1").unwrap();
    let certificate = one.path().join(CERTIFICATE_FILE);
    fs::copy(other.path().join(CERTIFICATE_FILE), &certificate).unwrap();
    let error = error(one.path());
    assert!(matches!(error, RootError::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains(certificate.to_str().unwrap()), "{error}");
}

#[test]
fn certificate_without_its_key_is_refused() {
    let state = tempfile::tempdir().unwrap();
    Root::open(state.path(), "td1").unwrap();
    fs::remove_file(state.path().join(KEY_FILE)).unwrap();
    assert!(matches!(error(state.path()), RootError::MissingKey { .. }));
}

#[test]
fn files_that_are_not_what_their_names_say_are_refused_by_name() {
    let state = tempfile::tempdir().unwrap();
    Root::open(state.path(), "td1").unwrap();
    let (key, certificate) = (state.path().join(KEY_FILE), state.path().join(CERTIFICATE_FILE));
    let good = fs::read(&certificate).unwrap();
    for bad in
        [&b""[..], b"nonsense", &[good.clone(), good.clone()].concat(), &fs::read(&key).unwrap()]
    {
        fs::write(&certificate, bad).unwrap();
        let error = error(state.path());
        assert!(
            matches!(&error, RootError::Unusable { path, .. } if *path == certificate),
            "{error}"
        );
    }
    fs::write(&key, "nonsense").unwrap();
    let error = error(state.path());
    assert!(matches!(&error, RootError::Unusable { path, .. } if *path == key), "{error}");
}

#[test]
fn root_of_another_trust_domain_is_refused() {
    let state = tempfile::tempdir().unwrap();
    Root::open(state.path(), "td2").unwrap();
    let error = error(state.path());
    assert!(
        matches!(&error, RootError::ForeignTrustDomain { found, .. } if found == "td2"),
        "{error}"
    );
}

#[test]
fn leaf_or_expired_certificate_cannot_be_the_root() {
    let state = tempfile::tempdir().unwrap();
    let leaf = Authority::root("other").leaf(Wanted::uris(&[]));
    let key = KeyPair::try_from(leaf.key.as_slice()).unwrap();
    place(&state.path().join(KEY_FILE), 0o600, key.serialize_pem().as_bytes()).unwrap();
    place(&state.path().join(CERTIFICATE_FILE), 0o644, leaf.pem.as_bytes()).unwrap();
    assert!(matches!(error(state.path()), RootError::Unusable { .. }));

    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(1);
    let expired = params.self_signed(&key).unwrap().pem();
    fs::write(state.path().join(CERTIFICATE_FILE), expired).unwrap();
    assert!(matches!(error(state.path()), RootError::Expired { .. }));
}
