//! Compiles the `.proto` files into Rust without an installed protoc.

// Cargo reads a build script's standard output.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::io;
use std::path::PathBuf;

const ROOT: &str = "proto";

/// One file for each package; protox finds what they import.
const FILES: [&str; 5] = [
    "envoy/service/discovery/v3/discovery.proto",
    "istio/security/authorization.proto",
    "istio/v1/auth/ca.proto",
    "istio/workload/workload.proto",
    "istio/workload/zds.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={ROOT}");
    let files = FILES.map(|file| PathBuf::from(ROOT).join(file));
    // protox prints a parse error with its file and line.
    let descriptors = protox::compile(files, [ROOT]).map_err(|error| format!("{error:?}"))?;
    generate(descriptors)?;
    Ok(())
}

fn generate(descriptors: prost_types::FileDescriptorSet) -> io::Result<()> {
    tonic_prost_build::configure()
        // Connections are made by those who use the services; here tonic brings no transport.
        .build_transport(false)
        // Equal messages have equal bytes, also those with maps.
        .btree_map(".")
        .emit_rerun_if_changed(false)
        .include_file("packages.rs")
        .compile_fds(descriptors)
}
