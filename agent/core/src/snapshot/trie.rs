//! A persistent set of shared values by hash: a clone shares everything, a change copies paths from
//! root to leaf.
//!
//! Keys are not stored: whoever looks something up brings its hash, and tells by the value whether it
//! is the one. Several values may have one key; the last one inserted comes last. All changes of one
//! step are applied together, each path and leaf being copied once. So a set is built from nothing in
//! the same way as one value is replaced, and leaves are as large as their content.

use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::DefaultHashBuilder;

/// Hash bits that choose a branch, and the branches of one node.
const BITS: u32 = 5;
const FAN_OUT: usize = 1 << BITS;
/// A leaf with more entries becomes a branch, unless the hash has no bits left.
const LEAF_ENTRIES: usize = 16;

/// Iterates in no particular order, which differs between sets of equal content.
pub(super) struct Trie<T> {
    root: Node<T>,
    len: usize,
    /// Seeded at random, so that nobody can choose keys that collide.
    hasher: DefaultHashBuilder,
}

/// The pointers lie in the parent, so that a look-up follows one per level.
enum Node<T> {
    /// In the order of the hashes.
    Leaf(Arc<[Entry<T>]>),
    Branch(Arc<[Node<T>; FAN_OUT]>),
}

struct Entry<T> {
    hash: u64,
    value: Arc<T>,
}

/// One of the changes that are applied together.
#[derive(Debug)]
pub(super) struct Step<'a, T> {
    pub hash: u64,
    pub value: &'a Arc<T>,
    pub kind: Kind,
}

/// What becomes of the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Takes away this very value, under this hash.
    Remove,
    Insert,
}

impl<T> Trie<T> {
    /// An empty one that hashes keys as this one does.
    pub fn empty_like<U>(other: &Trie<U>) -> Self {
        Self { hasher: other.hasher.clone(), ..Self::default() }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing changed between the two; false may also be answered for equal contents.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.root, &other.root) {
            (Node::Leaf(one), Node::Leaf(two)) => Arc::ptr_eq(one, two),
            (Node::Branch(one), Node::Branch(two)) => Arc::ptr_eq(one, two),
            (Node::Leaf(_), Node::Branch(_)) | (Node::Branch(_), Node::Leaf(_)) => false,
        }
    }

    pub fn values(&self) -> Values<'_, T> {
        Values { entries: [].iter(), nodes: vec![&self.root] }
    }

    pub fn hash<Q: Hash + ?Sized>(&self, key: &Q) -> u64 {
        self.hasher.hash_one(key)
    }

    /// The first value with this hash that `is_it`.
    pub fn find(&self, hash: u64, is_it: impl Fn(&T) -> bool) -> Option<&Arc<T>> {
        let found = self.leaf(hash).iter().find(|entry| entry.hash == hash && is_it(&entry.value));
        found.map(|entry| &entry.value)
    }

    /// All values with this hash that `is_it`, in the order in which they were inserted.
    pub fn matching<'a, F: Fn(&T) -> bool + Clone>(
        &'a self,
        hash: u64,
        is_it: F,
    ) -> impl DoubleEndedIterator<Item = &'a Arc<T>> + Clone + use<'a, T, F> {
        let entries = self.leaf(hash).iter();
        let found = entries.filter(move |entry| entry.hash == hash && is_it(&entry.value));
        found.map(|entry| &entry.value)
    }

    /// Removals first, then insertions in their order.
    pub fn apply(&mut self, mut steps: Vec<Step<'_, T>>) {
        if !steps.is_empty() {
            // Stable: what has one key stays in order.
            steps.sort_by_key(|step| step.hash);
            apply(&mut self.root, 0, &steps, &mut self.len);
        }
    }

    fn leaf(&self, hash: u64) -> &[Entry<T>] {
        let mut node = &self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Leaf(entries) => return entries,
                Node::Branch(children) => {
                    node = &children[branch(hash, shift)];
                    shift += BITS;
                }
            }
        }
    }
}

