//! A cache and its tiers over real bytes: arrays for the device, the host and a disk. A block's bytes are what an
//! honest model would have computed for its tokens, so that every step can check all that it attends to. Copies are
//! made one by one, as late as their jobs allow, and some fail; sequences yield and end in the middle of it; the
//! process restarts.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the caches of this test are tiny")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::kind::{Full, SlidingWindow};
use quayline_kv_cache::tier::*;
use quayline_kv_cache::*;

const SEQUENCES: u64 = 5;
const RUBBISH: u64 = u64::MAX;

type Cached = KvCache;
type Named = BlockKey<BlockHash>;

#[derive(Clone, Debug)]
enum Call {
    Open {
        sequence: u64,
        tokens: Vec<TokenId>,
        reuse: Reuse,
    },
    /// Admit a waiting sequence, with what it finds elsewhere.
    Admit {
        sequence: u64,
        new: u32,
        whole: bool,
    },
    /// Compute further tokens of a running one.
    Step {
        sequence: u64,
        new: u32,
    },
    Push {
        sequence: u64,
        tokens: Vec<TokenId>,
    },
    SwapOut {
        sequence: u64,
    },
    Release {
        sequence: u64,
    },
    Close {
        sequence: u64,
    },
    Copy {
        job: usize,
        copy: usize,
        good: bool,
    },
    Progress {
        job: usize,
    },
    Complete {
        job: usize,
    },
    /// A job makes all copies that it has not made, all but perhaps one of them well, and ends.
    Finish {
        job: usize,
        bad: usize,
    },
    Flush {
        tier: u8,
        most: u32,
    },
    /// Shared stores answer what they were asked: that they have what other processes stored, which is one key in
    /// `has_one_in`.
    Answers {
        has_one_in: u64,
    },
    /// A shared store tells what another process has just stored there. Nobody asked.
    Announce {
        tier: u8,
        key: usize,
    },
    Tick,
    Reset,
    Restart {
        tier: u8,
    },
}

fn call() -> impl Strategy<Value = Call> {
    let sequence = || 0..SEQUENCES;
    let reuse = prop_oneof![5 => Just(Reuse::ReadWrite), 1 => Just(Reuse::WriteOnly)];
    prop_oneof![
        48 => (sequence(), tokens(16), reuse)
            .prop_map(|(sequence, tokens, reuse)| Call::Open { sequence, tokens, reuse }),
        96 => (sequence(), 1u32..25, prop::bool::weighted(0.2))
            .prop_map(|(sequence, new, whole)| Call::Admit { sequence, new, whole }),
        30 => (sequence(), 1u32..9).prop_map(|(sequence, new)| Call::Step { sequence, new }),
        24 => (sequence(), tokens(5)).prop_map(|(sequence, tokens)| Call::Push { sequence, tokens }),
        6 => sequence().prop_map(|sequence| Call::SwapOut { sequence }),
        6 => sequence().prop_map(|sequence| Call::Release { sequence }),
        40 => sequence().prop_map(|sequence| Call::Close { sequence }),
        30 => (0usize..4, 0usize..5, prop::bool::weighted(0.95))
            .prop_map(|(job, copy, good)| Call::Copy { job, copy, good }),
        12 => (0usize..6).prop_map(|job| Call::Progress { job }),
        96 => (0usize..4, 0usize..14).prop_map(|(job, bad)| Call::Finish { job, bad }),
        6 => (0usize..6).prop_map(|job| Call::Complete { job }),
        60 => (1u8..3, 1u32..9).prop_map(|(tier, most)| Call::Flush { tier, most }),
        30 => (1u64..4).prop_map(|has_one_in| Call::Answers { has_one_in }),
        6 => (1u8..3, 0usize..60).prop_map(|(tier, key)| Call::Announce { tier, key }),
        24 => Just(Call::Tick),
        1 => Just(Call::Reset),
        2 => (0u8..3).prop_map(|tier| Call::Restart { tier }),
    ]
}

