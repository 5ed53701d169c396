#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

proptest! {
    #[test]
    fn behaves_like_a_sorted_map(
        entries in prop::collection::vec((0..20u16, any::<u16>()), 0..30),
        more in prop::collection::vec((0..20u16, any::<u16>()), 0..5),
    ) {
        let mut model: BTreeMap<u16, u16> = entries.iter().copied().collect();
        let mut map: SortedMap<u16, u16> = entries.into_iter().collect();
        let before = map.clone();
        let unchanged = model.clone();
        for (key, value) in more {
            prop_assert_eq!(map.insert(key, value), model.insert(key, value));
        }
        for (map, model) in [(map, model), (before, unchanged)] {
            prop_assert!(map.iter().eq(model.iter()));
            prop_assert!(map.keys().eq(model.keys()) && map.values().eq(model.values()));
            prop_assert_eq!((map.len(), map.is_empty()), (model.len(), model.is_empty()));
            for key in 0..20 {
                prop_assert_eq!(map.get(&key), model.get(&key));
            }
        }
    }
}
