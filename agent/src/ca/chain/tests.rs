#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::tls::testing::{Authority, Wanted};
use crate::tls::{HANDSHAKE_LIMIT, Issued, Trust, WorkloadCertificate, accept, connect};

const X: &str = "spiffe://td1/ns/a/sa/x";

fn made(chain: IssuedChain, key: Vec<u8>) -> WorkloadCertificate {
    let issued = Issued { chain: chain.presented, key, roots: chain.roots };
    WorkloadCertificate::new(issued, &Trust::default()).unwrap()
}

#[test]
fn root_bundle_of_two_has_no_intermediates() {
    let (a, b) = (Authority::root("a"), Authority::root("b"));
    let leaf = a.leaf(Wanted::uris(&[X]));
    let chain = parse_chain(&[leaf.pem.clone(), format!("{}{}", a.pem, b.pem)]).unwrap();
    assert_eq!(chain, IssuedChain { presented: vec![leaf.der], roots: vec![a.der, b.der] });
}

#[tokio::test]
async fn peers_under_either_root_of_a_bundle_are_accepted() {
    let (a, b) = (Authority::root("a"), Authority::root("b"));
    let leaf = a.leaf(Wanted::uris(&[X]));
    let chain = parse_chain(&[leaf.pem, format!("{}{}", a.pem, b.pem)]).unwrap();
    let ours = made(chain, leaf.key);
    for (issuer, uri) in
        [(&a, "spiffe://td1/ns/a/sa/under-a"), (&b, "spiffe://td1/ns/a/sa/under-b")]
    {
        let leaf = issuer.leaf(Wanted::uris(&[uri]));
        let peer = leaf.workload(&[], &[&a], &Trust::default());
        let (near, far) = tokio::io::duplex(16384);
        let expect = [X.parse().unwrap()];
        let (accepted, connected) = tokio::join!(
            accept(near, &ours, HANDSHAKE_LIMIT),
            connect(far, &peer, &expect, HANDSHAKE_LIMIT)
        );
        assert_eq!(accepted.unwrap().1.to_string(), uri);
        connected.unwrap();
    }
}

#[test]
fn intermediates_are_presented_in_their_order() {
    let root = Authority::root("root");
    let second = root.intermediate("second");
    let first = second.intermediate("first");
    let leaf = first.leaf(Wanted::uris(&[X]));
    let elements = [leaf.pem, first.pem, second.pem, root.pem];
    let chain = parse_chain(&elements).unwrap();
    assert_eq!(chain.presented, [leaf.der, first.der, second.der]);
    assert_eq!(chain.roots, [root.der]);
}

#[test]
fn only_the_first_block_of_an_intermediate_counts() {
    let root = Authority::root("root");
    let middle = root.intermediate("middle");
    let leaf = middle.leaf(Wanted::uris(&[X]));
    let two = format!("{}{}", middle.pem, root.pem);
    let chain = parse_chain(&[leaf.pem, two, root.pem]).unwrap();
    assert_eq!(chain.presented, [leaf.der, middle.der]);
}

#[test]
fn list_without_root_or_without_anything_is_refused() {
    let root = Authority::root("root");
    let leaf = root.leaf(Wanted::uris(&[X])).pem;
    assert_eq!(parse_chain::<String>(&[]), Err(ChainError::Empty));
    assert_eq!(parse_chain(&[&leaf]), Err(ChainError::NoRoot));
    let nothing = String::new();
    assert_eq!(parse_chain(&[&leaf, &nothing]), Err(ChainError::NoBlock { position: 1 }));
    assert_eq!(parse_chain(&[&nothing, &root.pem]), Err(ChainError::NoBlock { position: 0 }));
}

#[test]
fn other_pem_among_the_roots_is_refused() {
    let root = Authority::root("root");
    let leaf = root.leaf(Wanted::uris(&[X])).pem;
    let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let label = "PRIVATE KEY".to_owned();
    let refused = parse_chain(&[leaf.clone(), format!("{}{key}", root.pem)]);
    assert_eq!(refused, Err(ChainError::NotACertificate { position: 1, label }));
    let cut = root.pem.replace("-----END CERTIFICATE-----", "");
    let refused = parse_chain(&[leaf, cut]);
    assert!(matches!(refused, Err(ChainError::Unreadable { position: 1, .. })), "{refused:?}");
}

#[test]
fn unusable_root_among_several_is_left_out() {
    let root = Authority::root("root");
    let leaf = root.leaf(Wanted::uris(&[X]));
    let unusable = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    let chain = parse_chain(&[leaf.pem, format!("{unusable}{}", root.pem)]).unwrap();
    let made = made(chain, leaf.key);
    assert_eq!(made.roots().len(), 1);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(elements in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..4)) {
        let _ = parse_chain(&elements);
    }

    #[test]
    fn any_damaged_pem_is_read_or_refused(noise in "[-A-Z a-z0-9=\n]{0,80}", at in 0usize..100) {
        let mut text = String::from("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
        let at = at.min(text.len());
        text.insert_str(at, &noise);
        let _ = parse_chain(&[text.clone(), text]);
    }
}