/// Token lists that often begin alike.
fn tokens(length_max: u32) -> impl Strategy<Value = Vec<TokenId>> {
    (0..2 * length_max, 1..length_max, 0u32..3).prop_map(|(alike, length, other)| {
        (0..length).map(|index| if index < alike { index } else { 1000 * (other + 1) + index }).collect()
    })
}

#[derive(Clone, Debug)]
struct Setup {
    block_size: u32,
    blocks: u32,
    windows: Vec<Option<u32>>,
    tiers: Vec<TierConfig>,
    fetch: Fetch,
}

fn setup() -> impl Strategy<Value = Setup> {
    let windows = prop_oneof![
        3 => Just(vec![None]),
        1 => (1u32..9).prop_map(|window| vec![None, Some(window)]),
        1 => (1u32..9).prop_map(|window| vec![Some(window)]),
    ];
    let patience = prop_oneof![
        Just(Patience::BestEffort),
        Just(Patience::WaitComplete),
        Just(Patience::Timeout { base: 1, per_block: 1 }),
    ];
    let fetch = (0u32..3, 0u32..3, patience).prop_map(|(load_min, promote_min, patience)| Fetch {
        load_min: BlockCount(load_min),
        promote_min: BlockCount(promote_min),
        patience,
    });
    let tier = (2u32..14, any::<bool>(), 0u32..4, prop::bool::weighted(0.7), prop::bool::weighted(0.3))
        .prop_map(|(slots, arc, write, staged, asked)| TierConfig {
            eviction: if arc { TierEviction::Arc } else { TierEviction::Lru },
            write: match write {
                0 | 1 => Write::THROUGH,
                2 => Write::After { offers: 2, tracked: 20 },
                _ => Write::Back { ahead: 2 },
            },
            staged,
            contents: if asked { Contents::Asked { remembered: 4 } } else { Contents::Own },
            ..TierConfig::new(Medium::Host, BlockCount(slots))
        });
    let tiers = prop::collection::vec(tier, 1..4).prop_map(|mut tiers| {
        tiers[0].staged = false;
        tiers[0].contents = Contents::Own;
        tiers
    });
    (1u32..4, 7u32..18, windows, tiers, fetch).prop_map(|(block_size, blocks, windows, tiers, fetch)| Setup {
        block_size,
        blocks,
        windows,
        tiers,
        fetch,
    })
}

#[test]
fn every_step_attends_to_what_its_tokens_say() {
    let runs =
        Runs { cases: 100, rng_seed: RngSeed::Fixed(11), failure_persistence: None, ..Runs::default() };
    let mut seen = Seen::default();
    let strategy = (setup(), prop::collection::vec(call(), 100..400));
    let mut runner = TestRunner::new(runs);
    let totals = std::cell::RefCell::new(&mut seen);
    runner
        .run(&strategy, |(setup, calls)| {
            let mut world = World::new(setup);
            for (number, call) in (0..).zip(calls) {
                world.run(call);
                world.check();
                if number % 8 == 0 {
                    world.hear();
                }
            }
            world.wind_down();
            totals.borrow_mut().add(world.seen);
            Ok(())
        })
        .unwrap();
    // What is not reached is not tested.
    assert!(seen.from_others > 50, "{seen:?}");
    assert!(seen.loaded_tokens > 50 && seen.rescued > 50 && seen.promoted > 0, "{seen:?}");
    assert!(seen.cut_short > 2 && seen.for_nobody > 3 && seen.later > 2 && seen.swapped > 8, "{seen:?}");
}

/// How often something happened.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    loaded_tokens: u32,
    rescued: u32,
    promoted: u32,
    cut_short: u32,
    for_nobody: u32,
    later: u32,
    swapped: u32,
    from_others: u32,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        self.loaded_tokens += other.loaded_tokens;
        self.rescued += other.rescued;
        self.promoted += other.promoted;
        self.cut_short += other.cut_short;
        self.for_nobody += other.for_nobody;
        self.later += other.later;
        self.swapped += other.swapped;
        self.from_others += other.from_others;
    }
}

