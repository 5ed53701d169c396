#![allow(clippy::unwrap_used)]

use std::io::Read;

use flate2::read::GzDecoder;

use super::*;

fn entries(entries: &[(&str, Entry)]) -> BTreeMap<String, Entry> {
    entries.iter().map(|(path, entry)| ((*path).to_owned(), entry.clone())).collect()
}

fn some() -> BTreeMap<String, Entry> {
    entries(&[
        ("usr/local/bin/program", Entry::File(0o755, b"program".to_vec())),
        ("etc/passwd", Entry::File(0o644, b"root".to_vec())),
        ("tmp", Entry::Directory(0o1777)),
    ])
}

#[test]
fn equal_files_become_equal_bytes() {
    assert_eq!(pack(&some(), 1_700_000_000).unwrap(), pack(&some(), 1_700_000_000).unwrap());
}

#[test]
fn everything_belongs_to_root_and_has_one_time_in_sorted_order() {
    let layer = pack(&some(), 1_700_000_000).unwrap();
    let mut archive = tar::Archive::new(GzDecoder::new(&layer.bytes[..]));
    let mut found = Vec::new();
    for entry in archive.entries().unwrap() {
        let entry = entry.unwrap();
        let header = entry.header();
        assert_eq!((header.uid().unwrap(), header.gid().unwrap()), (0, 0));
        assert_eq!(header.mtime().unwrap(), 1_700_000_000);
        found.push((entry.path().unwrap().display().to_string(), header.mode().unwrap()));
    }
    let expected = [
        ("etc/", 0o755),
        ("etc/passwd", 0o644),
        ("tmp/", 0o1777),
        ("usr/", 0o755),
        ("usr/local/", 0o755),
        ("usr/local/bin/", 0o755),
        ("usr/local/bin/program", 0o755),
    ];
    assert_eq!(found, expected.map(|(path, mode)| (path.to_owned(), mode)));
}

#[test]
fn the_diff_id_is_of_the_archive_before_compression() {
    let layer = pack(&some(), 0).unwrap();
    let mut archive = Vec::new();
    GzDecoder::new(&layer.bytes[..]).read_to_end(&mut archive).unwrap();
    assert_eq!(layer.diff_id, digest(&archive));
    assert_ne!(layer.diff_id, digest(&layer.bytes));
}

#[test]
fn a_digest_is_as_others_compute_it() {
    // FIPS 180-2, appendix B.1.
    let abc = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    assert_eq!(digest(b"abc"), abc);
}
