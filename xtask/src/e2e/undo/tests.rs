#![allow(clippy::unwrap_used)]

use super::*;

/// A stand-in for kubectl that writes down its arguments.
fn noted(file: &std::path::Path) -> Undo {
    use std::os::unix::fs::PermissionsExt as _;
    let program = file.with_extension("sh");
    let script = format!("#!/bin/sh\necho \"$@\" >> {}\n[ \"$1\" != fail ]\n", file.display());
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    Undo::new(Kubectl::new(program, None))
}

fn file(name: &str) -> std::path::PathBuf {
    let folder = std::env::temp_dir().join(format!("culvert-undo-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder.join("said")
}

#[test]
fn everything_is_taken_back_newest_first_and_once() {
    let file = file("order");
    let undo = noted(&file);
    let _one = undo.remember(&["delete", "one"]);
    let two = undo.remember(&["delete", "two"]);
    let _three = undo.remember(&["fail"]);
    undo.now(two).unwrap();
    assert_eq!(undo.all().len(), 1);
    assert!(undo.all().is_empty());
    let said = std::fs::read_to_string(&file).unwrap();
    assert_eq!(said, "delete two\nfail\ndelete one\n");
    std::fs::remove_dir_all(file.parent().unwrap()).unwrap();
}