struct World {
    setup: Setup,
    cache: Cached,
    offload: Offload<BlockHash>,
    /// By block, by token in it.
    device: Vec<Vec<u64>>,
    /// By tier, by slot, by token in it.
    slots: Vec<Vec<Vec<u64>>>,
    sequences: BTreeMap<u64, State>,
    /// What the bytes of a key must be.
    meaning: BTreeMap<Named, Vec<u64>>,
    /// Copies under way; whether each is made, and well.
    jobs: BTreeMap<JobId, Vec<Option<bool>>>,
    reported: BTreeMap<JobId, usize>,
    now: Tick,
    /// Who hears nothing but events.
    replica: Replica<BlockHash>,
    seen: Seen,
}

#[derive(Clone, Debug)]
struct State {
    tokens: Vec<TokenId>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Waiting,
    /// Room for a load was granted; it has begun or not.
    Loading(bool),
    Running(u32),
}

/// What a model computes for a token: it depends on all tokens before, and on the group.
fn computed(tokens: &[TokenId], group: u8) -> u64 {
    let sum = |sum: u64, token: &TokenId| sum.wrapping_mul(1_000_003).wrapping_add(u64::from(*token) + 1);
    tokens.iter().fold(u64::from(group) + 17, sum)
}

impl World {
    fn new(setup: Setup) -> World {
        let groups = setup.windows.iter().map(|window| match window {
            None => Group::new(Full),
            Some(window) => Group::new(SlidingWindow::new(TokenCount(*window)).unwrap()),
        });
        let config = Config {
            groups: groups.collect(),
            retention: Retention::Dense,
            report_lost: true,
            events_max: 1000,
            ..Config::new(BlockSize::new(setup.block_size).unwrap(), BlockCount(setup.blocks))
        };
        let block = vec![RUBBISH; setup.block_size as usize];
        World {
            cache: KvCache::new(config).unwrap(),
            offload: Offload::new(Tiers::new(&setup.tiers, 0).unwrap(), setup.fetch),
            device: vec![block.clone(); setup.blocks as usize],
            slots: setup.tiers.iter().map(|tier| vec![block.clone(); tier.slots.get() as usize]).collect(),
            sequences: BTreeMap::new(),
            meaning: BTreeMap::new(),
            jobs: BTreeMap::new(),
            reported: BTreeMap::new(),
            now: Tick(0),
            replica: Replica::new(),
            seen: Seen::default(),
            setup,
        }
    }

