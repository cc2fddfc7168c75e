//! Tiers behind the cache, with memory of their own. Copies are made when their job ends, as late as may be, so that
//! whoever overwrites what is still to be copied is found out; some fail, and leave rubbish.

use std::collections::BTreeMap;

use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

use super::{Cache, Script, World};

/// What a place holds that nothing sensible was written to.
const RUBBISH: u64 = 0;

/// The tiers, what lies in each slot, and the copies under way.
pub(super) struct Behind {
    pub(super) offload: Offload<BlockHash>,
    /// By tier and slot.
    slots: Vec<BTreeMap<u32, Vec<u64>>>,
    /// How many copies of a job have been made.
    jobs: BTreeMap<JobId, usize>,
    now: Tick,
}

impl Behind {
    /// One to three tiers, or none at all.
    pub(super) fn new(script: &mut Script<'_>) -> Option<Behind> {
        let tiers = script.below(6).checked_sub(2)?.clamp(1, 3);
        let configs: Vec<TierConfig> = (0..tiers)
            .map(|tier| TierConfig {
                eviction: if script.one_in(3) { TierEviction::Arc } else { TierEviction::Lru },
                write: match script.below(4) {
                    0 => Write::After { offers: 2, tracked: 20 },
                    1 => Write::Back { ahead: 2 },
                    _ => Write::THROUGH,
                },
                staged: tier > 0 && script.one_in(2),
                ..TierConfig::new(Medium::Host, BlockCount(1 + script.below(12)))
            })
            .collect();
        let patience = match script.below(3) {
            0 => Patience::BestEffort,
            1 => Patience::Timeout { base: 1, per_block: 1 },
            _ => Patience::WaitComplete,
        };
        let minimum = BlockCount(script.below(3));
        let fetch = Fetch { load_min: minimum, promote_min: minimum, patience };
        let tiers = Tiers::new(&configs, 0).expect("they can work");
        let slots = vec![BTreeMap::new(); configs.len()];
        Some(Behind { offload: Offload::new(tiers, fetch), slots, jobs: BTreeMap::new(), now: Tick(0) })
    }

    fn note(&mut self, store: Store) -> Option<JobId> {
        let Store::Begun { job, .. } = store else { return None };
        self.jobs.insert(job, 0);
        Some(job)
    }
}

/// The cache and what is behind it, if something is.
fn both<'a>(cache: &'a mut Cache, behind: &'a mut Option<Behind>) -> Option<(&'a mut Cache, &'a mut Behind)> {
    behind.as_mut().map(|behind| (cache, behind))
}

impl World {
    /// How many tokens behind its hit a sequence may claim as external, because a tier has them. None if it waits.
    pub(super) fn look_behind(&mut self, id: u64) -> Option<u32> {
        let Some((cache, behind)) = both(&mut self.cache, &mut self.behind) else { return Some(0) };
        behind.now.0 += 1;
        let external = behind.offload.external(cache, SequenceId(id), behind.now).expect("it holds nothing");
        behind.jobs.extend(external.begun.map(|job| (job, 0)));
        match external.advice {
            Advice::Compute => Some(0),
            Advice::Load(tokens) => Some(tokens.get()),
            Advice::Wait { .. } => None,
        }
    }

    /// Saves what a claim pushed out of the cache, before anything is written.
    pub(super) fn rescue(&mut self) {
        let Some((cache, behind)) = both(&mut self.cache, &mut self.behind) else { return };
        let store = behind.offload.rescue(cache).expect("all loads began here");
        if let Some(job) = behind.note(store) {
            let copies = behind.offload.tiers().transfers(job).expect("it has begun").len();
            self.make(job, copies, None);
        }
    }

    /// Offers what a sequence has computed.
    pub(super) fn offer(&mut self, id: u64, computed: u32) {
        if let Some((cache, behind)) = both(&mut self.cache, &mut self.behind) {
            let store = behind.offload.computed(cache, SequenceId(id), TokenCount(computed)).expect("open");
            behind.note(store);
        }
    }

