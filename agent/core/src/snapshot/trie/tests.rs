#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::hash::{Hash, Hasher};

use proptest::prelude::*;

use super::*;

/// A key all of whose values share few hashes, so that leaves overflow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Colliding(u16);

impl Hash for Colliding {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.0 % 3).hash(state);
    }
}

fn same<K: Hash + Eq + Clone>(changes: Vec<(K, Option<u32>)>) {
    let mut model = HashMap::new();
    let mut trie = Trie::default();
    let mut earlier = Vec::new();
    for (key, change) in changes {
        earlier.push((trie.clone(), model.clone()));
        match change {
            Some(value) => {
                assert_eq!(trie.insert(key.clone(), value), model.insert(key, value));
            }
            None => assert_eq!(trie.remove(&key), model.remove(&key)),
        }
    }
    earlier.push((trie, model));
    for (trie, model) in earlier {
        assert_eq!(trie.len(), model.len());
        assert_eq!(trie.iter().count(), model.len());
        assert!(trie.iter().all(|(key, value)| model.get(key) == Some(value)));
        assert!(model.iter().all(|(key, value)| trie.get(key) == Some(value)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn behaves_like_a_hash_map(
        changes in prop::collection::vec((0..200u16, prop::option::weighted(0.7, any::<u32>())), 0..300),
    ) {
        same(changes);
    }

    #[test]
    fn colliding_hashes_do_not_confuse_keys(
        changes in prop::collection::vec((0..60u16, prop::option::weighted(0.7, any::<u32>())), 0..150),
    ) {
        same(changes.into_iter().map(|(key, change)| (Colliding(key), change)).collect());
    }
}

#[test]
fn a_clone_is_the_same_until_one_of_both_changes() {
    let mut trie = Trie::default();
    trie.insert("a", 1);
    let clone = trie.clone();
    assert!(trie.is_same(&clone));
    assert_eq!(trie.remove("b"), None);
    assert!(trie.is_same(&clone));
    trie.insert("b", 2);
    assert!(!trie.is_same(&clone));
    assert_eq!((trie.get("b"), clone.get("b")), (Some(&2), None));
}
