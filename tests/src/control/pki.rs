//! The authority of the control plane's own certificate, which has nothing to do with workloads'.

use std::sync::Arc;

use anyhow::Context as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::ServerConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::PrivateKeyDer;

/// A root of its own, and what it signs.
pub struct Pki {
    root: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    pub fn new() -> anyhow::Result<Self> {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().context("a key for the control plane's root")?;
        Ok(Self { root: CertifiedIssuer::self_signed(params, key).context("the root")? })
    }

    /// PEM.
    pub fn root(&self) -> String {
        self.root.pem()
    }

    /// For `localhost`, 127.0.0.1 and istiod's own name.
    pub(super) fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let mut params = CertificateParams::new(vec![
            "localhost".to_owned(),
            "istiod.istio-system.svc".to_owned(),
        ])?;
        params.subject_alt_names.push(SanType::IpAddress([127, 0, 0, 1].into()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let key = KeyPair::generate()?;
        let leaf = params.signed_by(&key, &self.root)?;
        let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(anyhow::Error::msg)?;
        let provider = Arc::new(aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(vec![leaf.der().clone()], key)?;
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }
}
