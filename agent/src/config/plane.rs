//! How the control plane is reached, and what the agent takes from it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::environment::{Environment, Setting, duration, number, switch};
use super::{ConfigError, Named};

/// Where the control plane is and how each side proves itself to the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlPlane {
    /// `https://host:port`, in order of preference (`XDS_ADDRESS`, `CA_ADDRESS`; several are
    /// separated by commas). Not empty.
    pub addresses: Vec<String>,
    /// Whom to trust as the control plane (`XDS_ROOT_CA`, `CA_ROOT_CA`).
    pub roots: Roots,
    /// A name that its certificate may carry instead of the address's host (`ALT_XDS_HOSTNAME`,
    /// `ALT_CA_HOSTNAME`).
    pub alt_hostname: Option<String>,
    /// Sent as `authorization: Bearer …` (`AUTH_TOKEN`).
    pub token: Option<Token>,
    /// Further request metadata (`XDS_HEADER_*`, `CA_HEADER_*`).
    pub headers: Vec<(String, String)>,
    /// Sent as `clusterid`.
    pub cluster_id: Arc<str>,
}

/// Trust anchors of the control plane's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Roots {
    /// PEM, read for each connection.
    File(PathBuf),
    /// Those of the operating system.
    System,
    /// PEM text given in the setting itself.
    Pem(String),
}

/// A bearer token.
#[derive(Clone, PartialEq, Eq)]
pub enum Token {
    /// Read for each request, for it is replaced before it expires.
    File(PathBuf),
    Literal(String),
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Token::File(path) => f.debug_tuple("File").field(path).finish(),
            Token::Literal(_) => f.write_str("Literal(…)"),
        }
    }
}

/// The workload API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XdsSettings {
    pub control: ControlPlane,
    /// Ask for addresses when they are needed instead of subscribing to all (`XDS_ON_DEMAND`).
    pub on_demand: bool,
    /// Node metadata (`ISTIO_META_*` as text, `ISTIO_METAJSON_*` as JSON).
    pub metadata: Vec<(String, Value)>,
    /// Keep the last good state on disk; off unless asked for.
    pub kept: Option<Kept>,
}

/// State that outlives the agent while the control plane is away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    /// `CULVERT_XDS_CACHE`.
    pub path: PathBuf,
    /// What is older is not served (`CULVERT_XDS_CACHE_MAX_AGE`).
    pub max_age: Duration,
}

/// Istio's certificate service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaSettings {
    pub control: ControlPlane,
    /// Lifetime asked for (`SECRET_TTL`).
    pub ttl: Duration,
}

/// The agent's own pod, as Kubernetes names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPod {
    /// `POD_NAME`; empty outside of Kubernetes.
    pub name: Arc<str>,
    /// `POD_NAMESPACE`; empty outside of Kubernetes.
    pub namespace: Arc<str>,
    /// `SERVICE_ACCOUNT`; empty outside of Kubernetes.
    pub service_account: Arc<str>,
    /// `INSTANCE_IP`.
    pub ip: Option<IpAddr>,
}

/// The DNS proxy in each pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DnsSettings {
    /// `ISTIO_META_DNS_PROXY_ADDR`.
    pub addr: SocketAddr,
    /// `CLUSTER_DOMAIN`.
    pub cluster_domain: Arc<str>,
    /// Whose services win when several namespaces have a name (`PREFERED_SERVICE_NAMESPACE`).
    pub prefer_namespace: Option<Arc<str>>,
}

/// How connections come to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirect {
    /// By the agent's own kernel programs.
    Ebpf,
    /// By packet rules that a CNI plugin keeps in each pod.
    Cni,
}

const IN_KUBERNETES: &str = "https://istiod.istio-system.svc:15012";
const DEFAULT_ROOTS: &str = "./var/run/secrets/istio/root-cert.pem";
const DEFAULT_TOKEN: &str = "./var/run/secrets/tokens/istio-token";
const DEFAULT_CNI: &str = "/var/run/ztunnel/ztunnel.sock";
const DEFAULT_TTL: Duration = Duration::from_secs(24 * 60 * 60);
const DEFAULT_KEPT_AGE: Duration = Duration::from_secs(60 * 60);
/// `serverca.DefaultMaxWorkloadCertTTL` of istiod refuses longer ones.
const LONGEST_TTL: Duration = Duration::from_secs(90 * 24 * 60 * 60);
const DNS_PORT: u16 = 15053;

