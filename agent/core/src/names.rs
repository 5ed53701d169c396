//! What a DNS name that a pod asks for stands for in the mesh.
//!
//! Only services have names here. Names of workloads and pods, and whatever else is not found, are
//! for the resolver of the cluster.

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use crate::service::{IpFamilies, Service};
use crate::snapshot::Snapshot;

/// Where names are looked up.
#[derive(Clone, Copy, Debug)]
pub struct Directory<'a> {
    pub snapshot: &'a Snapshot,
    /// Without a dot at either end, in lower case: `cluster.local`.
    pub cluster_domain: &'a str,
    /// Whose service is taken when neither the client's namespace nor a canonical service decides.
    pub preferred_namespace: Option<&'a str>,
    /// Whether anyone is told IPv6 addresses.
    pub ipv6: bool,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Client<'a> {
    pub namespace: &'a str,
    pub network: &'a str,
}

/// Which addresses are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Record type A (RFC 1035 section 3.4.1).
    V4,
    /// Record type AAAA (RFC 3596 section 2.1).
    V6,
}

/// What the mesh has to say of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Nothing: the question is someone else's.
    Unknown,
    /// The name is known and has no address of that family for this client.
    Empty,
    Addresses {
        /// The name with a search domain taken off, when the client asked with one: it is told as
        /// the canonical name (CNAME, RFC 1035 section 3.3.1), and owns the addresses.
        canonical: Option<Arc<str>>,
        /// In no particular order; not empty.
        addresses: Vec<IpAddr>,
    },
}

/// Answers a question for the addresses of `name`, which may end with a dot and be in any case.
pub fn answer(
    directory: &Directory<'_>,
    client: &Client<'_>,
    name: &str,
    family: Family,
) -> Answer {
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    let Some(found) = find(directory, client, &name) else { return Answer::Unknown };
    let addresses = addresses(directory, client, found.service, family);
    if addresses.is_empty() {
        return Answer::Empty;
    }
    let canonical = match found.by {
        By::Exactly => found.stripped.map(Arc::from),
        By::Wildcard => None,
    };
    Answer::Addresses { canonical, addresses }
}

/// How a key matched an alias of the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Exactly,
    Wildcard,
}

struct Found<'a, 'n> {
    service: &'a Arc<Service>,
    by: By,
    /// The name without the search domain that the match took off.
    stripped: Option<&'n str>,
}

/// Looks at the name itself first, then at what it may be short for, then at the same of the name
/// without each of the client's search domains.
fn find<'a, 'n>(
    directory: &Directory<'a>,
    client: &Client<'_>,
    name: &'n str,
) -> Option<Found<'a, 'n>> {
    let domain = directory.cluster_domain;
    let mut seen: Vec<Cow<'n, str>> = Vec::new();
    let mut look_up = |stripped: Option<&'n str>| {
        let base = stripped.unwrap_or(name);
        let expanded = expansions(base, client.namespace, domain).map(Cow::Owned);
        for alias in std::iter::once(Cow::Borrowed(base)).chain(expanded) {
            if seen.contains(&alias) {
                continue;
            }
            if let Some((service, by)) = look_up_alias(directory, client, &alias) {
                return Some(Found { service, by, stripped });
            }
            seen.push(alias);
        }
        None
    };
    let namespaced = format!("{}.svc.{domain}", client.namespace);
    let services = format!("svc.{domain}");
    look_up(None).or_else(|| {
        let search = [namespaced.as_str(), services.as_str(), domain];
        search.iter().find_map(|suffix| look_up(Some(without(name, suffix)?)))
    })
}

/// The name without a search domain that it ends with.
fn without<'n>(name: &'n str, suffix: &str) -> Option<&'n str> {
    let stripped = name.strip_suffix(suffix)?.strip_suffix('.')?;
    (!stripped.is_empty()).then_some(stripped)
}

