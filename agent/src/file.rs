//! The file source: mesh news from one YAML file, in ztunnel's local format with one more section.
//!
//! The file is read once at start, where any error ends the start, and then watched. An edit is
//! compared with the last good content and yields only what changed; an edit that cannot be used
//! leaves the last good content in force and says file, line, field and why.
//!
//! Every value is checked while it is deserialised (`entities`, `scalar`), so the YAML library can
//! tell its place; what concerns several values at once (`section`) finds the place in a second
//! pass (`place`).

mod entities;
mod error;
mod mesh;
mod place;
mod scalar;
mod section;
mod source;

pub use error::{FileError, Place};
pub use mesh::{Invalid, Mesh, diff};
pub use section::{CaSettings, CulvertSection, NetnsRef, PodSettings};
pub use source::{FileSource, FileStatus, FileUpdate, MeshFile, load};

#[cfg(test)]
mod tests;
