//! The Culvert node agent: sockets, TLS, HTTP/2, eBPF loading and the command line around the
//! decisions of `culvert-core`.
//!
//! Modules stand in reading order: the door, the corridors, and the rooms they pass.

pub mod cli;
pub mod config;

pub mod app;

pub mod inbound;
pub mod outbound;

pub mod decide;
pub mod recheck;

pub mod accept;
mod blocks;
pub mod capture;
pub mod direct;
pub mod doctor;
pub mod handover;
pub mod memory;
pub mod node;
pub mod packet;
pub mod pods;
pub mod session;
pub mod workers;

pub mod dial;
pub mod dns;
pub mod hbone;
pub mod relay;

pub mod ca;
pub mod tls;

pub mod control;
pub mod file;
pub mod watch;
pub mod xds;
pub mod zds;

pub mod admin;
pub mod connections;
pub mod drain;
pub mod telemetry;
