#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_core::identity::Identity;
use rcgen::{ExtendedKeyUsagePurpose, SanType};
use rustls::{ClientConfig, NamedGroup, ProtocolVersion, RootCertStore};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client};

use super::testing::{Authority, Leaf, Wanted};
use super::verify::ServerVerifier;
use super::*;

const X: &str = "spiffe://td1/ns/a/sa/x";
const Y: &str = "spiffe://td1/ns/a/sa/y";
const FOREIGN: &str = "spiffe://td2/ns/a/sa/x";
const SERVER: &str = "spiffe://td1/ns/a/sa/server";
const CLIENT: &str = "spiffe://td1/ns/a/sa/client";

fn id(uri: &str) -> Identity {
    uri.parse().unwrap()
}

fn trusting(authority: &Authority) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.der.clone().into()).unwrap();
    Arc::new(roots)
}

fn verifier(authority: &Authority, expect: &str) -> ServerVerifier {
    let algorithms = config::provider().signature_verification_algorithms;
    ServerVerifier::new(trusting(authority), algorithms, Trust::default()).expecting(&[id(expect)])
}

/// A client with any leaf at all, towards a server of ours.
async fn accepting(ours: &Authority, leaf: &Leaf) -> Result<Identity, TlsError> {
    let provider = Arc::new(config::provider());
    let client = config::client(&provider, &leaf.certified(), verifier(ours, SERVER)).unwrap();
    accepting_from(ours, client).await
}

async fn accepting_from(ours: &Authority, client: ClientConfig) -> Result<Identity, TlsError> {
    let server = ours.workload(SERVER);
    let (near, far) = duplex(16384);
    let connector = TlsConnector::from(Arc::new(client));
    let peer = tokio::spawn(connector.connect(config::unsent_server_name(), far));
    let accepted = accept(near, &server, HANDSHAKE_LIMIT).await;
    let _ = peer.await.unwrap();
    accepted.map(|(_, identity)| identity)
}

/// A server with any leaf at all, towards a client of ours that expects `expect`.
async fn connecting(ours: &Authority, leaf: &Leaf, expect: &[Identity]) -> Result<(), TlsError> {
    let provider = Arc::new(config::provider());
    let server = config::server(
        &provider,
        &leaf.certified(),
        &trusting(ours),
        &"td1".into(),
        &Trust::default(),
    )
    .unwrap();
    let client = ours.workload(CLIENT);
    let (near, far) = duplex(16384);
    let peer = tokio::spawn(async move { TlsAcceptor::from(Arc::new(server)).accept(far).await });
    let connected = connect(near, &client, expect, HANDSHAKE_LIMIT).await;
    let _ = peer.await.unwrap();
    connected.map(|_| ())
}

fn fault<T: std::fmt::Debug>(outcome: Result<T, TlsError>) -> PeerFault {
    match outcome.unwrap_err() {
        TlsError::Peer(fault) => fault,
        other => panic!("expected a fault of the peer's certificate, got {other:?}"),
    }
}

#[tokio::test]
async fn peer_with_the_expected_identity_is_accepted_in_both_roles() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[X]));
    assert_eq!(accepting(&ours, &leaf).await.unwrap(), id(X));
    connecting(&ours, &leaf, &[id(X)]).await.unwrap();
    connecting(&ours, &leaf, &[id(Y), id(X)]).await.unwrap();
}

#[tokio::test]
async fn other_trust_domain_is_rejected_in_both_roles() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[FOREIGN]));
    let found = vec![id(FOREIGN)];
    let foreign = PeerFault::ForeignTrustDomain { found: found.clone(), own: "td1".into() };
    assert_eq!(fault(accepting(&ours, &leaf).await), foreign);
    let unexpected = PeerFault::Unexpected { found, expected: vec![id(X)] };
    assert_eq!(fault(connecting(&ours, &leaf, &[id(X)]).await), unexpected);
}

