//! The agent's HTTP servers: metrics, readiness, and the administrator's view.
//!
//! They only read what the rest of the agent gives through [`AdminState`]; the exceptions are the
//! log's directives and the request to shut down.

mod api;
mod culvert;
mod dump;
mod http;
mod logging;
pub mod readiness;
mod stats;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use culvert_core::snapshot::Snapshot;
use futures_util::future::BoxFuture;
use tokio::net::TcpListener;

use crate::connections::Connections;
use crate::drain::DrainWatch;
use crate::telemetry::Telemetry;
use crate::telemetry::logging::LogControl;

pub use culvert::{
    Agent, ExplainError, ExplainStep, Explanation, Kernel, Outcome, Program, Source,
};
pub use dump::{Certificate, CertificateState, CertificateStatus, Pod, PodState, Version};

use readiness::Readiness;

/// What the servers show. Reading may take a moment but must not wait for connections.
pub trait AdminState: Send + Sync + 'static {
    /// The mesh as it is known now.
    fn snapshot(&self) -> Arc<Snapshot>;
    /// Every certificate held or wanted, in any order.
    fn certificates(&self) -> Vec<CertificateState>;
    /// The pods of this node, in any order.
    fn pods(&self) -> Vec<Pod>;
    fn connections(&self) -> &Connections;
    /// Brings up to date how many bytes they have carried. Runs on a thread that may block.
    fn measure(&self);
    /// The agent itself: its source, kernel programs and age.
    fn agent(&self) -> Agent;
    fn version(&self) -> Version;
    /// The effective configuration; keys in camelCase, without secrets.
    fn config(&self) -> serde_json::Value;
    /// The configuration file as it is now, read again; empty without a file. Runs on a thread
    /// that may block. The error names file and reason.
    fn static_config(&self) -> Result<Snapshot, String>;
    /// What would happen to a connection from `src` (address, uid or `namespace/name`) to `dst`
    /// (`address:port` or `host:port`), by the functions that decide.
    fn explain<'a>(
        &'a self,
        src: &'a str,
        dst: &'a str,
    ) -> BoxFuture<'a, Result<Explanation, ExplainError>>;
    /// Begins the graceful shutdown, and returns at once.
    fn shutdown(&self);
}

/// Everything the servers need.
#[derive(Clone)]
pub struct Sources {
    pub telemetry: Telemetry,
    pub readiness: Readiness,
    pub log: LogControl,
    pub state: Arc<dyn AdminState>,
}

/// Where the servers listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminAddrs {
    /// A loopback address listens on the other family's loopback too, if that is possible.
    pub admin: SocketAddr,
    /// `[::]` listens on IPv4 too, and only there without IPv6.
    pub stats: SocketAddr,
    /// As `stats`.
    pub readiness: SocketAddr,
}

/// The servers' sockets, listening.
#[derive(Debug)]
pub struct AdminServers {
    admin: Vec<TcpListener>,
    stats: TcpListener,
    readiness: TcpListener,
}

/// A server cannot listen.
#[derive(Debug, thiserror::Error)]
#[error("the {server} server cannot listen on {address}: {error}")]
pub struct BindError {
    server: &'static str,
    address: SocketAddr,
    #[source]
    error: std::io::Error,
}

impl AdminServers {
    /// Listens in the network namespace of the calling thread; with those of the `given` listeners
    /// that fit, which another agent had.
    pub async fn bind(
        addresses: &AdminAddrs,
        given: Vec<std::net::TcpListener>,
    ) -> Result<AdminServers, BindError> {
        let mut given = Given(given);
        Ok(Self {
            admin: bind_loopback(addresses.admin, &mut given).await?,
            stats: bind("stats", addresses.stats, &mut given).await?,
            readiness: bind("readiness", addresses.readiness, &mut given).await?,
        })
    }

    /// Other descriptors of the sockets.
    pub fn descriptors(&self) -> std::io::Result<Vec<OwnedFd>> {
        let all = self.admin.iter().chain([&self.stats, &self.readiness]);
        all.map(|listener| listener.as_fd().try_clone_to_owned()).collect()
    }

    /// The addresses bound: several for admin, then stats and readiness.
    pub fn addresses(&self) -> std::io::Result<(Vec<SocketAddr>, SocketAddr, SocketAddr)> {
        let admin = self.admin.iter().map(TcpListener::local_addr).collect::<Result<_, _>>()?;
        Ok((admin, self.stats.local_addr()?, self.readiness.local_addr()?))
    }

    /// Serves until the drain begins; then the sockets close at once, so that probes are refused
    /// while connections still drain.
    pub async fn serve(self, sources: Sources, drain: DrainWatch) {
        let admin = {
            let sources = sources.clone();
            move |request| {
                let sources = sources.clone();
                async move { api::respond(&sources, request).await }
            }
        };
        let stats = move |request| {
            let telemetry = sources.telemetry.clone();
            async move { stats::respond(&telemetry, request).await }
        };
        let readiness = move |request| {
            let readiness = sources.readiness.clone();
            async move { readiness::respond(&readiness, &request) }
        };
        tokio::join!(
            http::serve(self.admin, admin, drain.clone()),
            http::serve(vec![self.stats], stats, drain.clone()),
            http::serve(vec![self.readiness], readiness, drain),
        );
    }
}

/// Listeners that another agent had.
struct Given(Vec<std::net::TcpListener>);

impl Given {
    fn take(&mut self, address: SocketAddr) -> Option<TcpListener> {
        let fits = |listener: &std::net::TcpListener| {
            listener.local_addr().is_ok_and(|own| own == address)
        };
        let found = self.0.swap_remove(self.0.iter().position(fits)?);
        found.set_nonblocking(true).ok()?;
        TcpListener::from_std(found).ok()
    }

    async fn take_or_bind(&mut self, address: SocketAddr) -> std::io::Result<TcpListener> {
        match self.take(address) {
            Some(listener) => Ok(listener),
            None => TcpListener::bind(address).await,
        }
    }
}

async fn bind(
    server: &'static str,
    address: SocketAddr,
    given: &mut Given,
) -> Result<TcpListener, BindError> {
    match given.take_or_bind(address).await {
        Ok(listener) => Ok(listener),
        Err(error) if address.ip() == Ipv6Addr::UNSPECIFIED && lacks_family(&error) => {
            let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
            let bound = given.take_or_bind(v4).await;
            bound.map_err(|error| BindError { server, address: v4, error })
        }
        Err(error) => Err(BindError { server, address, error }),
    }
}

async fn bind_loopback(
    address: SocketAddr,
    given: &mut Given,
) -> Result<Vec<TcpListener>, BindError> {
    let first = bind("admin", address, given).await?;
    let port = first.local_addr().map_or(address.port(), |bound| bound.port());
    let other: IpAddr = match address.ip() {
        IpAddr::V4(Ipv4Addr::LOCALHOST) => Ipv6Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::LOCALHOST) => Ipv4Addr::LOCALHOST.into(),
        _ => return Ok(vec![first]),
    };
    match given.take_or_bind(SocketAddr::new(other, port)).await {
        Ok(second) => Ok(vec![first, second]),
        Err(error) => {
            tracing::debug!(address = %other, port, %error, "admin listens on one loopback only");
            Ok(vec![first])
        }
    }
}

/// The kernel has no such address family, or no such address.
fn lacks_family(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAFNOSUPPORT | libc::EADDRNOTAVAIL))
}

#[cfg(test)]
mod tests;
