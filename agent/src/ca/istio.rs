//! Istio's certificate service: istiod, or what speaks its protocol, signs for the node's workloads.
//!
//! The agent asks in its own name and says for whom (`ImpersonatedIdentity`). istiod checks the agent's
//! token, not the request's contents, and signs what it was asked for; so that what came back is what was
//! asked is for [`Certificates`](super::Certificates) to check.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use culvert_core::identity::Identity;
use culvert_proto::istio::v1::auth::IstioCertificateRequest;
use culvert_proto::istio::v1::auth::istio_certificate_service_client::IstioCertificateServiceClient;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost_types::value::Kind;
use prost_types::{Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use tokio::time::timeout;
use tonic::{Code, Status};

use super::{AnswerFault, CaError, IdentitySource, parse_chain};
use crate::config::{CaSettings, Roots};
use crate::control::{Control, ControlChannel};
use crate::tls::Issued;
use crate::watch::Fingerprint;

/// How long one address may take for one certificate before another is tried.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(10);

/// How much of a text that the service sent is passed on, in characters.
const LONGEST_TEXT: usize = 300;

/// The entry of `IstioCertificateRequest.metadata` that names the SPIFFE URI to sign for.
const IMPERSONATED: &str = "ImpersonatedIdentity";

/// A client of `istio.v1.auth.IstioCertificateService`.
///
/// One channel serves all requests. It is made again before the next request when the file with the
/// service's roots has changed, keeping the old one if that fails; and towards the next address when the
/// service could not be reached or left a request unanswered.
pub struct IstioCa {
    control: Control,
    roots: Option<PathBuf>,
    /// Of each certificate (`SECRET_TTL`).
    lifetime: Duration,
    link: tokio::sync::Mutex<Link>,
    /// Who was asked last.
    authority: Mutex<Arc<str>>,
}

#[derive(Default)]
struct Link {
    channel: Option<ControlChannel>,
    /// Of the roots' file when the channel was made.
    roots: Option<Fingerprint>,
    /// Counts the channels.
    number: u64,
    /// The address that gave no answer last.
    failed: Option<Arc<str>>,
}

/// Why one attempt failed.
enum Attempt {
    /// Another channel may do better.
    Unreachable {
        reason: String,
        number: u64,
    },
    Failed(CaError),
}

impl IstioCa {
    /// Connects with the first request.
    pub fn new(settings: &CaSettings) -> Self {
        let addresses = &settings.control.addresses;
        let authority = addresses.first().map_or("without an address", String::as_str);
        Self {
            control: Control::new(&settings.control),
            roots: match &settings.control.roots {
                Roots::File(path) => Some(path.clone()),
                Roots::System | Roots::Pem(_) => None,
            },
            lifetime: settings.ttl,
            link: tokio::sync::Mutex::default(),
            authority: Mutex::new(authority.into()),
        }
    }

    async fn ask(&self, identity: &Identity) -> Result<Issued, CaError> {
        let failed = |reason| self.failed(identity, reason);
        if !identity.is_complete() {
            let reason = super::Refusal::Incomplete;
            return Err(CaError::Refused { identity: identity.clone(), reason });
        }
        let first = match self.attempt(identity).await {
            Err(Attempt::Unreachable { reason, number }) => (reason, number),
            Err(Attempt::Failed(error)) => return Err(error),
            Ok(issued) => return Ok(issued),
        };
        // A channel that stood for hours is often found broken only now.
        let (reason, number) = first;
        tracing::debug!(%identity, %reason, "certificate authority is asked again");
        self.give_up(number).await;
        match self.attempt(identity).await {
            Err(Attempt::Unreachable { reason, number }) => {
                self.give_up(number).await;
                Err(failed(reason))
            }
            Err(Attempt::Failed(error)) => Err(error),
            Ok(issued) => Ok(issued),
        }
    }

    /// One request with a key of its own.
    async fn attempt(&self, identity: &Identity) -> Result<Issued, Attempt> {
        let failed = |reason: String| Attempt::Failed(self.failed(identity, reason));
        let (channel, number) = self.channel().await.map_err(failed)?;
        let unreachable = |reason| Attempt::Unreachable { reason, number };
        let (csr, key) = signing_request(identity)
            .map_err(|error| failed(format!("cannot make a request: {error}")))?;
        let request = IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(identity)),
        };
        let mut client = IstioCertificateServiceClient::new(channel);
        let answer = match timeout(ATTEMPT_LIMIT, client.create_certificate(request)).await {
            Err(_) => {
                return Err(unreachable(format!("no answer within {ATTEMPT_LIMIT:?}")));
            }
            Ok(Err(status)) if is_of_transport(&status) => {
                return Err(unreachable(told(&status)));
            }
            Ok(Err(status)) => return Err(failed(told(&status))),
            Ok(Ok(answer)) => answer.into_inner(),
        };
        let chain = parse_chain(&answer.cert_chain).map_err(|fault| {
            let (identity, ca) = (identity.clone(), self.authority());
            Attempt::Failed(CaError::Answer { identity, ca, fault: AnswerFault::Chain(fault) })
        })?;
        Ok(Issued { chain: chain.presented, key, roots: chain.roots })
    }

    /// The channel to use now, with its number.
    async fn channel(&self) -> Result<(ControlChannel, u64), String> {
        let mut link = self.link.lock().await;
        let roots = self.fingerprint().await;
        if let Some(channel) = &link.channel
            && link.roots == roots
        {
            return Ok((channel.clone(), link.number));
        }
        let connected = match &link.failed {
            Some(failed) => self.control.connect_after(failed).await,
            None => self.control.connect().await,
        };
        match (connected, link.channel.clone()) {
            (Ok(channel), _) => {
                *self.authority.lock() = channel.address().clone();
                link.channel = Some(channel.clone());
                link.roots = roots;
                link.number += 1;
                Ok((channel, link.number))
            }
            (Err(error), Some(old)) => {
                tracing::warn!(
                    %error,
                    "no channel to the certificate authority with its new roots, the old one is used"
                );
                Ok((old, link.number))
            }
            (Err(error), None) => Err(error.to_string()),
        }
    }

    /// Leaves a channel, unless another request has done so.
    async fn give_up(&self, number: u64) {
        let mut link = self.link.lock().await;
        if link.number == number
            && let Some(channel) = link.channel.take()
        {
            link.failed = Some(channel.address().clone());
        }
    }

    async fn fingerprint(&self) -> Option<Fingerprint> {
        let metadata = tokio::fs::metadata(self.roots.as_ref()?).await;
        metadata.ok().as_ref().map(Fingerprint::of)
    }

    fn failed(&self, identity: &Identity, reason: String) -> CaError {
        CaError::Failed { identity: identity.clone(), ca: self.authority(), reason }
    }
}

