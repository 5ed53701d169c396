//! The headers of a CONNECT request: what a source agent says of itself, and how to read it.
//!
//! Building and parsing are pure. Parsing never fails as a whole: a header that cannot be read is
//! absent, for none of them decides about anything but telemetry.

use std::net::SocketAddr;
use std::sync::Arc;

use culvert_core::addr::Authority;
use culvert_core::workload::Workload;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use rand::Rng;

const BAGGAGE: HeaderName = HeaderName::from_static("baggage");
const FORWARDED: HeaderName = HeaderName::from_static("forwarded");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const FORWARDED_NETWORK: HeaderName = HeaderName::from_static("x-forwarded-network");

/// The kinds of owners that have a key in baggage, `k8s.<kind>.name`.
const OWNER_KINDS: [&str; 4] = ["deployment", "cronjob", "pod", "job"];

/// All that a CONNECT request carries.
#[derive(Clone, Debug)]
pub struct ConnectHeaders {
    /// Where the tunnel leads (`:authority`).
    pub authority: Authority,
    /// Describes the source workload; sent also when empty.
    pub baggage: Baggage,
    pub forwarded: Forwarded,
    pub traceparent: TraceParent,
    /// Our own network, on the inner request of a cross-network call only.
    pub x_forwarded_network: Option<Arc<str>>,
}

/// An authority that HTTP cannot carry.
#[derive(Debug, thiserror::Error)]
#[error("{authority} cannot be an :authority: {source}")]
pub struct InvalidRequest {
    authority: Authority,
    source: http::Error,
}

impl ConnectHeaders {
    /// The request as it goes to the wire (RFC 9113 section 8.5: no scheme, no path).
    pub fn request(&self) -> Result<Request<()>, InvalidRequest> {
        let invalid = |source| InvalidRequest { authority: self.authority.clone(), source };
        let uri = Uri::builder().authority(self.authority.to_string()).build().map_err(invalid)?;
        let mut request =
            Request::builder().method(Method::CONNECT).uri(uri).body(()).map_err(invalid)?;
        let headers = request.headers_mut();
        headers.insert(BAGGAGE, text(self.baggage.to_string()));
        headers.insert(FORWARDED, text(self.forwarded.to_string()));
        headers.insert(TRACEPARENT, text(self.traceparent.to_string()));
        if let Some(network) = &self.x_forwarded_network {
            headers.insert(FORWARDED_NETWORK, text(network.to_string()));
        }
        Ok(request)
    }
}

/// What a destination agent reads from a request, and a source agent from an answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceivedHeaders {
    pub baggage: Option<Baggage>,
    /// The `host` of `forwarded`: the service that was addressed.
    pub forwarded_host: Option<String>,
    pub traceparent: Option<TraceParent>,
    /// The sender's network as it names it; may be empty.
    pub forwarded_network: Option<String>,
}

impl ReceivedHeaders {
    pub fn parse(headers: &HeaderMap) -> Self {
        let first = |name| headers.get(name).and_then(|value| value.to_str().ok());
        Self {
            baggage: Baggage::parse(headers),
            forwarded_host: first(FORWARDED).and_then(forwarded_host).map(str::to_owned),
            traceparent: first(TRACEPARENT).and_then(TraceParent::parse),
            forwarded_network: first(FORWARDED_NETWORK).map(str::to_owned),
        }
    }

    /// Whether the sender says that it is on a network other than `own`.
    pub fn is_from_another_network(&self, own: &str) -> bool {
        self.forwarded_network.as_ref().is_some_and(|network| !network.eq_ignore_ascii_case(own))
    }
}

/// A description of a workload (W3C Baggage in Istio's keys); `None` is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Baggage {
    pub cluster: Option<String>,
    pub namespace: Option<String>,
    pub owner: Option<Owner>,
    pub service_name: Option<String>,
    pub service_version: Option<String>,
    pub region: Option<String>,
    pub zone: Option<String>,
}

/// The `k8s.<kind>.name` of a workload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    pub kind: String,
    pub name: String,
}

impl Baggage {
    /// Describes `workload`; values that the format cannot carry are left out.
    pub fn of(workload: &Workload) -> Self {
        let kind = workload.workload_type.to_ascii_lowercase();
        let owner = value(&workload.workload_name)
            .filter(|_| OWNER_KINDS.contains(&kind.as_str()))
            .map(|name| Owner { kind, name });
        Self {
            cluster: value(&workload.cluster_id),
            namespace: value(&workload.namespace),
            owner,
            service_name: value(&workload.canonical_name),
            service_version: value(&workload.canonical_revision),
            region: value(&workload.locality.region),
            zone: value(&workload.locality.zone),
        }
    }

