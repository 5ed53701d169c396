//! Istio's certificate service, as the scenarios' control plane serves it: conformant, or as it is told.
//!
//! Written from the protocol alone; it shares only the generated messages with the agent.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use culvert_proto::istio::v1::auth::istio_certificate_service_server::{
    IstioCertificateService, IstioCertificateServiceServer,
};
use culvert_proto::istio::v1::auth::{IstioCertificateRequest, IstioCertificateResponse};
use prost_types::value::Kind;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams,
    CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};
use time::OffsetDateTime;
use tonic::{Code, Request, Response, Status};

/// The longest life that is signed, as istiod's default.
const LONGEST: Duration = Duration::from_secs(90 * 24 * 3600);
/// What is signed when no life is asked for.
const DEFAULT: Duration = Duration::from_secs(24 * 3600);
/// How far in the past certificates begin.
const BACKDATED: Duration = Duration::from_secs(120);

/// What the service does with one request.
#[derive(Clone, Debug)]
pub enum Behaviour {
    /// As it is meant to.
    Sign,
    /// Signs for another URI.
    WrongIdentity(String),
    /// Signs what ended an hour ago.
    Expired,
    /// Signs what begins in an hour.
    NotYetValid,
    /// Answers with a root that did not sign.
    OtherRoot,
    /// Answers with the leaf alone.
    OneElement,
    /// Answers with nothing.
    Nothing,
    /// Answers with text that is no certificate.
    Garbage,
    /// Signs another key than the request's.
    AnotherKey,
    /// Takes the request and never answers.
    Hang,
    Refuse(Code, String),
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Asked {
    /// `ImpersonatedIdentity`, or empty.
    pub identity: String,
    pub token: Option<String>,
    /// Seconds.
    pub lifetime: i64,
    pub at: Instant,
}

/// The service and its authorities. Cloning shares them.
#[derive(Clone)]
pub struct TestCa {
    shared: Arc<Mutex<Shared>>,
    /// Requests wait here while the service is held.
    gate: Arc<tokio::sync::Semaphore>,
}

struct Shared {
    token: Option<String>,
    cluster: Option<String>,
    script: VecDeque<Behaviour>,
    otherwise: Behaviour,
    signer: Arc<Signer>,
    announced: Option<Arc<Signer>>,
    /// PEM; the last element of an answer.
    roots: String,
    asked: Vec<Asked>,
    running: usize,
    most_running: usize,
}

/// A root and the intermediates below it, the last of which signs.
struct Signer {
    /// PEM, from the one that signs to the root.
    authorities: Vec<String>,
    issuers: Vec<Issuer<'static, KeyPair>>,
}

impl Signer {
    fn new(name: &str, intermediates: usize) -> Self {
        let key = KeyPair::generate().expect("a key");
        let params = authority(name);
        let mut pem = vec![params.self_signed(&key).expect("a root").pem()];
        let mut issuers = vec![Issuer::new(params, key)];
        for level in 1..=intermediates {
            let (params, key) =
                (authority(&format!("{name} {level}")), KeyPair::generate().expect("a key"));
            let above = issuers.last().expect("a root");
            pem.push(params.signed_by(&key, above).expect("an intermediate").pem());
            issuers.push(Issuer::new(params, key));
        }
        pem.reverse();
        issuers.reverse();
        Self { authorities: pem, issuers }
    }

