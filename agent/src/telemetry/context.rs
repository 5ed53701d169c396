//! What is told of a connection when it opens and when it ends.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_core::addr::Authority;
use culvert_core::identity::Identity;
use culvert_core::service::Service;
use culvert_core::workload::{PolicyKey, Workload};

/// Everything that metrics and access log say about one connection.
#[derive(Clone, Debug)]
pub struct ConnectionContext {
    pub reporter: Reporter,
    /// The local pod for [`Reporter::Source`]; for [`Reporter::Destination`] the workload known by
    /// the peer's address.
    pub source: Option<Arc<Workload>>,
    /// The identity presented by the source; told only with `mutual_tls`.
    pub source_identity: Option<Identity>,
    /// What the peer says about itself. [`Reporter::Destination`] uses it for a source unknown by
    /// address, [`Reporter::Source`] in place of the destination (double HBONE).
    pub baggage: Option<Box<Baggage>>,
    /// The next hop: the waypoint or gateway if there is one; the local pod for
    /// [`Reporter::Destination`].
    pub destination: Option<Arc<Workload>>,
    /// `None`: the configured identity of `destination`.
    pub destination_identity: Option<Identity>,
    /// The service that was addressed.
    pub service: Option<Arc<Service>>,
    pub src: SocketAddr,
    /// What is dialled (outbound), or where the connection came in (inbound).
    pub dst: SocketAddr,
    /// The `:authority` of the tunnel, without which it is plain TCP.
    pub hbone_addr: Option<Authority>,
    /// Whether the connection travels in HBONE or double HBONE.
    pub mutual_tls: bool,
}

impl ConnectionContext {
    /// The destination's identity, where it is told.
    pub fn told_destination_identity(&self) -> Option<Identity> {
        let known = || self.destination_identity.clone();
        let configured = || self.destination.as_ref().map(|workload| workload.identity());
        known().or_else(configured).filter(|_| self.mutual_tls)
    }
}

/// Which end of a connection tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reporter {
    /// The outbound listener.
    Source,
    /// The inbound listeners, plaintext and HBONE.
    Destination,
}

impl Reporter {
    pub(super) fn label(self) -> &'static str {
        match self {
            Reporter::Source => "source",
            Reporter::Destination => "destination",
        }
    }

    pub(super) fn direction(self) -> &'static str {
        match self {
            Reporter::Source => "outbound",
            Reporter::Destination => "inbound",
        }
    }
}

/// The `baggage` header's members, by the attribute that each fills.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Baggage {
    /// `k8s.cluster.name`
    pub cluster_id: Option<Arc<str>>,
    /// `k8s.namespace.name`
    pub namespace: Option<Arc<str>>,
    /// `k8s.<type>.name`
    pub workload_name: Option<Arc<str>>,
    /// `service.name`
    pub canonical_name: Option<Arc<str>>,
    /// `service.version`
    pub canonical_revision: Option<Arc<str>>,
    /// `cloud.region`
    pub region: Option<Arc<str>>,
    /// `cloud.availability_zone`
    pub zone: Option<Arc<str>>,
}

/// Why a connection ended otherwise than by both sides closing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub flag: ResponseFlag,
    /// The log's `error`.
    pub error: String,
    /// Which policy refused or closed it.
    pub denial: Option<Denial>,
}

impl Failure {
    /// A failure that no policy caused.
    pub fn new(flag: ResponseFlag, error: impl Into<String>) -> Self {
        Self { flag, error: error.into(), denial: None }
    }

    /// A refusal or closing by policy, with flag `DENY`.
    pub fn denied(error: impl Into<String>, denial: Denial) -> Self {
        Self { flag: ResponseFlag::Deny, error: error.into(), denial: Some(denial) }
    }
}

/// The policy decision behind a failure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Denial {
    pub reason: DenialReason,
    /// `None` where no single policy decided.
    pub policy: Option<PolicyKey>,
    /// Index of the policy's rule that matched.
    pub rule: Option<usize>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DenialReason {
    /// A DENY policy matched.
    Explicit,
    /// ALLOW policies exist and none matched.
    NoneAllowed,
    /// The workload takes traffic from its waypoint only.
    NotFromWaypoint,
    /// A policy or binding changed while the connection was live.
    PolicyChange,
}

impl DenialReason {
    pub(super) fn label(self) -> &'static str {
        match self {
            DenialReason::Explicit => "explicit",
            DenialReason::NoneAllowed => "none_allowed",
            DenialReason::NotFromWaypoint => "not_from_waypoint",
            DenialReason::PolicyChange => "policy_change",
        }
    }
}

/// The `response_flags` of a connection that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResponseFlag {
    /// No error, also for connections cut by shutdown; not counted as failed.
    None,
    /// Refused by policy, at start or later.
    Deny,
    /// Any failure not listed.
    Connect,
    /// The TLS configuration is at fault.
    TlsFailure,
    /// HTTP/2 errors.
    H2HandshakeFailure,
    /// A TCP connect time-out to an HBONE peer.
    NetworkPolicy,
    /// The own certificate could not be obtained.
    IdentityError,
    /// The peer's certificate is revoked.
    CertRevoked,
}

impl ResponseFlag {
    /// Every flag, in the order of its discriminant.
    pub(super) const ALL: [ResponseFlag; 8] = [
        ResponseFlag::None,
        ResponseFlag::Deny,
        ResponseFlag::Connect,
        ResponseFlag::TlsFailure,
        ResponseFlag::H2HandshakeFailure,
        ResponseFlag::NetworkPolicy,
        ResponseFlag::IdentityError,
        ResponseFlag::CertRevoked,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            ResponseFlag::None => "-",
            ResponseFlag::Deny => "DENY",
            ResponseFlag::Connect => "CONNECT",
            ResponseFlag::TlsFailure => "TLS_FAILURE",
            ResponseFlag::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            ResponseFlag::NetworkPolicy => "NETWORK_POLICY",
            ResponseFlag::IdentityError => "IDENTITY_ERROR",
            ResponseFlag::CertRevoked => "CERT_REVOKED",
        }
    }
}