    fn run(&mut self, call: Call) {
        match call {
            Call::Open { sequence, tokens, reuse } => {
                if !self.sequences.contains_key(&sequence) {
                    self.cache.open(SequenceId(sequence), SequenceKey::default(), &tokens, reuse).unwrap();
                    self.sequences.insert(sequence, State { tokens, phase: Phase::Waiting });
                    self.learn(sequence);
                    self.admit(sequence, 25, false);
                }
            }
            Call::Admit { sequence, new, whole } => match self.phase(sequence) {
                Some(Phase::Waiting) => self.admit(sequence, new, whole),
                Some(Phase::Loading(false)) => self.load(sequence),
                _ => {}
            },
            Call::Step { sequence, new } => {
                if let Some(Phase::Running(computed)) = self.phase(sequence) {
                    self.step(sequence, computed, new);
                }
            }
            Call::Push { sequence, tokens } => {
                if let Some(state) = self.sequences.get_mut(&sequence) {
                    self.cache.push(SequenceId(sequence), &tokens).unwrap();
                    state.tokens.extend(tokens);
                    self.learn(sequence);
                }
            }
            Call::SwapOut { sequence } => {
                if let Some(Phase::Running(computed)) = self.phase(sequence) {
                    let store = self
                        .offload
                        .swap_out(&mut self.cache, SequenceId(sequence), TokenCount(computed))
                        .unwrap();
                    self.seen.swapped += u32::from(matches!(store, Store::Begun { .. }));
                    self.begun(store);
                    self.release(sequence);
                }
            }
            Call::Release { sequence } => self.release(sequence),
            Call::Close { sequence } => {
                if self.phase(sequence).is_some_and(|phase| phase != Phase::Waiting) {
                    self.sequences.remove(&sequence);
                    self.offload.close(&mut self.cache, SequenceId(sequence)).unwrap();
                }
            }
            Call::Copy { job, copy, good } => {
                if let Some((&job, copies)) = self.jobs.iter().nth(job)
                    && copy < copies.len()
                {
                    self.make(job, copy, good);
                }
            }
            Call::Progress { job } => self.progress(job),
            Call::Complete { job } => self.complete(job),
            Call::Finish { job, bad } => {
                if let Some((&id, copies)) = self.jobs.iter().nth(job) {
                    (0..copies.len()).for_each(|copy| self.make(id, copy, copy != bad));
                    self.complete(job);
                }
            }
            Call::Flush { tier, most } => {
                if tier > 0 && usize::from(tier) < self.setup.tiers.len() {
                    let store = self.offload.tiers_mut().flush(TierId(tier), BlockCount(most)).unwrap();
                    self.begun(store);
                }
            }
            Call::Answers { has_one_in } => {
                let questions: Vec<_> = self.offload.tiers_mut().questions().collect();
                for (tier, key) in questions {
                    self.answer(tier, key, key.digest.low64().is_multiple_of(has_one_in));
                }
            }
            Call::Announce { tier, key } => {
                let asked = |tier: &TierConfig| tier.contents != Contents::Own;
                let known = self.meaning.keys().nth(key).copied();
                if let Some(key) =
                    known.filter(|_| self.setup.tiers.get(usize::from(tier)).is_some_and(asked))
                {
                    self.answer(TierId(tier), key, true);
                }
            }
            Call::Tick => self.now.0 += 1,
            Call::Reset => {
                if self.offload.reset(&mut self.cache) {
                    for tier in (0..).map(TierId).take(self.setup.tiers.len()) {
                        assert_eq!(self.offload.tiers().dump(tier).unwrap().count(), 0);
                    }
                }
            }
            Call::Restart { tier } => self.restart(tier),
        }
    }

    /// A shared store has, or has not, what another process computed for the same tokens.
    fn answer(&mut self, tier: TierId, key: Named, has: bool) {
        let slot = |offload: &Offload<BlockHash>| {
            let mut dump = offload.tiers().dump(tier).unwrap();
            dump.find(|&(there, _)| there == key).map(|(_, slot)| slot as usize)
        };
        let before = slot(&self.offload);
        self.offload.tiers_mut().answer(tier, key, has).unwrap();
        if let (true, None, Some(slot)) = (has, before, slot(&self.offload)) {
            self.slots[usize::from(tier.0)][slot] = self.meaning[&key].clone();
            self.seen.from_others += 1;
        }
    }

    fn phase(&self, sequence: u64) -> Option<Phase> {
        self.sequences.get(&sequence).map(|state| state.phase)
    }

    fn set(&mut self, sequence: u64, phase: Phase) {
        self.sequences.get_mut(&sequence).unwrap().phase = phase;
    }

    /// Notes what the bytes of the blocks that a sequence can name must be.
    fn learn(&mut self, sequence: u64) {
        let size = self.setup.block_size as usize;
        let state = &self.sequences[&sequence];
        for (index, &digest) in self.cache.hashes(SequenceId(sequence)).unwrap().iter().enumerate() {
            for group in 0..self.setup.windows.len() as u8 {
                let range = index * size..(index + 1) * size;
                let bytes = range.map(|token| computed(&state.tokens[..=token], group)).collect();
                let known = self.meaning.insert(BlockKey { digest, group: GroupId(group) }, bytes);
                let bytes = &self.meaning[&BlockKey { digest, group: GroupId(group) }];
                assert!(known.is_none_or(|known| known == *bytes));
            }
        }
    }