    /// Begins the load of what was claimed because a tier had it. It may have to wait, or be gone.
    pub(super) fn load(&mut self, id: u64) {
        let Some((cache, behind)) = both(&mut self.cache, &mut self.behind) else { return };
        let sequence = self.sequences.get_mut(&id).expect("open");
        match behind.offload.load(cache, SequenceId(id)).expect("it was claimed") {
            LoadStart::Begun(job) => {
                behind.jobs.insert(job, 0);
                sequence.fetches = Some(true);
            }
            LoadStart::Later(block) => assert!(!behind.offload.tiers().is_idle(block)),
            LoadStart::Gone(computed) => {
                (sequence.loading, sequence.fetches) = (None, None);
                sequence.computed = computed.get();
            }
        }
    }

    /// Gives a sequence's room back, and forgets it if it is to be closed.
    pub(super) fn part(&mut self, id: u64, close: bool) -> bool {
        let name = SequenceId(id);
        match both(&mut self.cache, &mut self.behind) {
            Some((cache, behind)) if close => behind.offload.close(cache, name).is_ok(),
            Some((cache, behind)) => behind.offload.release(cache, name).is_ok(),
            None if close => self.cache.close(name).is_ok(),
            None => self.cache.release(name).is_ok(),
        }
    }

    pub(super) fn reset(&mut self) -> bool {
        match both(&mut self.cache, &mut self.behind) {
            Some((cache, behind)) => behind.offload.reset(cache),
            None => self.cache.reset(),
        }
    }

    /// A call to the tiers: copies are made or fail, content moves on, a sequence is swapped out.
    pub(super) fn tend(&mut self, id: u64, script: &mut Script<'_>) {
        let Some((cache, behind)) = both(&mut self.cache, &mut self.behind) else { return };
        match script.below(8) {
            0 => {
                let tiers = behind.slots.len() as u32;
                let (tier, most) = (script.below(tiers + 1), BlockCount(1 + script.below(6)));
                let flushed = behind.offload.tiers_mut().flush(TierId(tier as u8), most);
                assert_eq!(flushed.is_ok(), (1..tiers).contains(&tier));
                behind.note(flushed.unwrap_or(Store::Nothing));
            }
            1 => {
                let sequence = self.sequences.get(&id).filter(|of| of.loading.is_none());
                if let Some(computed) = sequence.map(|of| of.computed) {
                    let store = behind.offload.swap_out(cache, SequenceId(id), TokenCount(computed));
                    behind.note(store.expect("open"));
                    self.release(id);
                }
            }
            2 => {
                let job = behind.jobs.keys().nth(script.below(4) as usize).copied();
                if let Some(job) = job {
                    let copies = behind.offload.tiers().transfers(job).expect("it has begun").len();
                    let made = (script.below(copies as u32 + 1) as usize).max(behind.jobs[&job]);
                    self.make(job, made, None);
                    let (cache, behind) = both(&mut self.cache, &mut self.behind).expect("there are tiers");
                    behind.offload.progress(cache, job, made as u32).expect("so many were made");
                }
            }
            _ => {
                let job = behind.jobs.keys().nth(script.below(4) as usize).copied();
                let (ends, copy) = (script.below(6), script.below(8));
                if let Some(job) = job {
                    self.finish(job, ends, copy);
                }
            }
        }
    }

