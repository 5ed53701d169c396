#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;

type Item = (u16, u32);

/// Maps keys to hashes that few share, or none.
fn same(batches: Vec<Vec<(u16, Option<u32>)>>, hash_of: fn(&Trie<Item>, u16) -> u64) {
    let mut model: Vec<Arc<Item>> = Vec::new();
    let mut trie = Trie::default();
    let mut earlier = Vec::new();
    for batch in batches {
        earlier.push((trie.clone(), model.clone()));
        let mut steps = Vec::new();
        for (key, change) in batch {
            let hash = hash_of(&trie, key);
            match change {
                Some(value) => {
                    let value = Arc::new((key, value));
                    model.push(value.clone());
                    steps.push(Step { hash, value, kind: Kind::Insert });
                }
                None => {
                    let gone = model.extract_if(.., |item| item.0 == key);
                    steps.extend(gone.map(|value| Step { hash, value, kind: Kind::Remove }));
                }
            }
        }
        trie.apply(steps);
    }
    earlier.push((trie, model));
    for (trie, model) in earlier {
        assert_eq!(trie.len(), model.len());
        assert_eq!(trie.values().count(), model.len());
        for key in 0..200 {
            let hash = hash_of(&trie, key);
            let expected: Vec<&Arc<Item>> = model.iter().filter(|item| item.0 == key).collect();
            let found: Vec<_> = trie.matching(hash, |item| item.0 == key).collect();
            assert_eq!(found, expected, "{key}");
            assert_eq!(trie.find(hash, |item| item.0 == key), expected.first().copied());
            let last = trie.matching(hash, |item| item.0 == key).next_back();
            assert_eq!(last, expected.last().copied());
        }
    }
}

fn any_batches(keys: u16, most: usize) -> impl Strategy<Value = Vec<Vec<(u16, Option<u32>)>>> {
    let change = (0..keys, prop::option::weighted(0.7, any::<u32>()));
    prop::collection::vec(prop::collection::vec(change, 0..most), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn keeps_values_by_key_in_their_order(batches in any_batches(200, 100)) {
        same(batches, |trie, key| trie.hash(&key));
    }

    #[test]
    fn colliding_hashes_do_not_confuse_keys(batches in any_batches(60, 30)) {
        same(batches, |trie, key| trie.hash(&(key % 3)));
    }

    #[test]
    fn hashes_that_differ_late_are_told_apart(batches in any_batches(60, 60)) {
        same(batches, |_, key| u64::from(key % 40));
    }
}

#[test]
fn a_clone_is_the_same_until_one_of_both_changes() {
    let (one, two) = (Arc::new("a"), Arc::new("b"));
    let insert =
        |value: &Arc<&'static str>| Step { hash: 7, value: value.clone(), kind: Kind::Insert };
    let mut trie = Trie::default();
    trie.apply(vec![insert(&one)]);
    let clone = trie.clone();
    assert!(trie.is_same(&clone));
    trie.apply(vec![]);
    assert!(trie.is_same(&clone));
    trie.apply(vec![insert(&two)]);
    assert!(!trie.is_same(&clone));
    assert_eq!((trie.len(), clone.len()), (2, 1));
}
