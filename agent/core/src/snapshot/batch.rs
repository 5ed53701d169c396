//! The changes of one step to one kind of thing: what goes and what comes, as each is made.

use std::sync::Arc;

use hashbrown::HashTable;
use hashbrown::hash_table::Entry;

use super::trie::{Kind, Step, Trie};

/// Takes changes on top of a set of things that each have a key of their own.
pub(super) struct Batch<'a, T, S> {
    base: &'a Trie<T>,
    /// Of the set itself.
    steps: Vec<Step<T>>,
    /// Places in `steps`: the last one of each key.
    by_key: HashTable<u32>,
    others: S,
}

/// Collects the steps of all other indexes of a thing, while it is at hand.
pub(super) trait Indexes<T> {
    /// `hash` is that of the thing's own key.
    fn add(&mut self, kind: Kind, hash: u64, value: &Arc<T>);
}

impl<'a, T: PartialEq, S: Indexes<T>> Batch<'a, T, S> {
    pub fn on(base: &'a Trie<T>, others: S) -> Self {
        Self { base, steps: Vec::new(), by_key: HashTable::new(), others }
    }

    /// Replaces what has the same key. What is just as it was keeps its place among others.
    pub fn insert(&mut self, hash: u64, value: Arc<T>, has_key: impl Fn(&T) -> bool) {
        let old = self.now(hash, &has_key);
        if old.is_some_and(|old| **old == *value) {
            return;
        }
        if let Some(old) = old.cloned() {
            self.add(Kind::Remove, hash, old, &has_key);
        }
        self.add(Kind::Insert, hash, value, has_key);
    }

    pub fn remove(&mut self, hash: u64, has_key: impl Fn(&T) -> bool) {
        if let Some(old) = self.now(hash, &has_key).cloned() {
            self.add(Kind::Remove, hash, old, has_key);
        }
    }

    /// The steps of the set, and those of its other indexes.
    pub fn end(self) -> (Vec<Step<T>>, S) {
        (self.steps, self.others)
    }

    /// What has the key after all steps so far.
    fn now(&self, hash: u64, has_key: impl Fn(&T) -> bool) -> Option<&Arc<T>> {
        let is_it = |place: &u32| is_of(&self.steps, *place, hash, &has_key);
        let last = self.by_key.find(hash, is_it).and_then(|at| self.steps.get(*at as usize));
        match last {
            None => self.base.find(hash, has_key),
            Some(Step { kind: Kind::Insert, value, .. }) => Some(value),
            Some(Step { kind: Kind::Remove, .. }) => None,
        }
    }

    fn add(&mut self, kind: Kind, hash: u64, value: Arc<T>, has_key: impl Fn(&T) -> bool) {
        self.others.add(kind, hash, &value);
        // A batch has fewer than 2^32 steps: they would not fit into memory.
        let place = self.steps.len() as u32;
        self.steps.push(Step { hash, value, kind });
        let steps = &self.steps;
        let is_it = |place: &u32| is_of(steps, *place, hash, &has_key);
        let hash_of = |place: &u32| steps.get(*place as usize).map_or(0, |step| step.hash);
        match self.by_key.entry(hash, is_it, hash_of) {
            Entry::Occupied(mut last) => *last.get_mut() = place,
            Entry::Vacant(none) => {
                none.insert(place);
            }
        }
    }
}

fn is_of<T>(steps: &[Step<T>], place: u32, hash: u64, has_key: impl Fn(&T) -> bool) -> bool {
    steps.get(place as usize).is_some_and(|step| step.hash == hash && has_key(&step.value))
}