#[tokio::test]
async fn any_identity_may_admit_and_the_first_is_the_principal() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[FOREIGN, X]));
    assert_eq!(accepting(&ours, &leaf).await.unwrap(), id(FOREIGN));
    connecting(&ours, &leaf, &[id(X)]).await.unwrap();
    let leaf = ours.leaf(Wanted::uris(&["https://td1/x", X]));
    assert_eq!(accepting(&ours, &leaf).await.unwrap(), id(X));
}

#[tokio::test]
async fn certificate_without_identity_is_rejected_in_both_roles() {
    let ours = Authority::root("ours");
    let dns = vec![SanType::DnsName("x.a.svc".try_into().unwrap())];
    let none = vec![];
    let path = Wanted::uris(&["spiffe://td1/my/workload"]).names;
    for names in [dns, none, path] {
        let leaf = ours.leaf(Wanted { names, ..Wanted::uris(&[]) });
        let refused = fault(accepting(&ours, &leaf).await);
        assert!(matches!(refused, PeerFault::NoIdentity { .. }), "{refused:?}");
        let refused = fault(connecting(&ours, &leaf, &[id(X)]).await);
        assert!(matches!(refused, PeerFault::NoIdentity { .. }), "{refused:?}");
    }
}

#[tokio::test]
async fn client_without_certificate_is_rejected() {
    let ours = Authority::root("ours");
    let mut client = ClientConfig::builder_with_provider(Arc::new(config::provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier(&ours, SERVER)))
        .with_no_client_auth();
    client.alpn_protocols = vec![config::ALPN_H2.to_vec()];
    assert_eq!(fault(accepting_from(&ours, client).await), PeerFault::NoCertificate);
}

#[tokio::test]
async fn wrong_identity_of_our_trust_domain_is_for_the_client_to_reject() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[Y]));
    assert_eq!(accepting(&ours, &leaf).await.unwrap(), id(Y));
    let unexpected = PeerFault::Unexpected { found: vec![id(Y)], expected: vec![id(X)] };
    assert_eq!(fault(connecting(&ours, &leaf, &[id(X)]).await), unexpected);
}

#[tokio::test]
async fn other_root_is_rejected_in_both_roles() {
    let (ours, other) = (Authority::root("ours"), Authority::root("other"));
    let leaf = other.leaf(Wanted::uris(&[X]));
    assert_eq!(fault(accepting(&ours, &leaf).await), PeerFault::UntrustedRoot);
    assert_eq!(fault(connecting(&ours, &leaf, &[id(X)]).await), PeerFault::UntrustedRoot);
    // A foreign root that bears our root's name convinces nobody.
    let leaf = Authority::root("ours").leaf(Wanted::uris(&[X]));
    let refused = fault(accepting(&ours, &leaf).await);
    assert!(matches!(refused, PeerFault::Path(_) | PeerFault::UntrustedRoot), "{refused:?}");
}

#[tokio::test]
async fn expired_certificate_is_rejected_in_both_roles() {
    let ours = Authority::root("ours");
    let not_after = OffsetDateTime::now_utc() - Duration::from_secs(5);
    let leaf = ours.leaf(Wanted { not_after, ..Wanted::uris(&[X]) });
    assert_eq!(fault(accepting(&ours, &leaf).await), PeerFault::Expired);
    assert_eq!(fault(connecting(&ours, &leaf, &[id(X)]).await), PeerFault::Expired);
}

#[tokio::test]
async fn certificate_for_the_other_role_only_is_rejected() {
    let ours = Authority::root("ours");
    let leaf = |usage| ours.leaf(Wanted { usages: vec![usage], ..Wanted::uris(&[X]) });
    let server_only = leaf(ExtendedKeyUsagePurpose::ServerAuth);
    assert!(matches!(fault(accepting(&ours, &server_only).await), PeerFault::Path(_)));
    let client_only = leaf(ExtendedKeyUsagePurpose::ClientAuth);
    assert!(matches!(fault(connecting(&ours, &client_only, &[id(X)]).await), PeerFault::Path(_)));
}

