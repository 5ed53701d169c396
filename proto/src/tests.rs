#![allow(clippy::unwrap_used)]

mod wire;

mod authorization;
mod certificates;
mod discovery;
mod tolerance;
mod workload;
mod zds;
