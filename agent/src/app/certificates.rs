//! Certificates: which authority signs them, and what peers are judged by besides their roots.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use culvert_core::identity::{Identity, TrustDomains};
use culvert_core::workload::Workload;
use rand::SeedableRng;
use rand::rngs::StdRng;
use time::OffsetDateTime;
use tokio::time::Instant;

use crate::ca::{CertificateState, Certificates, EmbeddedCa, IdentitySource, IstioCa, State};
use crate::config::{Config, MeshSettings};
use crate::file::MeshFile;
use crate::node::Mesh;
use crate::tls::{CrlFile, Revocations, Trust};

/// How long an agent that takes over waits for the certificates of its pods.
const FIRST_CERTIFICATES: Duration = Duration::from_secs(5);
const LOOK: Duration = Duration::from_millis(20);

/// Starts the cache, and follows the revocation lists for as long as the runtime runs.
pub(super) fn start(
    config: &Config,
    settings: &MeshSettings,
    first: &MeshFile,
    mesh: &Arc<Mesh>,
) -> anyhow::Result<Certificates> {
    let source: Arc<dyn IdentitySource> = match &config.ca {
        Some(ca) => Arc::new(IstioCa::new(ca)),
        None => Arc::new(embedded(config, settings, first, mesh)?),
    };
    let aliases = config.trust_domain_aliases.iter().cloned();
    let trust = Trust {
        domains: TrustDomains::new(settings.trust_domain.clone(), aliases),
        revocations: follow_revocations(config)?,
    };
    let random = StdRng::from_rng(&mut rand::rng());
    Ok(Certificates::start(source, trust, Arc::new(OffsetDateTime::now_utc), random))
}

/// Ready when there is a mesh, and for each of its identities that this node has a certificate or the
/// reason why there is none; these are not waited for in vain.
pub(super) async fn ready(certificates: Arc<Certificates>, synced: impl Future<Output = ()>) {
    synced.await;
    let limit = Instant::now() + FIRST_CERTIFICATES;
    let is_awaited = |state: &CertificateState| matches!(state.state, State::Initializing);
    while certificates.states().iter().any(is_awaited) && Instant::now() < limit {
        tokio::time::sleep(LOOK).await;
    }
}

fn follow_revocations(config: &Config) -> anyhow::Result<Revocations> {
    let Some(path) = &config.crl else { return Ok(Revocations::default()) };
    let file = CrlFile::open(path).context("CRL_PATH")?;
    let revocations = file.revocations();
    tokio::spawn(file.follow());
    Ok(revocations)
}

fn embedded(
    config: &Config,
    settings: &MeshSettings,
    first: &MeshFile,
    mesh: &Arc<Mesh>,
) -> anyhow::Result<EmbeddedCa> {
    let directory = match &first.culvert.ca.directory {
        Some(directory) => directory.clone(),
        None => config.state_dir.join("ca"),
    };
    make_private(&config.state_dir)?;
    let (mesh, node) = (mesh.clone(), config.node.clone());
    let may_issue = Arc::new(move |identity: &Identity| {
        let is_ours =
            |workload: &Arc<Workload>| workload.node == node && workload.identity() == *identity;
        mesh.snapshot().workloads().any(is_ours)
    });
    let (ttl, domain) = (first.culvert.ca.ttl, settings.trust_domain.clone());
    Ok(EmbeddedCa::open(&directory, ttl, domain, may_issue)?)
}

fn make_private(directory: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("state directory {}", directory.display()))
}
