//! A tier that outlives the process: what it holds, written down and taken up again.
//!
//! Keys are hashes that mean the same in every process of equal configuration, so a tier whose bytes survive (a file,
//! a drive) needs only the list of its keys and slots to be as good as before. Which bytes a list takes is yours to
//! say.

use std::collections::BTreeSet;

use super::{Key, TierError, TierEvent, TierId, Tiers};
use crate::BlockCount;
use crate::id::count;

/// What a dump was taken from. Kept beside it, it tells whether it may be taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// [`TierConfig::identity`](super::TierConfig::identity).
    pub identity: u64,
    /// [`Tiers::generation`].
    pub generation: u32,
}

impl<K: Key> Tiers<K> {
    /// Where a dump of the tier would come from.
    ///
    /// # Errors
    /// [`TierError::NoTier`].
    pub fn origin(&self, tier: TierId) -> Result<Origin, TierError> {
        self.must_exist(tier)?;
        Ok(Origin { identity: self.level(tier).config.identity, generation: self.generation })
    }

    /// Keys and slots of all that can be read, what would be given up first coming first. What is still being written
    /// is not in it.
    ///
    /// # Errors
    /// [`TierError::NoTier`].
    pub fn dump(&self, tier: TierId) -> Result<impl Iterator<Item = (K, u32)> + '_, TierError> {
        self.must_exist(tier)?;
        let level = self.level(tier);
        Ok(level.order.oldest_first().filter(|(key, _)| level.ready(key).is_some()))
    }

    /// Takes a dump up, into a tier that holds nothing. All of it counts as used once, in its order. The bytes must
    /// still be in the slots.
    ///
    /// # Errors
    /// [`TierError::NoTier`]; [`TierError::NotEmpty`]; [`TierError::Foreign`] for a dump of another identity or
    /// generation; [`TierError::BadDump`] for a slot that does not exist, and for a slot or a key named twice.
    pub fn restore(
        &mut self,
        tier: TierId,
        origin: Origin,
        content: impl IntoIterator<Item = (K, u32)>,
    ) -> Result<BlockCount, TierError> {
        let own = self.origin(tier)?;
        if own != origin {
            return Err(TierError::Foreign {
                identity: origin.identity,
                generation: origin.generation,
                own_identity: own.identity,
                own_generation: own.generation,
            });
        }
        let held = self.level(tier).held();
        if held > BlockCount(0) {
            return Err(TierError::NotEmpty { tier, held });
        }
        let (mut keys, mut slots) = (BTreeSet::new(), BTreeSet::new());
        let mut checked = Vec::new();
        for (index, (key, slot)) in content.into_iter().enumerate() {
            if slot >= self.level(tier).config.slots.0 || !keys.insert(key) || !slots.insert(slot) {
                return Err(TierError::BadDump { index, slot });
            }
            checked.push((key, slot));
        }
        self.level_mut(tier).restore(&checked);
        let stored = checked.iter().map(|&(key, _)| TierEvent::Stored { key, tier, from: None });
        self.events.extend(stored);
        Ok(BlockCount(count(checked.len())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{HOST, begin, host, items, put, removed, tiers};
    use super::super::{Lookup, TierConfig};
    use super::*;

    #[test]
    fn a_dump_is_taken_up_with_slots_and_order() {
        let mut before = tiers(&[host(4)]);
        put(&mut before, &[1, 2, 3]);
        before.touch(&[1]);
        let _unfinished = begin(before.store(HOST, &items(&[4])).unwrap());
        let dump: Vec<_> = before.dump(HOST).unwrap().collect();
        assert_eq!(dump, [(2, 1), (3, 2), (1, 0)]);

        let mut after = tiers(&[host(4)]);
        assert_eq!(after.restore(HOST, before.origin(HOST).unwrap(), dump), Ok(BlockCount(3)));
        after.check().unwrap();
        assert_eq!([1, 4].map(|key| after.lookup(&key)), [Lookup::Hit(HOST), Lookup::Miss]);
        put(&mut after, &[5, 6]);
        assert_eq!(removed(&mut after), [2]);
    }

    #[test]
    fn a_dump_that_does_not_fit_is_refused_and_nothing_is_taken_up() {
        let mut tiers = Tiers::<u32>::new(&[TierConfig { identity: 7, ..host(4) }], 3).unwrap();
        let own = tiers.origin(HOST).unwrap();
        let foreign = |identity, generation| {
            Err(TierError::Foreign { identity, generation, own_identity: 7, own_generation: 3 })
        };
        let old = Origin { generation: 2, ..own };
        assert_eq!(tiers.restore(HOST, old, [(1, 0)]), foreign(7, 2));
        assert_eq!(tiers.restore(HOST, Origin { identity: 8, ..own }, [(1, 0)]), foreign(8, 3));
        let bad = |index, slot| Err(TierError::BadDump { index, slot });
        assert_eq!(tiers.restore(HOST, own, [(1, 0), (2, 0)]), bad(1, 0), "a slot twice");
        assert_eq!(tiers.restore(HOST, own, [(1, 0), (1, 1)]), bad(1, 1), "a key twice");
        assert_eq!(tiers.restore(HOST, own, [(1, 4)]), bad(0, 4), "no such slot");
        assert_eq!(tiers.stats(HOST).unwrap().free, BlockCount(4));
        assert_eq!(tiers.restore(HOST, own, [(1, 2)]), Ok(BlockCount(1)));
        assert_eq!(
            tiers.restore(HOST, own, [(2, 3)]),
            Err(TierError::NotEmpty { tier: HOST, held: BlockCount(1) })
        );
        tiers.check().unwrap();
    }
}
