//! How a job ends: what was written can be read, what was not is forgotten, everything held is let go.

use std::collections::BTreeSet;

use super::job::Work;
use super::tiers::DeviceUse;
use super::{Ended, JobId, Key, Outcome, Place, TierError, TierEvent, TierId, TierSlot, Tiers, Transfer};
use crate::id::count;
use crate::{BlockCount, BlockId};

impl<K: Key> Tiers<K> {
    /// The first `made` copies of a job have been made, the others are under way: those can be read from now on, and
    /// their sources are let go. Saying what was said before changes nothing.
    ///
    /// # Errors
    /// [`TierError::UnknownJob`]; [`TierError::NoSuchCopy`] for more copies than there are, or fewer than said before.
    pub fn progress(&mut self, job: JobId, made: u32) -> Result<(), TierError> {
        let (first, end) = self.under_way(job)?;
        must_name(job, Outcome::First(made), first, end)?;
        let Some(entry) = self.jobs.get_mut(&job) else { return Err(self.unknown(job)) };
        if let Work::Copy { transfers, settled } = &mut entry.work {
            *settled = made as usize;
            let done = transfers[first..made as usize].to_vec();
            for transfer in done {
                self.settle_copy(transfer, true, false);
            }
        }
        Ok(())
    }

    /// A job has ended, in whatever way: nothing reads its sources and nothing writes to its targets any more. Also
    /// ends a [`pin`](Tiers::pin).
    ///
    /// What was written can be read. What was not is forgotten, and so is what a tier failed to deliver.
    ///
    /// # Errors
    /// [`TierError::UnknownJob`], also for a job that ended before; [`TierError::NoSuchCopy`] for an outcome that names
    /// a copy which the job does not have or which was reported as made.
    pub fn complete(&mut self, job: JobId, outcome: Outcome<'_>) -> Result<Ended, TierError> {
        let (first, end) = self.under_way(job)?;
        must_name(job, outcome, first, end)?;
        let Some(entry) = self.jobs.remove(&job) else { return Err(self.unknown(job)) };
        let late = entry.generation != self.generation;
        let (mut leading, mut made) = (first, first);
        match entry.work {
            Work::Pin(places) => {
                for place in places {
                    self.level_mut(place.tier).end_hold(place.slot);
                }
            }
            Work::Copy { transfers, .. } => {
                let bad: BTreeSet<usize> = match outcome {
                    Outcome::AllBut(bad) => bad.iter().map(|&index| index as usize).collect(),
                    Outcome::First(made) => (made as usize..end).collect(),
                    Outcome::All => BTreeSet::new(),
                };
                let blamed = matches!(outcome, Outcome::AllBut(_));
                for (index, &transfer) in transfers.iter().enumerate().skip(first) {
                    let good = !bad.contains(&index);
                    leading += usize::from(good && leading == index);
                    made += usize::from(good);
                    self.settle_copy(transfer, good, blamed && !good);
                }
            }
        }
        let [leading, made] = [leading, made].map(|copies| BlockCount(count(copies)));
        Ok(if late { Ended::Late } else { Ended::Counted { leading, made } })
    }

    /// The copies of a job whose end is not known: from the first up to, not including, the second.
    fn under_way(&self, job: JobId) -> Result<(usize, usize), TierError> {
        match self.jobs.get(&job).map(|job| &job.work) {
            Some(Work::Copy { transfers, settled }) => Ok((*settled, transfers.len())),
            Some(Work::Pin(_)) => Ok((0, 0)),
            None => Err(self.unknown(job)),
        }
    }

    pub(super) fn unknown(&self, job: JobId) -> TierError {
        TierError::UnknownJob { job, next: self.next_job }
    }

    fn settle_copy(&mut self, transfer: Transfer<K>, good: bool, blamed: bool) {
        match transfer.from {
            Place::Device(block) => self.end_read(block),
            Place::Tier(from) => {
                if blamed {
                    self.lose(transfer.key, from);
                }
                self.level_mut(from.tier).end_hold(from.slot);
            }
        }
        match transfer.to {
            Place::Device(block) => _ = self.device.remove(&block),
            Place::Tier(to) => self.end_write(transfer, to, good),
        }
        self.count_copy(transfer, good);
    }

