//! A certificate service that signs with the mesh's own root, so that peers made by hand fit in.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use culvert_proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use culvert_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use rcgen::{
    CertificateSigningRequestParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use time::{Duration, OffsetDateTime};
use tonic::{Request, Response, Status};

/// Signs for whom the caller wants to be.
pub struct Signer {
    issuer: Arc<Issuer<'static, KeyPair>>,
    /// PEM.
    root: String,
}

impl Signer {
    /// With `root.pem` and `root.key` of a folder.
    pub fn of(directory: &Path) -> Result<Self> {
        let file = |name: &str| {
            let path = directory.join(name);
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
        };
        let (root, key) = (file("root.pem")?, KeyPair::from_pem(&file("root.key")?)?);
        Ok(Self { issuer: Arc::new(Issuer::from_ca_cert_pem(&root, key)?), root })
    }

    /// To be mounted on a server.
    pub fn service(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self)
    }

    fn sign(&self, request: &IstioCertificateRequest) -> Result<String> {
        let wanted = request.metadata.as_ref().and_then(|it| it.fields.get("ImpersonatedIdentity"));
        let Some(Kind::StringValue(identity)) = wanted.and_then(|value| value.kind.as_ref()) else {
            anyhow::bail!("nobody is impersonated");
        };
        let mut csr = CertificateSigningRequestParams::from_pem(&request.csr)?;
        let now = OffsetDateTime::now_utc();
        let params = &mut csr.params;
        params.subject_alt_names = vec![SanType::URI(identity.as_str().try_into()?)];
        params.not_before = now - Duration::minutes(2);
        params.not_after = now + Duration::days(1);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(csr.signed_by(&*self.issuer)?.pem())
    }
}

#[tonic::async_trait]
impl IstioCertificateService for Signer {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let leaf = self.sign(request.get_ref());
        let leaf = leaf.map_err(|error| Status::invalid_argument(format!("{error:#}")))?;
        Ok(Response::new(IstioCertificateResponse { cert_chain: vec![leaf, self.root.clone()] }))
    }
}