impl IdentitySource for IstioCa {
    fn authority(&self) -> Arc<str> {
        self.authority.lock().clone()
    }

    fn issue<'a>(&'a self, identity: &'a Identity) -> BoxFuture<'a, Result<Issued, CaError>> {
        Box::pin(self.ask(identity))
    }
}

impl fmt::Debug for IstioCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCa")
            .field("control", &self.control)
            .field("lifetime", &self.lifetime)
            .finish_non_exhaustive()
    }
}

/// A PKCS#10 request in PEM, and the PKCS#8 DER of its new P-256 key.
///
/// istiod ignores the name in it; other authorities may not.
fn signing_request(identity: &Identity) -> Result<(String, Vec<u8>), rcgen::Error> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    Ok((params.serialize_request(&key)?.pem()?, key.serialize_der()))
}

fn impersonating(identity: &Identity) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(identity.to_string())) };
    Struct { fields: [(IMPERSONATED.to_owned(), value)].into() }
}

/// Whether the service may never have seen the request.
fn is_of_transport(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal)
}

/// What the service said, and what it usually means. Its own log tells more.
fn told(status: &Status) -> String {
    let message: String = status.message().chars().take(LONGEST_TEXT).collect();
    let code = status.code();
    match hint(status) {
        Some(hint) => format!("{code:?}: {message} ({hint})"),
        None => format!("{code:?}: {message}"),
    }
}

fn hint(status: &Status) -> Option<&'static str> {
    match (status.code(), status.message()) {
        (Code::Unauthenticated, "request authenticate failure") => Some(
            "the token must be valid and its audience istio-ca, and CLUSTER_ID be the one that the \
             authority knows this cluster by",
        ),
        (Code::Unauthenticated, "request impersonation authentication failure") => Some(
            "the agent's service account must be in CA_TRUSTED_NODE_ACCOUNTS, its token bound to its \
             pod, CLUSTER_ID set, and a pod of the identity be known on this node; right after the \
             start of a pod it may not be known yet",
        ),
        (Code::InvalidArgument, _) => Some("SECRET_TTL may be longer than the authority allows"),
        (Code::Unimplemented, _) => {
            Some("nothing signs certificates at this address; istiod does at port 15012")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests;