    fn begun(&mut self, store: Store) {
        if let Store::Begun { job, copies, .. } = store {
            self.fly(job);
            assert_eq!(self.jobs[&job].len(), copies.get() as usize);
        }
    }

    fn fly(&mut self, job: JobId) {
        let copies = self.offload.tiers().transfers(job).unwrap().len();
        self.jobs.insert(job, vec![None; copies]);
        self.reported.insert(job, 0);
    }

    fn admit(&mut self, sequence: u64, new: u32, whole: bool) {
        let id = SequenceId(sequence);
        let hit = self.cache.lookup(id).unwrap().tokens;
        let External { advice, begun } = self.offload.external(&mut self.cache, id, self.now).unwrap();
        if let Some(job) = begun {
            self.fly(job);
            self.seen.promoted += 1;
        }
        let external = match advice {
            Advice::Compute => TokenCount(0),
            Advice::Load(tokens) => tokens,
            Advice::Wait { loadable, coming, .. } => {
                assert!(loadable <= coming);
                return assert_ne!(self.setup.fetch.patience, Patience::BestEffort);
            }
        };
        let known = self.sequences[&sequence].tokens.len() as u32;
        assert!(hit.get() + external.get() < known, "the last token is computed");
        let new_tokens = if external.get() > 0 { 0 } else { new.clamp(1, known - hit.get()) };
        let claim = Claim {
            computed: hit,
            external,
            new_tokens: TokenCount(new_tokens),
            whole_sequence: whole,
            ..Claim::default()
        };
        if !self.claim(id, claim) {
            return;
        }
        if external.get() > 0 {
            self.set(sequence, Phase::Loading(false));
            self.load(sequence);
        } else {
            self.compute(sequence, hit.get(), new_tokens);
        }
    }

    /// Takes room, and saves what that pushes out before anything is written.
    fn claim(&mut self, sequence: SequenceId, claim: Claim) -> bool {
        match self.cache.reserve(sequence, claim).unwrap() {
            Admission::Admit(reservation) => _ = reservation.commit(),
            _ => return false,
        }
        let rescue = self.offload.rescue(&mut self.cache).unwrap();
        self.begun(rescue);
        if let Store::Begun { job, copies, .. } = rescue {
            self.seen.rescued += copies.get();
            for copy in 0..copies.get() as usize {
                self.make(job, copy, true);
            }
        }
        for copy in self.cache.copies().to_vec() {
            let tokens = copy.tokens.get() as usize;
            let source = self.device[copy.from.get() as usize][..tokens].to_vec();
            self.device[copy.to.get() as usize][..tokens].copy_from_slice(&source);
        }
        self.cache.end_step();
        true
    }

    fn load(&mut self, sequence: u64) {
        match self.offload.load(&mut self.cache, SequenceId(sequence)).unwrap() {
            LoadStart::Begun(job) => {
                self.fly(job);
                self.set(sequence, Phase::Loading(true));
            }
            LoadStart::Later(block) => {
                assert!(!self.offload.tiers().is_idle(block));
                self.seen.later += 1;
            }
            LoadStart::Gone(tokens) => {
                self.seen.cut_short += 1;
                self.runs(sequence, tokens.get());
            }
        }
    }

    fn runs(&mut self, sequence: u64, computed: u32) {
        let phase = if computed == 0 { Phase::Waiting } else { Phase::Running(computed) };
        self.set(sequence, phase);
        self.attend(sequence, computed);
    }

    fn step(&mut self, sequence: u64, computed: u32, new: u32) {
        let known = self.sequences[&sequence].tokens.len() as u32;
        let new = new.min(known - computed);
        let id = SequenceId(sequence);
        self.cache.settle(id, TokenCount(computed)).unwrap();
        let claim = Claim { computed: TokenCount(computed), new_tokens: TokenCount(new), ..Claim::default() };
        if new > 0 && self.claim(id, claim) {
            self.compute(sequence, computed, new);
        }
    }