    fn root(&self) -> &str {
        self.authorities.last().map_or("", String::as_str)
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Default for TestCa {
    fn default() -> Self {
        Self::new(0)
    }
}

impl TestCa {
    /// A service whose certificates have this many intermediates above them.
    pub fn new(intermediates: usize) -> Self {
        let signer = Signer::new("root", intermediates);
        let shared = Shared {
            token: None,
            cluster: None,
            script: VecDeque::new(),
            otherwise: Behaviour::Sign,
            roots: signer.root().to_owned(),
            signer: Arc::new(signer),
            announced: None,
            asked: Vec::new(),
            running: 0,
            most_running: 0,
        };
        let gate = Arc::new(tokio::sync::Semaphore::new(tokio::sync::Semaphore::MAX_PERMITS));
        Self { shared: Arc::new(Mutex::new(shared)), gate }
    }

    /// To be mounted on a server.
    pub fn service(self) -> IstioCertificateServiceServer<Self> {
        IstioCertificateServiceServer::new(self)
    }

    /// Takes no other token and no other cluster from now on.
    pub fn require(&self, token: &str, cluster: &str) {
        let mut shared = self.lock();
        shared.token = Some(token.to_owned());
        shared.cluster = Some(cluster.to_owned());
    }

    /// What the next requests meet, one each; then comes what is usual.
    pub fn next(&self, behaviours: impl IntoIterator<Item = Behaviour>) {
        self.lock().script.extend(behaviours);
    }

    /// What requests usually meet.
    pub fn usually(&self, behaviour: Behaviour) {
        self.lock().otherwise = behaviour;
    }

    /// Lets requests wait until [`Self::release`].
    pub fn hold(&self) {
        self.gate.forget_permits(tokio::sync::Semaphore::MAX_PERMITS);
    }

    pub fn release(&self) {
        self.gate.add_permits(1 << 20);
    }

    /// Makes a new root, which answers carry besides the old ones.
    pub fn announce_root(&self, intermediates: usize) {
        let signer = Signer::new("new root", intermediates);
        let mut shared = self.lock();
        let old = shared.roots.clone();
        shared.roots = format!("{old}{}", signer.root());
        shared.announced = Some(Arc::new(signer));
    }

    /// Signs below the announced root from now on.
    pub fn switch_root(&self) {
        let mut shared = self.lock();
        if let Some(announced) = shared.announced.take() {
            shared.signer = announced;
        }
    }

    /// Answers carry only the root that signs from now on.
    pub fn drop_other_roots(&self) {
        let mut shared = self.lock();
        shared.roots = shared.signer.root().to_owned();
    }

    /// The list (PEM) of the authority that signs leaves, with certificates of these serial numbers
    /// (big-endian bytes).
    pub fn revoke(&self, serials: &[Vec<u8>]) -> String {
        let signer = self.lock().signer.clone();
        revocation_list(&signer.issuers[0], serials)
    }

    /// All requests so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.lock().asked.clone()
    }

    /// How many requests were being answered at one time, at most.
    pub fn most_at_once(&self) -> usize {
        self.lock().most_running
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, request: &Request<IstioCertificateRequest>) -> (Behaviour, Running) {
        let metadata =
            |name| Some(request.metadata().get(name)?.to_str().unwrap_or_default().to_owned());
        let token = metadata("authorization").map(|value| value.replacen("Bearer ", "", 1));
        let mut shared = self.lock();
        shared.asked.push(Asked {
            identity: impersonated(request.get_ref()).unwrap_or_default().to_owned(),
            token: token.clone(),
            lifetime: request.get_ref().validity_duration,
            at: Instant::now(),
        });
        shared.running += 1;
        shared.most_running = shared.most_running.max(shared.running);
        let refused = (shared.token.is_some() && shared.token != token)
            || (shared.cluster.is_some() && shared.cluster != metadata("clusterid"));
        let behaviour = match refused {
            true => {
                Behaviour::Refuse(Code::Unauthenticated, "request authenticate failure".to_owned())
            }
            false => shared.script.pop_front().unwrap_or(shared.otherwise.clone()),
        };
        (behaviour, Running(self.clone()))
    }
}

/// Counts a request as running.
struct Running(TestCa);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

/// A list of `issuer` that revokes certificates of these serial numbers, as PEM.
pub fn revocation_list(issuer: &Issuer<'_, KeyPair>, serials: &[Vec<u8>]) -> String {
    let now = OffsetDateTime::now_utc();
    let revoked = |serial: &Vec<u8>| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: now - BACKDATED,
        reason_code: None,
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: now - BACKDATED,
        next_update: now + DEFAULT,
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(issuer).and_then(|list| list.pem()).expect("a revocation list")
}

#[tonic::async_trait]
impl IstioCertificateService for TestCa {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let (behaviour, _running) = self.note(&request);
        // Ends only with the server.
        if let Ok(permit) = self.gate.acquire().await {
            drop(permit);
        }
        match behaviour {
            Behaviour::Refuse(code, message) => return Err(Status::new(code, message)),
            Behaviour::Hang => std::future::pending().await,
            _ => {}
        }
        let (signer, roots) = {
            let shared = self.lock();
            (shared.signer.clone(), shared.roots.clone())
        };
        let cert_chain = answer(request.get_ref(), &behaviour, &signer, roots)?;
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}

fn impersonated(request: &IstioCertificateRequest) -> Option<&str> {
    let value = request.metadata.as_ref()?.fields.get("ImpersonatedIdentity")?;
    match value.kind.as_ref()? {
        Kind::StringValue(identity) => Some(identity),
        _ => None,
    }
}

fn answer(
    request: &IstioCertificateRequest,
    behaviour: &Behaviour,
    signer: &Signer,
    roots: String,
) -> Result<Vec<String>, Status> {
    let identity = impersonated(request)
        .ok_or_else(|| Status::unauthenticated("request impersonation authentication failure"))?;
    let mut csr = read(&request.csr, identity)?;
    let life = match u64::try_from(request.validity_duration) {
        Ok(0) | Err(_) => DEFAULT,
        Ok(seconds) => Duration::from_secs(seconds),
    };
    if life > LONGEST {
        return Err(Status::invalid_argument("CSR signing error: requested TTL is too long"));
    }
    let (now, hour) = (OffsetDateTime::now_utc(), Duration::from_secs(3600));
    let (begin, end) = match behaviour {
        Behaviour::Expired => (now - 2 * hour, now - hour),
        Behaviour::NotYetValid => (now + hour, now + 2 * hour),
        _ => (now - BACKDATED, now + life),
    };
    let uri = match behaviour {
        Behaviour::WrongIdentity(other) => other,
        _ => identity,
    };
    leaf(&mut csr.params, uri, begin, end)?;
    let issuer = &signer.issuers[0];
    let signed = match behaviour {
        Behaviour::AnotherKey => {
            let key = KeyPair::generate().map_err(internal)?;
            csr.params.signed_by(&key, issuer).map_err(internal)?
        }
        _ => csr.signed_by(issuer).map_err(internal)?,
    };
    let mut chain = vec![signed.pem()];
    match behaviour {
        Behaviour::OneElement => return Ok(chain),
        Behaviour::Nothing => return Ok(Vec::new()),
        Behaviour::Garbage => return Ok(vec!["garbage".to_owned(), "garbage".to_owned()]),
        _ => {}
    }
    let intermediates = signer.authorities.len() - 1;
    chain.extend(signer.authorities.iter().take(intermediates).cloned());
    chain.push(match behaviour {
        Behaviour::OtherRoot => Signer::new("other root", 0).root().to_owned(),
        _ => roots,
    });
    Ok(chain)
}

/// Checks what istiod leaves unchecked too: other authorities do not.
fn read(csr: &str, identity: &str) -> Result<CertificateSigningRequestParams, Status> {
    let bad = |why: &str| Status::invalid_argument(format!("CSR signing error: {why}"));
    let csr =
        CertificateSigningRequestParams::from_pem(csr).map_err(|error| bad(&error.to_string()))?;
    if csr.params.distinguished_name.iter().next().is_some() {
        return Err(bad("the subject is not empty"));
    }
    match csr.params.subject_alt_names.as_slice() {
        [SanType::URI(uri)] if uri.as_str() == identity => {}
        names => return Err(bad(&format!("it is for {names:?}, not for {identity}"))),
    }
    match csr.public_key.algorithm() == &rcgen::PKCS_ECDSA_P256_SHA256 {
        true => Ok(csr),
        false => Err(bad("the key is not P-256")),
    }
}

fn leaf(
    params: &mut CertificateParams,
    uri: &str,
    begin: OffsetDateTime,
    end: OffsetDateTime,
) -> Result<(), Status> {
    params.subject_alt_names = vec![SanType::URI(uri.try_into().map_err(internal)?)];
    params.not_before = begin;
    params.not_after = end;
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    Ok(())
}

fn internal(error: rcgen::Error) -> Status {
    Status::internal(error.to_string())
}
