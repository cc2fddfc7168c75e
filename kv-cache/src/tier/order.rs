//! In which order a tier gives its content up.
//!
//! One structure serves both policies. LRU keeps everything in `once`. ARC (Megiddo and Modha, FAST '03) moves
//! what is used again to `again`, remembers what it gave up as ghosts, and shifts room to the side whose ghosts
//! come back:
//!
//! ```text
//!  ghosts of once | once: used one time   <- target ->   again: used more often | ghosts of again
//!                 ^ given up next when `once` is as long as its target, else ^ here
//! ```

use super::recent::Recent;
use super::{Key, TierEviction};

/// The content of a tier (its slot by key), oldest use first.
#[derive(Clone, Debug)]
pub(super) struct Order<K> {
    policy: TierEviction,
    capacity: usize,
    once: Recent<K, u32>,
    again: Recent<K, u32>,
    once_ghosts: Recent<K, ()>,
    again_ghosts: Recent<K, ()>,
    /// How much of the tier is for content used once. Always 0 under LRU, which so looks into `once` first.
    target: usize,
}

impl<K: Key> Order<K> {
    pub(super) fn new(policy: TierEviction, capacity: usize) -> Self {
        let [once_ghosts, again_ghosts] = [Recent::new(), Recent::new()];
        let [once, again] = [Recent::new(), Recent::new()];
        Order { policy, capacity, once, again, once_ghosts, again_ghosts, target: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.once.len() + self.again.len()
    }

    pub(super) fn slot(&self, key: &K) -> Option<u32> {
        self.once.get(key).or_else(|| self.again.get(key))
    }

    /// Enters a key that is not here. One that comes back as a ghost has been used twice, and says that its side
    /// is too small: by one, or by as much as the other side's ghosts outnumber its own.
    pub(super) fn insert(&mut self, key: K, slot: u32) {
        let (once, again) = (self.once_ghosts.len(), self.again_ghosts.len());
        if self.once_ghosts.remove(&key).is_some() {
            self.target = (self.target + (again / once).max(1)).min(self.capacity);
            self.again.insert(key, slot);
        } else if self.again_ghosts.remove(&key).is_some() {
            self.target = self.target.saturating_sub((once / again).max(1));
            self.again.insert(key, slot);
        } else {
            self.once.insert(key, slot);
        }
    }

    /// A use of the content.
    pub(super) fn touch(&mut self, key: &K) {
        match self.policy {
            TierEviction::Lru => _ = self.once.renew(key),
            TierEviction::Arc => {
                if let Some(slot) = self.once.remove(key).or_else(|| self.again.get(key)) {
                    self.again.insert(*key, slot);
                }
            }
        }
    }

    /// Makes the key the youngest among its like, without counting a use.
    pub(super) fn renew(&mut self, key: &K) {
        _ = self.once.renew(key) || self.again.renew(key);
    }

    /// Forgets a key as if it had never been here.
    pub(super) fn remove(&mut self, key: &K) -> Option<u32> {
        self.once.remove(key).or_else(|| self.again.remove(key))
    }

    /// Gives a key up, to make room.
    pub(super) fn evict(&mut self, key: &K) -> Option<u32> {
        let arc = self.policy == TierEviction::Arc;
        let (slot, ghosts) = match self.once.remove(key) {
            Some(slot) => (slot, &mut self.once_ghosts),
            None => (self.again.remove(key)?, &mut self.again_ghosts),
        };
        if arc {
            ghosts.insert_bounded(*key, (), self.capacity);
        }
        Some(slot)
    }

    /// The next `count` keys to give up, of those that `may` go: fewer if there are not as many.
    pub(super) fn victims(&self, count: usize, may: impl Fn(&K, u32) -> bool) -> Vec<K> {
        let may = &may;
        let mut once = self.once.oldest_first().filter(|(key, slot)| may(key, *slot));
        let mut again = self.again.oldest_first().filter(|(key, slot)| may(key, *slot));
        let mut of_once = || once.next().map(|(key, _)| (key, 1));
        let mut of_again = || again.next().map(|(key, _)| (key, 0));
        let mut once_left = self.once.len();
        let mut victims = Vec::with_capacity(count);
        while victims.len() < count {
            let victim = if once_left >= self.target {
                of_once().or_else(&mut of_again)
            } else {
                of_again().or_else(&mut of_once)
            };
            let Some((key, from_once)) = victim else { break };
            victims.push(key);
            once_left -= from_once;
        }
        victims
    }

    /// Everything, in the order in which it would go if all of it might.
    pub(super) fn oldest_first(&self) -> impl Iterator<Item = (K, u32)> + '_ {
        self.once.oldest_first().chain(self.again.oldest_first())
    }