#[tokio::test]
async fn nobody_expected_means_nobody_accepted() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[X]));
    let provider = Arc::new(config::provider());
    let server = config::server(
        &provider,
        &leaf.certified(),
        &trusting(&ours),
        &"td1".into(),
        &Trust::default(),
    )
    .unwrap();
    let (near, far) = duplex(16384);
    let peer = tokio::spawn(async move { TlsAcceptor::from(Arc::new(server)).accept(far).await });
    let client = ours.workload(CLIENT);
    let error = connect(near, &client, &[], HANDSHAKE_LIMIT).await.unwrap_err();
    assert_eq!(error.side(), Side::Us);
    assert!(matches!(error, TlsError::Peer(PeerFault::NothingExpected)));
    assert!(peer.await.unwrap().is_err());
    // The verifier says the same by itself.
    let client = config::client(
        &provider,
        &leaf.certified(),
        ServerVerifier::new(
            trusting(&ours),
            provider.signature_verification_algorithms,
            Trust::default(),
        ),
    );
    let (near, far) = duplex(16384);
    let server = ours.workload(SERVER);
    let peer = tokio::spawn(async move { accept(far, &server, HANDSHAKE_LIMIT).await.map(|_| ()) });
    let connector = TlsConnector::from(Arc::new(client.unwrap()));
    let error = connector.connect(config::unsent_server_name(), near).await.unwrap_err();
    assert_eq!(fault(Err::<(), _>(TlsError::from_handshake(error))), PeerFault::NothingExpected);
    assert!(matches!(peer.await.unwrap(), Err(TlsError::RefusedByPeer(_))));
}

/// A handshake between two certificates of ours.
async fn pair() -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let ours = Authority::root("ours");
    let (server, client) = (ours.workload(SERVER), ours.workload(CLIENT));
    // A pipe of 64 bytes: each message arrives in many pieces.
    let (near, far) = duplex(64);
    let expect = [id(SERVER)];
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connect(far, &client, &expect, HANDSHAKE_LIMIT)
    );
    let (accepted, identity) = accepted.unwrap();
    assert_eq!(identity, id(CLIENT));
    (accepted, connected.unwrap())
}

/// Our side with the TLS library's own stream at the other.
async fn mixed_pair() -> (TlsStream<DuplexStream>, client::TlsStream<DuplexStream>) {
    let ours = Authority::root("ours");
    let (server, client) = (ours.workload(SERVER), ours.workload(CLIENT));
    let (near, far) = duplex(64);
    let connector = TlsConnector::from(client.client_config(&[id(SERVER)]));
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connector.connect(config::unsent_server_name(), far)
    );
    (accepted.unwrap().0, connected.unwrap())
}

#[tokio::test]
async fn hello_larger_than_a_segment_arrives_and_negotiates_the_best_of_each() {
    let (_accepted, connected) = mixed_pair().await;
    let (_, client) = connected.get_ref();
    assert_eq!(client.alpn_protocol(), Some(&b"h2"[..]));
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let group = client.negotiated_key_exchange_group().unwrap();
    assert_eq!(group.name(), NamedGroup::X25519MLKEM768);
    let suite = client.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_256_GCM_SHA384);
}

#[tokio::test]
async fn bytes_pass_after_the_handshake_and_no_ticket_is_sent() {
    let (mut accepted, mut connected) = mixed_pair().await;
    let sent = async {
        connected.write_all(b"ping").await.unwrap();
        connected.flush().await.unwrap();
        let mut answer = [0; 4];
        connected.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"pong");
    };
    let answered = async {
        let mut question = [0; 4];
        accepted.read_exact(&mut question).await.unwrap();
        accepted.write_all(b"pong").await.unwrap();
        accepted.flush().await.unwrap();
    };
    tokio::join!(sent, answered);
    assert_eq!(connected.get_ref().1.tls13_tickets_received(), 0);
}

#[tokio::test]
async fn tunnel_within_a_tunnel_has_its_own_identities() {
    let (accepted, connected) = pair().await;
    let inner = Authority::root("inner");
    let (server, client) = (inner.workload(X), inner.workload(Y));
    let expect = [id(X)];
    let (inner_accepted, inner_connected) = tokio::join!(
        accept(accepted, &server, HANDSHAKE_LIMIT),
        connect(connected, &client, &expect, HANDSHAKE_LIMIT)
    );
    assert_eq!(inner_accepted.unwrap().1, id(Y));
    inner_connected.unwrap();
}

