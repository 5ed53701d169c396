#![allow(clippy::unwrap_used)]

mod changes;
mod content;
mod culvert;
mod mutations;
mod watching;

/// The example of the local configuration format, which ztunnel loads too.
pub(super) const EXAMPLE: &str = include_str!("tests/example.yaml");

/// The example with the first `from` replaced.
pub(super) fn edited(from: &str, to: &str) -> String {
    assert!(EXAMPLE.contains(from), "the example holds no {from:?}");
    EXAMPLE.replacen(from, to, 1)
}

/// The line on which `text` first stands, counted from 1.
pub(super) fn line_of(yaml: &str, text: &str) -> usize {
    yaml[..yaml.find(text).unwrap()].matches('\n').count() + 1
}
