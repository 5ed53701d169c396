//! A persistent hash map: a clone shares everything, a change copies one path from root to leaf.

use std::fmt;
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, Equivalent};

/// Hash bits that choose a branch, and the branches of one node.
const BITS: u32 = 5;
const FAN_OUT: usize = 1 << BITS;
/// A leaf with more entries becomes a branch, unless the hash has no bits left.
const LEAF_ENTRIES: usize = 16;

/// Iterates in no particular order, which differs between maps of equal content.
pub(super) struct Trie<K, V> {
    root: Node<K, V>,
    len: usize,
    /// Seeded at random, so that nobody can choose keys that collide.
    hasher: DefaultHashBuilder,
}

/// The pointers lie in the parent, so that a look-up follows one per level.
enum Node<K, V> {
    Leaf(Arc<[Entry<K, V>]>),
    Branch(Arc<[Node<K, V>; FAN_OUT]>),
}

#[derive(Clone)]
struct Entry<K, V> {
    hash: u64,
    key: K,
    value: V,
}

impl<K, V> Trie<K, V> {
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

    pub fn iter(&self) -> Iter<'_, K, V> {
        Iter { entries: [].iter(), nodes: vec![&self.root] }
    }

    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }
}

impl<K: Hash + Eq, V> Trie<K, V> {
    pub fn get<Q: Hash + Equivalent<K> + ?Sized>(&self, key: &Q) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        let mut node = &self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Leaf(entries) => {
                    return entries
                        .iter()
                        .find(|entry| entry.hash == hash && key.equivalent(&entry.key))
                        .map(|entry| &entry.value);
                }
                Node::Branch(children) => {
                    node = &children[branch(hash, shift)];
                    shift += BITS;
                }
            }
        }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Trie<K, V> {
    /// Returns the value that was replaced.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        let hash = self.hasher.hash_one(&key);
        let previous = insert(&mut self.root, 0, Entry { hash, key, value });
        self.len += usize::from(previous.is_none());
        previous
    }

    pub fn get_mut<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<&mut V> {
        self.get(key)?;
        let hash = self.hasher.hash_one(key);
        let mut node = &mut self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Leaf(entries) => {
                    return Arc::make_mut(entries)
                        .iter_mut()
                        .find(|entry| entry.hash == hash && key.equivalent(&entry.key))
                        .map(|entry| &mut entry.value);
                }
                Node::Branch(children) => {
                    node = &mut Arc::make_mut(children)[branch(hash, shift)];
                    shift += BITS;
                }
            }
        }
    }

    /// Returns the value that was removed.
    pub fn remove<Q: Hash + Equivalent<K> + ?Sized>(&mut self, key: &Q) -> Option<V> {
        // Looked up first, so that removing what is not there copies nothing.
        self.get(key)?;
        let hash = self.hasher.hash_one(key);
        let mut node = &mut self.root;
        let mut shift = 0;
        loop {
            match node {
                Node::Leaf(entries) => {
                    let is_it =
                        |entry: &Entry<K, V>| entry.hash == hash && key.equivalent(&entry.key);
                    let removed = entries.iter().find(|entry| is_it(entry))?.value.clone();
                    *entries = entries.iter().filter(|entry| !is_it(entry)).cloned().collect();
                    self.len -= 1;
                    return Some(removed);
                }
                Node::Branch(children) => {
                    node = &mut Arc::make_mut(children)[branch(hash, shift)];
                    shift += BITS;
                }
            }
        }
    }
}

/// Always below `FAN_OUT`.
fn branch(hash: u64, shift: u32) -> usize {
    (hash >> shift) as usize & (FAN_OUT - 1)
}

fn insert<K: Eq + Clone, V: Clone>(
    node: &mut Node<K, V>,
    shift: u32,
    entry: Entry<K, V>,
) -> Option<V> {
    match node {
        Node::Leaf(entries) => {
            let known = |e: &Entry<K, V>| e.hash == entry.hash && e.key == entry.key;
            if entries.iter().any(known) {
                let present = Arc::make_mut(entries).iter_mut().find(|e| known(e))?;
                return Some(std::mem::replace(&mut present.value, entry.value));
            }
            let entries: Arc<[_]> = entries.iter().cloned().chain([entry]).collect();
            *node = if entries.len() > LEAF_ENTRIES && shift < u64::BITS {
                split(&entries, shift)
            } else {
                Node::Leaf(entries)
            };
            None
        }
        Node::Branch(children) => {
            let child = &mut Arc::make_mut(children)[branch(entry.hash, shift)];
            insert(child, shift + BITS, entry)
        }
    }
}

fn split<K: Clone, V: Clone>(entries: &[Entry<K, V>], shift: u32) -> Node<K, V> {
    Node::Branch(Arc::new(std::array::from_fn(|index| {
        let own = entries.iter().filter(|entry| branch(entry.hash, shift) == index);
        Node::Leaf(own.cloned().collect())
    })))
}

impl<K, V> Clone for Node<K, V> {
    fn clone(&self) -> Self {
        match self {
            Node::Leaf(entries) => Node::Leaf(entries.clone()),
            Node::Branch(children) => Node::Branch(children.clone()),
        }
    }
}

impl<K, V> Clone for Trie<K, V> {
    fn clone(&self) -> Self {
        Self { root: self.root.clone(), len: self.len, hasher: self.hasher.clone() }
    }
}

impl<K, V> Default for Trie<K, V> {
    fn default() -> Self {
        Self { root: Node::Leaf(Arc::from([])), len: 0, hasher: Default::default() }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for Trie<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

pub(super) struct Iter<'a, K, V> {
    entries: std::slice::Iter<'a, Entry<K, V>>,
    nodes: Vec<&'a Node<K, V>>,
}

impl<'a, K, V> Iterator for Iter<'a, K, V> {
    type Item = (&'a K, &'a V);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.entries.next() {
                return Some((&entry.key, &entry.value));
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
