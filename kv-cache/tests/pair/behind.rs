//! The calls to the tiers, and what the model expects of them.

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::Pair;
use crate::calls::Call;
use crate::model::Model;
use crate::model::afar::Start;
use crate::model::behind::{Behind, Needed};
use crate::seen::{saw, saw_if};
use crate::shelves::{Entry, Plan};

impl<E: Eviction + Clone, P: Eviction + Clone> Pair<E, P> {
    /// What the tiers may know by name has one number in the model, in every sequence that knows it.
    pub(super) fn learn(&mut self) {
        if self.offload.is_none() || !self.cache.config().prefix_caching {
            return;
        }
        let (unit, groups) = (self.cache.config().hash_unit().get(), self.cache.config().groups.len() as u8);
        for id in self.model.sequences.keys().copied().collect::<Vec<_>>() {
            let hashes = self.cache.hashes(SequenceId(id)).unwrap();
            if self.learned.get(&id).is_some_and(|learned| learned == hashes) {
                continue;
            }
            self.learned.insert(id, hashes.to_vec());
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
                    (Ok(store), Ok((found, plan))) => {
                        let begun = matches!(store, Store::Begun { .. });
                        saw_if(begun, "what was computed is stored");
                        let nearest = offload.tiers().config(TierId(0)).unwrap().write;
                        saw_if(begun && nearest != Write::THROUGH, "what was offered before is stored");
                        self.store(store, plan, &found);
                    }
                    (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
                }
            }
            Call::Fetch { sequence, whole } => self.fetch(sequence, whole),
            Call::Load { sequence } => self.load(sequence),
            Call::Flush { tier, most } => {
                let expected = model.behind.as_mut().unwrap().shelves.flush(tier, most as usize);
                match (offload.tiers_mut().flush(TierId(tier), BlockCount(most)), expected) {
                    (Ok(store), Ok(plan)) => {
                        let tiers = offload.tiers();
                        let back =
                            tiers.config(TierId(tier)).is_ok_and(|of| matches!(of.write, Write::Back { .. }));
                        let begun = matches!(store, Store::Begun { .. });
                        saw_if(
                            begun,
                            if back { "a tier is written back" } else { "a tier is written through" },
                        );
                        self.store(store, plan, &[]);
                    }
                    (answer, expected) => assert_eq!(answer.err(), expected.err()),
                }
            }
            Call::Swap { sequence, behind, release } => {
                let tokens = model.settled(sequence).saturating_sub(behind);
                let answer = offload.swap_out(cache, SequenceId(sequence), TokenCount(tokens));
                match (answer, model.leave(sequence, tokens)) {
                    (Ok(store), Ok((found, plan))) => {
                        let has_room = !matches!(store, Store::NoRoom { .. });
                        self.store(store, plan, &found);
                        if has_room {
                            self.model.keep_for(sequence, &found);
                            saw_if(release && !found.is_empty(), "a sequence is swapped out");
                        }
                        if release {
                            self.run(Call::Release { sequence });
                        }
                    }
                    (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
                }
            }
            Call::Answer { question, present } => self.answer(question, present),
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
                let is_load = flight.load.is_some();
                let all = (first..copies).all(|copy| made(copy as usize));
                saw(match (is_load, outcome) {
                    (_, _) if flight.late => "a job ends after a reset",
                    (true, Outcome::AllBut(_)) if copy > first => "a load fails in the middle",
                    (true, _) if !all => "a load ends early",
                    (false, Outcome::AllBut(_)) => "a store fails",
                    (false, _) if !all => "a store is given up",
                    (true, _) => "a load ends well",
                    (false, _) => "a store ends well",
                });
                let expected = model.complete(job, made, matches!(outcome, Outcome::AllBut(_)));
                saw_if(expected == Finished::LoadedForNobody, "a load ends for nobody");
                assert_eq!(offload.complete(cache, job, outcome), Ok(expected));
            }
            other => unreachable!("{other:?} is no call to the tiers"),
        }
    }

    /// What a sequence finds in the tiers is claimed and loaded.
    fn fetch(&mut self, sequence: u64, whole: bool) {
        self.now += 1;
        let Pair { cache, offload, .. } = self;
        let answer = offload.as_mut().unwrap().external(cache, SequenceId(sequence), Tick(self.now));
        let begun = answer.ok().and_then(|external| external.begun);
        let copies = begun.map(|job| (job, self.copies(job)));
        let had_waited = self.model.has_waited(sequence);
        let expected = self.model.external(sequence, self.now, |model, plan| {
            let Plan::Copy { tier, keys, victims } = plan else { unreachable!("{plan:?} begins nothing") };
            let (job, copies) = copies.expect("a promotion was to begin");
            assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), keys);
            let shelf = &mut model.behind.as_mut().unwrap().shelves.tiers[tier];
            victims.into_iter().for_each(|victim| shelf.evict(victim));
            model.fly(job, copies, &[], None);
            saw("content is promoted");
        });
        self.hear_questions();
        match (answer, expected) {
            (Ok(External { advice, begun }), Ok(expected)) => {
                assert_eq!((advice, begun.is_some()), (expected.advice, expected.promotes));
                saw_if(matches!(advice, Advice::Wait { .. }), "a sequence waits for content");
                saw_if(had_waited && !matches!(advice, Advice::Wait { .. }), "a sequence waits no longer");
                if let Advice::Load(external) = advice {
                    let computed = self.model.usual_start(sequence);
                    let claim = Claim { computed, external, whole_sequence: whole, ..Claim::default() };
                    self.claim(sequence, claim, true);
                    self.load(sequence);
                }
            }
            (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
        }
    }

    /// Shared stores are asked what the model says, in its order.
    fn hear_questions(&mut self) {
        let Pair { model, offload, names, .. } = self;
        let asked = offload.as_mut().unwrap().tiers_mut().questions();
        let asked: Vec<_> = asked.map(|(tier, key)| (tier, names[&key])).collect();
        saw_if(!asked.is_empty(), "a store is asked");
        assert_eq!(asked, std::mem::take(&mut model.behind.as_mut().unwrap().shelves.questions));
    }

    fn answer(&mut self, question: usize, present: bool) {
        let Pair { model, offload, names, .. } = self;
        let tiers = (0u8..).zip(&model.behind.as_ref().unwrap().shelves.tiers);
        let mut open = tiers.flat_map(|(id, tier)| tier.asked.iter().map(move |&content| (id, content)));
        let Some((tier, content)) = open.nth(question) else { return };
        let key = *names.iter().find(|(_, known)| **known == content).unwrap().0;
        let tiers = offload.as_mut().unwrap().tiers_mut();
        tiers.answer(TierId(tier), key, present).unwrap();
        let slot = || tiers.dump(TierId(tier)).unwrap().find(|(there, _)| *there == key).unwrap().1;
        model.answer(tier, content, present, slot);
        saw(if present { "a store says yes" } else { "a store says no" });
    }

    /// What a claim pushes out of the device is saved before anything is written.
    pub(super) fn rescue(&mut self) {
        let Pair { cache, model, offload, .. } = self;
        let store = offload.as_mut().unwrap().rescue(cache).unwrap();
        let plan = model.rescue();
        saw_if(matches!(store, Store::Begun { .. }), "what is pushed out is saved");
        saw_if(matches!(store, Store::NoRoom { .. }), "what is pushed out finds no room");
        self.store(store, plan, &[]);
    }

    /// The process ends, and another begins with what lies on disks.
    pub(super) fn restart(&mut self) {
        let written_down = self.offload.as_mut().map(|offload| offload.snapshot(&mut self.cache).unwrap());
        let (cache, model) = (self.new_cache(), self.new_model());
        self.replica = Replica::new();
        self.cache = cache;
        let old = std::mem::replace(&mut self.model, model);
        self.model.names = old.names;
        let (Some(before), Some((configs, fetch))) = (self.offload.take(), &self.tiered) else { return };
        let mut tiers = Tiers::new(configs, before.tiers().generation()).unwrap();
        let mut behind = Behind::new(configs, *fetch);
        let disks = (0..).map(TierId).zip(configs).filter(|(_, config)| config.medium == Medium::Disk);
        for (disk, _) in disks {
            let origin = before.tiers().origin(disk).unwrap();
            let dump: Vec<_> = before.tiers().dump(disk).unwrap().collect();
            let was = &old.behind.as_ref().unwrap().shelves.tiers[usize::from(disk.0)];
            assert_eq!(dump.iter().map(|(key, _)| self.names[key]).collect::<Vec<_>>(), was.order());
            for &(key, slot) in &dump {
                let entry = Entry { slot, writer: None };
                behind.shelves.tiers[usize::from(disk.0)].enter(self.names[&key], entry);
                saw("content outlives its process");
            }
            tiers.restore(disk, origin, dump).unwrap();
        }
        let mut offload = Offload::new(tiers, *fetch);
        for stored in written_down.iter().flat_map(Snapshot::stored) {
            let disk = matches!(stored.location, Location::Tier { medium: Medium::Disk, .. });
            if disk && !stored.tokens.is_empty() {
                offload.describe(&mut self.cache, &stored);
            }
        }
        self.offload = Some(offload);
        self.model.behind = Some(behind);
    }

    fn load(&mut self, sequence: u64) {
        let Pair { cache, model, offload, .. } = self;
        let answer = offload.as_mut().unwrap().load(cache, SequenceId(sequence));
        match (answer, model.start(sequence)) {
            (Err(OffloadError::NothingToLoad { .. }), Ok(Start::Nothing)) => {}
            (Ok(LoadStart::Later(block)), Ok(Start::Later(expected))) => {
                assert_eq!(block, expected);
                saw("a load finds its block still read");
            }
            (Ok(LoadStart::Gone(tokens)), Ok(Start::Gone(expected))) => {
                assert_eq!(tokens.get(), expected);
                saw("a load finds its content gone");
            }
            (Ok(LoadStart::Begun(job)), Ok(Start::Begun(needed, tokens))) => {
                let copies = self.copies(job);
                let expected: Vec<u32> = needed.iter().map(|needed| needed.content).collect();
                assert_eq!(copies.iter().map(|copy| copy.0).collect::<Vec<_>>(), expected);
                let from_disk = |place| matches!(place, Place::Tier(from) if self.is_disk(from.tier));
                saw_if(copies.iter().any(|copy| from_disk(copy.1)), "a load from a disk begins");
                saw("a load begins");
                self.model.fly(job, copies, &needed, Some((sequence, tokens)));
            }
            (answer, expected) => assert_eq!(cache_error(answer.map(drop)), expected.map(drop)),
        }
    }

    fn is_disk(&self, tier: TierId) -> bool {
        self.offload.as_ref().unwrap().tiers().config(tier).unwrap().medium == Medium::Disk
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
                saw("a tier has no room");
            }
            (Store::Begun { job, copies, evicted }, Plan::Copy { tier, keys, victims }) => {
                let transfers = self.copies(job);
                assert_eq!(transfers.iter().map(|copy| copy.0).collect::<Vec<_>>(), keys);
                assert_eq!((copies.get() as usize, evicted.get() as usize), (keys.len(), victims.len()));
                let shelf = &mut self.model.behind.as_mut().unwrap().shelves.tiers[tier];
                saw_if(!victims.is_empty(), "a tier gives content up");
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