    /// What the model does: read everything before, write what is new.
    fn compute(&mut self, sequence: u64, from: u32, new: u32) {
        self.attend(sequence, from);
        let tokens = self.sequences[&sequence].tokens.clone();
        for group in 0..self.setup.windows.len() as u8 {
            for token in from..from + new {
                let table = self.cache.table_in(SequenceId(sequence), GroupId(group)).unwrap();
                let block = table.blocks()[(token / self.setup.block_size) as usize];
                if block != BlockId::NULL {
                    let place = (token % self.setup.block_size) as usize;
                    self.device[block.get() as usize][place] = computed(&tokens[..=token as usize], group);
                }
            }
        }
        self.set(sequence, Phase::Running(from + new));
        let end = TokenCount(from + new);
        let store = self.offload.computed(&mut self.cache, SequenceId(sequence), end).unwrap();
        self.begun(store);
    }

    /// Reads all that the token behind `end` attends to.
    fn attend(&self, sequence: u64, end: u32) {
        let tokens = &self.sequences[&sequence].tokens;
        for (group, window) in (0u8..).zip(&self.setup.windows) {
            let table = self.cache.table_in(SequenceId(sequence), GroupId(group)).unwrap();
            let first = window.map_or(0, |window| (end + 1).saturating_sub(window));
            for token in first..end {
                let block = table.blocks()[(token / self.setup.block_size) as usize];
                assert_ne!(block, BlockId::NULL, "token {token} of {sequence} before {end}, group {group}");
                let there = self.device[block.get() as usize][(token % self.setup.block_size) as usize];
                let expected = computed(&tokens[..=token as usize], group);
                assert_eq!(there, expected, "token {token} of {sequence}, block {block}, group {group}");
            }
        }
    }

    fn release(&mut self, sequence: u64) {
        if self.sequences.contains_key(&sequence) {
            self.offload.release(&mut self.cache, SequenceId(sequence)).unwrap();
            self.set(sequence, Phase::Waiting);
        }
    }

    fn make(&mut self, job: JobId, copy: usize, good: bool) {
        let copies = self.jobs.get_mut(&job).unwrap();
        if copies[copy].is_some() {
            return;
        }
        copies[copy] = Some(good);
        let transfer = self.offload.tiers().transfers(job).unwrap()[copy];
        let read = self.bytes(transfer.from).clone();
        assert_eq!(read, self.meaning[&transfer.key], "what job {job} reads from {}", transfer.from);
        let length = read.len();
        *self.bytes(transfer.to) = if good { read } else { vec![RUBBISH; length] };
    }

    fn bytes(&mut self, place: Place) -> &mut Vec<u64> {
        match place {
            Place::Device(block) => &mut self.device[block.get() as usize],
            Place::Tier(place) => &mut self.slots[usize::from(place.tier.0)][place.slot as usize],
        }
    }

    fn progress(&mut self, job: usize) {
        let Some((&job, copies)) = self.jobs.iter().nth(job) else { return };
        let made = copies.iter().take_while(|copy| **copy == Some(true)).count();
        self.offload.progress(&mut self.cache, job, made as u32).unwrap();
        self.reported.insert(job, made);
    }

