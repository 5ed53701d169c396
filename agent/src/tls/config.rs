//! The one shape of TLS that mesh peers speak (RFC 8446).

use std::net::Ipv4Addr;
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::{cipher_suite, default_provider, kx_group};
use rustls::pki_types::ServerName;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::Trust;
use super::verify::{ClientVerifier, ServerVerifier};

/// The only application protocol of HBONE (RFC 9113, section 3.2).
pub(super) const ALPN_H2: &[u8] = b"h2";

/// The algorithms of mesh peers, best first; a server takes the first of the client's that it has.
///
/// The post-quantum hybrid comes first so that its key share is in the first flight.
pub(crate) fn provider() -> CryptoProvider {
    CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups: vec![
            kx_group::X25519MLKEM768,
            kx_group::X25519,
            kx_group::SECP256R1,
            kx_group::SECP384R1,
        ],
        ..default_provider()
    }
}

/// Has the cipher library gather randomness, which takes it some 50 ms of one processor the first time.
/// Whoever draws meanwhile waits for it; should it fail, then so does each who draws.
pub(crate) fn gather_randomness() {
    let _ = default_provider().secure_random.fill(&mut [0]);
}

/// Peers are known by identity: the name that the TLS library wants is an address, which is never sent.
pub(super) fn unsent_server_name() -> ServerName<'static> {
    ServerName::from(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED))
}

/// How to accept peers of `trust_domain` under `roots`, as far as `trust` does.
pub(super) fn server(
    provider: &Arc<CryptoProvider>,
    key: &Arc<CertifiedKey>,
    roots: &Arc<RootCertStore>,
    trust_domain: &Arc<str>,
    trust: &Trust,
) -> Result<ServerConfig, rustls::Error> {
    let path = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
        // Naming our roots would make clients with an intermediate issuer withhold their certificate.
        .clear_root_hint_subjects()
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))?;
    let verifier = ClientVerifier::new(path, roots.clone(), trust_domain.clone(), trust.clone());
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.enable_secret_extraction = true;
    Ok(config)
}

/// How to connect under `roots`, as a template: `verifier` is replaced for each connection.
pub(super) fn client(
    provider: &Arc<CryptoProvider>,
    key: &Arc<CertifiedKey>,
    verifier: ServerVerifier,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key.clone())));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(config)
}
