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
use std::vec;

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

impl<T> Clone for Entry<T> {
    fn clone(&self) -> Self {
        Self { hash: self.hash, value: self.value.clone() }
    }
}

/// One of the changes that are applied together. It holds its value, whose holders are thus counted
/// while it is at hand, and not when very many are applied.
#[derive(Debug)]
pub(super) struct Step<T> {
    pub hash: u64,
    pub value: Arc<T>,
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

    /// Applies all in their order.
    pub fn apply(&mut self, mut steps: Vec<Step<T>>) {
        if !steps.is_empty() {
            // Stable: what has one key stays in order.
            steps.sort_by_key(|step| step.hash);
            let count = steps.len();
            apply(&mut self.root, 0, &mut steps.into_iter(), count, &mut self.len);
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

/// The next `count` of `steps` are those that belong below `node`, in the order of their hashes.
fn apply<T>(
    node: &mut Node<T>,
    shift: u32,
    steps: &mut vec::IntoIter<Step<T>>,
    count: usize,
    len: &mut usize,
) {
    match node {
        Node::Leaf(entries) => {
            let next = merged(entries, steps.by_ref().take(count));
            *len = *len + next.len() - entries.len();
            let count = next.len();
            *node = build(&mut next.into_iter(), count, shift);
        }
        Node::Branch(children) => {
            let children = Arc::make_mut(children);
            let mut left = count;
            while left > 0 {
                let rest = steps.as_slice().get(..left).unwrap_or_default();
                let Some(index) = rest.first().map(|step| branch(step.hash, shift)) else { return };
                let own = rest.partition_point(|step| branch(step.hash, shift) <= index);
                apply(&mut children[index], shift + BITS, steps, own, len);
                left -= own;
            }
        }
    }
}

/// What becomes of `entries`; both are in the order of their hashes, and so is this.
fn merged<T>(entries: &[Entry<T>], steps: impl ExactSizeIterator<Item = Step<T>>) -> Vec<Entry<T>> {
    let mut next: Vec<Entry<T>> = Vec::with_capacity(entries.len() + steps.len());
    let mut rest = entries;
    for Step { hash, value, kind } in steps {
        let (before, after) = rest.split_at(rest.partition_point(|entry| entry.hash <= hash));
        next.extend_from_slice(before);
        rest = after;
        match kind {
            Kind::Insert => next.push(Entry { hash, value }),
            Kind::Remove => {
                let mut same_hash = next.iter().rev().take_while(|entry| entry.hash == hash);
                if let Some(place) = same_hash.position(|entry| Arc::ptr_eq(&entry.value, &value)) {
                    next.remove(next.len() - 1 - place);
                }
            }
        }
    }
    next.extend_from_slice(rest);
    next
}

/// From the next `count` of `entries`, which are all below one node, in the order of their hashes.
fn build<T>(entries: &mut vec::IntoIter<Entry<T>>, count: usize, shift: u32) -> Node<T> {
    if count == 0 {
        return Node::Leaf(Arc::default());
    }
    if count <= LEAF_ENTRIES || shift >= u64::BITS {
        return Node::Leaf(entries.by_ref().take(count).collect());
    }
    let mut left = count;
    Node::Branch(Arc::new(std::array::from_fn(|index| {
        let rest = entries.as_slice().get(..left).unwrap_or_default();
        let own = rest.partition_point(|entry| branch(entry.hash, shift) <= index);
        left -= own;
        build(entries, own, shift + BITS)
    })))
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