/// The highest bits come first, so that the order of the hashes is that of the branches. Always below
/// `FAN_OUT`.
fn branch(hash: u64, shift: u32) -> usize {
    (hash << shift >> (u64::BITS - BITS)) as usize
}

/// `steps` are those that belong below `node`, in the order of their hashes.
fn apply<T>(node: &mut Node<T>, shift: u32, steps: &[Step<'_, T>], len: &mut usize) {
    match node {
        Node::Leaf(entries) => {
            let mut next: Vec<(u64, &Arc<T>)> = Vec::with_capacity(entries.len() + steps.len());
            let kept = entries.iter().filter(|entry| !is_removed(entry, steps));
            next.extend(kept.map(|entry| (entry.hash, &entry.value)));
            let inserted = steps.iter().filter(|step| step.kind == Kind::Insert);
            next.extend(inserted.map(|step| (step.hash, step.value)));
            next.sort_by_key(|(hash, _)| *hash);
            *len = *len + next.len() - entries.len();
            let built = build(&next, shift);
            *node = built;
        }
        Node::Branch(children) => {
            let children = Arc::make_mut(children);
            let mut rest = steps;
            while let Some(first) = rest.first() {
                let index = branch(first.hash, shift);
                let own = rest.partition_point(|step| branch(step.hash, shift) <= index);
                let (own, others) = rest.split_at(own);
                apply(&mut children[index], shift + BITS, own, len);
                rest = others;
            }
        }
    }
}

fn is_removed<T>(entry: &Entry<T>, steps: &[Step<'_, T>]) -> bool {
    let from = steps.partition_point(|step| step.hash < entry.hash);
    let same_hash = steps.iter().skip(from).take_while(|step| step.hash == entry.hash);
    let mut removals = same_hash.filter(|step| step.kind == Kind::Remove);
    removals.any(|step| Arc::ptr_eq(step.value, &entry.value))
}

/// From all entries below one node, in the order of their hashes.
fn build<T>(entries: &[(u64, &Arc<T>)], shift: u32) -> Node<T> {
    match entries {
        [] => Node::Leaf(Arc::default()),
        several if several.len() > LEAF_ENTRIES && shift < u64::BITS => {
            let mut rest = several;
            Node::Branch(Arc::new(std::array::from_fn(|index| {
                let own = rest.partition_point(|(hash, _)| branch(*hash, shift) <= index);
                let (own, others) = rest.split_at(own);
                rest = others;
                build(own, shift + BITS)
            })))
        }
        few => {
            let entry =
                |(hash, value): &(u64, &Arc<T>)| Entry { hash: *hash, value: Arc::clone(value) };
            Node::Leaf(few.iter().map(entry).collect())
        }
    }
}

impl<T> Clone for Node<T> {
    fn clone(&self) -> Self {
        match self {
            Node::Leaf(entries) => Node::Leaf(entries.clone()),
            Node::Branch(children) => Node::Branch(children.clone()),
        }
    }
}

impl<T> Clone for Trie<T> {
    fn clone(&self) -> Self {
        Self { root: self.root.clone(), len: self.len, hasher: self.hasher.clone() }
    }
}

impl<T> Default for Trie<T> {
    fn default() -> Self {
        Self { root: Node::Leaf(Arc::default()), len: 0, hasher: Default::default() }
    }
}

impl<T: fmt::Debug> fmt::Debug for Trie<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.values()).finish()
    }
}

pub(super) struct Values<'a, T> {
    entries: std::slice::Iter<'a, Entry<T>>,
    nodes: Vec<&'a Node<T>>,
}

impl<'a, T> Iterator for Values<'a, T> {
    type Item = &'a Arc<T>;

    fn next(&mut self) -> Option<&'a Arc<T>> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Some(&entry.value);
            }
            match self.nodes.pop()? {
                Node::Leaf(entries) => self.entries = entries.iter(),
                Node::Branch(children) => self.nodes.extend(children.iter()),
            }
        }
    }
}

#[cfg(test)]
mod tests;
