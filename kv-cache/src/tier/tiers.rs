//! The tiers: what is where, what may be read, what is given up.

use std::collections::BTreeMap;

use super::job::{Job, Work};
use super::level::{Level, Presence};
use super::{JobId, Key, TierConfig, TierError, TierEvent, TierId, TierStats, TierViolation, Transfer};
use crate::{BlockCount, BlockId};

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
    questions: Vec<(TierId, K)>,
    pub(super) counted: Vec<TierStats>,
}

/// What jobs under way do with a block of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DeviceUse {
    Written,
    /// By so many jobs.
    Read(u32),
}

/// Where a key's content can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lookup {
    /// Here, now. If this tier is staged, after a [`promote`](Tiers::promote).
    Hit(TierId),
    /// Nowhere yet: this job is writing it to the tiers. Look again when it has ended.
    Pending(JobId),
    /// Nobody knows yet: a shared store is being asked ([`Tiers::questions`]). Look again after the answer.
    Retry,
    /// Nowhere.
    Miss,
}

/// How far the content of consecutive blocks reaches, each number counting from the first block on.
///
/// ```text
///  |---- loadable ----|                                            load
///  |---- present --------------|                                   promote, then load
///  |---- coming --------------------------|                        wait, then load
///                                         ^ asked: nobody knows yet whether it goes on
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Blocks in tiers that the device reads.
    pub loadable: BlockCount,
    /// Blocks in any tier.
    pub present: BlockCount,
    /// Blocks in any tier or being written to one.
    pub coming: BlockCount,
    /// Whether a store is being asked about the blocks behind those.
    pub asked: bool,
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

    /// Where the content can be read. Promises nothing and holds nothing; a store that could have it and was not
    /// asked yet is asked.
    pub fn lookup(&mut self, key: &K) -> Lookup {
        let found = self.find(key);
        if found == Lookup::Miss && self.ask(*key) { Lookup::Retry } else { found }
    }

    /// Looks consecutive blocks up, as far as they reach. Behind the first that nobody knows, a shared store is
    /// asked about all the others at once.
    pub fn reach(&mut self, keys: &[K]) -> Reach {
        let mut reach = Reach::default();
        let mut whole = Reach { loadable: BlockCount(1), present: BlockCount(1), ..reach };
        for (index, key) in keys.iter().enumerate() {
            match self.lookup(key) {
                Lookup::Hit(tier) => {
                    whole.loadable.0 &= u32::from(!self.level(tier).config.staged);
                }
                Lookup::Pending(_) => (whole.loadable.0, whole.present.0) = (0, 0),
                Lookup::Retry => {
                    reach.asked = true;
                    for key in &keys[index + 1..] {
                        self.lookup(key);
                    }
                    break;
                }
                Lookup::Miss => break,
            }
            reach.loadable.0 += whole.loadable.0;
            reach.present.0 += whole.present.0;
            reach.coming.0 += 1;
        }
        reach
    }

    /// Where the device can read it, else where it soon can; then the same for staged tiers. Near before far.
    pub(super) fn find(&self, key: &K) -> Lookup {
        let (mut coming, mut staged, mut coming_staged, mut awaited) = (None, None, None, None);
        for (tier, level) in self.tiers() {
            match level.presence(key) {
                Presence::Ready(_) if !level.config.staged => return Lookup::Hit(tier),
                Presence::Ready(_) => staged = staged.or(Some(Lookup::Hit(tier))),
                Presence::Writing(job) if level.config.staged => {
                    coming_staged = coming_staged.or(Some(Lookup::Pending(job)));
                }
                Presence::Writing(job) => coming = coming.or(Some(Lookup::Pending(job))),
                Presence::Awaited => awaited = Some(Lookup::Retry),
                Presence::Absent => {}
            }
        }
        coming.or(staged).or(coming_staged).or(awaited).unwrap_or(Lookup::Miss)
    }

    /// Asks every store that could have the key and has not been asked.
    fn ask(&mut self, key: K) -> bool {
        let before = self.questions.len();
        for (tier, level) in (0..).map(TierId).zip(&mut self.levels) {
            if level.ask(key) {
                self.questions.push((tier, key));
            }
        }
        self.questions.len() > before
    }

    /// What shared stores are to be asked, in order; each question is told once. Answer each with
    /// [`answer`](Tiers::answer).
    pub fn questions(&mut self) -> impl Iterator<Item = (TierId, K)> + '_ {
        self.questions.drain(..)
    }

    /// A shared store has the content or has not. Nobody needs to have asked: a peer that announces what it sends
    /// is believed as well. A "yes" takes a slot, which the store does not see; if none can be had, it is taken for a
    /// "no". A "no" about what we know to be there changes nothing: only a failed read does.
    ///
    /// # Errors
    /// [`TierError::NoTier`]; [`TierError::NotAsked`] for a tier that nobody else writes to.
    pub fn answer(&mut self, tier: TierId, key: K, present: bool) -> Result<(), TierError> {
        self.must_exist(tier)?;
        let level = self.level_mut(tier);
        if !level.asks() {
            return Err(TierError::NotAsked { tier });
        }
        if level.slot(&key).is_some() {
            return Ok(());
        }
        if present && self.make_room(tier, 1, &[key].into()).is_ok() {
            self.level_mut(tier).reserve(key, None);
            self.events.push(TierEvent::Stored { key, tier, from: None });
        } else {
            self.level_mut(tier).deny(key);
        }
        Ok(())
    }

    /// Believes no earlier "no" of a shared store, and no longer waits for its answers.
    ///
    /// # Errors
    /// [`TierError::NoTier`].
    pub fn forget_answers(&mut self, tier: TierId) -> Result<(), TierError> {
        self.must_exist(tier)?;
        self.level_mut(tier).forget_answers();
        self.questions.retain(|(asked, _)| *asked != tier);
        Ok(())
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
    use super::super::testing::{DISK, HOST, begin, host, items, put, tiers};
    use super::super::{Contents, Medium, Outcome, Store, Write};
    use super::*;

    fn store(remembered: u32) -> TierConfig {
        let contents = Contents::Asked { remembered };
        TierConfig { contents, ..TierConfig::new(Medium::Remote, BlockCount(3)) }
    }

    #[test]
    fn a_shared_store_is_asked_once_and_its_no_is_remembered_for_a_while() {
        let mut tiers = tiers(&[host(4), store(2)]);
        assert_eq!([7, 7, 8].map(|key| tiers.lookup(&key)), [Lookup::Retry; 3]);
        let asked: Vec<_> = tiers.questions().collect();
        assert_eq!(asked, [(DISK, 7), (DISK, 8)]);
        tiers.answer(DISK, 7, true).unwrap();
        tiers.answer(DISK, 8, false).unwrap();
        assert_eq!([7, 8].map(|key| tiers.lookup(&key)), [Lookup::Hit(DISK), Lookup::Miss]);
        for key in [1, 2] {
            tiers.answer(DISK, key, false).unwrap();
        }
        assert_eq!([1, 2, 8].map(|key| tiers.lookup(&key)), [Lookup::Miss, Lookup::Miss, Lookup::Retry]);
        tiers.forget_answers(DISK).unwrap();
        assert_eq!([1, 8].map(|key| tiers.lookup(&key)), [Lookup::Retry; 2]);
        assert_eq!(tiers.questions().count(), 2, "what was asked before and is still open is asked once");
        assert_eq!(tiers.answer(HOST, 1, true), Err(TierError::NotAsked { tier: HOST }));
        tiers.check().unwrap();
    }

    #[test]
    fn a_store_keeps_as_much_in_mind_as_it_has_slots() {
        let mut tiers = tiers(&[host(4), store(2)]);
        for key in 1..=4 {
            tiers.answer(DISK, key, true).unwrap();
        }
        assert_eq!([1, 4].map(|key| tiers.lookup(&key)), [Lookup::Retry, Lookup::Hit(DISK)]);
        let pin = tiers.pin(&[2, 3, 4]).unwrap();
        tiers.answer(DISK, 5, true).unwrap();
        assert_eq!(tiers.lookup(&5), Lookup::Miss, "no slot, as if it were not there");
        tiers.complete(pin, Outcome::All).unwrap();
        tiers.check().unwrap();
    }

    #[test]
    fn reach_tells_what_can_be_loaded_promoted_and_waited_for() {
        let mut tiers = tiers(&[host(4), store(9)]);
        put(&mut tiers, &[1, 2]);
        tiers.answer(DISK, 3, true).unwrap();
        begin(tiers.store(HOST, &items(&[4])).unwrap());
        let reach = tiers.reach(&[1, 2, 3, 4, 5, 6, 7]);
        let [loadable, present, coming] = [2, 3, 4].map(BlockCount);
        assert_eq!(reach, Reach { loadable, present, coming, asked: true });
        assert_eq!(tiers.questions().map(|(_, key)| key).collect::<Vec<_>>(), [5, 6, 7], "all at once");
        assert!(matches!(tiers.load(&[(3, BlockId(5))]), Err(TierError::Staged { index: 0, tier: DISK })));
    }

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
