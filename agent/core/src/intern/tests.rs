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
fn what_was_made_of_the_same_bytes_is_made_once() {
    let mut interner = Interner::default();
    let mut made = 0;
    let mut members = |interner: &mut Interner, source: &[u8], port| {
        let make = |texts: &mut Interner| {
            made += 1;
            Ok::<_, ()>(Memberships::from([(texts.hostname("shop", "api"), [(port, port)].into())]))
        };
        interner.memberships_of(source, make).unwrap()
    };
    let one = members(&mut interner, b"one", 1);
    assert_eq!(members(&mut interner, b"one", 2), one);
    assert_ne!(members(&mut interner, b"two", 2), one);
    assert_eq!(made, 2);
    assert_eq!(interner.memberships_of(b"bad", |_| Err("bad")), Err("bad"));
    assert!(interner.memberships_of(b"bad", |_| Ok::<_, ()>(Memberships::default())).is_ok());
}

#[test]
fn a_text_like_the_last_one_is_the_same() {
    let (mut interner, mut last) = (Interner::default(), Last::default());
    let first = interner.text("a");
    assert!(Arc::ptr_eq(&interner.text_like(&mut last, "a"), &first));
    assert!(Arc::ptr_eq(&interner.text_like(&mut last, "a"), &first));
    assert_eq!(*interner.text_like(&mut last, "b"), *"b");
    assert_eq!(*interner.text_like(&mut last, ""), *"");
    assert!(Arc::ptr_eq(&interner.text_like(&mut last, "a"), &first));
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
