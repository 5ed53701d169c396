//! Certificates from Istio's certificate service, over the wire: what is asked, what is accepted.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use culvert_agent::ca::{AnswerFault, CaError, Certificates, IstioCa};
use culvert_agent::config::{CaSettings, ControlPlane, Roots, Token};
use culvert_agent::tls::{
    self, CrlFile, HANDSHAKE_LIMIT, PeerFault, TlsError, Trust, WorkloadCertificate,
};
use culvert_core::identity::Identity;
use culvert_tests::control::ca::{Behaviour, TestCa};
use culvert_tests::control::{Listen, Pki, Serving};
use rand::SeedableRng;
use rand::rngs::StdRng;
use tempfile::TempDir;
use time::OffsetDateTime;
use tonic::Code;
use tonic::service::Routes;

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate service with its server, and what an agent is given to reach it.
struct Scene {
    ca: TestCa,
    pki: Pki,
    server: Serving,
    files: TempDir,
}

impl Scene {
    fn start(ca: TestCa) -> Self {
        let pki = Pki::new().unwrap();
        let server = serve(&pki, &ca);
        let files = TempDir::new().unwrap();
        ca.require("token-1", "cluster-1");
        fs::write(files.path().join("token"), "token-1").unwrap();
        fs::write(files.path().join("root-cert.pem"), pki.root()).unwrap();
        Self { ca, pki, server, files }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.files.path().join(name)
    }

    fn settings(&self) -> CaSettings {
        let control = ControlPlane {
            addresses: vec![self.server.address()],
            roots: Roots::File(self.path("root-cert.pem")),
            alt_hostname: None,
            token: Some(Token::File(self.path("token"))),
            headers: vec![],
            cluster_id: "cluster-1".into(),
        };
        CaSettings { control, ttl: DAY }
    }

    fn cache(&self) -> Certificates {
        cache(&self.settings(), Trust::default())
    }
}

fn serve(pki: &Pki, ca: &TestCa) -> Serving {
    Serving::start(Listen::Loopback, pki, Routes::new(ca.clone().service())).unwrap()
}

fn cache(settings: &CaSettings, trust: Trust) -> Certificates {
    let source = Arc::new(IstioCa::new(settings));
    let random = StdRng::seed_from_u64(7);
    Certificates::start(source, trust, Arc::new(OffsetDateTime::now_utc), random)
}

fn id(name: &str) -> Identity {
    Identity::new("td1", "a", name)
}

async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, what).await.expect("it takes too long")
}

async fn fetch(cache: &Certificates, name: &str) -> Result<Arc<WorkloadCertificate>, Arc<CaError>> {
    within(cache.fetch(&id(name))).await
}

