//! A mesh peer made by hand: certificates of any kind, and TLS and HTTP/2 that may misbehave.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use culvert_lab::mesh::Running;
use culvert_lab::netns::Netns;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::LIMIT;

mod terminus;

pub use terminus::{Arrival, Terminus};

/// The port of tunnels.
pub const HBONE: u16 = 15008;

/// An authority that signs anything.
#[derive(Debug)]
pub struct Forge(Issuer<'static, KeyPair>);

/// What a forged certificate says.
#[derive(Clone, Debug)]
pub struct Leaf {
    /// Its alternative names that are URIs.
    pub uris: Vec<String>,
    /// Its alternative names that are DNS names.
    pub dns: Vec<String>,
    pub not_before: OffsetDateTime,
    pub not_after: OffsetDateTime,
}

impl Leaf {
    /// A good one for these URIs, valid for an hour around now.
    pub fn uris(uris: &[&str]) -> Self {
        let (now, hour) = (OffsetDateTime::now_utc(), time::Duration::HOUR);
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        Self { uris, dns: Vec::new(), not_before: now - hour, not_after: now + hour }
    }
}

impl Forge {
    /// The mesh's own authority, once an agent has made it.
    pub fn of_mesh(mesh: &Running) -> Result<Self> {
        let file = |name: &str| {
            let path = mesh.ca().join(name);
            std::fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let key = KeyPair::from_pem(&file("root.key")?)?;
        Ok(Self(Issuer::from_ca_cert_pem(&file("root.pem")?, key)?))
    }

    /// An authority that nobody trusts.
    pub fn foreign() -> Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Ok(Self(Issuer::new(params, KeyPair::generate()?)))
    }

    /// A list (PEM) of revoked serial numbers, big-endian bytes.
    pub fn revoke(&self, serials: &[Vec<u8>]) -> String {
        crate::control::ca::revocation_list(&self.0, serials)
    }

    fn sign(
        &self,
        leaf: &Leaf,
    ) -> Result<(Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>)> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        for uri in &leaf.uris {
            params.subject_alt_names.push(SanType::URI(uri.as_str().try_into()?));
        }
        for name in &leaf.dns {
            params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
        }
        (params.not_before, params.not_after) = (leaf.not_before, leaf.not_after);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &self.0)?;
        Ok((vec![certificate.der().clone()], key.serialize_der().into()))
    }
}

/// Somebody in a pod with a certificate, or without.
#[derive(Clone, Debug)]
pub struct Peer {
    netns: Netns,
    config: Arc<ClientConfig>,
}

impl Peer {
    /// In `pod`, with a certificate that `forge` signs.
    pub fn with(mesh: &Running, pod: &str, forge: &Forge, leaf: &Leaf) -> Result<Self> {
        let (chain, key) = forge.sign(leaf)?;
        let config = builder()?.with_client_auth_cert(chain, key.into())?;
        Ok(Self::of(mesh, pod, config))
    }

    /// In `pod`, without a certificate.
    pub fn without(mesh: &Running, pod: &str) -> Result<Self> {
        Ok(Self::of(mesh, pod, builder()?.with_no_client_auth()))
    }

    fn of(mesh: &Running, pod: &str, mut config: ClientConfig) -> Self {
        config.alpn_protocols = vec![b"h2".to_vec()];
        config.enable_sni = false;
        Self { netns: mesh.pod(pod).place().netns().clone(), config: Arc::new(config) }
    }

    /// A plain TCP connection to the pod's tunnel port.
    pub fn tcp(&self, to: IpAddr) -> io::Result<TcpStream> {
        let to = SocketAddr::new(to, HBONE);
        let stream = self.netns.run(|| std::net::TcpStream::connect_timeout(&to, LIMIT))?;
        stream.set_nonblocking(true)?;
        TcpStream::from_std(stream)
    }

    /// After the TLS handshake. With TLS 1.3 the other side may yet refuse our certificate.
    pub async fn tls(&self, to: IpAddr) -> io::Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(self.config.clone());
        let handshake = connector.connect(ServerName::from(to), self.tcp(to)?);
        within(handshake).await?
    }

    /// After the HTTP/2 handshake.
    pub async fn h2(&self, to: IpAddr) -> Result<Tunnel> {
        let (send, connection) = within(h2::client::handshake(self.tls(to).await?)).await??;
        let driver = tokio::spawn(async move {
            // Each request tells of the connection's failure.
            let _ = connection.await;
        });
        Ok(Tunnel { send, driver: driver.abort_handle() })
    }
}

/// An HTTP/2 connection to a tunnel port. Dropping it cuts the connection off.
#[derive(Debug)]
pub struct Tunnel {
    send: SendRequest<Bytes>,
    driver: tokio::task::AbortHandle,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

/// What a request was answered with.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub send: SendStream<Bytes>,
    pub recv: RecvStream,
}

impl Tunnel {
    /// Sends a CONNECT.
    pub async fn connect(&self, authority: &str) -> Result<Answer> {
        self.connect_with(authority, &[]).await
    }

    /// Sends a CONNECT with headers whose values may be any bytes.
    pub async fn connect_with(
        &self,
        authority: &str,
        headers: &[(&'static str, &[u8])],
    ) -> Result<Answer> {
        let mut request = Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = authority.parse()?;
        for (name, value) in headers {
            request.headers_mut().append(*name, HeaderValue::from_bytes(value)?);
        }
        self.request(request).await
    }

    /// Sends any request, and leaves its body open.
    pub async fn request(&self, request: Request<()>) -> Result<Answer> {
        let mut ready = within(self.send.clone().ready()).await??;
        let (answer, send) = ready.send_request(request, false)?;
        let (head, recv) = within(answer).await??.into_parts();
        Ok(Answer { status: head.status, headers: head.headers, send, recv })
    }
}

impl Answer {
    /// Sends `text` through an accepted tunnel to an echo server, and takes it back to the end.
    pub async fn echo(mut self, text: &'static str) -> Result<()> {
        anyhow::ensure!(self.status == StatusCode::OK, "status {}", self.status);
        self.send.send_data(Bytes::from_static(text.as_bytes()), true)?;
        let mut answer = Vec::new();
        while let Some(chunk) = within(self.recv.data()).await? {
            let chunk = chunk?;
            self.recv.flow_control().release_capacity(chunk.len())?;
            answer.extend_from_slice(&chunk);
        }
        anyhow::ensure!(answer == text.as_bytes(), "{answer:?} instead of {text:?}");
        Ok(())
    }
}

/// Gives up after a generous time.
pub async fn within<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let limit = Duration::from_secs(20);
    tokio::time::timeout(limit, work).await.map_err(|_| io::ErrorKind::TimedOut.into())
}

fn builder() -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let any = Arc::new(AnyServer(provider.clone()));
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(any))
}

/// Takes any server for what it says.
#[derive(Debug)]
struct AnyServer(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("tls 1.2 is not spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
