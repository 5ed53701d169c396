#![allow(clippy::unwrap_used)]

mod asking;
mod parsing;
mod tables;
