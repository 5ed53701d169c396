//! Edits in all the ways in which files are replaced.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use culvert_core::snapshot::Change;
use tempfile::TempDir;
use tokio::time::timeout;

use super::{EXAMPLE, edited};
use crate::file::{FileError, FileSource, FileUpdate, MeshFile, load};

/// What an edit may take on a busy machine.
const EFFECT: Duration = Duration::from_secs(20);
/// Longer than the source would need to tell of anything twice.
const SILENCE: Duration = Duration::from_millis(900);

fn with_capacity(capacity: u32) -> String {
    edited("capacity: 2", &format!("capacity: {capacity}"))
}

async fn open(path: &Path) -> FileSource {
    let (first, source) = FileSource::open(path).await.unwrap();
    assert_eq!(first.changes.len(), 9);
    source
}

async fn update(source: &mut FileSource) -> FileUpdate {
    timeout(EFFECT, source.next()).await.expect("an update")
}

async fn changed(source: &mut FileSource) -> MeshFile {
    match update(source).await {
        FileUpdate::Changed(file) => {
            taken_over(source).await;
            file
        }
        FileUpdate::Rejected(error) => panic!("refused: {error}"),
    }
}

/// Asks for the next version, and does not wait for it.
async fn taken_over(source: &mut FileSource) {
    assert!(timeout(Duration::ZERO, source.next()).await.is_err());
}

async fn rejected(source: &mut FileSource) -> FileError {
    match update(source).await {
        FileUpdate::Changed(file) => panic!("loads: {:?}", file.changes),
        FileUpdate::Rejected(error) => error,
    }
}

fn capacity(file: &MeshFile) -> u32 {
    match file.changes.as_slice() {
        [Change::Workload(workload)] => workload.capacity,
        other => panic!("{other:?}"),
    }
}

fn mesh_file(directory: &TempDir) -> PathBuf {
    let path = directory.path().join("mesh.yaml");
    fs::write(&path, EXAMPLE).unwrap();
    path
}

#[tokio::test]
async fn edit_in_place_takes_effect_within_a_second() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    for round in 3..6 {
        fs::write(&path, with_capacity(round)).unwrap();
        assert_eq!(capacity(&changed(&mut source).await), round);
    }
}

#[tokio::test]
async fn atomic_rename_takes_effect() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    for round in 3..6 {
        let beside = directory.path().join(".mesh.yaml.new");
        fs::write(&beside, with_capacity(round)).unwrap();
        fs::rename(&beside, &path).unwrap();
        assert_eq!(capacity(&changed(&mut source).await), round);
    }
}

#[tokio::test]
async fn delete_and_create_takes_effect_as_one_edit() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    fs::remove_file(&path).unwrap();
    fs::write(&path, with_capacity(3)).unwrap();
    assert_eq!(capacity(&changed(&mut source).await), 3);
}

/// As a config map is mounted: the file is a link into `..data`, which is a link that is swapped.
#[tokio::test]
async fn swapped_symlink_takes_effect() {
    let directory = TempDir::new().unwrap();
    let root = directory.path();
    let version = |name: &str, text: &str| {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("mesh.yaml"), text).unwrap();
        symlink(name, root.join("..data_tmp")).unwrap();
        fs::rename(root.join("..data_tmp"), root.join("..data")).unwrap();
    };
    version("..1", EXAMPLE);
    let path = root.join("mesh.yaml");
    symlink("..data/mesh.yaml", &path).unwrap();
    let mut source = open(&path).await;
    version("..2", &with_capacity(3));
    fs::remove_dir_all(root.join("..1")).unwrap();
    assert_eq!(capacity(&changed(&mut source).await), 3);
    version("..3", &with_capacity(4));
    assert_eq!(capacity(&changed(&mut source).await), 4);
}