/// The names of Kubernetes services that a name may be short for.
fn expansions(name: &str, namespace: &str, domain: &str) -> impl Iterator<Item = String> {
    let labels: Vec<&str> = name.split('.').take(5).collect();
    let expanded = match *labels {
        [_] => [Some(format!("{name}.{namespace}.svc.{domain}")), None],
        [_, _] => {
            [Some(format!("{name}.svc.{domain}")), Some(format!("{name}.{namespace}.svc.{domain}"))]
        }
        [_, _, "svc"] => [Some(format!("{name}.{domain}")), Some(format!("{name}.svc.{domain}"))],
        [_, _, _] => [Some(format!("{name}.svc.{domain}")), None],
        [_, _, _, "svc"] => [Some(format!("{name}.{domain}")), None],
        _ => [None, None],
    };
    expanded.into_iter().flatten()
}

/// The service that an alias names: exactly, else by ever shorter wildcards. `*` alone is none, and
/// no wildcard covers the domain it is for.
fn look_up_alias<'a>(
    directory: &Directory<'a>,
    client: &Client<'_>,
    alias: &str,
) -> Option<(&'a Arc<Service>, By)> {
    if let Some(service) = choose(directory, client, alias) {
        return Some((service, By::Exactly));
    }
    let mut wildcard = String::with_capacity(alias.len() + 1);
    let mut rest = alias;
    while let Some((_, parent)) = rest.split_once('.') {
        wildcard.clear();
        wildcard.push_str("*.");
        wildcard.push_str(parent);
        if let Some(service) = choose(directory, client, &wildcard) {
            return Some((service, By::Wildcard));
        }
        rest = parent;
    }
    None
}

/// Of the services with a hostname: the one of the client's namespace, else a canonical one, else
/// that of the preferred namespace, else the first.
fn choose<'a>(
    directory: &Directory<'a>,
    client: &Client<'_>,
    hostname: &str,
) -> Option<&'a Arc<Service>> {
    let candidates = directory.snapshot.services_named(hostname).filter(|service| {
        service.is_visible_to(client.namespace) && has_answer(directory, service)
    });
    let of = |namespace: &str| candidates.clone().rfind(|service| *service.namespace == *namespace);
    of(client.namespace)
        .or_else(|| candidates.clone().rfind(|service| service.canonical))
        .or_else(|| directory.preferred_namespace.and_then(of))
        .or_else(|| candidates.clone().next())
}

/// Services without an address of their own are answered from their endpoints, if they are ones of
/// Kubernetes. Others without an address are not the mesh's to answer for.
fn has_answer(directory: &Directory<'_>, service: &Service) -> bool {
    let kubernetes = || {
        let parent = service.hostname.strip_suffix(directory.cluster_domain);
        parent.is_some_and(|parent| parent.ends_with(".svc."))
    };
    !service.vips.is_empty() || kubernetes()
}

fn addresses(
    directory: &Directory<'_>,
    client: &Client<'_>,
    service: &Service,
    family: Family,
) -> Vec<IpAddr> {
    let told = match (family, service.ip_families) {
        (Family::V4, IpFamilies::Ipv6Only) | (Family::V6, IpFamilies::Ipv4Only) => false,
        (Family::V4, _) => true,
        (Family::V6, _) => directory.ipv6,
    };
    if !told {
        return Vec::new();
    }
    let fits = |ip: &IpAddr| match family {
        Family::V4 => ip.is_ipv4(),
        Family::V6 => ip.is_ipv6(),
    };
    if service.vips.is_empty() {
        let endpoints = directory.snapshot.endpoints(service);
        return endpoints
            .filter_map(|endpoint| endpoint.workload.addresses.iter().copied().find(fits))
            .collect();
    }
    let own = service.vips.iter().filter(|vip| *vip.network == *client.network);
    own.map(|vip| vip.ip).filter(fits).collect()
}

#[cfg(test)]
mod tests;