    fn end_read(&mut self, block: BlockId) {
        match self.device.get_mut(&block) {
            Some(DeviceUse::Read(jobs)) if *jobs > 1 => *jobs -= 1,
            _ => _ = self.device.remove(&block),
        }
    }

    fn end_write(&mut self, transfer: Transfer<K>, to: TierSlot, good: bool) {
        if let Some(key) = self.level_mut(to.tier).end_write(to.slot, good) {
            self.events.push(TierEvent::Stored { key, tier: to.tier, from: Some(transfer.from) });
            self.offer_below(to.tier, key);
        }
    }

    /// A tier could not deliver what it was taken to have. If that was forgotten meanwhile, by another job or a reset,
    /// the key leads elsewhere, because the job has kept the slot.
    fn lose(&mut self, key: K, from: TierSlot) {
        if self.level(from.tier).slot(&key) == Some(from.slot)
            && self.level_mut(from.tier).forget(from.slot).is_some()
        {
            self.note_removed(key, from.tier);
        }
    }

    fn count_copy(&mut self, transfer: Transfer<K>, good: bool) {
        let mut count = |tier: TierId, read: bool| {
            let counted = &mut self.counted[usize::from(tier.0)];
            *match (read, good) {
                (true, true) => &mut counted.reads,
                (true, false) => &mut counted.failed_reads,
                (false, true) => &mut counted.writes,
                (false, false) => &mut counted.failed_writes,
            } += 1;
        };
        if let Place::Tier(from) = transfer.from {
            count(from.tier, true);
        }
        if let Place::Tier(to) = transfer.to {
            count(to.tier, false);
        }
    }
}

