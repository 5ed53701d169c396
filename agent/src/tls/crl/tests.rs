#![allow(clippy::unwrap_used)]

use std::os::unix::fs::symlink;
use std::time::Duration;

use tempfile::TempDir;

use super::super::testing::Authority;
use super::*;

const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `count` lists are in force.
async fn until(revocations: &Revocations, count: usize) {
    let reached = async {
        while revocations.current().map_or(0, |lists| lists.len()) != count {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(LIMIT, reached).await.unwrap_or_else(|_| panic!("never {count} lists"));
}

fn pem(names: &[&str]) -> String {
    use base64::Engine as _;
    let encoded = |name: &&str| {
        let der = Authority::root(name).revoking(&[]);
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        format!("-----BEGIN X509 CRL-----\n{text}\n-----END X509 CRL-----\n")
    };
    names.iter().map(encoded).collect()
}

#[tokio::test]
async fn file_may_come_later_and_every_change_counts() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ca-crl.pem");
    let file = CrlFile::open(&path).unwrap();
    let revocations = file.revocations();
    let following = tokio::spawn(file.follow());
    until(&revocations, 0).await;
    fs::write(&path, pem(&["a"])).unwrap();
    until(&revocations, 1).await;
    fs::write(&path, pem(&["a", "b", "c"])).unwrap();
    until(&revocations, 3).await;
    // What cannot be used, and a file that is gone, change nothing; what follows them does.
    fs::write(&path, "garbage").unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, pem(&["a", "b"])).unwrap();
    until(&revocations, 2).await;
    // Emptied, nothing is revoked any more.
    fs::write(&path, "").unwrap();
    until(&revocations, 0).await;
    following.abort();
}

#[tokio::test]
async fn unusable_content_leaves_the_lists_as_they_were() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ca-crl.pem");
    fs::write(&path, pem(&["a"])).unwrap();
    let mut file = CrlFile::open(&path).unwrap();
    let revocations = file.revocations();
    for reading in [Ok(Some(b"garbage".to_vec())), Ok(None)] {
        file.take(reading);
        until(&revocations, 1).await;
        assert!(file.failure.is_some());
    }
    // The same good content again ends the failure.
    file.take(read(&path));
    assert!(file.failure.is_none());
    until(&revocations, 1).await;
}

#[tokio::test]
async fn config_map_is_replaced_by_its_links() {
    let directory = TempDir::new().unwrap();
    let place = |version: &str, text: String| {
        let data = directory.path().join(version);
        fs::create_dir(&data).unwrap();
        fs::write(data.join("ca-crl.pem"), text).unwrap();
        let next = directory.path().join("..next");
        symlink(version, &next).unwrap();
        fs::rename(&next, directory.path().join("..data")).unwrap();
    };
    place("..1", pem(&["a"]));
    let path = directory.path().join("ca-crl.pem");
    symlink("..data/ca-crl.pem", &path).unwrap();
    let file = CrlFile::open(&path).unwrap();
    let revocations = file.revocations();
    until(&revocations, 1).await;
    let following = tokio::spawn(file.follow());
    place("..2", pem(&["a", "b"]));
    until(&revocations, 2).await;
    following.abort();
}

#[tokio::test]
async fn start_ends_at_what_is_no_list_and_not_at_a_missing_directory() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("ca-crl.pem");
    fs::write(&path, "garbage").unwrap();
    let error = CrlFile::open(&path).err().unwrap().to_string();
    assert!(error.contains("ca-crl.pem are unusable: list 0"), "{error}");
    let unreadable = CrlFile::open(directory.path()).err().unwrap();
    assert!(matches!(unreadable, CrlError::Read { .. }), "{unreadable}");

    let nested = directory.path().join("not/yet/ca-crl.pem");
    let file = CrlFile::open(&nested).unwrap();
    let revocations = file.revocations();
    let following = tokio::spawn(file.follow());
    fs::create_dir_all(nested.parent().unwrap()).unwrap();
    fs::write(&nested, pem(&["a"])).unwrap();
    until(&revocations, 1).await;
    following.abort();
}