    /// Reads all `baggage` lines. `None` when there is none, or when one is not text.
    pub fn parse(headers: &HeaderMap) -> Option<Self> {
        let mut found = None;
        for line in headers.get_all(BAGGAGE) {
            let baggage: &mut Self = found.get_or_insert_default();
            line.to_str().ok()?.split(',').for_each(|member| baggage.take(member));
        }
        found
    }

    fn take(&mut self, member: &str) {
        let mut pieces = member.split('=');
        let (Some(key), Some(value)) = (pieces.next(), pieces.next()) else { return };
        let value = Some(value.to_owned()).filter(|value| !value.is_empty());
        match key {
            "k8s.cluster.name" => self.cluster = value,
            "k8s.namespace.name" => self.namespace = value,
            "service.name" => self.service_name = value,
            "service.version" => self.service_version = value,
            "cloud.region" => self.region = value,
            "cloud.availability_zone" => self.zone = value,
            other => {
                let kind = other.strip_prefix("k8s.").and_then(|rest| rest.strip_suffix(".name"));
                if let Some(kind) = kind.filter(|kind| OWNER_KINDS.contains(kind)) {
                    self.owner = value.map(|name| Owner { kind: kind.to_owned(), name });
                }
            }
        }
    }
}

impl std::fmt::Display for Baggage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let owner_key = self.owner.as_ref().map(|owner| format!("k8s.{}.name", owner.kind));
        let members = [
            ("k8s.cluster.name", self.cluster.as_deref()),
            ("k8s.namespace.name", self.namespace.as_deref()),
            (
                owner_key.as_deref().unwrap_or_default(),
                self.owner.as_ref().map(|owner| owner.name.as_str()),
            ),
            ("service.name", self.service_name.as_deref()),
            ("service.version", self.service_version.as_deref()),
            ("cloud.region", self.region.as_deref()),
            ("cloud.availability_zone", self.zone.as_deref()),
        ];
        let mut separator = "";
        for (key, value) in members {
            if let Some(value) = value {
                write!(f, "{separator}{key}={value}")?;
                separator = ",";
            }
        }
        Ok(())
    }
}

/// The `forwarded` header of a CONNECT (RFC 7239, as peers write it: the host is not quoted).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// The application's own address.
    pub client: SocketAddr,
    /// The hostname of the addressed service.
    pub host: Option<Arc<str>>,
}

impl std::fmt::Display for Forwarded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "for=\"{}\"", self.client)?;
        match &self.host {
            Some(host) => write!(f, ";host={host}"),
            None => Ok(()),
        }
    }
}

/// The `host` parameter; its name counts in lower case only.
fn forwarded_host(text: &str) -> Option<&str> {
    let host = text.split(';').find_map(|part| part.trim().strip_prefix("host="))?;
    let unquoted = host.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    Some(unquoted.unwrap_or(host)).filter(|host| !host.is_empty())
}

/// A trace context (W3C Trace Context, version 00, flags always 00).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    pub trace_id: u128,
    pub parent_id: u64,
}

impl TraceParent {
    /// A new trace; both ids are never 0, which the format reserves.
    pub fn random(random: &mut impl Rng) -> Self {
        let trace_id = u128::from(random.next_u64()) << 64 | u128::from(random.next_u64() | 1);
        Self { trace_id, parent_id: random.next_u64() | 1 }
    }

    /// Exactly four segments of the right length in lower-case hexadecimal, or `None`.
    fn parse(text: &str) -> Option<Self> {
        let mut segments = text.split('-');
        let [version, trace, parent, flags] = std::array::from_fn(|_| segments.next());
        let whole = segments.next().is_none() && text.len() == 55;
        let (Some(_), Some(_), true) = (version, flags, whole) else { return None };
        let hex = |text: &&str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let trace = trace.filter(|text| text.len() == 32).filter(hex)?;
        let parent = parent.filter(|text| text.len() == 16).filter(hex)?;
        Some(Self {
            trace_id: u128::from_str_radix(trace, 16).ok()?,
            parent_id: u64::from_str_radix(parent, 16).ok()?,
        })
    }
}

impl std::fmt::Display for TraceParent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "00-{:032x}-{:016x}-00", self.trace_id, self.parent_id)
    }
}

/// `text` if it may stand as a value in baggage.
fn value(text: &str) -> Option<String> {
    let plain = |b: u8| (b' '..=b'~').contains(&b) && b != b',' && b != b'=';
    (!text.is_empty() && text.bytes().all(plain)).then(|| text.to_owned())
}

/// Text that came from outside and cannot be a header value becomes the empty one.
fn text(value: String) -> HeaderValue {
    HeaderValue::try_from(value).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests;