/// The two services of a control plane, and which of their variables they read.
struct Service {
    address: &'static str,
    roots: &'static [&'static str],
    alt_hostname: &'static str,
    header: &'static str,
}

const XDS: Service = Service {
    address: "XDS_ADDRESS",
    roots: &["XDS_ROOT_CA", "CA_ROOT_CA"],
    alt_hostname: "ALT_XDS_HOSTNAME",
    header: "XDS_HEADER_",
};

const CA: Service = Service {
    address: "CA_ADDRESS",
    roots: &["CA_ROOT_CA"],
    alt_hostname: "ALT_CA_HOSTNAME",
    header: "CA_HEADER_",
};

/// `alone`: a mesh file is given, so that no control plane is assumed unless one is named.
pub(super) fn xds(
    env: &Environment,
    alone: bool,
    cluster: &Arc<str>,
) -> Result<Option<XdsSettings>, ConfigError> {
    let Some(control) = control_plane(env, &XDS, alone, cluster)? else { return Ok(None) };
    Ok(Some(XdsSettings {
        control,
        on_demand: env.parse("XDS_ON_DEMAND", switch)?.unwrap_or(false),
        metadata: metadata(env)?,
        kept: kept(env)?,
    }))
}

pub(super) fn ca(
    env: &Environment,
    alone: bool,
    cluster: &Arc<str>,
) -> Result<Option<CaSettings>, ConfigError> {
    let Some(control) = control_plane(env, &CA, alone, cluster)? else { return Ok(None) };
    let ttl = env.parse("SECRET_TTL", |text| match duration(text)? {
        ttl if ttl.is_zero() => Err("is no time at all".to_owned()),
        ttl if ttl > LONGEST_TTL => Err("is more than the 90 days that istiod grants".to_owned()),
        ttl => Ok(ttl),
    })?;
    Ok(Some(CaSettings { control, ttl: ttl.unwrap_or(DEFAULT_TTL) }))
}

fn control_plane(
    env: &Environment,
    service: &Service,
    alone: bool,
    cluster: &Arc<str>,
) -> Result<Option<ControlPlane>, ConfigError> {
    let addresses = match env.stated(service.address)? {
        Some(setting) if setting.value.is_empty() => return Ok(None),
        Some(setting) => addresses(&setting)?,
        None if alone || !env.is_set("KUBERNETES_SERVICE_HOST") => return Ok(None),
        None => vec![IN_KUBERNETES.to_owned()],
    };
    let mut roots = Roots::File(DEFAULT_ROOTS.into());
    for name in service.roots {
        if let Some(text) = env.text(name)? {
            roots = match text.as_str() {
                "SYSTEM" => Roots::System,
                pem if pem.contains("-----BEGIN") => Roots::Pem(text),
                _ => Roots::File(text.into()),
            };
            break;
        }
    }
    let token = match env.text("AUTH_TOKEN")? {
        None => Token::File(DEFAULT_TOKEN.into()),
        // A token has no slash where a path has; a path that does not start so is not guessed at.
        Some(text) if text.starts_with('/') || text.starts_with("./") => Token::File(text.into()),
        Some(text) => Token::Literal(text),
    };
    let headers = env.prefixed(service.header)?.into_iter();
    Ok(Some(ControlPlane {
        addresses,
        roots,
        alt_hostname: env.text(service.alt_hostname)?,
        token: Some(token),
        headers: headers.map(|(name, value)| (name.to_ascii_lowercase(), value)).collect(),
        cluster_id: cluster.clone(),
    }))
}

/// Text without a scheme is https, as ztunnel takes it.
fn addresses(setting: &Setting) -> Result<Vec<String>, ConfigError> {
    let mut addresses = Vec::new();
    for part in setting.value.split(',').map(str::trim) {
        let authority = match part.split_once("://") {
            Some(("https", authority)) => authority,
            Some((scheme, _)) => {
                return Err(
                    setting.invalid(format!("has the scheme {scheme}, only https is spoken"))
                );
            }
            None => part,
        };
        let authority = authority.trim_end_matches('/');
        let port = authority.rsplit_once(':').filter(|(host, port)| {
            !host.is_empty() && !host.contains('/') && port.parse::<u16>().is_ok()
        });
        if port.is_none() {
            return Err(setting.invalid(format!("{part:?} is not https://host:port")));
        }
        addresses.push(format!("https://{authority}"));
    }
    Ok(addresses)
}