#[tokio::test]
async fn intermediate_is_sent_and_root_is_not() {
    let root = Authority::root("root");
    let middle = root.intermediate("middle");
    let leaf = middle.leaf(Wanted::uris(&[SERVER]));
    let server = leaf.workload(&[&middle], &[&root], &Trust::default());
    let client = root.workload(CLIENT);
    let (near, far) = duplex(16384);
    let expect = [id(SERVER)];
    let (accepted, connected) = tokio::join!(
        accept(near, &server, HANDSHAKE_LIMIT),
        connect(far, &client, &expect, HANDSHAKE_LIMIT)
    );
    accepted.unwrap();
    let connected = connected.unwrap();
    let shown = connected.peer_certificates();
    assert_eq!(shown.len(), 2);
    assert_eq!(shown[1].as_ref(), middle.der);
}

#[tokio::test(start_paused = true)]
async fn silent_peer_is_given_up_after_the_limit_in_both_roles() {
    let ours = Authority::root("ours");
    let certificate = ours.workload(SERVER);
    let (near, _silent) = duplex(16384);
    let began = tokio::time::Instant::now();
    let error = accept(near, &certificate, HANDSHAKE_LIMIT).await.unwrap_err();
    assert!(matches!(error, TlsError::TimedOut { limit } if limit == HANDSHAKE_LIMIT));
    assert_eq!(error.side(), Side::Network);
    let (near, _silent) = duplex(16384);
    let error = connect(near, &certificate, &[id(X)], HANDSHAKE_LIMIT).await.unwrap_err();
    assert!(matches!(error, TlsError::TimedOut { .. }));
    assert!(began.elapsed() >= 2 * HANDSHAKE_LIMIT);
    assert!(began.elapsed() < 2 * HANDSHAKE_LIMIT + Duration::from_secs(1));
}

#[tokio::test]
async fn peer_that_leaves_or_talks_nonsense_is_told_apart() {
    let ours = Authority::root("ours");
    let certificate = ours.workload(SERVER);
    let (near, far) = duplex(16384);
    drop(far);
    let error = accept(near, &certificate, HANDSHAKE_LIMIT).await.unwrap_err();
    assert!(matches!(error, TlsError::Lost(_)), "{error:?}");
    let (near, mut far) = duplex(16384);
    far.write_all(b"GET / HTTP/1.1\r\nHost: 10.1.0.7:15008\r\n\r\n").await.unwrap();
    let error = accept(near, &certificate, HANDSHAKE_LIMIT).await.unwrap_err();
    assert!(matches!(error, TlsError::Protocol(_)), "{error:?}");
    assert_eq!(error.side(), Side::Peer);
}

#[tokio::test]
async fn hundreds_of_half_open_handshakes_do_not_delay_a_good_one() {
    let ours = Authority::root("ours");
    let (server, client) = (Arc::new(ours.workload(SERVER)), ours.workload(CLIENT));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let limit = Duration::from_secs(8);
    let accepting = tokio::spawn(async move {
        let mut handshakes = tokio::task::JoinSet::new();
        for _ in 0..301 {
            let (stream, _) = listener.accept().await.unwrap();
            let server = server.clone();
            handshakes.spawn(async move { accept(stream, &server, limit).await.map(|_| ()) });
        }
        handshakes.join_all().await
    });
    let mut half_open = Vec::new();
    for _ in 0..300 {
        half_open.push(TcpStream::connect(address).await.unwrap());
    }
    let began = Instant::now();
    let stream = TcpStream::connect(address).await.unwrap();
    connect(stream, &client, &[id(SERVER)], HANDSHAKE_LIMIT).await.unwrap();
    assert!(began.elapsed() < limit, "good handshake took {:?}", began.elapsed());
    let outcomes = accepting.await.unwrap();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    let timed_out =
        |outcome: &&Result<(), TlsError>| matches!(outcome, Err(TlsError::TimedOut { .. }));
    assert_eq!(outcomes.iter().filter(timed_out).count(), 300);
}

