#![allow(clippy::unwrap_used)]

use std::time::Duration;

use culvert_core::identity::Identity;
use tokio::io::{DuplexStream, duplex};

use super::super::testing::{Authority, Leaf, Wanted};
use super::super::{
    HANDSHAKE_LIMIT, PeerFault, TlsError, TlsStream, Trust, WorkloadCertificate, accept, connect,
};
use super::*;

const SERVER: &str = "spiffe://td1/ns/a/sa/server";
const CLIENT: &str = "spiffe://td1/ns/a/sa/client";
const LIMIT: Duration = Duration::from_secs(20);

fn pem(der: &[u8]) -> String {
    let parsed = x509_parser::pem::Pem { label: "X509 CRL".into(), contents: der.to_vec() };
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(&parsed.contents);
    format!("-----BEGIN {0}-----\n{text}\n-----END {0}-----\n", parsed.label)
}

fn list(pems: &[String]) -> RevocationList {
    RevocationList::parse(pems.concat().as_bytes()).unwrap()
}

fn trust(revocations: &Revocations) -> Trust {
    Trust { revocations: revocations.clone(), ..Trust::default() }
}

type Accepted = Result<(TlsStream<DuplexStream>, Identity), TlsError>;
type Connected = Result<TlsStream<DuplexStream>, TlsError>;

async fn handshake(
    server: &WorkloadCertificate,
    client: &WorkloadCertificate,
) -> (Accepted, Connected) {
    let (near, far) = duplex(16384);
    let expect = [SERVER.parse().unwrap()];
    tokio::join!(
        accept(near, server, HANDSHAKE_LIMIT),
        connect(far, client, &expect, HANDSHAKE_LIMIT)
    )
}

/// A root, an intermediate under it, and the leaves of two peers under that.
struct Peers {
    root: Authority,
    middle: Authority,
    server: Leaf,
    client: Leaf,
}

impl Peers {
    fn new() -> Self {
        let root = Authority::root("root");
        let middle = root.intermediate("middle");
        let server = middle.leaf(Wanted::uris(&[SERVER]));
        let client = middle.leaf(Wanted::uris(&[CLIENT]));
        Self { root, middle, server, client }
    }

    fn certificate(&self, leaf: &Leaf, revocations: &Revocations) -> WorkloadCertificate {
        leaf.workload(&[&self.middle], &[&self.root], &trust(revocations))
    }

    /// What each of the two says to the other under the same lists.
    async fn meet(&self, lists: RevocationList) -> (Option<PeerFault>, Option<PeerFault>) {
        let (checked, unchecked) = (Revocations::starting_with(lists), Revocations::default());
        let fault = |error| match error {
            TlsError::Peer(fault) => fault,
            other => panic!("expected a fault of the peer's certificate, got {other:?}"),
        };
        let (server, client) =
            (self.certificate(&self.server, &checked), self.certificate(&self.client, &unchecked));
        let as_server = handshake(&server, &client).await.0.err().map(fault);
        let (server, client) =
            (self.certificate(&self.server, &unchecked), self.certificate(&self.client, &checked));
        let as_client = handshake(&server, &client).await.1.err().map(fault);
        (as_server, as_client)
    }
}

#[tokio::test]
async fn revoked_certificates_of_the_chain_are_refused_in_both_roles() {
    let peers = Peers::new();
    let revoked = Some(PeerFault::Revoked);
    let Peers { root, middle, server, client } = &peers;
    let stranger = Authority::root("stranger");
    let namesake = Authority::root("middle");
    let of = |issuer: &Authority, revoked: &[&[u8]]| pem(&issuer.revoking(revoked));
    let both: &[&[u8]] = &[&server.der, &client.der];
    for (row, lists, as_server, as_client) in [
        ("C13: the client's serial", vec![of(middle, &[&client.der])], revoked.clone(), None),
        ("C13: the server's serial", vec![of(middle, &[&server.der])], None, revoked.clone()),
        ("C14: another issuer's list", vec![of(&stranger, both)], None, None),
        ("another issuer of the same name", vec![of(&namesake, both)], None, None),
        (
            "the right list after a namesake's",
            vec![of(&namesake, both), of(middle, both)],
            revoked.clone(),
            revoked.clone(),
        ),
        ("the root's list with leaves' serials", vec![of(root, both)], None, None),
        ("C15: the intermediate", vec![of(root, &[&middle.der])], revoked.clone(), revoked.clone()),
        ("nobody is listed", vec![of(root, &[]), of(middle, &[])], None, None),
        ("C16: no list", vec![], None, None),
    ] {
        assert_eq!(peers.meet(list(&lists)).await, (as_server, as_client), "{row}");
    }
}

