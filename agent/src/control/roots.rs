//! Whom the agent takes for the control plane: the roots, and the names of the server.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, RootCertStore, SignatureScheme};

use super::{ControlError, of_file};
use crate::config::Roots;

/// Reads the roots as they are now.
pub(super) async fn load(roots: &Roots) -> Result<RootCertStore, ControlError> {
    let (from, certificates) = match roots {
        Roots::File(path) => {
            let read = tokio::fs::read(path).await.map_err(|error| error.to_string());
            (of_file(path), read.and_then(|pem| parse(&pem)))
        }
        Roots::Pem(pem) => ("given literally".to_owned(), parse(pem.as_bytes())),
        Roots::System => ("of the system".to_owned(), load_system().await),
    };
    let invalid = |why: String| ControlError::Roots { from: from.clone(), why };
    let mut store = RootCertStore::empty();
    for certificate in certificates.map_err(invalid)? {
        store.add(certificate).map_err(|error| invalid(error.to_string()))?;
    }
    match store.is_empty() {
        true => Err(invalid("no certificate in it".to_owned())),
        false => Ok(store),
    }
}

fn parse(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|error| error.to_string())
}

async fn load_system() -> Result<Vec<CertificateDer<'static>>, String> {
    let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
    let found = found.map_err(|error| error.to_string())?;
    match (found.certs.is_empty(), found.errors.first()) {
        (true, Some(error)) => Err(error.to_string()),
        (true, None) | (false, _) => Ok(found.certs),
    }
}

/// Verifies a server by the name it was asked for, or else by one further name.
#[derive(Debug)]
pub(super) struct ServerVerifier {
    path: Arc<WebPkiServerVerifier>,
    alternative: Option<ServerName<'static>>,
}

impl ServerVerifier {
    pub fn new(
        roots: RootCertStore,
        provider: Arc<CryptoProvider>,
        alternative: Option<ServerName<'static>>,
    ) -> Result<Self, rustls::client::VerifierBuilderError> {
        let path =
            WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
        Ok(Self { path, alternative })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let verify =
            |name| self.path.verify_server_cert(leaf, intermediates, name, ocsp_response, now);
        let wrong_name = |error: &rustls::Error| {
            matches!(
                error,
                rustls::Error::InvalidCertificate(
                    CertificateError::NotValidForName
                        | CertificateError::NotValidForNameContext { .. }
                )
            )
        };
        match (verify(name), &self.alternative) {
            (Err(error), Some(alternative)) if wrong_name(&error) => {
                // What the operator reads should be about the name that was asked for.
                verify(alternative).map_err(|_| error)
            }
            (verified, _) => verified,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.path.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.path.supported_verify_schemes()
    }
}
