//! A mesh on one machine: nodes and pods as network namespaces and cgroups, real processes in
//! them, and eyes on the wire between the nodes.
//!
//! Scenario tests, the demo and the benchmarks build on it. It needs root, Linux with cgroup v2
//! (pure or hybrid) and `ip` from iproute2; it never touches an interface of the machine itself.
//!
//! ```no_run
//! use culvert_lab::mesh::Mesh;
//!
//! # fn main() -> anyhow::Result<()> {
//! let mesh = Mesh::new()
//!     .node("a")
//!     .pod("client", "web", "client")
//!     .node("b")
//!     .pod("server", "shop", "server")
//!     .start()?;
//! let server = mesh.pod("server");
//! let listener = server.place().run(|| std::net::TcpListener::bind("[::]:8080"))?;
//! let agent = mesh.agent("b", "target/debug/culvert".as_ref())?;
//! # Ok(()) }
//! ```
//!
//! Modules stand in reading order: what is asked of the kernel first, what is made of it after.

pub mod sys;

pub mod cgroup;
pub mod netns;
pub mod place;
pub mod process;
pub mod wait;

pub mod cleanup;
pub mod lab;

pub mod http;
pub mod poll;
pub mod socket;
pub mod wire;

pub mod agent;
pub mod mesh;
pub mod pki;
pub mod waypoint;