#[tokio::test]
async fn live_connections_learn_of_a_revocation_and_others_go_on() {
    let peers = Peers::new();
    let lists = Revocations::starting_with(RevocationList::default());
    let server = peers.certificate(&peers.server, &lists);
    let client = peers.certificate(&peers.client, &lists);
    let (accepted, connected) = handshake(&server, &client).await;
    let (accepted, connected) = (accepted.unwrap().0, connected.unwrap());
    let mut of_client = Box::pin(server.watch_client(&accepted).revoked());
    let mut of_server = Box::pin(client.watch_server(&connected).revoked());
    let pending = async |watch: &mut std::pin::Pin<Box<_>>| {
        tokio::time::timeout(Duration::from_millis(50), watch).await.is_err()
    };
    lists.replace(list(&[pem(&Authority::root("stranger").revoking(&[&peers.client.der]))]));
    assert!(pending(&mut of_client).await && pending(&mut of_server).await);

    let revoking = || pem(&peers.middle.revoking(&[&peers.client.der]));
    lists.replace(list(&[revoking()]));
    tokio::time::timeout(LIMIT, &mut of_client).await.unwrap();
    assert!(pending(&mut of_server).await);
    // The server's own connection is judged by what the client presented, not by our certificate.
    lists.replace(list(&[pem(&peers.root.revoking(&[&peers.middle.der]))]));
    tokio::time::timeout(LIMIT, &mut of_server).await.unwrap();

    // C16: emptied lists admit everybody again.
    lists.replace(RevocationList::parse(b"").unwrap());
    let (accepted, _connected) = handshake(&server, &client).await;
    let (accepted, _) = accepted.unwrap();
    // A revocation between the handshake and the watch is not missed.
    lists.replace(list(&[revoking()]));
    tokio::time::timeout(LIMIT, server.watch_client(&accepted).revoked()).await.unwrap();
}

#[tokio::test]
async fn certificate_that_ended_meanwhile_is_not_taken_for_revoked_and_still_can_be() {
    let peers = Peers::new();
    let lists = Revocations::starting_with(RevocationList::default());
    let roots = {
        let mut roots = RootCertStore::empty();
        roots.add(peers.root.der.clone().into()).unwrap();
        Arc::new(roots)
    };
    let chain: Vec<CertificateDer<'_>> =
        vec![peers.client.der.clone().into(), peers.middle.der.clone().into()];
    let PeerWatch::Tracked(mut watch) = lists.watch(Some(&chain), &roots, Role::Client) else {
        panic!("not tracked");
    };
    // As of a handshake that was made while it was valid; now, by contrast, it is over.
    let (then, long_after) = (watch.at, UnixTime::since_unix_epoch(LIMIT * 1_000_000_000));
    let revoking = list(&[pem(&peers.middle.revoking(&[&peers.client.der]))]);
    assert!(revoking.revokes(&chain, &roots.roots, Role::Client, then));
    assert!(!revoking.revokes(&chain, &roots.roots, Role::Client, long_after));
    watch.at = then;
    lists.replace(revoking);
    tokio::time::timeout(LIMIT, watch.revoked()).await.unwrap();
}

#[tokio::test]
async fn agent_without_lists_tracks_nothing() {
    let peers = Peers::new();
    let none = Revocations::default();
    none.replace(list(&[pem(&peers.middle.revoking(&[&peers.client.der]))]));
    let server = peers.certificate(&peers.server, &none);
    let client = peers.certificate(&peers.client, &none);
    let (accepted, _connected) = handshake(&server, &client).await;
    let watch = server.watch_client(&accepted.unwrap().0);
    assert!(matches!(watch, PeerWatch::Off));
    let roots = Arc::new(RootCertStore::empty());
    let some = Revocations::starting_with(RevocationList::default());
    assert!(some.watch(None, &roots, Role::Client).is_untracked());
}

#[test]
fn files_are_pem_with_anything_in_between_or_der_or_empty() {
    let (a, b) = (Authority::root("a"), Authority::root("b"));
    let (first, second) = (a.revoking(&[]), b.revoking(&[&a.der]));
    let count = |bytes: &[u8]| RevocationList::parse(bytes).map(|list| list.len()).ok();
    let mixed = format!("\n{}{}some words\n{}", pem(&first), a.pem, pem(&second));
    assert_eq!(count(mixed.as_bytes()), Some(2));
    assert_eq!(count(&second), Some(1));
    assert_eq!(count(b""), Some(0));
    assert_eq!(count(b" \n"), Some(0));
    assert_eq!(count(a.pem.as_bytes()), Some(0));
    for broken in [
        b"no list at all".to_vec(),
        first[..first.len() - 1].to_vec(),
        pem(&first[..40]).into_bytes(),
        pem(&first).replace("-----END X509 CRL-----", "").into_bytes(),
        a.der.clone(),
    ] {
        assert_eq!(count(&broken), None, "{}", String::from_utf8_lossy(&broken));
    }
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
        let _ = RevocationList::parse(&bytes);
        let _ = RevocationList::parse(pem(&bytes).as_bytes());
    }
}
