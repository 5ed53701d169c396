//! Every seed of every parser, and mutations of each: the part of fuzzing that needs no fuzzer.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use culvert_tests::parsers::{ALL, Parser};

/// Mutations of all seeds of one parser together.
const MUTATIONS: usize = 2_000;

/// A mutation is at most this long, in bytes.
const LONGEST: usize = 8 << 10;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz").join(name)
}

fn names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

/// In the order of their names, so that every run does the same.
fn seeds(parser: &Parser) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = folder("seeds").join(parser.name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn try_one(parser: &Parser, seed: &Path, bytes: &[u8]) {
    let outcome = catch_unwind(AssertUnwindSafe(|| (parser.run)(bytes)));
    let input = bytes.escape_ascii();
    assert!(outcome.is_ok(), "{} panicked; from {}: b\"{input}\"", parser.name, seed.display());
}

#[test]
fn every_parser_has_a_fuzz_target_and_seeds() {
    let expected: BTreeSet<String> = ALL.iter().map(|parser| parser.name.to_owned()).collect();
    assert_eq!(expected.len(), ALL.len(), "a name is there twice");
    assert_eq!(names(&folder("fuzz_targets")), expected);
    assert_eq!(names(&folder("seeds")), expected);
    let manifest = fs::read_to_string(folder("Cargo.toml")).unwrap();
    for Parser { name, .. } in ALL {
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in the manifest");
        let target = folder("fuzz_targets").join(format!("{name}.rs"));
        let target = fs::read_to_string(target).unwrap();
        assert!(target.contains(&format!("parsers::run(\"{name}\"")), "{target}");
    }
}

#[test]
fn seeds_and_their_mutations_do_not_panic() {
    std::thread::scope(|scope| {
        for parser in ALL {
            scope.spawn(|| replay(parser));
        }
    });
}

fn replay(parser: &Parser) {
    try_one(parser, Path::new("nothing"), b"");
    let seeds = seeds(parser);
    assert!(!seeds.is_empty(), "{} has no seeds", parser.name);
    for (path, seed) in &seeds {
        try_one(parser, path, seed);
    }
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..MUTATIONS {
        let (path, seed) = &seeds[round % seeds.len()];
        let other = &seeds[random.below(seeds.len())].1;
        try_one(parser, path, &mutate(seed, other, &mut random));
    }
}

/// One to four changes; `other` lends pieces.
fn mutate(seed: &[u8], other: &[u8], random: &mut Random) -> Vec<u8> {
    /// Bytes on which parsers turn.
    const TELLING: [&[u8]; 20] = [
        b"\0",
        b"\xff",
        b"\x80",
        b"\x7f",
        b"\xff\xff\xff\xff",
        b"/",
        b":",
        b"=",
        b",",
        b";",
        b"\"",
        b"-",
        b"\n",
        b"[",
        b"]",
        b"%",
        b"*",
        b"{",
        b" ",
        "ö".as_bytes(),
    ];
    let mut bytes = seed.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(bytes.len() + 1);
        match random.below(7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.below(8),
            1 if at < bytes.len() => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let end = (at + 1 + random.below(16)).min(bytes.len());
                bytes.drain(at.min(end)..end);
            }
            4 => {
                let piece = TELLING[random.below(TELLING.len())];
                bytes.splice(at..at, piece.iter().copied());
            }
            5 => {
                let from = random.below(other.len() + 1);
                let to = (from + random.below(64)).min(other.len());
                bytes.splice(at..at, other[from..to].iter().copied());
            }
            _ => {
                let from = random.below(at + 1);
                let piece = bytes[from..at].repeat(1 + random.below(8));
                bytes.splice(at..at, piece);
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}

/// The same numbers in every run (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// 0 for a bound of 0.
    fn below(&mut self, bound: usize) -> usize {
        (self.next() % (bound.max(1) as u64)) as usize
    }
}
