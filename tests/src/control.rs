//! A control plane for tests: a gRPC server over TLS with a PKI of its own, on loopback or in a
//! network namespace.
//!
//! It serves the workload API from a [`World`] that the test holds, as istiod does; see [`ads`].
//! Further services join it through [`ControlPlane::start_with`].

pub mod ads;
pub mod ca;
pub mod serving;
pub mod world;

use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::Context as _;
use culvert_lab::netns::Netns;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, SanType,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

pub use ads::{Behaviour, Recorded};
pub use serving::{ServerAuthority, Serving};
pub use world::World;

/// How long connections may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(5);

/// Where to listen.
#[derive(Clone, Debug)]
pub enum Listen {
    /// On 127.0.0.1, on a port that is free.
    Loopback,
    In(Netns, SocketAddr),
}

/// The server, which can be stopped and started again at the same address.
pub struct ControlPlane {
    /// What it serves, and how it behaves.
    pub world: Arc<World>,
    pub pki: Pki,
    addr: SocketAddr,
    listen: Listen,
    routes: Routes,
    running: Option<Runtime>,
}

impl ControlPlane {
    /// Serves the workload API.
    pub fn start(listen: Listen) -> anyhow::Result<Self> {
        Self::start_with(listen, |routes, _| routes)
    }

    /// Serves the workload API and what `add` adds to it.
    pub fn start_with(
        listen: Listen,
        add: impl FnOnce(Routes, &Pki) -> Routes,
    ) -> anyhow::Result<Self> {
        let (world, pki) = (Arc::new(World::default()), Pki::new()?);
        let routes = add(Routes::new(ads::service(world.clone())), &pki);
        let listener = bind(&listen, None)?;
        let addr = listener.local_addr()?;
        let mut plane = Self { world, pki, addr, listen, routes, running: None };
        plane.serve(listener)?;
        Ok(plane)
    }

    /// As an agent's setting names it.
    pub fn address(&self) -> String {
        match self.listen {
            Listen::Loopback => format!("https://localhost:{}", self.addr.port()),
            Listen::In(..) => format!("https://{}", self.addr),
        }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Ends all connections and listens no more.
    pub fn stop(&mut self) {
        if let Some(runtime) = self.running.take() {
            self.world.stopped();
            // A thread of its own, because the test's may not block.
            let ending = std::thread::spawn(move || runtime.shutdown_timeout(STOP_LIMIT));
            ending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    }

    /// Listens again, with the world as it is now.
    pub fn restart(&mut self) -> anyhow::Result<()> {
        self.stop();
        self.serve(bind(&self.listen, Some(self.addr))?)
    }

    fn serve(&mut self, listener: StdListener) -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .context("a runtime for the control plane")?;
        let config = self.pki.server_config()?;
        let routes = self.routes.clone();
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
        self.running = Some(runtime);
        Ok(())
    }
}

impl Drop for ControlPlane {
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
struct Accepted(TlsStream<tokio::net::TcpStream>);

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

/// A root of its own, and what it signs.
pub struct Pki {
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().context("a key for the control plane's root")?;
        Ok(Self { root: CertifiedIssuer::self_signed(params, key).context("the root")? })
    }

    /// PEM.
    pub fn root(&self) -> String {
        self.root.pem()
    }

    /// To sign further certificates with.
    pub fn issuer(&self) -> &CertifiedIssuer<'static, KeyPair> {
        &self.root
    }

    /// A signed revocation list, PEM.
    pub fn revoke(&self, params: CertificateRevocationListParams) -> anyhow::Result<String> {
        Ok(params.signed_by(&self.root)?.pem()?)
    }

    /// For `localhost`, 127.0.0.1 and istiod's own name.
    fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let mut params = CertificateParams::new(vec![
            "localhost".to_owned(),
            "istiod.istio-system.svc".to_owned(),
        ])?;
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.root)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let mut config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}