fn must_name(job: JobId, outcome: Outcome<'_>, first: usize, end: usize) -> Result<(), TierError> {
    match outcome.stranger(first, end) {
        Some(index) => Err(TierError::NoSuchCopy { job, index, first, end }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{DISK, HOST, begin, host, items, put, removed, tiers};
    use super::super::{Lookup, Medium, TierConfig};
    use super::*;

    #[test]
    fn what_is_being_written_is_pending_and_then_there_or_not() {
        let mut tiers = tiers(&[host(4)]);
        let job = begin(tiers.store(HOST, &items(&[1, 2, 3])).unwrap());
        assert_eq!(tiers.lookup(&1), Lookup::Pending(job));
        let ended = tiers.complete(job, Outcome::AllBut(&[1])).unwrap();
        assert_eq!(ended, Ended::Counted { leading: BlockCount(1), made: BlockCount(2) });
        let found = [1, 2, 3].map(|key| tiers.lookup(&key));
        assert_eq!(found, [Lookup::Hit(HOST), Lookup::Miss, Lookup::Hit(HOST)]);
        assert_eq!(removed(&mut tiers), [], "what was never there is not removed");
    }

    #[test]
    fn what_a_tier_fails_to_deliver_is_forgotten_there_and_what_was_given_up_is_not() {
        let mut tiers = tiers(&[host(4)]);
        put(&mut tiers, &[1, 2, 3]);
        let load = |tiers: &mut Tiers<u32>| {
            tiers.load(&[(1, BlockId(7)), (2, BlockId(8)), (3, BlockId(9))]).unwrap()
        };
        let job = load(&mut tiers);
        let ended = tiers.complete(job, Outcome::First(1)).unwrap();
        assert_eq!(ended, Ended::Counted { leading: BlockCount(1), made: BlockCount(1) });
        let job = load(&mut tiers);
        let ended = tiers.complete(job, Outcome::AllBut(&[1])).unwrap();
        assert_eq!(ended, Ended::Counted { leading: BlockCount(1), made: BlockCount(2) });
        let found = [1, 2, 3].map(|key| tiers.lookup(&key));
        assert_eq!(found, [Lookup::Hit(HOST), Lookup::Miss, Lookup::Hit(HOST)]);
        assert_eq!(removed(&mut tiers), [2]);
        tiers.check().unwrap();
    }

    #[test]
    fn copies_that_are_made_count_before_the_job_ends() {
        let mut tiers = tiers(&[host(4)]);
        let job = begin(tiers.store(HOST, &items(&[1, 2, 3])).unwrap());
        tiers.progress(job, 2).unwrap();
        tiers.progress(job, 2).unwrap();
        assert_eq!(
            [1, 2, 3].map(|key| tiers.lookup(&key)),
            [Lookup::Hit(HOST), Lookup::Hit(HOST), Lookup::Pending(job)]
        );
        assert!(tiers.is_idle(BlockId(2)) && !tiers.is_idle(BlockId(3)));
        let wrong = |index| Err(TierError::NoSuchCopy { job, index, first: 2, end: 3 });
        assert_eq!(tiers.progress(job, 1), wrong(1).map(|_: ()| ()));
        assert_eq!(tiers.progress(job, 4), wrong(4).map(|_: ()| ()));
        assert_eq!(tiers.complete(job, Outcome::First(1)), wrong(1).map(|_: ()| Ended::Late));
        assert_eq!(tiers.complete(job, Outcome::AllBut(&[0])), wrong(0).map(|_: ()| Ended::Late));
        assert_eq!(tiers.complete(job, Outcome::AllBut(&[3])), wrong(3).map(|_: ()| Ended::Late));
        let ended = tiers.complete(job, Outcome::AllBut(&[2])).unwrap();
        assert_eq!(ended, Ended::Counted { leading: BlockCount(2), made: BlockCount(2) });
        tiers.check().unwrap();
    }

    #[test]
    fn a_job_ends_once() {
        let mut tiers = tiers(&[host(4)]);
        put(&mut tiers, &[1]);
        let unknown = |job| Err(TierError::UnknownJob { job: JobId(job), next: JobId(2) });
        assert_eq!(tiers.complete(JobId(1), Outcome::All), unknown(1));
        assert_eq!(tiers.complete(JobId(2), Outcome::All), unknown(2));
        assert_eq!(tiers.progress(JobId(0), 0), unknown(0).map(|_: Ended| ()));
        assert_eq!(tiers.transfers(JobId(9)).map(|_| Ended::Late), unknown(9));
    }

    #[test]
    fn a_job_from_before_a_reset_keeps_its_slots_and_changes_nothing_else() {
        let mut tiers = tiers(&[host(2)]);
        put(&mut tiers, &[1]);
        let store = begin(tiers.store(HOST, &items(&[2])).unwrap());
        let load = tiers.load(&[(1, BlockId(9))]).unwrap();
        tiers.reset();
        tiers.check().unwrap();
        assert_eq!([1, 2].map(|key| tiers.lookup(&key)), [Lookup::Miss; 2]);
        let again = tiers.store(HOST, &items(&[2])).unwrap();
        assert!(matches!(again, super::super::Store::NoRoom { .. }), "its slots may still be written");
        assert!(!tiers.is_idle(BlockId(9)), "and so may its block");
        assert_eq!(tiers.complete(store, Outcome::All), Ok(Ended::Late));
        assert_eq!(tiers.lookup(&2), Lookup::Miss);
        put(&mut tiers, &[1]);
        assert_eq!(tiers.complete(load, Outcome::AllBut(&[0])), Ok(Ended::Late));
        assert_eq!(tiers.lookup(&1), Lookup::Hit(HOST), "the failure is not about this content");
        assert!(tiers.is_idle(BlockId(9)));
        assert!(matches!(tiers.complete(load, Outcome::All), Err(TierError::UnknownJob { .. })));
        assert_eq!(tiers.stats(HOST).unwrap().free, BlockCount(1));
        tiers.check().unwrap();
    }

    #[test]
    fn a_failed_promotion_is_not_tried_again() {
        let mut tiers = tiers(&[host(1), TierConfig::new(Medium::Disk, BlockCount(4))]);
        put(&mut tiers, &[1]);
        let job = begin(tiers.flush(DISK, BlockCount(1)).unwrap());
        tiers.complete(job, Outcome::All).unwrap();
        put(&mut tiers, &[2]);
        let up = begin(tiers.promote(HOST, &[1]).unwrap());
        assert_eq!(tiers.lookup(&2), Lookup::Miss, "it made room");
        tiers.complete(up, Outcome::AllBut(&[0])).unwrap();
        assert_eq!(tiers.lookup(&1), Lookup::Miss);
        assert_eq!(tiers.stats(HOST).unwrap().free, BlockCount(1));
        tiers.check().unwrap();
    }
}
