//! gRPC services over TLS for a test that has a runtime of its own.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Connected;

/// The authority of the control plane's own certificate, which has nothing to do with workloads'.
pub struct ServerAuthority {
    root: String,
    issuer: Issuer<'static, KeyPair>,
}

impl ServerAuthority {
    pub fn new() -> Result<Self, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate()?;
        let root = params.self_signed(&key)?.pem();
        Ok(Self { root, issuer: Issuer::new(params, key) })
    }

    /// What clients have to trust, PEM.
    pub fn root(&self) -> &str {
        &self.root
    }

    fn server(&self, name: &str) -> io::Result<ServerConfig> {
        let made = || -> Result<_, rcgen::Error> {
            let key = KeyPair::generate()?;
            let params = CertificateParams::new(vec![name.to_owned()])?;
            Ok((params.signed_by(&key, &self.issuer)?, key))
        };
        let (leaf, key) = made().map_err(io::Error::other)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                builder.with_no_client_auth().with_single_cert(vec![leaf.der().clone()], key)
            })
            .map_err(io::Error::other)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(config)
    }
}

/// A running server. Dropping it ends it with all its connections.
pub struct Serving {
    addr: SocketAddr,
    tasks: [JoinHandle<()>; 2],
    end: CancellationToken,
}

impl Serving {
    /// Serves `routes` on a loopback address, under the name `127.0.0.1`.
    pub async fn start(authority: &ServerAuthority, routes: Routes) -> io::Result<Self> {
        Self::start_at("127.0.0.1:0".parse().map_err(io::Error::other)?, authority, routes).await
    }

    /// The same at a given address.
    pub async fn start_at(
        addr: SocketAddr,
        authority: &ServerAuthority,
        routes: Routes,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        let (addr, end) = (listener.local_addr()?, CancellationToken::new());
        let acceptor = TlsAcceptor::from(Arc::new(authority.server("127.0.0.1")?));
        let (secured, incoming) = mpsc::channel(16);
        let accepting = tokio::spawn(accept(listener, acceptor, secured, end.clone()));
        let serving = tokio::spawn(async move {
            let server = Server::builder().add_routes(routes);
            // Ends when nothing more comes in.
            let _ = server.serve_with_incoming(ReceiverStream::new(incoming)).await;
        });
        Ok(Self { addr, tasks: [accepting, serving], end })
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// As settings of an agent write it.
    pub fn address(&self) -> String {
        format!("https://{}", self.addr)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        self.end.cancel();
    }
}

async fn accept(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    secured: mpsc::Sender<io::Result<Secured>>,
    end: CancellationToken,
) {
    let mut handshakes = JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let (acceptor, secured) = (acceptor.clone(), secured.clone());
        let end = Box::pin(end.clone().cancelled_owned());
        handshakes.spawn(async move {
            if let Ok(stream) = acceptor.accept(tcp).await {
                // Fails only at the server's end.
                let _ = secured.send(Ok(Secured { stream, end })).await;
            }
        });
        while handshakes.try_join_next().is_some() {}
    }
}

/// A TLS connection as the gRPC server takes it, which breaks at the server's end.
struct Secured {
    stream: TlsStream<TcpStream>,
    end: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Connected for Secured {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Secured {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Secured {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