fn metadata(env: &Environment) -> Result<Vec<(String, Value)>, ConfigError> {
    let text = env.prefixed("ISTIO_META_")?;
    let mut metadata: Vec<_> =
        text.into_iter().map(|(name, value)| (name, Value::String(value))).collect();
    for (name, value) in env.prefixed("ISTIO_METAJSON_")? {
        let parsed = serde_json::from_str(&value).map_err(|error| ConfigError::Invalid {
            setting: Named(format!("ISTIO_METAJSON_{name}")),
            value,
            why: format!("is not JSON: {error}"),
        })?;
        metadata.push((name, parsed));
    }
    Ok(metadata)
}

fn kept(env: &Environment) -> Result<Option<Kept>, ConfigError> {
    let max_age = env.parse("CULVERT_XDS_CACHE_MAX_AGE", duration)?;
    match (env.path(None, "CULVERT_XDS_CACHE"), max_age) {
        (Some(path), age) => Ok(Some(Kept { path, max_age: age.unwrap_or(DEFAULT_KEPT_AGE) })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(ConfigError::Contradiction {
            setting: Named("CULVERT_XDS_CACHE_MAX_AGE".to_owned()),
            other: Named("CULVERT_XDS_CACHE".to_owned()),
            why: "nothing is kept unless a file is named".to_owned(),
        }),
    }
}

pub(super) fn pod(env: &Environment) -> Result<AgentPod, ConfigError> {
    let text = |name| env.text(name).map(|text| text.unwrap_or_default().into());
    Ok(AgentPod {
        name: text("POD_NAME")?,
        namespace: text("POD_NAMESPACE")?,
        service_account: text("SERVICE_ACCOUNT")?,
        ip: env.parse("INSTANCE_IP", |text| {
            text.parse().map_err(|_| "is not an IP address".to_owned())
        })?,
    })
}

/// istio-cni's socket, unless the pods come from the mesh file.
pub(super) fn cni(env: &Environment, alone: bool) -> Option<PathBuf> {
    match env.path(None, "INPOD_UDS") {
        None if alone => None,
        None => Some(DEFAULT_CNI.into()),
        stated => stated,
    }
}

pub(super) fn redirect(env: &Environment, cni: bool) -> Result<Redirect, ConfigError> {
    let redirect = env.parse("CULVERT_REDIRECT", |text| match text {
        "ebpf" => Ok(Redirect::Ebpf),
        "cni" => Ok(Redirect::Cni),
        _ => Err("is neither ebpf nor cni".to_owned()),
    })?;
    match redirect {
        Some(Redirect::Cni) if !cni => Err(ConfigError::Contradiction {
            setting: Named("CULVERT_REDIRECT".to_owned()),
            other: Named("INPOD_UDS".to_owned()),
            why: "without istio-cni nobody keeps packet rules in the pods".to_owned(),
        }),
        redirect => Ok(redirect.unwrap_or(Redirect::Ebpf)),
    }
}

/// Off where pods come from a file, unless it is asked for.
pub(super) fn dns(env: &Environment, alone: bool) -> Result<Option<DnsSettings>, ConfigError> {
    let captured = env.parse("ISTIO_META_DNS_CAPTURE", switch)?.unwrap_or(!alone);
    if !captured {
        return Ok(None);
    }
    let addr = env.parse("ISTIO_META_DNS_PROXY_ADDR", |text| {
        let text = text.replacen("localhost:", "127.0.0.1:", 1);
        let addr: SocketAddr = text.parse().map_err(|_| "is not IP:port".to_owned())?;
        match addr.ip().is_loopback() {
            true => Ok(addr),
            false => Err("is not a loopback address".to_owned()),
        }
    })?;
    let text = |name| env.text(name).map(|text| text.map(Arc::<str>::from));
    Ok(Some(DnsSettings {
        addr: addr.unwrap_or(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), DNS_PORT)),
        cluster_domain: text("CLUSTER_DOMAIN")?.unwrap_or_else(|| "cluster.local".into()),
        prefer_namespace: text("PREFERED_SERVICE_NAMESPACE")?,
    }))
}

/// The mark that istio-cni's rules let pass (`PACKET_MARK`).
pub(super) fn packet_mark(env: &Environment) -> Result<u32, ConfigError> {
    let mark = env.parse("PACKET_MARK", |text| number(text, 1, 0xfff))?;
    Ok(mark.unwrap_or(1337))
}