#[test]
fn unusable_certificates_say_why() {
    let ours = Authority::root("ours");
    let leaf = ours.leaf(Wanted::uris(&[X]));
    let other = ours.leaf(Wanted::uris(&[X]));
    let roots = || vec![ours.der.clone()];
    let made = |chain, key, roots| {
        WorkloadCertificate::new(Issued { chain, key, roots }, &Trust::default()).unwrap_err()
    };
    assert!(matches!(made(vec![], leaf.key.clone(), roots()), UnusableCertificate::EmptyChain));
    let error = made(vec![leaf.der.clone()], other.key, roots());
    assert!(matches!(error, UnusableCertificate::Key { .. }), "{error}");
    let error = made(vec![leaf.der.clone()], leaf.key.clone(), vec![b"no".to_vec()]);
    assert!(matches!(error, UnusableCertificate::NoRoot { given: 1 }), "{error}");
    let error = made(vec![b"no".to_vec()], leaf.key.clone(), roots());
    assert!(matches!(error, UnusableCertificate::Unreadable(_)), "{error}");
    let foreign = ours.leaf(Wanted::uris(&["https://a", X]));
    let error = made(vec![foreign.der], foreign.key, roots());
    assert!(matches!(error, UnusableCertificate::ForeignIdentity(_)), "{error}");
}

#[test]
fn summary_is_pem_with_decimal_serial_and_whole_seconds() {
    let ours = Authority::root("ours");
    let not_before = time::macros::datetime!(2026-03-01 00:00:00 UTC);
    let not_after = time::macros::datetime!(2026-03-02 00:00:00 UTC);
    let leaf = ours.leaf(Wanted { not_before, not_after, ..Wanted::uris(&[X]) });
    let certificate = leaf.workload(&[], &[&ours], &Trust::default());
    let [summary] = certificate.chain().try_into().unwrap();
    assert_eq!(summary.valid_from, "2026-03-01T00:00:00Z");
    assert_eq!(summary.expiration, "2026-03-02T00:00:00Z");
    assert!(summary.serial.bytes().all(|digit| digit.is_ascii_digit()));
    assert_eq!(summary.pem.replace("\r\n", "\n"), leaf.pem);
    assert_eq!(certificate.roots().len(), 1);
}

fn aliased() -> Trust {
    let domains = TrustDomains::new("td1".into(), ["old".into()]);
    Trust { domains, ..Trust::default() }
}

async fn handshake(
    server: &WorkloadCertificate,
    client: &WorkloadCertificate,
    expect: &str,
) -> (
    Result<(TlsStream<DuplexStream>, Identity), TlsError>,
    Result<TlsStream<DuplexStream>, TlsError>,
) {
    let (near, far) = duplex(16384);
    let expect = [id(expect)];
    tokio::join!(
        accept(near, server, HANDSHAKE_LIMIT),
        connect(far, client, &expect, HANDSHAKE_LIMIT)
    )
}

#[tokio::test]
async fn alias_of_the_trust_domain_counts_as_ours_and_is_told_as_presented() {
    const OLD: &str = "spiffe://old/ns/a/sa/x";
    let root = Authority::root("root");
    let ours = root.workload_trusting(X, &[&root], &aliased());
    let old = root.workload_trusting(OLD, &[&root], &aliased());
    let foreign = root.workload_trusting(FOREIGN, &[&root], &aliased());
    // As server, both ways.
    assert_eq!(handshake(&ours, &old, X).await.0.unwrap().1, id(OLD));
    assert_eq!(handshake(&old, &ours, OLD).await.0.unwrap().1, id(X));
    // As client: what is expected under one name may be presented under the other.
    handshake(&old, &ours, X).await.1.unwrap();
    handshake(&ours, &old, OLD).await.1.unwrap();
    let other_account = fault(handshake(&old, &ours, "spiffe://td1/ns/a/sa/y").await.1);
    assert!(matches!(other_account, PeerFault::Unexpected { .. }), "{other_account}");
    // Whoever is of neither domain stays foreign, and our aliases mean nothing to such a workload.
    let refused = fault(handshake(&ours, &foreign, X).await.0);
    assert!(matches!(refused, PeerFault::ForeignTrustDomain { .. }), "{refused}");
    let refused = fault(handshake(&foreign, &old, FOREIGN).await.0);
    assert!(matches!(refused, PeerFault::ForeignTrustDomain { .. }), "{refused}");
}