    /// Ends a job: well, early, or with a bad copy.
    fn finish(&mut self, job: JobId, ends: u32, copy: u32) {
        let behind = self.behind.as_ref().expect("there are tiers");
        let (copies, made) =
            (behind.offload.tiers().transfers(job).expect("it has begun").len(), behind.jobs[&job]);
        let copy = copy.max(made as u32);
        let bad = [copy];
        let outcome = match ends {
            0 if (copy as usize) < copies => Outcome::First(copy),
            1 if (copy as usize) < copies => Outcome::AllBut(&bad),
            _ => Outcome::All,
        };
        match outcome {
            Outcome::First(made) => self.make(job, made as usize, None),
            Outcome::AllBut(_) => self.make(job, copies, Some(copy as usize)),
            Outcome::All => self.make(job, copies, None),
        }
        let (cache, behind) = both(&mut self.cache, &mut self.behind).expect("there are tiers");
        behind.jobs.remove(&job);
        let ended = behind.offload.complete(cache, job, outcome).expect("it was under way");
        if let Finished::Loaded { sequence: SequenceId(id), computed } = ended {
            let sequence = self.sequences.get_mut(&id).expect("open");
            assert_eq!(sequence.fetches, Some(true), "it was loading");
            let (came, claimed) = (sequence.loading.map(|(.., to)| to), sequence.computed);
            (sequence.loading, sequence.fetches) = (None, None);
            sequence.computed = computed.get();
            self.read(id, computed.get());
            if came == Some(computed.get()) {
                // What was claimed behind the load meanwhile is computed now.
                self.write(id, computed.get(), claimed);
                self.sequences.get_mut(&id).expect("open").computed = claimed;
            }
        }
    }

    /// Makes the copies of a job up to the one numbered `to`, of which one may fail.
    fn make(&mut self, job: JobId, to: usize, bad: Option<usize>) {
        let Some(behind) = &mut self.behind else { return };
        let from = behind.jobs.insert(job, to).expect("it has begun");
        let transfers = behind.offload.tiers().transfers(job).expect("it has begun").to_vec();
        for (copy, transfer) in transfers.into_iter().enumerate().take(to).skip(from) {
            let size = self.block_size;
            let memory = &mut self.memory[usize::from(transfer.key.group.0)];
            let slots = |block: BlockId| (0..size).map(move |at| u64::from(block.get() * size + at));
            let read = match transfer.from {
                Place::Device(block) => {
                    slots(block).map(|slot| memory.get(&slot).copied().unwrap_or(RUBBISH)).collect()
                }
                Place::Tier(from) => behind.slots[usize::from(from.tier.0)][&from.slot].clone(),
            };
            let written = if bad == Some(copy) { vec![RUBBISH; read.len()] } else { read };
            match transfer.to {
                Place::Device(block) => memory.extend(slots(block).zip(written)),
                Place::Tier(to) => _ = behind.slots[usize::from(to.tier.0)].insert(to.slot, written),
            }
        }
    }

    /// Ends all jobs.
    pub(super) fn settle_behind(&mut self) {
        while let Some(job) = self.behind.as_ref().and_then(|behind| behind.jobs.keys().next().copied()) {
            self.finish(job, 9, 0);
        }
        if let Some(behind) = &self.behind {
            for tier in (0..).map(TierId).take(behind.slots.len()) {
                let stats = behind.offload.tiers().stats(tier).expect("there is one");
                assert_eq!((stats.held, stats.writing, stats.gone), Default::default(), "no slot is lost");
            }
        }
    }

    /// Audits the tiers, and hears the events of all.
    pub(super) fn hear(&mut self) {
        let replica = &mut self.replica;
        let apply = |number, event: Event<'_, BlockHash>| {
            replica.apply(number, &event).unwrap_or_else(|error| panic!("{error}: {event:?}"));
        };
        let snapshot = match both(&mut self.cache, &mut self.behind) {
            Some((cache, behind)) => {
                behind.offload.check(cache).expect("every invariant holds");
                behind.offload.drain_events(cache, apply);
                behind.offload.snapshot(cache)
            }
            None => {
                self.cache.drain_events(apply);
                self.cache.snapshot()
            }
        };
        assert_eq!(self.replica, Replica::of(&snapshot.expect("it tells")), "the events come to the index");
    }
}