/// Fetches again and again until it succeeds.
async fn fetched(cache: &Certificates, name: &str) -> Arc<WorkloadCertificate> {
    within(async {
        loop {
            match cache.fetch(&id(name)).await {
                Ok(certificate) => return certificate,
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    })
    .await
}

type Handshake = (Result<Identity, TlsError>, Result<usize, TlsError>);

/// What the server says of the client, and how many certificates the client was shown.
async fn handshake(server: &WorkloadCertificate, client: &WorkloadCertificate) -> Handshake {
    let (near, far) = tokio::io::duplex(16384);
    let expect = [server.identity().clone()];
    let (accepted, connected) = tokio::join!(
        tls::accept(near, server, HANDSHAKE_LIMIT),
        tls::connect(far, client, &expect, HANDSHAKE_LIMIT)
    );
    let shown = connected.map(|stream| stream.peer_certificates().len());
    (accepted.map(|(_, identity)| identity), shown)
}

#[tokio::test]
async fn request_carries_identity_lifetime_token_and_cluster() {
    let scene = Scene::start(TestCa::default());
    let cache = scene.cache();
    let certificate = fetch(&cache, "x").await.unwrap();
    assert_eq!(certificate.identity(), &id("x"));
    let [asked] = scene.ca.asked().try_into().unwrap();
    assert_eq!(asked.identity, "spiffe://td1/ns/a/sa/x");
    assert_eq!((asked.token.as_deref(), asked.lifetime), (Some("token-1"), 86_400));
}

#[tokio::test]
async fn intermediates_are_presented_to_peers_and_both_roots_of_a_rotation_trusted() {
    // C4: leaf, int1, int2, root.
    let scene = Scene::start(TestCa::new(2));
    let cache = scene.cache();
    let old = fetch(&cache, "old").await.unwrap();
    assert_eq!((old.chain().len(), old.roots().len()), (3, 1));
    // C3: leaf, rootA + rootB.
    scene.ca.announce_root(0);
    let both = fetch(&cache, "both").await.unwrap();
    assert_eq!((both.chain().len(), both.roots().len()), (3, 2));
    scene.ca.switch_root();
    let between = fetch(&cache, "between").await.unwrap();
    assert_eq!((between.chain().len(), between.roots().len()), (1, 2));
    let untrusted =
        |outcome: &TlsError| matches!(outcome, TlsError::Peer(PeerFault::UntrustedRoot));
    for (server, client) in [(&between, &both), (&both, &between), (&both, &old)] {
        let (principal, shown) = handshake(server, client).await;
        assert_eq!(&principal.unwrap(), client.identity());
        assert_eq!(shown.unwrap(), server.chain().len());
    }
    // Who knows only the old root refuses what the new one signed, in both roles.
    assert!(handshake(&old, &between).await.0.is_err_and(|error| untrusted(&error)));
    assert!(handshake(&between, &old).await.1.is_err_and(|error| untrusted(&error)));
    // The old root goes: who was signed by it is refused by the next handshake.
    scene.ca.drop_other_roots();
    let new = fetch(&cache, "new").await.unwrap();
    assert_eq!((new.chain().len(), new.roots().len()), (1, 1));
    assert!(handshake(&new, &both).await.0.is_err_and(|error| untrusted(&error)));
    assert_eq!(handshake(&new, &between).await.0.unwrap(), id("between"));
}

#[tokio::test]
async fn wrong_answers_are_refused_with_their_reason_and_asked_for_again() {
    let scene = Scene::start(TestCa::default());
    let wrong = |uri: &str| Behaviour::WrongIdentity(uri.to_owned());
    for (row, behaviour, part) in [
        ("c6", wrong("spiffe://td1/ns/a/sa/other"), "is for spiffe://td1/ns/a/sa/other"),
        ("trust-domain", wrong("spiffe://td2/ns/a/sa/trust-domain"), "is for spiffe://td2/"),
        ("foreign", wrong("spiffe://td1/workload"), "for no workload"),
        ("c5", Behaviour::OneElement, "no root certificate present"),
        ("nothing", Behaviour::Nothing, "certificate list is empty"),
        ("garbage", Behaviour::Garbage, "element 0 contains no pem block"),
        ("expired", Behaviour::Expired, "the certificate expired at"),
        ("early", Behaviour::NotYetValid, "is not valid before"),
        ("rootless", Behaviour::OtherRoot, "does not hold under the roots"),
        ("key", Behaviour::AnotherKey, "key does not fit the certificate"),
    ] {
        let cache = scene.cache();
        let asked = scene.ca.asked().len();
        scene.ca.next([behaviour]);
        let error = fetch(&cache, row).await.unwrap_err();
        let text = error.to_string();
        let begin = format!(
            "certificate authority {} answered wrongly for {}: ",
            scene.server.address(),
            id(row)
        );
        assert!(text.starts_with(&begin) && text.contains(part), "{row}: {text}");
        assert_eq!(cache.states()[0].state.to_string(), format!("Unavailable: {text}"));
        assert_eq!(cache.failed_requests(), 1);
        let certificate = fetched(&cache, row).await;
        assert_eq!(certificate.identity(), &id(row));
        let asked = &scene.ca.asked()[asked..];
        assert_eq!(asked.len(), 2, "{row}");
        let pause = asked[1].at - asked[0].at;
        assert!(pause >= Duration::from_millis(790), "{row}: {pause:?}");
    }
}

#[tokio::test]
async fn refusals_are_told_with_their_hint_and_end_by_themselves() {
    let scene = Scene::start(TestCa::default());
    let message = "request impersonation authentication failure".to_owned();
    scene.ca.next([Behaviour::Refuse(Code::Unauthenticated, message)]);
    let cache = scene.cache();
    let text = fetch(&cache, "x").await.unwrap_err().to_string();
    let address = scene.server.address();
    let begin = format!("certificate authority {address} failed for {}: ", id("x"));
    assert!(text.starts_with(&begin) && text.contains("CA_TRUSTED_NODE_ACCOUNTS"), "{text}");
    fetched(&cache, "x").await;
}

#[tokio::test]
async fn token_is_read_for_every_request() {
    // C17.
    let scene = Scene::start(TestCa::default());
    let cache = scene.cache();
    fetch(&cache, "before").await.unwrap();
    scene.ca.require("token-2", "cluster-1");
    let text = fetch(&cache, "refused").await.unwrap_err().to_string();
    assert!(text.contains("request authenticate failure") && text.contains("istio-ca"), "{text}");
    fs::write(scene.path("token"), "token-2\n").unwrap();
    fetch(&cache, "after").await.unwrap();
    let last = scene.ca.asked().pop().unwrap();
    assert_eq!(last.token.as_deref(), Some("token-2"));
    fs::remove_file(scene.path("token")).unwrap();
    let text = fetch(&cache, "without").await.unwrap_err().to_string();
    assert!(text.contains("token for the control plane, file"), "{text}");
}

#[tokio::test]
async fn many_waiters_make_one_request_and_many_identities_at_most_eight_at_once() {
    let scene = Scene::start(TestCa::default());
    let cache = Arc::new(scene.cache());
    scene.ca.hold();
    // C9.
    let waiting: Vec<_> = (0..100)
        .map(|_| {
            let cache = cache.clone();
            tokio::spawn(async move { cache.fetch(&id("one")).await.map(drop) })
        })
        .collect();
    // C10.
    let identities: Vec<_> = (0..20).map(|number| id(&format!("many-{number}"))).collect();
    identities.iter().for_each(|identity| cache.prefetch(identity));
    within(async {
        while scene.ca.asked().len() < 8 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    scene.ca.release();
    for waiter in waiting {
        within(waiter).await.unwrap().unwrap();
    }
    for identity in &identities {
        within(cache.fetch(identity)).await.unwrap();
    }
    assert_eq!((scene.ca.asked().len(), scene.ca.most_at_once()), (21, 8));
}

#[tokio::test]
async fn authority_that_restarts_is_asked_again_at_once() {
    let mut scene = Scene::start(TestCa::default());
    let cache = scene.cache();
    fetch(&cache, "before").await.unwrap();
    scene.server.restart().unwrap();
    fetch(&cache, "after").await.unwrap();
}

#[tokio::test]
async fn other_addresses_serve_when_the_first_is_gone_or_silent() {
    let scene = Scene::start(TestCa::default());
    let silent = TestCa::default();
    silent.usually(Behaviour::Hang);
    let hanging = serve(&scene.pki, &silent);
    let gone = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("https://{}", listener.local_addr().unwrap())
    };
    let mut settings = scene.settings();
    settings.control.addresses = vec![gone, hanging.address(), scene.server.address()];
    let cache = cache(&settings, Trust::default());
    let begun = Instant::now();
    fetch(&cache, "x").await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert_eq!((silent.asked().len(), scene.ca.asked().len()), (1, 1));
    // What did answer stays.
    fetch(&cache, "y").await.unwrap();
    assert_eq!((silent.asked().len(), scene.ca.asked().len()), (1, 2));
}

#[tokio::test]
async fn channel_is_made_again_with_new_roots_and_the_old_one_kept_when_that_fails() {
    let scene = Scene::start(TestCa::default());
    let cache = scene.cache();
    let roots = scene.path("root-cert.pem");
    fetch(&cache, "before").await.unwrap();
    // No server has a certificate of this root: the connection that stands is used.
    fs::write(&roots, Pki::new().unwrap().root()).unwrap();
    fetch(&cache, "kept").await.unwrap();
    fs::write(&roots, "no certificate").unwrap();
    fetch(&cache, "still").await.unwrap();
    fs::remove_file(&roots).unwrap();
    fetch(&cache, "even-now").await.unwrap();
    fs::write(&roots, scene.pki.root()).unwrap();
    fetch(&cache, "again").await.unwrap();
    assert_eq!(scene.ca.asked().len(), 5);

    // Without a connection that stands, wrong roots are fatal, and told.
    fs::write(&roots, Pki::new().unwrap().root()).unwrap();
    let text = fetch(&scene.cache(), "new").await.unwrap_err().to_string();
    assert!(text.contains(&scene.server.address()) && text.contains("tls"), "{text}");
}

#[tokio::test]
async fn answer_for_an_identity_that_was_forgotten_is_discarded() {
    // C12.
    let scene = Scene::start(TestCa::default());
    let cache = Arc::new(scene.cache());
    scene.ca.hold();
    let waiting = tokio::spawn({
        let cache = cache.clone();
        async move { cache.fetch(&id("x")).await.map(drop) }
    });
    within(async {
        while scene.ca.asked().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    cache.forget(&id("x"));
    let error = within(waiting).await.unwrap().unwrap_err();
    assert!(matches!(&*error, CaError::Forgotten { .. }), "{error}");
    scene.ca.release();
    fetch(&cache, "y").await.unwrap();
    let known: Vec<_> = cache.states().into_iter().map(|state| state.identity).collect();
    assert_eq!(known, [id("y")]);
}

#[tokio::test]
async fn identity_that_no_certificate_can_carry_is_not_asked_for() {
    let scene = Scene::start(TestCa::default());
    let cache = scene.cache();
    let text = fetch(&cache, "").await.unwrap_err().to_string();
    assert!(text.contains("a part of the identity is empty"), "{text}");
    assert!(scene.ca.asked().is_empty());
}

#[tokio::test]
async fn wrong_identity_is_a_fault_of_the_answer() {
    let scene = Scene::start(TestCa::default());
    scene.ca.next([Behaviour::WrongIdentity("spiffe://td1/ns/b/sa/x".to_owned())]);
    let error = fetch(&scene.cache(), "x").await.unwrap_err();
    let issued = Identity::new("td1", "b", "x");
    let expected =
        |fault: &AnswerFault| matches!(fault, AnswerFault::WrongIdentity(id) if *id == issued);
    assert!(matches!(&*error, CaError::Answer { fault, .. } if expected(fault)), "{error}");
}

/// The serial number of a certificate as bytes.
fn serial(certificate: &WorkloadCertificate) -> Vec<u8> {
    culvert_tests::serial_bytes(&certificate.chain()[0].serial).unwrap()
}

async fn refused_as_revoked(
    crl: &Path,
    text: &str,
    server: &WorkloadCertificate,
    client: &WorkloadCertificate,
    wanted: bool,
) {
    fs::write(crl, text).unwrap();
    within(async {
        loop {
            let revoked = handshake(server, client).await.0.is_err_and(|error| error.is_revoked());
            if revoked == wanted {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn revocation_lists_of_the_authority_are_followed() {
    let scene = Scene::start(TestCa::new(1));
    let crl = scene.path("ca-crl.pem");
    let file = CrlFile::open(&crl).unwrap();
    let trust = Trust { revocations: file.revocations(), ..Trust::default() };
    let following = tokio::spawn(file.follow());
    let cache = cache(&scene.settings(), trust);
    let (server, client) =
        (fetch(&cache, "server").await.unwrap(), fetch(&cache, "client").await.unwrap());
    assert_eq!(handshake(&server, &client).await.0.unwrap(), id("client"));
    // C13, C14, C16.
    let listed = scene.ca.revoke(&[serial(&client)]);
    refused_as_revoked(&crl, &listed, &server, &client, true).await;
    let stranger = TestCa::new(1).revoke(&[serial(&client)]);
    refused_as_revoked(&crl, &stranger, &server, &client, false).await;
    refused_as_revoked(&crl, &listed, &server, &client, true).await;
    refused_as_revoked(&crl, "", &server, &client, false).await;
    following.abort();
}
