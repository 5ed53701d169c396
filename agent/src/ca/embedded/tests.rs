#![allow(clippy::unwrap_used)]

use x509_parser::pem::Pem;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::*;
use crate::tls::{HANDSHAKE_LIMIT, Trust, WorkloadCertificate, accept, connect};

const DAY: Duration = Duration::from_secs(24 * 3600);

fn id(name: &str) -> Identity {
    Identity::new("td1", "a", name)
}

async fn issued(ca: &EmbeddedCa, name: &str) -> WorkloadCertificate {
    WorkloadCertificate::new(ca.issue(&id(name)).await.unwrap(), &Trust::default()).unwrap()
}

fn everyone() -> MayIssue {
    Arc::new(|_| true)
}

#[tokio::test]
async fn two_nodes_with_one_directory_accept_each_other() {
    let state = tempfile::tempdir().unwrap();
    let open = || EmbeddedCa::open(state.path(), DAY, "td1", everyone()).unwrap();
    let (one, two) = (open(), open());
    let server = issued(&one, "server").await;
    let client = issued(&two, "client").await;
    let (near, far) = tokio::io::duplex(16384);
    let expect = [id("server")];
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connect(far, &client, &expect, HANDSHAKE_LIMIT)
    );
    assert_eq!(accepted.unwrap().1, id("client"));
    connected.unwrap();
}

#[tokio::test]
async fn leaf_says_what_mesh_peers_look_for() {
    let state = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(state.path(), DAY, "td1", everyone()).unwrap();
    let certificate = issued(&ca, "x").await;
    assert_eq!(certificate.identity(), &id("x"));
    assert_eq!(certificate.not_after() - certificate.not_before(), time::Duration::DAY + BACKDATED);

    let (leaf, _) = ca.leaf(&id("x"), OffsetDateTime::now_utc()).unwrap();
    let (_, leaf) = X509Certificate::from_der(&leaf).unwrap();
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(leaf.subject_alternative_name().unwrap().unwrap().critical);
    let usage = leaf.key_usage().unwrap().unwrap().value;
    assert!(usage.digital_signature() && !usage.key_cert_sign());
    let extended = leaf.extended_key_usage().unwrap().unwrap().value;
    assert!(extended.server_auth && extended.client_auth);
    let root = std::fs::read(state.path().join("root.pem")).unwrap();
    let root = Pem::iter_from_buffer(&root).next().unwrap().unwrap();
    leaf.verify_signature(Some(root.parse_x509().unwrap().public_key())).unwrap();
}

#[tokio::test]
async fn each_certificate_has_its_own_key_and_serial() {
    let state = tempfile::tempdir().unwrap();
    let ca = EmbeddedCa::open(state.path(), DAY, "td1", everyone()).unwrap();
    let (one, two) = (issued(&ca, "x").await, issued(&ca, "x").await);
    assert_ne!(one.chain()[0].serial, two.chain()[0].serial);
    assert_eq!(one.roots(), two.roots());
    assert_eq!(one.chain().len(), 1, "the root is not sent");
}

#[tokio::test]
async fn only_identities_of_this_node_and_trust_domain_are_issued() {
    let state = tempfile::tempdir().unwrap();
    let local: MayIssue = Arc::new(|identity| &*identity.service_account == "local");
    let ca = EmbeddedCa::open(state.path(), DAY, "td1", local).unwrap();
    ca.issue(&id("local")).await.unwrap();
    for (identity, wanted) in [
        (id("elsewhere"), Refusal::NotOfThisNode),
        (Identity::new("td2", "a", "local"), Refusal::ForeignTrustDomain("td1".into())),
        (Identity::new("td1", "", "local"), Refusal::Incomplete),
        (Identity::new("td1", "a/sa/b", "local"), Refusal::Incomplete),
    ] {
        match ca.issue(&identity).await.unwrap_err() {
            CaError::Refused { reason, .. } => assert_eq!(reason, wanted),
            other => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn short_life_is_backdated_less_than_half() {
    let state = tempfile::tempdir().unwrap();
    let lifetime = Duration::from_secs(20);
    let ca = EmbeddedCa::open(state.path(), lifetime, "td1", everyone()).unwrap();
    let certificate = issued(&ca, "x").await;
    let life = certificate.not_after() - certificate.not_before();
    assert_eq!(life, time::Duration::seconds(25));
}

#[test]
fn lifetime_out_of_bounds_is_refused() {
    let state = tempfile::tempdir().unwrap();
    for lifetime in [Duration::ZERO, Duration::from_secs(9), LONGEST_LIFETIME + DAY, Duration::MAX]
    {
        let error = EmbeddedCa::open(state.path(), lifetime, "td1", everyone()).unwrap_err();
        assert!(matches!(error, RootError::Lifetime(_)), "{error}");
    }
}
