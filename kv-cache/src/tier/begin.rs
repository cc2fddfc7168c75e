//! How a job begins: everything is checked, room is made, sources and targets are held.

use std::collections::BTreeSet;

use super::job::{Job, Work};
use super::tiers::DeviceUse;
use super::{JobId, Key, Lookup, Place, TierError, TierId, TierSlot, Tiers, Transfer, Write};
use crate::id::count;
use crate::{BlockCount, BlockId};

/// What came of content that was to be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a job that has begun must be carried out and completed"]
pub enum Store {
    /// These copies are to be made.
    Begun {
        /// The job.
        job: JobId,
        /// How many copies.
        copies: BlockCount,
        /// How much content was given up for them.
        evicted: BlockCount,
    },
    /// Nothing is to be done: it is all there, or on its way, or not wanted yet.
    Nothing,
    /// Not now, none of it: the rest of the tier is in use, was offered itself, or is not in the tier below, which
    /// must have it first ([`Tiers::flush`]). Nothing has changed.
    NoRoom {
        /// Slots needed.
        need: BlockCount,
        /// Slots that are free.
        free: BlockCount,
        /// Slots whose content could have been given up.
        evictable: BlockCount,
    },
}

/// Why the device offers content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// It was computed, or found in the device by another sequence.
    Use,
    /// The device is about to overwrite it: the copies must be made first.
    Leaving,
}

impl<K: Key> Tiers<K> {
    /// Begins to copy content to blocks of the device that hold nothing yet. It must not be read, nor found by
    /// others, before the job is completed.
    ///
    /// # Errors
    /// [`TierError::NotThere`] and [`TierError::Staged`] for content that cannot be read; [`TierError::BlockBusy`].
    pub fn load(&mut self, items: &[(K, BlockId)]) -> Result<JobId, TierError> {
        let mut targets = BTreeSet::new();
        let mut transfers = Vec::with_capacity(items.len());
        for (index, &(key, block)) in items.iter().enumerate() {
            let Lookup::Hit(tier) = self.find(&key) else { return Err(TierError::NotThere { index }) };
            if self.level(tier).config.staged {
                return Err(TierError::Staged { index, tier });
            }
            if block == BlockId::NULL || !self.is_idle(block) || !targets.insert(block) {
                return Err(TierError::BlockBusy { index, block });
            }
            transfers.push(Transfer { key, from: self.place(tier, &key), to: Place::Device(block) });
        }
        Ok(self.begin(transfers))
    }

    /// Begins to copy content of the device to a tier, all that is not there yet or none of it. The device must not
    /// overwrite the blocks before the job is completed.
    ///
    /// # Errors
    /// [`TierError::NoTier`]; [`TierError::BlockBusy`] for a block that is just being loaded.
    pub fn store(&mut self, tier: TierId, items: &[(K, BlockId)]) -> Result<Store, TierError> {
        self.must_exist(tier)?;
        self.must_be_readable(items)?;
        Ok(self.bring(tier, items.iter().map(|&(key, block)| (key, Place::Device(block))), &[]))
    }

    /// The device offers content; what the nearest tier wants of it ([`Write`]) is stored there.
    ///
    /// # Errors
    /// As [`store`](Tiers::store); the offer then does not count.
    pub fn offer(&mut self, occasion: Occasion, items: &[(K, BlockId)]) -> Result<Store, TierError> {
        self.must_be_readable(items)?;
        let nearest = &mut self.levels[0];
        let back = matches!(nearest.config.write, Write::Back { .. });
        let wanted: Vec<(K, BlockId)> = match occasion {
            Occasion::Leaving if back => items.to_vec(),
            Occasion::Leaving => Vec::new(),
            Occasion::Use => items.iter().copied().filter(|&(key, _)| nearest.wants(key)).collect(),
        };
        self.store(TierId(0), &wanted)
    }

