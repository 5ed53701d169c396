//! gRPC services over TLS, on a runtime of their own.

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use culvert_lab::netns::Netns;
use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

use super::Pki;

/// How long connections may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Listen {
    /// On 127.0.0.1, on a port that is free.
    Loopback,
    In(Netns, SocketAddr),
}

/// A running server, which can be stopped and started again at the same address. Dropping it ends it
/// with all its connections.
pub struct Serving {
    addr: SocketAddr,
    listen: Listen,
    config: Arc<ServerConfig>,
    routes: Routes,
    running: Option<Runtime>,
}

impl Serving {
    /// Serves `routes` with a certificate that `pki` signs.
    pub fn start(listen: Listen, pki: &Pki, routes: Routes) -> anyhow::Result<Self> {
        let listener = bind(&listen, None)?;
        let (addr, config) = (listener.local_addr()?, pki.server_config()?);
        let running = Some(serve(listener, config.clone(), routes.clone())?);
        Ok(Self { addr, listen, config, routes, running })
    }

    /// As an agent's setting names it.
    pub fn address(&self) -> String {
        match self.listen {
            Listen::Loopback => format!("https://localhost:{}", self.addr.port()),
            Listen::In(..) => format!("https://{}", self.addr),
        }
    }

    /// Ends all connections and listens no more.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.running.take() {
            // A thread of its own, because the test's may not block.
            let ending = std::thread::spawn(move || runtime.shutdown_timeout(STOP_LIMIT));
            ending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }

    /// Listens again.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop();
        let listener = bind(&self.listen, Some(self.addr))?;
        self.running = Some(serve(listener, self.config.clone(), self.routes.clone())?);
        Ok(())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        if let Some(runtime) = self.running.take() {
            runtime.shutdown_background();
        }
    }
}

fn bind(listen: &Listen, again: Option<SocketAddr>) -> anyhow::Result<StdListener> {
    match listen {
        Listen::Loopback => {
            let addr = again.unwrap_or(SocketAddr::from(([127, 0, 0, 1], 0)));
            StdListener::bind(addr).with_context(|| format!("listening on {addr}"))
        }
        Listen::In(netns, addr) => netns
            .run(|| StdListener::bind(again.unwrap_or(*addr)))
            .with_context(|| format!("listening on {addr} in {}", netns.name())),
    }
}

fn serve(
    listener: StdListener,
    config: Arc<ServerConfig>,
    routes: Routes,
) -> anyhow::Result<Runtime> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .context("a runtime for the control plane")?;
    runtime.spawn(async move {
        let incoming = match accept(listener, config) {
            Ok(incoming) => incoming,
            Err(error) => panic!("listening as control plane: {error}"),
        };
        let server = Server::builder().add_routes(routes);
        if let Err(error) = server.serve_with_incoming(incoming).await {
            panic!("serving as control plane: {error}");
        }
    });
    Ok(runtime)
}

fn accept(
    listener: StdListener,
    config: Arc<ServerConfig>,
) -> io::Result<ReceiverStream<io::Result<Accepted>>> {
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener)?;
    let (accepted, incoming) = mpsc::channel(16);
    tokio::spawn(async move {
        let acceptor = TlsAcceptor::from(config);
        while let Ok((tcp, _)) = listener.accept().await {
            let (acceptor, accepted) = (acceptor.clone(), accepted.clone());
            tokio::spawn(async move {
                let _ = tcp.set_nodelay(true);
                if let Ok(stream) = acceptor.accept(tcp).await {
                    // The server has stopped when nobody takes it.
                    let _ = accepted.send(Ok(Accepted(stream))).await;
                }
            });
        }
    });
    Ok(ReceiverStream::new(incoming))
}

/// A connection whose handshake is done.
struct Accepted(TlsStream<TcpStream>);

impl Connected for Accepted {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Accepted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Accepted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}
