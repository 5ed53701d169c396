#![allow(clippy::unwrap_used)]

use std::io::Read;

use super::*;

fn image() -> Image {
    let program = Entry::File(0o755, b"program".to_vec());
    Image {
        reference: "registry.example.com/mesh/culvert:1".to_owned(),
        architecture: "amd64".to_owned(),
        entrypoint: vec!["/program".to_owned()],
        arguments: vec!["run".to_owned()],
        entries: BTreeMap::from([("program".to_owned(), program)]),
        labels: BTreeMap::from([("a".to_owned(), "b".to_owned())]),
        created: 1_700_000_000,
    }
}

fn files(archive: &Archive) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in tar::Archive::new(&archive.bytes[..]).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        files.insert(entry.path().unwrap().display().to_string(), bytes);
    }
    files
}

fn parsed(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

#[test]
fn equal_images_become_equal_bytes() {
    assert_eq!(archive(&image()).unwrap(), archive(&image()).unwrap());
}

#[test]
fn every_blob_is_named_by_its_digest() {
    let files = files(&archive(&image()).unwrap());
    let blobs = files.iter().filter(|(path, _)| path.starts_with("blobs/sha256/"));
    let mut count = 0;
    for (path, bytes) in blobs.filter(|(path, _)| !path.ends_with('/')) {
        assert_eq!(*path, blob(bytes));
        count += 1;
    }
    assert_eq!(count, 3);
}

#[test]
fn the_layout_leads_from_the_index_to_the_layer() {
    let archive = archive(&image()).unwrap();
    let files = files(&archive);
    let of = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        let bytes = files[&format!("blobs/{}", digest.replace(':', "/"))].clone();
        assert_eq!(descriptor["size"], bytes.len());
        bytes
    };
    let index = parsed(&files["index.json"]);
    let entry = &index["manifests"][0];
    assert_eq!(entry["digest"], archive.digest);
    assert_eq!(entry["annotations"]["io.containerd.image.name"], image().reference);
    assert_eq!(entry["annotations"]["org.opencontainers.image.ref.name"], "1");
    let manifest = parsed(&of(entry));
    let config = parsed(&of(&manifest["config"]));
    assert_eq!(config["created"], "2023-11-14T22:13:20Z");
    assert_eq!(config["config"]["Entrypoint"], json!(["/program"]));
    let layer = of(&manifest["layers"][0]);
    let diff_id = layer::pack(&image().entries, image().created).unwrap().diff_id;
    assert_eq!(config["rootfs"]["diff_ids"], json!([diff_id]));
    let docker = parsed(&files["manifest.json"]);
    assert_eq!(docker[0]["Layers"], json!([blob(&layer)]));
    assert_eq!(docker[0]["RepoTags"], json!([image().reference]));
}

#[test]
fn a_reference_is_completed_as_containerd_does() {
    for (short, full) in [
        ("culvert:1", "docker.io/library/culvert:1"),
        ("mesh/culvert:1", "docker.io/mesh/culvert:1"),
        ("localhost/culvert:1", "localhost/culvert:1"),
        ("localhost:5000/culvert:1", "localhost:5000/culvert:1"),
        ("registry.example.com/culvert:v1.0-a", "registry.example.com/culvert:v1.0-a"),
    ] {
        assert_eq!(full_reference(short).unwrap(), full);
    }
}

#[test]
fn a_reference_without_a_tag_or_with_odd_letters_is_refused() {
    for odd in
        ["culvert", ":1", "culvert:", "localhost:5000/culvert", "Culvert:1", "a//b:1", "a:b c"]
    {
        assert!(full_reference(odd).is_err(), "{odd}");
    }
}
