#![allow(clippy::unwrap_used)]

use super::*;

#[test]
fn equal_values_are_kept_once() {
    let mut interner = Interner::default();
    let one = interner.hostname("shop", "api.shop");
    let two = interner.hostname("shop", "api.shop");
    assert!(Arc::ptr_eq(&one.namespace, &two.namespace));
    assert!(Arc::ptr_eq(&one.hostname, &two.hostname));
    let ports = || PortMap::from([(80, 8080)]);
    let first = interner.ports(ports());
    assert_eq!(interner.ports(ports()), first);
    assert_eq!(first.sharers(), 2, "the pool and this");
    let members = interner.memberships([(one, first)].into());
    assert_eq!(members.sharers(), 2);
}

#[test]
fn what_nobody_holds_is_forgotten() {
    let mut interner = Interner::default();
    let held = interner.text("held");
    for number in 0..100_000 {
        interner.text(&number.to_string());
        assert!(interner.texts.known.len() <= FEW, "{number}");
    }
    assert!(Arc::ptr_eq(&held, &interner.text("held")));
}
