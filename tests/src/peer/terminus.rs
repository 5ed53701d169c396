//! A pod that ends tunnels by itself, and tells of each connection how it came.

use std::net::{Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use culvert_lab::mesh::Running;
use culvert_lab::wait;
use h2::server::SendResponse;
use http::{HeaderMap, Method, Response, StatusCode};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_rustls::TlsAcceptor;

use super::{Forge, HBONE, Leaf};

/// Ends tunnels on port 15008 of a pod, until dropped. Every connection in them is answered with
/// `<name> <authority>` and a clean end.
#[derive(Debug)]
pub struct Terminus {
    arrivals: Arc<Mutex<Vec<Arrival>>>,
    _runtime: Runtime,
}

/// One CONNECT.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub authority: String,
    /// The address that the tunnel came from.
    pub peer: SocketAddr,
    pub headers: HeaderMap,
}

impl Terminus {
    /// In `pod`, with a certificate for these identities that `forge` signs.
    pub fn start(mesh: &Running, pod: &str, forge: &Forge, identities: &[&str]) -> Result<Self> {
        let (chain, key) = forge.sign(&Leaf::uris(identities))?;
        let root = std::fs::read(mesh.ca().join("root.pem")).context("reading the root")?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        roots.add(certificate(&root)?)?;
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
                .build()?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain, key.into())?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, HBONE));
        // A process that this one starts holds what is open here, until it has become another program.
        let listener = wait::until_some(format!("{at} to be free"), wait::SOON, || {
            mesh.pod(pod).place().run(|| std::net::TcpListener::bind(at))
        })?;
        listener.set_nonblocking(true)?;
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let arrivals = Arc::new(Mutex::new(Vec::new()));
        let (name, all) = (Arc::<str>::from(pod), arrivals.clone());
        let acceptor = TlsAcceptor::from(Arc::new(config));
        runtime.spawn(async move {
            let Ok(listener) = TcpListener::from_std(listener) else { return };
            while let Ok((tcp, peer)) = listener.accept().await {
                let (name, all, acceptor) = (name.clone(), all.clone(), acceptor.clone());
                tokio::spawn(async move {
                    // A client that does not like this server tells its own test.
                    let Ok(tls) = acceptor.accept(tcp).await else { return };
                    let Ok(mut tunnel) = h2::server::handshake(tls).await else { return };
                    while let Some(Ok((request, answer))) = tunnel.accept().await {
                        if *request.method() != Method::CONNECT {
                            continue;
                        }
                        let authority = request.uri().to_string();
                        let text = format!("{name} {authority}");
                        let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                        let headers = request.headers().clone();
                        all.lock().unwrap_or_else(PoisonError::into_inner).push(Arrival {
                            authority,
                            peer,
                            headers,
                        });
                        let body = request.into_body();
                        tokio::spawn(async move {
                            // One that leaves early gets nothing.
                            let _ = tell(answer, body, text).await;
                        });
                    }
                });
            }
        });
        Ok(Self { arrivals, _runtime: runtime })
    }

    /// All that came so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.arrivals.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn tell(
    mut answer: SendResponse<Bytes>,
    mut body: h2::RecvStream,
    text: String,
) -> Result<()> {
    let head = Response::builder().status(StatusCode::OK).body(())?;
    let mut send = answer.send_response(head, false)?;
    // What the client says is taken to its end, so that nothing is cut off.
    while let Some(chunk) = body.data().await {
        body.flow_control().release_capacity(chunk?.len())?;
    }
    send.send_data(Bytes::from(text), true)?;
    Ok(())
}

fn certificate(pem: &[u8]) -> Result<CertificateDer<'static>> {
    use rustls::pki_types::pem::PemObject;
    CertificateDer::from_pem_slice(pem).map_err(|error| anyhow::anyhow!("the root: {error:?}"))
}