#[tokio::test]
async fn edit_behind_a_link_to_another_directory_takes_effect() {
    let (directory, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let target = mesh_file(&elsewhere);
    let path = directory.path().join("link.yaml");
    symlink(&target, &path).unwrap();
    let mut source = open(&path).await;
    fs::write(&target, with_capacity(3)).unwrap();
    assert_eq!(capacity(&changed(&mut source).await), 3);
}

#[tokio::test]
async fn bad_edit_keeps_the_last_good_state_and_is_told_once() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    let status = source.status();
    let loaded_at = status.borrow().loaded_at;
    assert!(status.borrow().error.is_none());

    let bad = edited("      \"shop/api.shop.svc.cluster.local\":\n", "      api:\n");
    fs::write(&path, &bad).unwrap();
    let error = rejected(&mut source).await.to_string();
    let expected = format!(
        "{}:{}:7: workloads[1].services: key \"api\" is not <namespace>/<hostname>",
        path.display(),
        super::line_of(&bad, "      api:\n"),
    );
    assert_eq!(error, expected);
    assert_eq!(status.borrow().error.as_deref(), Some(error.as_str()));
    assert_eq!(status.borrow().loaded_at, loaded_at);

    // The same content written again is no news.
    fs::write(&path, &bad).unwrap();
    assert!(timeout(SILENCE, source.next()).await.is_err());

    // The next good edit is compared with the last good state, not with the bad one.
    fs::write(&path, with_capacity(3)).unwrap();
    assert_eq!(capacity(&changed(&mut source).await), 3);
    assert!(status.borrow().error.is_none());
    assert!(status.borrow().loaded_at > loaded_at);
}

#[tokio::test]
async fn edit_that_is_taken_back_clears_the_error() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    let status = source.status();
    fs::write(&path, "workloads: 1\n").unwrap();
    rejected(&mut source).await;
    fs::write(&path, EXAMPLE).unwrap();
    assert!(changed(&mut source).await.changes.is_empty());
    assert!(status.borrow().error.is_none());
}

#[tokio::test]
async fn version_counts_as_loaded_when_the_next_is_asked_for() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    let status = source.status();
    fs::write(&path, with_capacity(3)).unwrap();
    assert!(matches!(update(&mut source).await, FileUpdate::Changed(_)));
    assert_eq!(status.borrow().loads, 1);
    taken_over(&mut source).await;
    assert_eq!(status.borrow().loads, 2);
}

#[tokio::test]
async fn vanished_file_keeps_the_last_good_state() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    fs::remove_file(&path).unwrap();
    let error = rejected(&mut source).await;
    assert!(matches!(error, FileError::Unreadable { .. }), "{error}");
    assert!(timeout(SILENCE, source.next()).await.is_err());
    fs::write(&path, with_capacity(3)).unwrap();
    assert_eq!(capacity(&changed(&mut source).await), 3);
}

/// As between the truncation and the writing of a slow writer.
#[tokio::test]
async fn emptied_file_keeps_the_last_good_state_and_braces_mean_empty() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    fs::write(&path, "").unwrap();
    assert!(rejected(&mut source).await.to_string().contains("write {} to mean that"));
    fs::write(&path, "{}").unwrap();
    assert_eq!(changed(&mut source).await.changes.len(), 9);
}

#[tokio::test]
async fn setting_that_is_read_at_start_only_cannot_be_edited() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    fs::write(&path, format!("{EXAMPLE}culvert:\n  network: n2\n")).unwrap();
    let error = rejected(&mut source).await.to_string();
    assert!(
        error.ends_with(":12: culvert.network: cannot change while the agent runs; restart it"),
        "{error}"
    );
}

#[tokio::test]
async fn waiting_may_be_interrupted_without_losing_an_edit() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    fs::write(&path, with_capacity(3)).unwrap();
    let begin = Instant::now();
    let file = loop {
        match timeout(Duration::from_millis(30), source.next()).await {
            Ok(FileUpdate::Changed(file)) => break file,
            Ok(FileUpdate::Rejected(error)) => panic!("{error}"),
            Err(_) => assert!(begin.elapsed() < EFFECT),
        }
    };
    assert_eq!(capacity(&file), 3);
}

#[tokio::test]
async fn reading_the_file_is_no_edit() {
    let directory = TempDir::new().unwrap();
    let path = mesh_file(&directory);
    let mut source = open(&path).await;
    let read = tokio::spawn(async move {
        for _ in 0..20 {
            fs::read(&path).unwrap();
            tokio::task::yield_now().await;
        }
    });
    assert!(timeout(SILENCE, source.next()).await.is_err());
    read.await.unwrap();
}

#[tokio::test]
async fn start_fails_without_a_good_file() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("mesh.yaml");
    let error = |error: FileError| error.to_string();
    assert!(error(FileSource::open(&path).await.err().unwrap()).contains("cannot be read"));
    assert!(
        error(FileSource::open(directory.path()).await.err().unwrap())
            .contains("is not a regular file")
    );
    let nowhere = directory.path().join("absent/mesh.yaml");
    assert!(error(FileSource::open(&nowhere).await.err().unwrap()).contains("cannot be read"));
    fs::write(&path, "foo: 1\n").unwrap();
    let refused = FileSource::open(&path).await.err().unwrap();
    assert_eq!(refused.place().unwrap().line, 1);
    assert!(load(&path).await.is_err());
}
