//! What a tier says when it is asked for content, and what a shared store answers.

use super::level::Presence;
use super::{JobId, Key, TierError, TierEvent, TierId, Tiers};
use crate::BlockCount;

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

impl<K: Key> Tiers<K> {
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
}

#[cfg(test)]
mod tests {
    use super::super::Outcome;
    use super::super::testing::{DISK, HOST, begin, host, items, put, store, tiers};
    use super::*;
    use crate::BlockId;

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
}
