//! The tiers: what is where, what may be read, what is given up.

use std::collections::BTreeMap;

use super::job::{Job, Work};
use super::level::Level;
use super::{JobId, Key, TierConfig, TierError, TierEvent, TierId, TierStats, TierViolation, Transfer};
use crate::BlockId;

/// Decides what of the content of a cache lies in which tier behind the device, nearest tier first.
///
/// Nothing is copied here. A call that begins a job ([`load`](Tiers::load), [`store`](Tiers::store),
/// [`promote`](Tiers::promote), [`flush`](Tiers::flush)) says which [`transfers`](Tiers::transfers) to make, and holds
/// their sources and targets until you say, with [`complete`](Tiers::complete), how it ended.
#[derive(Clone, Debug)]
pub struct Tiers<K> {
    pub(super) levels: Vec<Level<K>>,
    pub(super) jobs: BTreeMap<JobId, Job<K>>,
    pub(super) next_job: JobId,
    pub(super) generation: u32,
    /// Blocks of the device that jobs read or write.
    pub(super) device: BTreeMap<BlockId, DeviceUse>,
    pub(super) events: Vec<TierEvent<K>>,
    /// Whether somebody else hears the events.
    pub(super) joined: bool,
    pub(super) questions: Vec<(TierId, K)>,
    pub(super) counted: Vec<TierStats>,
}

/// What jobs under way do with a block of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceUse {
    Written,
    /// By so many jobs.
    Read(u32),
}

/// The most tiers there can be.
const TIERS_MAX: usize = 16;

impl<K: Key> Tiers<K> {
    /// Empty tiers, nearest to the device first. `generation` counts the resets in the life of the content, over all
    /// processes: 0, or what was kept beside a dump. Allocates about 80 bytes a slot, more as they fill.
    ///
    /// # Errors
    /// [`TierError::TierCount`], [`TierError::NoSlots`], [`TierError::NeverWritten`], [`TierError::Unreachable`].
    pub fn new(configs: &[TierConfig], generation: u32) -> Result<Tiers<K>, TierError> {
        let tiers = configs.len();
        if tiers == 0 || tiers > TIERS_MAX {
            return Err(TierError::TierCount { tiers, max: TIERS_MAX });
        }
        for (tier, config) in (0..).map(TierId).zip(configs) {
            config.validate(tier)?;
        }
        Ok(Tiers {
            levels: configs.iter().copied().map(Level::new).collect(),
            jobs: BTreeMap::new(),
            next_job: JobId(1),
            generation,
            device: BTreeMap::new(),
            events: Vec::new(),
            joined: false,
            questions: Vec::new(),
            counted: vec![TierStats::default(); tiers],
        })
    }

    /// A sequence uses this content: it is given up later, and counts as offered to the tier below the ones it is in.
    /// The keys are of consecutive blocks; the first of them is the one given up last. Keys in no tier are passed
    /// over, and so is content that is still being written: to be stored is not to be used.
    pub fn touch(&mut self, keys: &[K]) {
        for key in keys.iter().rev() {
            for tier in (0..).map(TierId).take(self.levels.len()) {
                if self.level(tier).ready(key).is_some() {
                    self.level_mut(tier).order.touch(key);
                    self.offer_below(tier, *key);
                }
            }
        }
    }

    /// Puts the content of a sequence in order, when it ends: the beginning is given up after the end, whichever was
    /// stored first. Not a use.
    pub fn settle(&mut self, keys: &[K]) {
        for key in keys.iter().rev() {
            for level in &mut self.levels {
                level.order.renew(key);
            }
        }
    }

    /// Content has come to `tier` or was used there: the next tier counts that as an offer.
    pub(super) fn offer_below(&mut self, tier: TierId, key: K) {
        if let Some(below) = self.levels.get_mut(usize::from(tier.0) + 1)
            && below.slot(&key).is_none()
            && below.wants(key)
            && !below.due.contains(&key)
        {
            below.due.insert(key, ());
        }
    }

    /// Forgets all content, as after a change of weights, and begins the next generation. Jobs under way keep their
    /// slots and blocks until they end, and their end changes nothing else.
    pub fn reset(&mut self) {
        for level in &mut self.levels {
            level.reset();
        }
        self.questions.clear();
        self.generation += 1;
        self.events.push(TierEvent::Cleared { generation: self.generation });
    }

