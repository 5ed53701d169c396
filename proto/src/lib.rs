//! The messages and services that Culvert speaks with a mesh's control plane and with the node's
//! CNI plugin, as Rust generated from the `.proto` files of this crate.
//!
//! Modules mirror the protobuf packages: [`istio::workload`] (workloads and services),
//! [`istio::security`] (authorization), [`istio::workload::zds`] (pods of the node),
//! [`istio::v1::auth`] (certificates), [`envoy::service::discovery::v3`] (the delta xDS stream).
//! Clients and servers are generated; a transport for them is not part of this crate.
//!
//! These types say what was sent, not what is valid: a decoder above turns them into the types of
//! `culvert-core` and rejects what they cannot express.

#![forbid(unsafe_code)]

/// The generated packages.
#[allow(clippy::all, missing_docs)]
mod packages {
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

pub use packages::{envoy, google, istio};

/// Type URL of [`istio::workload::Address`] in a delta xDS stream.
pub const ADDRESS_TYPE_URL: &str = "type.googleapis.com/istio.workload.Address";

/// Type URL of [`istio::security::Authorization`] in a delta xDS stream.
pub const AUTHORIZATION_TYPE_URL: &str = "type.googleapis.com/istio.security.Authorization";

#[cfg(test)]
mod tests;