    /// Begins to copy content from farther tiers up to `tier`, all that is not there or nearer yet, or none of it.
    /// What it was copied from stays where it is, and none of the keys is given up for the others.
    ///
    /// # Errors
    /// [`TierError::NoTier`]; [`TierError::NotThere`] for content that cannot be read anywhere.
    pub fn promote(&mut self, tier: TierId, keys: &[K]) -> Result<Store, TierError> {
        self.must_exist(tier)?;
        let mut items = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            let mut near = self.levels[..=usize::from(tier.0)].iter();
            if near.any(|level| level.slot(key).is_some()) {
                continue;
            }
            let source = self.source_below(tier, key).ok_or(TierError::NotThere { index })?;
            items.push((*key, source));
        }
        Ok(self.bring(tier, items.into_iter(), keys))
    }

    /// Keeps content where it is, nearest place each, until the pin is completed like a job: it can be read as long as
    /// no reset comes between. For what a sequence was promised and will load later.
    ///
    /// # Errors
    /// [`TierError::NotThere`] for content in no tier; content that is being written can be pinned.
    pub fn pin(&mut self, keys: &[K]) -> Result<JobId, TierError> {
        let mut places = Vec::with_capacity(keys.len());
        for (index, key) in keys.iter().enumerate() {
            let place =
                self.tiers().find_map(|(tier, level)| level.slot(key).map(|slot| TierSlot { tier, slot }));
            places.push(place.ok_or(TierError::NotThere { index })?);
        }
        for place in &places {
            self.level_mut(place.tier).hold(place.slot);
        }
        Ok(self.enlist(Work::Pin(places)))
    }

    fn must_be_readable(&self, items: &[(K, BlockId)]) -> Result<(), TierError> {
        for (index, &(_, block)) in items.iter().enumerate() {
            if block == BlockId::NULL || self.device.get(&block) == Some(&DeviceUse::Written) {
                return Err(TierError::BlockBusy { index, block });
            }
        }
        Ok(())
    }

    /// Stores in `tier` what of the items is not there, from where the items say. Neither they nor what is to be kept
    /// make room for them.
    pub(super) fn bring(
        &mut self,
        tier: TierId,
        items: impl Iterator<Item = (K, Place)>,
        keep: &[K],
    ) -> Store {
        let mut offered = BTreeSet::new();
        let level = self.level(tier);
        let items: Vec<(K, Place)> =
            items.filter(|(key, _)| offered.insert(*key) && level.slot(key).is_none()).collect();
        if items.is_empty() {
            return Store::Nothing;
        }
        offered.extend(keep);
        let evicted = match self.make_room(tier, items.len(), &offered) {
            Ok(evicted) => evicted,
            Err(no_room) => return no_room,
        };
        let job = self.next_job;
        let mut transfers = Vec::with_capacity(items.len());
        for (key, from) in items {
            let slot = self.level_mut(tier).reserve(key, Some(job));
            transfers.push(Transfer { key, from, to: Place::Tier(TierSlot { tier, slot }) });
        }
        let copies = BlockCount(count(transfers.len()));
        Store::Begun { job: self.begin(transfers), copies, evicted }
    }

    /// Makes `need` slots of a tier free, or changes nothing and says why it cannot.
    pub(super) fn make_room(
        &mut self,
        tier: TierId,
        need: usize,
        offered: &BTreeSet<K>,
    ) -> Result<BlockCount, Store> {
        let level = self.level(tier);
        let victims = level.victims(need, offered, |key| self.may_leave(tier, key));
        let free = level.free.len();
        let [need_blocks, free_blocks, evictable] =
            [need, free, victims.len()].map(|blocks| BlockCount(count(blocks)));
        if free + victims.len() < need {
            return Err(Store::NoRoom { need: need_blocks, free: free_blocks, evictable });
        }
        for key in victims {
            self.level_mut(tier).evict(&key);
            self.counted[usize::from(tier.0)].evictions += 1;
            self.note_removed(key, tier);
        }
        Ok(evictable)
    }

    /// Content may leave a tier unless the one below is written back and neither it nor a farther one has it.
    pub(super) fn may_leave(&self, tier: TierId, key: &K) -> bool {
        let below = &self.levels[usize::from(tier.0) + 1..];
        let back = below.first().is_some_and(|level| matches!(level.config.write, Write::Back { .. }));
        !back || below.iter().any(|level| level.ready(key).is_some())
    }

    /// The nearest place behind `tier` where the key can be read.
    fn source_below(&self, tier: TierId, key: &K) -> Option<Place> {
        let below = self.tiers().skip(usize::from(tier.0) + 1);
        below
            .into_iter()
            .find_map(|(tier, level)| level.ready(key).map(|slot| Place::Tier(TierSlot { tier, slot })))
    }

    pub(super) fn place(&self, tier: TierId, key: &K) -> Place {
        let slot = self.level(tier).ready(key).expect("looked up before");
        Place::Tier(TierSlot { tier, slot })
    }

    /// Holds the sources, and the targets in the device; those in a tier are held since they were reserved.
    fn begin(&mut self, transfers: Vec<Transfer<K>>) -> JobId {
        for transfer in &transfers {
            match transfer.from {
                Place::Tier(from) => self.level_mut(from.tier).hold(from.slot),
                Place::Device(block) => match self.device.entry(block).or_insert(DeviceUse::Read(0)) {
                    DeviceUse::Read(jobs) => *jobs += 1,
                    DeviceUse::Written => unreachable!("checked by the caller"),
                },
            }
            if let Place::Device(block) = transfer.to {
                self.device.insert(block, DeviceUse::Written);
            }
        }
        self.enlist(Work::Copy { transfers, settled: 0 })
    }

    fn enlist(&mut self, work: Work<K>) -> JobId {
        let job = self.next_job;
        self.jobs.insert(job, Job { generation: self.generation, work });
        self.next_job.0 += 1;
        job
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DISK, HOST, begin, host, items, put, removed, tiers};
    use super::super::{Medium, Outcome, TierConfig, TierEviction};
    use super::*;

    #[test]
    fn the_end_of_a_sequence_goes_before_its_beginning_whenever_it_was_written() {
        for settled_before_written in [true, false] {
            let mut tiers = tiers(&[host(4)]);
            let job = begin(tiers.store(HOST, &items(&[1, 2, 3, 4])).unwrap());
            if settled_before_written {
                tiers.settle(&[1, 2, 3, 4]);
                tiers.complete(job, Outcome::All).unwrap();
            } else {
                tiers.complete(job, Outcome::All).unwrap();
                tiers.settle(&[1, 2, 3, 4]);
            }
            put(&mut tiers, &[5]);
            assert_eq!(removed(&mut tiers), [4]);
        }
    }

    #[test]
    fn offered_content_is_never_given_up_for_its_like() {
        let mut tiers = tiers(&[host(4)]);
        put(&mut tiers, &[1, 2]);
        tiers.touch(&[1]);
        put(&mut tiers, &[2, 3, 4, 5]);
        assert_eq!(removed(&mut tiers), [1], "2 is older, and offered");
    }

    #[test]
    fn a_store_takes_all_its_room_or_none() {
        let mut tiers = tiers(&[host(4)]);
        put(&mut tiers, &[1, 2, 3, 4]);
        let load = tiers.load(&[(1, BlockId(9)), (2, BlockId(8)), (3, BlockId(7))]).unwrap();
        let no_room = Store::NoRoom { need: BlockCount(2), free: BlockCount(0), evictable: BlockCount(1) };
        assert_eq!(tiers.store(HOST, &items(&[5, 6])), Ok(no_room));
        for key in [1, 2, 3, 4] {
            assert_eq!(tiers.lookup(&key), Lookup::Hit(HOST));
        }
        tiers.complete(load, Outcome::All).unwrap();
        put(&mut tiers, &[5, 6]);
        assert_eq!(removed(&mut tiers), [1, 2]);
    }

    #[test]
    fn a_tier_written_on_the_second_offer_counts_a_bounded_number_of_keys() {
        let write = Write::After { offers: 2, tracked: 3 };
        let mut tiers = tiers(&[TierConfig { write, ..host(4) }]);
        let mut offer = |keys: &[u32]| tiers.offer(Occasion::Use, &items(keys)).unwrap();
        assert_eq!(offer(&[1, 2]), Store::Nothing);
        let both = offer(&[1, 2]);
        assert!(matches!(both, Store::Begun { copies: BlockCount(2), .. }));
        assert_eq!(offer(&[3, 4]), Store::Nothing);
        tiers.complete(begin(both), Outcome::First(0)).unwrap();
        assert_eq!(tiers.offer(Occasion::Use, &items(&[1])), Ok(Store::Nothing), "1 was forgotten for 4");
        assert!(matches!(tiers.offer(Occasion::Use, &items(&[4])), Ok(Store::Begun { .. })));
    }

    #[test]
    fn adaptive_replacement_keeps_what_was_used_again() {
        let mut tiers = tiers(&[TierConfig { eviction: TierEviction::Arc, ..host(4) }]);
        put(&mut tiers, &[1, 2, 3, 4]);
        tiers.touch(&[3, 4]);
        put(&mut tiers, &[5]);
        assert_eq!(removed(&mut tiers), [1]);
        put(&mut tiers, &[1]);
        assert_eq!(removed(&mut tiers), [2], "1 came back, so it counts as used again");
        put(&mut tiers, &[6]);
        assert_eq!(removed(&mut tiers), [5]);
    }

    #[test]
    fn a_pin_keeps_content_until_it_ends() {
        let mut tiers = tiers(&[host(2)]);
        let writing = begin(tiers.store(HOST, &items(&[1])).unwrap());
        let pin = tiers.pin(&[1]).unwrap();
        tiers.complete(writing, Outcome::All).unwrap();
        put(&mut tiers, &[2]);
        put(&mut tiers, &[3]);
        assert_eq!(removed(&mut tiers), [2]);
        tiers.complete(pin, Outcome::All).unwrap();
        put(&mut tiers, &[4]);
        assert_eq!(removed(&mut tiers), [1]);
    }

    #[test]
    fn wrong_input_is_refused_and_changes_nothing() {
        let disk = TierConfig { staged: true, ..TierConfig::new(Medium::Disk, BlockCount(8)) };
        let mut tiers = tiers(&[host(4), disk]);
        put(&mut tiers, &[1, 2]);
        let down = begin(tiers.flush(DISK, BlockCount(9)).unwrap());
        tiers.complete(down, Outcome::AllBut(&[0])).unwrap();
        let before = format!("{tiers:?}");
        let block = BlockId(9);
        let (null, no_tier) = (BlockId::NULL, TierError::NoTier { tier: TierId(2), tiers: 2 });
        assert_eq!(tiers.load(&[(1, block), (3, BlockId(8))]), Err(TierError::NotThere { index: 0 }));
        assert_eq!(tiers.load(&[(2, null)]), Err(TierError::BlockBusy { index: 0, block: null }));
        assert_eq!(tiers.load(&[(2, block), (2, block)]), Err(TierError::BlockBusy { index: 1, block }));
        assert_eq!(tiers.store(TierId(2), &items(&[3])), Err(no_tier));
        assert_eq!(
            tiers.offer(Occasion::Use, &[(3, null)]),
            Err(TierError::BlockBusy { index: 0, block: null })
        );
        assert_eq!(tiers.flush(HOST, BlockCount(1)), Err(TierError::NoTier { tier: HOST, tiers: 2 }));
        assert_eq!(tiers.promote(HOST, &[2, 7]), Err(TierError::NotThere { index: 1 }));
        assert_eq!(tiers.pin(&[2, 7]), Err(TierError::NotThere { index: 1 }));
        assert_eq!(format!("{tiers:?}"), before);
        let load = tiers.load(&[(2, block)]).unwrap();
        assert_eq!(tiers.load(&[(2, block)]), Err(TierError::BlockBusy { index: 0, block }));
        assert_eq!(tiers.store(HOST, &[(8, block)]), Err(TierError::BlockBusy { index: 0, block }));
        tiers.complete(load, Outcome::All).unwrap();
        tiers.check().unwrap();
    }
}