    /// Forgets all, ghosts and target too.
    pub(super) fn clear(&mut self) {
        *self = Order::new(self.policy, self.capacity);
    }

    pub(super) fn is_sound(&self) -> bool {
        let ghosts = [&self.once_ghosts, &self.again_ghosts];
        let apart = |(key, ()): (K, ())| self.slot(&key).is_none();
        self.once.is_sound()
            && self.again.is_sound()
            && ghosts.iter().all(|side| side.is_sound() && side.len() <= self.capacity)
            && ghosts.iter().all(|side| side.oldest_first().all(apart))
            && self.once.oldest_first().all(|(key, _)| !self.again.contains(&key))
            && self.target <= self.capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(policy: TierEviction, keys: impl IntoIterator<Item = u32>) -> Order<u32> {
        let mut order = Order::new(policy, 4);
        for key in keys {
            order.insert(key, key);
        }
        order
    }

    fn keys(order: &Order<u32>) -> (Vec<u32>, Vec<u32>) {
        assert!(order.is_sound());
        let keys = |side: &Recent<u32, u32>| side.oldest_first().map(|(key, _)| key).collect();
        (keys(&order.once), keys(&order.again))
    }

    #[test]
    fn arc_gives_up_what_was_used_once_while_that_side_has_its_target() {
        let mut arc = order(TierEviction::Arc, 1..=4);
        arc.touch(&3);
        arc.touch(&4);
        assert_eq!(keys(&arc), (vec![1, 2], vec![3, 4]));
        arc.target = 1;
        assert_eq!(arc.victims(1, |_, _| true), [1]);
        assert_eq!(arc.victims(3, |_, _| true), [1, 2, 3], "down to its target, then the other side");
        assert_eq!(arc.victims(2, |key, _| *key != 1), [2, 3], "who may not go is passed over");
        arc.target = 3;
        assert_eq!(arc.victims(3, |_, _| true), [3, 4, 1], "and back, when one side is empty");
    }

    #[test]
    fn a_ghost_that_comes_back_shifts_the_target_to_its_side() {
        let mut arc = order(TierEviction::Arc, 1..=4);
        arc.touch(&4);
        for key in [1, 2, 4] {
            arc.evict(&key);
        }
        arc.insert(1, 0);
        assert_eq!((arc.target, keys(&arc)), (1, (vec![3], vec![1])));
        arc.insert(4, 0);
        assert_eq!((arc.target, keys(&arc)), (0, (vec![3], vec![1, 4])));
        arc.insert(2, 0);
        assert_eq!((arc.target, keys(&arc)), (1, (vec![3], vec![1, 4, 2])));
    }

    #[test]
    fn lru_knows_one_list_and_no_ghosts() {
        let mut lru = order(TierEviction::Lru, 1..=4);
        lru.touch(&1);
        assert_eq!(keys(&lru), (vec![2, 3, 4, 1], vec![]));
        assert_eq!(lru.victims(9, |key, _| *key != 3), [2, 4, 1]);
        lru.evict(&2);
        lru.insert(2, 0);
        assert_eq!((lru.target, keys(&lru)), (0, (vec![3, 4, 1, 2], vec![])));
    }
}