    fn complete(&mut self, job: usize) {
        let Some((&job, copies)) = self.jobs.iter().nth(job) else { return };
        let copies = copies.clone();
        let bad: Vec<u32> =
            (0..copies.len() as u32).filter(|&copy| copies[copy as usize] != Some(true)).collect();
        let first = copies.iter().take_while(|copy| **copy == Some(true)).count();
        let outcome = match bad[..] {
            [] => Outcome::All,
            _ if copies.contains(&Some(false)) => Outcome::AllBut(&bad),
            _ => Outcome::First(first as u32),
        };
        let finished = self.offload.complete(&mut self.cache, job, outcome).unwrap();
        self.jobs.remove(&job);
        self.reported.remove(&job);
        match finished {
            Finished::Loaded { sequence: SequenceId(sequence), computed } => {
                assert_eq!(self.phase(sequence), Some(Phase::Loading(true)));
                self.seen.loaded_tokens += computed.get();
                self.seen.cut_short += u32::from(!bad.is_empty());
                self.runs(sequence, computed.get());
            }
            Finished::LoadedForNobody => self.seen.for_nobody += 1,
            Finished::Moved(_) | Finished::Late => {}
        }
    }

    /// Ends the process. One tier is still there, with its list.
    fn restart(&mut self, tier: u8) {
        let Ok(origin) = self.offload.tiers().origin(TierId(tier)) else { return };
        let dump: Vec<_> = self.offload.tiers().dump(TierId(tier)).unwrap().collect();
        let mut tiers = Tiers::new(&self.setup.tiers, origin.generation).unwrap();
        tiers.restore(TierId(tier), origin, dump).unwrap();
        let fresh = World::new(self.setup.clone());
        let kept = std::mem::take(&mut self.slots[usize::from(tier)]);
        let meaning = std::mem::take(&mut self.meaning);
        *self = World {
            offload: Offload::new(tiers, self.setup.fetch),
            meaning,
            now: self.now,
            seen: self.seen,
            ..fresh
        };
        self.slots[usize::from(tier)] = kept;
    }

    fn check(&mut self) {
        self.cache.check().unwrap();
        self.offload.check(&self.cache).unwrap();
        for (tier, slots) in (0..).map(TierId).zip(&self.slots) {
            for (key, slot) in self.offload.tiers().dump(tier).unwrap() {
                assert_eq!(slots[slot as usize], self.meaning[&key], "slot {slot} of tier {tier}");
            }
        }
        let stats = self.cache.stats();
        assert_eq!(stats.free.get() + stats.used.get() + 1, self.setup.blocks);
    }

    /// What the events come to is what is there: in the device, in every tier, and in a snapshot.
    fn hear(&mut self) {
        let World { cache, offload, replica, .. } = self;
        offload.drain_events(cache, |number, event| replica.apply(number, &event).unwrap());
        assert_eq!(*replica, Replica::of(&offload.snapshot(cache).unwrap()));
        let mut told = BTreeMap::<Location, BTreeSet<(GroupId, BlockHash)>>::new();
        for (group, digest) in replica.blocks() {
            for location in replica.locations(group, digest) {
                told.entry(location).or_default().insert((group, digest));
            }
        }
        let in_device = told.remove(&Location::Device).unwrap_or_default();
        let in_device: BTreeSet<BlockHash> = in_device.into_iter().map(|(_, digest)| digest).collect();
        let blocks = (1..self.setup.blocks).map(BlockId);
        assert_eq!(in_device, blocks.filter_map(|block| cache.hash_of(block)).collect());
        for (tier, config) in (0..).map(TierId).zip(&self.setup.tiers) {
            let there = offload.tiers().dump(tier).unwrap().map(|(key, _)| (key.group, key.digest));
            let location = Location::Tier { tier, medium: config.medium };
            assert_eq!(told.remove(&location).unwrap_or_default(), there.collect(), "{location:?}");
        }
        assert!(told.is_empty(), "{told:?}");
    }

    fn wind_down(&mut self) {
        for sequence in std::mem::take(&mut self.sequences).into_keys() {
            self.offload.close(&mut self.cache, SequenceId(sequence)).unwrap();
        }
        while !self.jobs.is_empty() {
            self.complete(0);
            self.check();
        }
        self.hear();
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
        for tier in (0..).map(TierId).take(self.setup.tiers.len()) {
            let stats = self.offload.tiers().stats(tier).unwrap();
            assert_eq!((stats.held, stats.writing, stats.gone), Default::default(), "no slot is lost");
        }
    }
}