    /// How many resets the content has seen.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// What a tier was made from.
    ///
    /// # Errors
    /// [`TierError::NoTier`].
    pub fn config(&self, tier: TierId) -> Result<&TierConfig, TierError> {
        self.must_exist(tier)?;
        Ok(&self.level(tier).config)
    }

    /// The numbers of this moment. O(slots).
    ///
    /// # Errors
    /// [`TierError::NoTier`].
    pub fn stats(&self, tier: TierId) -> Result<TierStats, TierError> {
        self.must_exist(tier)?;
        Ok(self.level(tier).stats(self.counted[usize::from(tier.0)]))
    }

    /// The copies of a job under way, in the order in which its outcome counts them. A pin has none.
    ///
    /// # Errors
    /// [`TierError::UnknownJob`].
    pub fn transfers(&self, job: JobId) -> Result<&[Transfer<K>], TierError> {
        match self.jobs.get(&job) {
            Some(Job { work: Work::Copy { transfers, .. }, .. }) => Ok(transfers),
            Some(Job { work: Work::Pin(_), .. }) => Ok(&[]),
            None => Err(self.unknown(job)),
        }
    }

    /// The jobs under way, oldest first.
    pub fn jobs(&self) -> impl Iterator<Item = JobId> + '_ {
        self.jobs.keys().copied()
    }

    /// What happened to the content since this was last asked, in order. Nothing, if an
    /// [`Offload`](super::Offload) tells it together with what happens in the device.
    pub fn events(&mut self) -> impl Iterator<Item = TierEvent<K>> + '_ {
        let all = if self.joined { 0 } else { self.events.len() };
        self.events.drain(..all)
    }

    /// Audits every invariant. O(slots + copies under way).
    ///
    /// # Errors
    /// The first [`TierViolation`] found: a bug of this crate.
    pub fn check(&self) -> Result<(), TierViolation> {
        super::check::check(self)
    }

    pub(super) fn tiers(&self) -> impl Iterator<Item = (TierId, &Level<K>)> {
        (0..).map(TierId).zip(&self.levels)
    }

    pub(super) fn level(&self, tier: TierId) -> &Level<K> {
        &self.levels[usize::from(tier.0)]
    }

    pub(super) fn level_mut(&mut self, tier: TierId) -> &mut Level<K> {
        &mut self.levels[usize::from(tier.0)]
    }

    pub(super) fn must_exist(&self, tier: TierId) -> Result<(), TierError> {
        let tiers = self.levels.len();
        if usize::from(tier.0) < tiers { Ok(()) } else { Err(TierError::NoTier { tier, tiers }) }
    }

    /// Whether jobs leave a block of the device alone, so that it may be written.
    pub fn is_idle(&self, block: BlockId) -> bool {
        !self.device.contains_key(&block)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DISK, HOST, host, items, store, tiers};
    use super::super::{Store, Write};
    use super::*;

    #[test]
    fn tiers_that_cannot_work_are_refused() {
        let refused = |configs: &[TierConfig]| Tiers::<u32>::new(configs, 0).unwrap_err();
        assert_eq!(refused(&[]), TierError::TierCount { tiers: 0, max: 16 });
        assert_eq!(refused(&[host(1); 17]), TierError::TierCount { tiers: 17, max: 16 });
        assert_eq!(refused(&[host(1), host(0)]), TierError::NoSlots { tier: DISK });
        assert_eq!(refused(&[store(1)]), TierError::Unreachable { tier: HOST });
        for (offers, tracked) in [(0, 9), (2, 0)] {
            let config = TierConfig { write: Write::After { offers, tracked }, ..host(1) };
            assert_eq!(refused(&[config]), TierError::NeverWritten { tier: HOST, offers, tracked });
        }
    }

    #[test]
    fn a_reset_begins_a_generation_and_forgets_offers_too() {
        let write = Write::After { offers: 2, tracked: 9 };
        let mut tiers = tiers(&[TierConfig { write, ..host(4) }]);
        assert_eq!(tiers.offer(super::super::Occasion::Use, &items(&[1])), Ok(Store::Nothing));
        tiers.reset();
        assert_eq!(tiers.offer(super::super::Occasion::Use, &items(&[1])), Ok(Store::Nothing));
        assert_eq!(tiers.events().collect::<Vec<_>>(), [TierEvent::Cleared { generation: 1 }]);
        assert_eq!(tiers.generation(), 1);
    }
}
