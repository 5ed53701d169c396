//! Whatever the bytes, reading them ends with a mesh or an error.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::EXAMPLE;
use crate::file::Mesh;

/// Fragments that mean something to YAML or to the format.
const FRAGMENTS: [&[u8]; 20] = [
    b"!Exact ",
    b"!Presence []",
    b"&a ",
    b"*a",
    b"<<: ",
    b"- ",
    b"\n",
    b"\t",
    b"{",
    b"}",
    b"[",
    b"]",
    b"\"",
    b"'",
    b": ",
    b"|\n",
    b"---\n",
    b"99999999999999999999",
    b"\xff",
    b"\0",
];

#[test]
fn mutated_example_never_panics() {
    let mut random = StdRng::seed_from_u64(15008);
    let mut accepted = 0;
    for _ in 0..2_000 {
        let mut bytes = EXAMPLE.as_bytes().to_vec();
        for _ in 0..random.random_range(1..6) {
            if bytes.is_empty() {
                break;
            }
            let at = random.random_range(0..bytes.len());
            match random.random_range(0..4) {
                0 => bytes[at] = random.random(),
                1 => {
                    let to = (at + random.random_range(1..40)).min(bytes.len());
                    bytes.drain(at..to);
                }
                2 => {
                    let fragment = FRAGMENTS[random.random_range(0..FRAGMENTS.len())];
                    bytes.splice(at..at, fragment.iter().copied());
                }
                _ => bytes.truncate(at.max(1)),
            }
        }
        match Mesh::parse(&bytes) {
            Ok(_) => accepted += 1,
            Err(invalid) => assert!(!invalid.what.is_empty()),
        }
    }
    assert!(accepted > 0, "some mutations only change a name");
}

#[test]
fn deep_nesting_and_growing_aliases_are_refused() {
    let deep = format!("workloads: {}", "[".repeat(2_000));
    assert!(Mesh::parse(deep.as_bytes()).is_err());
    let deep = format!("workloads: {}{}", "[".repeat(1_000), "]".repeat(1_000));
    assert!(Mesh::parse(deep.as_bytes()).is_err());

    let mut laughs = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
    for (below, name) in ('a'..'i').zip('b'..='i') {
        let list = vec![format!("*{below}"); 9].join(",");
        laughs.push_str(&format!("{name}: &{name} [{list}]\n"));
    }
    assert!(Mesh::parse(laughs.as_bytes()).is_err());
    let inside =
        format!("policies: [{{rules: [[{{foo: {{{}}}}}]]}}]", laughs.trim().replace('\n', ", "));
    assert!(Mesh::parse(inside.as_bytes()).is_err());
}
