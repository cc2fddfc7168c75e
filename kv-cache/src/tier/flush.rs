//! What is copied down, from a tier to the one behind it.

use super::{Key, Place, Store, TierError, TierId, TierSlot, Tiers, Write};
use crate::BlockCount;
use crate::id::count;

impl<K: Key> Tiers<K> {
    /// Begins to copy down to `tier` what it should have of the tier above it, at most `most` copies and no more than
    /// there is room for: what was offered often enough, or, for a tier that is written back, what will have to leave
    /// the tier above next. Cheap when there is nothing to do: ask after every step.
    ///
    /// # Errors
    /// [`TierError::NoTier`], also for tier 0: the device offers its content.
    pub fn flush(&mut self, tier: TierId, most: BlockCount) -> Result<Store, TierError> {
        let above = self.above(tier)?;
        let mut items = match self.level(tier).config.write {
            Write::After { .. } => self.due(tier, above, most.0 as usize),
            Write::Back { ahead } => self.leaving_next(tier, above, ahead.min(most.0) as usize),
        };
        let offered = items.iter().map(|&(key, _)| key).collect();
        let level = self.level(tier);
        let victims = level.victims(items.len(), &offered, |key| self.may_leave(tier, key));
        items.truncate(level.free.len() + victims.len());
        Ok(self.bring(tier, items.into_iter(), &[]))
    }

    /// How many blocks of the tier above would be copied to `tier`, had it the room and the time: what a
    /// [`flush`](Tiers::flush) of everything would begin. What is on its way is not counted. O(n) in what is due.
    ///
    /// # Errors
    /// As [`flush`](Tiers::flush).
    pub fn backlog(&self, tier: TierId) -> Result<BlockCount, TierError> {
        let above = self.above(tier)?;
        let is_absent =
            |key: &K| self.level(tier).slot(key).is_none() && self.level(above).ready(key).is_some();
        let blocks = match self.level(tier).config.write {
            Write::After { .. } => {
                self.level(tier).due.oldest_first().filter(|(key, ())| is_absent(key)).count()
            }
            Write::Back { .. } => {
                let all = self.level(above).order.oldest_first();
                all.filter(|(key, _)| is_absent(key) && !self.may_leave(above, key)).count()
            }
        };
        Ok(BlockCount(count(blocks)))
    }

    /// The tier that another is filled from.
    fn above(&self, tier: TierId) -> Result<TierId, TierError> {
        self.must_exist(tier)?;
        tier.0.checked_sub(1).map(TierId).ok_or(TierError::NoTier { tier, tiers: self.levels.len() })
    }

    /// The first keys due that still are above, and forgets those before them that are not.
    fn due(&mut self, tier: TierId, above: TierId, most: usize) -> Vec<(K, Place)> {
        let (mut items, mut stale) = (Vec::new(), Vec::new());
        for (key, ()) in self.level(tier).due.oldest_first() {
            if items.len() == most {
                break;
            }
            match self.level(above).ready(&key) {
                Some(slot) => items.push((key, Place::Tier(TierSlot { tier: above, slot }))),
                None => stale.push(key),
            }
        }
        for key in stale {
            self.level_mut(tier).due.remove(&key);
        }
        items
    }

    /// Those of the next `ahead` keys to leave the tier above that the tiers below do not have.
    fn leaving_next(&self, tier: TierId, above: TierId, ahead: usize) -> Vec<(K, Place)> {
        let free = self.level(above).free.len();
        let next = self.level(above).order.victims(ahead.saturating_sub(free), |_, _| true);
        let absent = next.into_iter().filter(|key| {
            self.level(tier).slot(key).is_none()
                && self.level(above).ready(key).is_some()
                && !self.may_leave(above, key)
        });
        absent.map(|key| (key, self.place(above, &key))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DISK, HOST, begin, host, items, put, removed, tiers};
    use super::super::{Lookup, Medium, Occasion, Outcome, TierConfig};
    use super::*;

    #[test]
    fn content_is_written_back_before_it_leaves() {
        let back = Write::Back { ahead: 1 };
        let disk = TierConfig { write: back, ..TierConfig::new(Medium::Disk, BlockCount(8)) };
        let mut tiers = tiers(&[TierConfig { write: back, ..host(2) }, disk]);
        assert_eq!(tiers.offer(Occasion::Use, &items(&[1, 2])), Ok(Store::Nothing));
        let job = begin(tiers.offer(Occasion::Leaving, &items(&[1, 2])).unwrap());
        tiers.complete(job, Outcome::All).unwrap();
        let full = tiers.offer(Occasion::Leaving, &items(&[3])).unwrap();
        assert_eq!(
            full,
            Store::NoRoom { need: BlockCount(1), free: BlockCount(0), evictable: BlockCount(0) }
        );
        assert_eq!(tiers.backlog(DISK), Ok(BlockCount(2)), "all that would be lost with the tier above");
        let job = begin(tiers.flush(DISK, BlockCount(9)).unwrap());
        assert_eq!(tiers.transfers(job).unwrap().len(), 1, "one ahead of need");
        assert_eq!(tiers.backlog(DISK), Ok(BlockCount(1)), "what is on its way does not count");
        tiers.complete(job, Outcome::All).unwrap();
        assert_eq!(tiers.flush(DISK, BlockCount(9)), Ok(Store::Nothing));
        begin(tiers.offer(Occasion::Leaving, &items(&[3])).unwrap());
        assert_eq!((tiers.lookup(&1), tiers.lookup(&2)), (Lookup::Hit(DISK), Lookup::Hit(HOST)));
        tiers.check().unwrap();
    }

    #[test]
    fn a_tier_below_counts_what_comes_to_the_tier_above_and_is_used_there() {
        let write = Write::After { offers: 2, tracked: 9 };
        let disk = TierConfig { write, ..TierConfig::new(Medium::Disk, BlockCount(8)) };
        let mut tiers = tiers(&[host(4), disk]);
        put(&mut tiers, &[1, 2, 3]);
        assert_eq!(tiers.flush(DISK, BlockCount(9)), Ok(Store::Nothing));
        tiers.touch(&[1, 2]);
        tiers.touch(&[1, 2]);
        assert_eq!(tiers.backlog(DISK), Ok(BlockCount(2)));
        assert!(tiers.backlog(HOST).is_err(), "the device offers its content");
        let job = begin(tiers.flush(DISK, BlockCount(1)).unwrap());
        assert_eq!(
            tiers.transfers(job).unwrap()[0].key,
            2,
            "at most as many as asked for, touched from the end"
        );
        tiers.complete(job, Outcome::All).unwrap();
        put(&mut tiers, &[4, 5, 6]);
        assert_eq!(removed(&mut tiers), [3, 2]);
        assert_eq!(tiers.backlog(DISK), Ok(BlockCount(1)));
        let job = begin(tiers.flush(DISK, BlockCount(9)).unwrap());
        assert_eq!(tiers.transfers(job).unwrap().len(), 1, "what was due and is gone is passed over");
        assert_eq!(tiers.lookup(&2), Lookup::Hit(DISK));
        let up = begin(tiers.promote(HOST, &[1, 2]).unwrap());
        assert_eq!(tiers.transfers(up).unwrap().len(), 1, "1 is there already");
        assert_eq!(tiers.lookup(&2), Lookup::Hit(DISK), "and can be read where it was");
        tiers.complete(up, Outcome::All).unwrap();
        assert_eq!(tiers.lookup(&2), Lookup::Hit(HOST));
        tiers.check().unwrap();
    }
}
