//! The calls to the tiers, and what the model expects of them.

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::Pair;
use crate::calls::Call;
use crate::model::Model;
use crate::model::behind::{Needed, Start};
use crate::shelves::Plan;

impl<E: Eviction, P: Eviction> Pair<E, P> {
    /// What the tiers may know by name has one number in the model, in every sequence that knows it.
    pub(super) fn learn(&mut self) {
        if self.offload.is_none() || !self.cache.config().prefix_caching {
            return;
        }
        let (unit, groups) = (self.cache.config().hash_unit().get(), self.cache.config().groups.len() as u8);
        for id in self.model.sequences.keys().copied().collect::<Vec<_>>() {
            let hashes = self.cache.hashes(SequenceId(id)).unwrap();
            for group in (0..groups).map(GroupId) {
                let size = self.cache.table_in(SequenceId(id), group).unwrap().block_size().get();
                for index in 0..hashes.len() as u32 * unit / size {
                    let digest = hashes[((index + 1) * size / unit) as usize - 1];
                    let content = self.model.content_of(id, usize::from(group.0), index).unwrap();
                    let known = *self.names.entry(BlockKey { digest, group }).or_insert(content);
                    assert_eq!(known, content, "{digest} of group {group}");
                }
            }
        }
    }

    pub(super) fn run_behind(&mut self, call: Call) {
        let Pair { cache, model, offload, .. } = self;
        let offload = offload.as_mut().unwrap();
        let jobs = |model: &Model<P>| model.behind.as_ref().unwrap().jobs.keys().copied().collect::<Vec<_>>();
        match call {
            Call::Computed { sequence, behind } => {
                let tokens = model.settled(sequence).saturating_sub(behind);
                let answer = offload.computed(cache, SequenceId(sequence), TokenCount(tokens));
                match (answer, model.offer(sequence, tokens)) {
                    (Ok(store), Ok((found, plan))) => self.store(store, plan, &found),
                    (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
                }
            }
            Call::Fetch { sequence, whole } => {
                let answer = offload.external(cache, SequenceId(sequence), Tick(0));
                let expected = model.elsewhere(sequence);
                match (answer, expected) {
                    (Ok(External { advice: Advice::Compute, begun: None }), Ok(0)) => {}
                    (Ok(External { advice: Advice::Load(tokens), begun: None }), Ok(expected)) => {
                        assert_eq!(tokens.get(), expected);
                        let computed = model.usual_start(sequence);
                        let claim =
                            Claim { computed, external: tokens, whole_sequence: whole, ..Claim::default() };
                        self.claim(sequence, claim, true);
                        self.load(sequence);
                    }
                    (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
                }
            }
            Call::Load { sequence } => self.load(sequence),
            Call::Flush { tier, most } => {
                let expected = model.behind.as_mut().unwrap().shelves.flush(tier, most as usize);
                match (offload.tiers_mut().flush(TierId(tier), BlockCount(most)), expected) {
                    (Ok(store), Ok(plan)) => self.store(store, plan, &[]),
                    (answer, expected) => assert_eq!(answer.err(), expected.err()),
                }
            }
            Call::Progress { job, made } => {
                let Some(&job) = jobs(model).get(job) else { return };
                let flight = &model.behind.as_ref().unwrap().jobs[&job];
                let made = (made as usize).clamp(flight.reported, flight.copies.len());
                offload.progress(cache, job, made as u32).unwrap();
                model.progress(job, made);
            }
            Call::Finish { job, end, copy } => {
                let Some(&job) = jobs(model).get(job) else { return };
                let flight = &model.behind.as_ref().unwrap().jobs[&job];
                let (first, copies, bad) = (flight.reported as u32, flight.copies.len() as u32, [copy]);
                let is_there = (first..copies).contains(&copy);
                let outcome = match end {
                    0 if is_there => Outcome::First(copy),
                    1 if is_there => Outcome::AllBut(&bad),
                    _ => Outcome::All,
                };
                let made = |at: usize| match outcome {
                    Outcome::First(copies) => at < copies as usize,
                    Outcome::AllBut(bad) => !bad.contains(&(at as u32)),
                    Outcome::All => true,
                };
                let expected = model.complete(job, made, matches!(outcome, Outcome::AllBut(_)));
                assert_eq!(offload.complete(cache, job, outcome), Ok(expected));
            }
            other => unreachable!("{other:?} is no call to the tiers"),
        }
    }

    fn load(&mut self, sequence: u64) {
        let Pair { cache, model, offload, .. } = self;
        let answer = offload.as_mut().unwrap().load(cache, SequenceId(sequence));
        match (answer, model.start(sequence)) {
            (Err(OffloadError::NothingToLoad { .. }), Ok(Start::Nothing)) => {}
            (Ok(LoadStart::Later(block)), Ok(Start::Later(expected))) => assert_eq!(block, expected),
            (Ok(LoadStart::Gone(tokens)), Ok(Start::Gone(expected))) => assert_eq!(tokens.get(), expected),
            (Ok(LoadStart::Begun(job)), Ok(Start::Begun(needed, tokens))) => {
                let copies = self.copies(job);
                let expected: Vec<u32> = needed.iter().map(|needed| needed.content).collect();
                assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), expected);
                self.model.fly(job, copies, &needed, Some((sequence, tokens)));
            }
            (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
        }
    }

    /// What a job copies, in the model's words.
    fn copies(&self, job: JobId) -> Vec<(u32, Place, Place)> {
        let transfers = self.offload.as_ref().unwrap().tiers().transfers(job).unwrap();
        transfers.iter().map(|copy| (self.names[&copy.key], copy.from, copy.to)).collect()
    }

    fn store(&mut self, store: Store, plan: Plan, found: &[Needed]) {
        match (store, plan) {
            (Store::Nothing, Plan::Nothing) => {}
            (Store::NoRoom { need, free, evictable }, Plan::NoRoom(numbers)) => {
                assert_eq!([need, free, evictable].map(|blocks| blocks.get() as usize), numbers);
            }
            (Store::Begun { job, copies, evicted }, Plan::Copy { tier, keys, victims }) => {
                let transfers = self.copies(job);
                assert_eq!(transfers.iter().map(|copy| copy.0).collect::<Vec<_>>(), keys);
                assert_eq!((copies.get() as usize, evicted.get() as usize), (keys.len(), victims.len()));
                let shelf = &mut self.model.behind.as_mut().unwrap().shelves.tiers[tier];
                victims.into_iter().for_each(|victim| shelf.evict(victim));
                self.model.fly(job, transfers, found, None);
            }
            (answer, expected) => unreachable!("{answer:?}, {expected:?} expected"),
        }
    }
}

/// What the cache said through the tiers.
pub(super) fn cache_error(answer: Result<(), OffloadError>) -> Result<(), Error> {
    answer.map_err(|error| match error {
        OffloadError::Cache(error) => error,
        other => unreachable!("{other}"),
    })
}
