//! A certificate authority for tests, which issues good certificates and bad ones.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{Issued, Trust, WorkloadCertificate, config};

/// A root or an intermediate, able to sign.
pub(crate) struct Authority {
    pub(crate) der: Vec<u8>,
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A leaf as a peer would hold it, whatever it says.
pub(crate) struct Leaf {
    pub(crate) der: Vec<u8>,
    pub(crate) pem: String,
    pub(crate) key: Vec<u8>,
}

/// What to write into a leaf.
pub(crate) struct Wanted {
    pub(crate) names: Vec<SanType>,
    pub(crate) not_before: OffsetDateTime,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) usages: Vec<ExtendedKeyUsagePurpose>,
}

impl Wanted {
    /// A good leaf for `uris`, an hour long.
    pub(crate) fn uris(uris: &[&str]) -> Self {
        let now = OffsetDateTime::now_utc();
        Self {
            names: uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect(),
            not_before: now - Duration::from_secs(60),
            not_after: now + Duration::from_secs(3600),
            usages: vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
        }
    }
}

impl Authority {
    pub(crate) fn root(name: &str) -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), Self::params(name));
        let certificate = params.self_signed(&key).unwrap();
        let (der, pem) = (certificate.der().to_vec(), certificate.pem());
        Self { der, pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), Self::params(name));
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (der, pem) = (certificate.der().to_vec(), certificate.pem());
        Self { der, pem, issuer: Issuer::new(params, key) }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    pub(crate) fn leaf(&self, wanted: Wanted) -> Leaf {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = wanted.names;
        params.not_before = wanted.not_before;
        params.not_after = wanted.not_after;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = wanted.usages;
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let (der, pem) = (certificate.der().to_vec(), certificate.pem());
        Leaf { der, pem, key: key.serialize_der() }
    }

    /// A good certificate for `identity`, with this authority as the only root.
    pub(crate) fn workload(&self, identity: &str) -> WorkloadCertificate {
        self.workload_trusting(identity, &[self], &Trust::default())
    }

    /// A good certificate for `identity`, with the roots and the trust given.
    pub(crate) fn workload_trusting(
        &self,
        identity: &str,
        roots: &[&Authority],
        trust: &Trust,
    ) -> WorkloadCertificate {
        let leaf = self.leaf(Wanted::uris(&[identity]));
        leaf.workload(&[], roots, trust)
    }

    /// A certificate for `identity` that is valid in the given time, as it is issued.
    pub(crate) fn valid(
        &self,
        identity: &Identity,
        not_before: OffsetDateTime,
        not_after: OffsetDateTime,
    ) -> Issued {
        let uris = Wanted::uris(&[&identity.to_string()]);
        let Leaf { der, key, .. } = self.leaf(Wanted { not_before, not_after, ..uris });
        Issued { chain: vec![der], key, roots: vec![self.der.clone()] }
    }

    /// A list of ours (DER) that revokes `certificates`, whoever issued them, from long ago.
    pub(crate) fn revoking(&self, certificates: &[&[u8]]) -> Vec<u8> {
        let now = OffsetDateTime::now_utc();
        let revoked = |der: &&[u8]| RevokedCertParams {
            serial_number: SerialNumber::from_slice(
                X509Certificate::from_der(der).unwrap().1.raw_serial(),
            ),
            revocation_time: now - Duration::from_secs(3600),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now - Duration::from_secs(7200),
            // Past already: a late list stays in force.
            next_update: now - Duration::from_secs(3600),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: certificates.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer).unwrap().der().to_vec()
    }
}

impl Leaf {
    /// With the intermediates between it and one of the roots.
    pub(crate) fn workload(
        &self,
        intermediates: &[&Authority],
        roots: &[&Authority],
        trust: &Trust,
    ) -> WorkloadCertificate {
        let ders = |authorities: &[&Authority]| {
            authorities.iter().map(|authority| authority.der.clone()).collect::<Vec<_>>()
        };
        let chain = std::iter::once(self.der.clone()).chain(ders(intermediates)).collect();
        let issued = Issued { chain, key: self.key.clone(), roots: ders(roots) };
        WorkloadCertificate::new(issued, trust).unwrap()
    }

    /// The leaf for the TLS library, without any of our checks.
    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.clone()));
        let chain = vec![CertificateDer::from(self.der.clone())];
        Arc::new(CertifiedKey::from_der(chain, key, &config::provider()).unwrap())
    }
}
