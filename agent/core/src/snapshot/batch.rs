//! The changes of one step to one kind of thing, reduced to what they come to.

use std::sync::Arc;

use hashbrown::HashTable;

use super::trie::{Kind, Step, Trie};

/// Collects changes on top of a set of things that each have a key of their own.
pub(super) struct Batch<'a, T> {
    base: &'a Trie<T>,
    touched: Vec<Touched<T>>,
    /// Places in `touched`.
    by_key: HashTable<u32>,
    insertions: u32,
}

struct Touched<T> {
    hash: u64,
    /// As it is in the set.
    old: Option<Arc<T>>,
    /// As it is to be, and which of all insertions that was.
    new: Option<(u32, Arc<T>)>,
}

impl<T> Touched<T> {
    /// `None`: it came and went within the batch.
    fn known(&self) -> Option<&T> {
        self.new.as_ref().map(|(_, new)| &**new).or(self.old.as_deref())
    }
}

impl<'a, T: PartialEq> Batch<'a, T> {
    pub fn on(base: &'a Trie<T>) -> Self {
        Self { base, touched: Vec::new(), by_key: HashTable::new(), insertions: 0 }
    }

    /// Replaces what has the same key. What is just as it was keeps its place among others.
    pub fn insert(&mut self, hash: u64, value: T, has_key: impl Fn(&T) -> bool) {
        let place = match self.place(hash, &has_key) {
            Some(place) => place,
            None => {
                let old = self.base.find(hash, &has_key);
                if old.is_some_and(|old| **old == value) {
                    return;
                }
                self.touch(Touched { hash, old: old.cloned(), new: None })
            }
        };
        let number = self.insertions;
        let Some(touched) = self.touched.get_mut(place) else { return };
        if touched.new.as_ref().is_some_and(|(_, new)| **new == value) {
            return;
        }
        touched.new = Some((number, Arc::new(value)));
        self.insertions += 1;
    }

    pub fn remove(&mut self, hash: u64, has_key: impl Fn(&T) -> bool) {
        match self.place(hash, &has_key) {
            Some(place) => {
                if let Some(touched) = self.touched.get_mut(place) {
                    touched.new = None;
                }
            }
            None => {
                if let Some(old) = self.base.find(hash, has_key) {
                    self.touch(Touched { hash, old: Some(old.clone()), new: None });
                }
            }
        }
    }

    /// What is left of it all.
    pub fn net(mut self) -> Net<T> {
        let number = |touched: &Touched<T>| touched.new.as_ref().map(|(number, _)| *number);
        // In order already, unless a thing was changed twice.
        self.touched.sort_by_key(number);
        let mut net = Net { removed: Vec::new(), added: Vec::with_capacity(self.touched.len()) };
        for Touched { hash, old, new } in self.touched {
            net.removed.extend(old.map(|old| (hash, old)));
            net.added.extend(new.map(|(_, new)| (hash, new)));
        }
        net
    }

    fn place(&self, hash: u64, has_key: impl Fn(&T) -> bool) -> Option<usize> {
        let is_it = |place: &u32| {
            let touched = self.touched.get(*place as usize);
            touched.is_some_and(|it| it.hash == hash && it.known().is_some_and(&has_key))
        };
        self.by_key.find(hash, is_it).map(|place| *place as usize)
    }

    fn touch(&mut self, touched: Touched<T>) -> usize {
        let (place, hash) = (self.touched.len(), touched.hash);
        self.touched.push(touched);
        let all = &self.touched;
        let hash_of = |place: &u32| all.get(*place as usize).map_or(0, |touched| touched.hash);
        // A batch has fewer than 2^32 changes: they would not fit into memory.
        self.by_key.insert_unique(hash, place as u32, hash_of);
        place
    }
}

/// What leaves a set, and what comes into it, each with the hash of its key there.
pub(super) struct Net<T> {
    pub removed: Vec<(u64, Arc<T>)>,
    /// In the order in which they came.
    pub added: Vec<(u64, Arc<T>)>,
}

impl<T> Net<T> {
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn len(&self) -> usize {
        self.removed.len() + self.added.len()
    }

    /// All that leaves, then all that comes, with the hash of its key in the set.
    pub fn all(&self) -> impl Iterator<Item = Step<'_, T>> {
        let removed = self.removed.iter().map(|(hash, value)| (Kind::Remove, *hash, value));
        let added = self.added.iter().map(|(hash, value)| (Kind::Insert, *hash, value));
        removed.chain(added).map(|(kind, hash, value)| Step { hash, value, kind })
    }

    /// The steps of an index in which a thing has the hashes that `keys` gives.
    pub fn steps<'a, I: IntoIterator<Item = u64>>(
        &'a self,
        keys: impl Fn(&'a T) -> I,
    ) -> Vec<Step<'a, T>> {
        let mut steps = Vec::with_capacity(self.len());
        for Step { value, kind, .. } in self.all() {
            steps.extend(keys(value).into_iter().map(|hash| Step { hash, value, kind }));
        }
        steps
    }
}
