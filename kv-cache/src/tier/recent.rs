//! A map that knows which of its keys was used longest ago.

use std::collections::BTreeMap;

use super::Key;

/// Keys with a value each, in the order of their last use. Every call takes O(log n).
#[derive(Clone, Debug)]
pub(super) struct Recent<K, V> {
    by_key: BTreeMap<K, (u64, V)>,
    by_age: BTreeMap<u64, K>,
    next: u64,
}

impl<K: Key, V: Copy> Recent<K, V> {
    pub(super) fn new() -> Self {
        Recent { by_key: BTreeMap::new(), by_age: BTreeMap::new(), next: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.by_key.get(key).map(|&(_, value)| value)
    }

    pub(super) fn contains(&self, key: &K) -> bool {
        self.by_key.contains_key(key)
    }

    /// Puts `value` under `key`, which is now the one used last.
    pub(super) fn insert(&mut self, key: K, value: V) {
        if let Some((age, _)) = self.by_key.insert(key, (self.next, value)) {
            self.by_age.remove(&age);
        }
        self.by_age.insert(self.next, key);
        self.next += 1;
    }

    /// The same, and then forgets the oldest keys until at most `most` are left.
    pub(super) fn insert_bounded(&mut self, key: K, value: V, most: usize) {
        self.insert(key, value);
        while self.len() > most {
            if let Some((_, oldest)) = self.by_age.pop_first() {
                self.by_key.remove(&oldest);
            }
        }
    }

    /// Makes `key` the one used last, if it is there.
    pub(super) fn renew(&mut self, key: &K) -> bool {
        let value = self.get(key);
        value.map(|value| self.insert(*key, value)).is_some()
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let (age, value) = self.by_key.remove(key)?;
        self.by_age.remove(&age);
        Some(value)
    }

    pub(super) fn clear(&mut self) {
        self.by_key.clear();
        self.by_age.clear();
    }

    /// Keys and values, the key used longest ago first.
    pub(super) fn oldest_first(&self) -> impl Iterator<Item = (K, V)> + '_ {
        self.by_age.values().map(|key| (*key, self.by_key[key].1))
    }

    /// Whether both halves say the same.
    pub(super) fn is_sound(&self) -> bool {
        self.by_key.len() == self.by_age.len()
            && self.by_key.iter().all(|(key, (age, _))| self.by_age.get(age) == Some(key))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(recent: &Recent<u32, u32>) -> Vec<(u32, u32)> {
        assert!(recent.is_sound());
        recent.oldest_first().collect()
    }

    #[test]
    fn the_last_used_is_the_last_forgotten() {
        let mut recent = Recent::new();
        for key in [1, 2, 3] {
            recent.insert(key, 10 * key);
        }
        assert!(recent.renew(&1) && !recent.renew(&9));
        recent.insert(2, 21);
        assert_eq!(order(&recent), [(3, 30), (1, 10), (2, 21)]);
        recent.insert_bounded(4, 40, 2);
        assert_eq!(order(&recent), [(2, 21), (4, 40)]);
        assert_eq!((recent.remove(&2), recent.remove(&2)), (Some(21), None));
        recent.insert_bounded(5, 50, 0);
        assert_eq!(order(&recent), []);
    }
}
