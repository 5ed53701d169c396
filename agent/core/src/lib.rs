//! Every decision of the Culvert agent, as pure functions of an immutable snapshot.
//!
//! Nothing here opens a socket, reads a clock or draws a random number by itself: the shell
//! (`culvert-agent`) brings those in. A module imports only those declared above it.

#![forbid(unsafe_code)]

pub mod addr;
pub mod identity;
pub mod sorted;

pub mod workload;

pub mod service;

pub mod authorization;
pub mod intern;

pub mod snapshot;
pub mod view;

pub mod names;
pub mod resolve;

pub mod balance;

pub mod route;

pub mod authorize;

pub mod admit;

pub mod tables;
pub mod verdict;

#[cfg(test)]
mod fixtures;