#[tokio::test]
async fn alias_brings_no_roots_with_it() {
    let (ours, theirs) = (Authority::root("ours"), Authority::root("theirs"));
    let server = ours.workload_trusting(X, &[&ours], &aliased());
    let client = theirs.workload_trusting("spiffe://old/ns/a/sa/x", &[&ours, &theirs], &aliased());
    assert_eq!(fault(handshake(&server, &client, X).await.0), PeerFault::UntrustedRoot);
}

#[tokio::test]
async fn without_the_alias_the_old_name_is_foreign() {
    let root = Authority::root("root");
    let (ours, old) = (root.workload(X), root.workload("spiffe://old/ns/a/sa/x"));
    let refused = fault(handshake(&ours, &old, X).await.0);
    assert!(matches!(refused, PeerFault::ForeignTrustDomain { .. }), "{refused}");
    let refused = fault(handshake(&old, &ours, X).await.1);
    assert!(matches!(refused, PeerFault::Unexpected { .. }), "{refused}");
}

#[tokio::test]
async fn roots_rotate_under_live_connections() {
    let (old, new) = (Authority::root("old"), Authority::root("new"));
    let plain = Trust::default();
    let server_before = old.workload(SERVER);
    let client_before = old.workload(CLIENT);
    let (accepted, connected) = handshake(&server_before, &client_before, SERVER).await;
    let (mut accepted, mut connected) = (accepted.unwrap().0, connected.unwrap());

    // Both roots: peers of either are accepted, whichever signed our own.
    let server_between = new.workload_trusting(SERVER, &[&old, &new], &plain);
    let client_between = old.workload_trusting(CLIENT, &[&old, &new], &plain);
    let (accepted_between, connected_between) =
        handshake(&server_between, &client_between, SERVER).await;
    let (mut accepted_between, mut connected_between) =
        (accepted_between.unwrap().0, connected_between.unwrap());

    // The new root only: the next handshake refuses the old one, in both roles.
    let server_after = new.workload(SERVER);
    let refused = fault(handshake(&server_after, &client_between, SERVER).await.0);
    assert_eq!(refused, PeerFault::UntrustedRoot);
    let client_after = new.workload(CLIENT);
    let refused = fault(handshake(&server_before, &client_after, SERVER).await.1);
    assert_eq!(refused, PeerFault::UntrustedRoot);
    handshake(&server_after, &client_after, SERVER).await.0.unwrap();

    for (near, far) in
        [(&mut accepted, &mut connected), (&mut accepted_between, &mut connected_between)]
    {
        far.write_all(b"still").await.unwrap();
        far.flush().await.unwrap();
        let mut said = [0; 5];
        near.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"still");
    }
}

#[test]
fn own_path_is_judged_as_peers_would() {
    let (root, other) = (Authority::root("root"), Authority::root("other"));
    let middle = root.intermediate("middle");
    let now = OffsetDateTime::now_utc();
    let plain = Trust::default();
    let leaf = || middle.leaf(Wanted::uris(&[X]));
    leaf().workload(&[&middle], &[&other, &root], &plain).verify_own_path(now).unwrap();
    let cut = leaf().workload(&[], &[&root], &plain).verify_own_path(now);
    assert_eq!(cut.unwrap_err(), "UnknownIssuer");
    let strange = leaf().workload(&[&middle], &[&other], &plain).verify_own_path(now);
    assert_eq!(strange.unwrap_err(), "UnknownIssuer");
    let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    let half = root.leaf(Wanted { usages, ..Wanted::uris(&[X]) });
    half.workload(&[], &[&root], &plain).verify_own_path(now).unwrap_err();
}
