//! Random calls to the tiers against a dumb model, with bytes: a device, a host and disks made of arrays. Copies are
//! made one by one, in any order, as late as a job allows, some fail and leave rubbish, some report twice or after a
//! reset. What can be read is always what was stored, and nothing goes that was not reported.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the tiers of this test are tiny")]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::tier::*;
use quayline_kv_cache::{BlockCount, BlockId};

type Content = u32;

const KEYS: Content = 14;
const BLOCKS: u32 = 10;
const RUBBISH: u64 = u64::MAX;

/// The bytes that belong to a key.
fn bytes(key: Content) -> u64 {
    u64::from(key) * 1_000_003 + 7
}

#[derive(Clone, Debug)]
enum Call {
    /// The device computes content, into a block that nothing is copied from or to.
    Compute {
        block: u32,
        key: Content,
    },
    Offer {
        occasion: Occasion,
        first: u32,
        blocks: u32,
    },
    Store {
        tier: u8,
        first: u32,
        blocks: u32,
    },
    Load {
        first: Content,
        keys: u32,
        block: u32,
    },
    Promote {
        tier: u8,
        first: Content,
        keys: u32,
    },
    Flush {
        tier: u8,
        most: u32,
    },
    Pin {
        first: Content,
        keys: u32,
    },
    Touch {
        first: Content,
        keys: u32,
    },
    Settle {
        first: Content,
        keys: u32,
    },
    Reach {
        first: Content,
        keys: u32,
    },
    Answer {
        tier: u8,
        key: Content,
        present: bool,
    },
    /// A copy of a job under way is made, well or badly.
    Copy {
        job: usize,
        copy: usize,
        good: bool,
    },
    Progress {
        job: usize,
        made: u32,
    },
    Complete {
        job: usize,
    },
    /// Something said of a job that never was, or has ended.
    Repeat {
        job: u64,
    },
    Reset,
    /// The process ends. What is in a tier stays, and its list.
    Restart {
        tier: u8,
    },
}

fn call() -> impl Strategy<Value = Call> {
    let tier = || 0u8..4;
    let key = || 1..KEYS;
    let some = || 0u32..6;
    let occasion = prop_oneof![Just(Occasion::Use), Just(Occasion::Leaving)];
    prop_oneof![
        6 => (1..BLOCKS, key()).prop_map(|(block, key)| Call::Compute { block, key }),
        6 => (occasion, 1..BLOCKS, some())
            .prop_map(|(occasion, first, blocks)| Call::Offer { occasion, first, blocks }),
        6 => (tier(), 1..BLOCKS, some()).prop_map(|(tier, first, blocks)| Call::Store { tier, first, blocks }),
        6 => (key(), some(), 0..BLOCKS).prop_map(|(first, keys, block)| Call::Load { first, keys, block }),
        4 => (tier(), key(), some()).prop_map(|(tier, first, keys)| Call::Promote { tier, first, keys }),
        5 => (tier(), some()).prop_map(|(tier, most)| Call::Flush { tier, most }),
        1 => (key(), some()).prop_map(|(first, keys)| Call::Pin { first, keys }),
        3 => (key(), some()).prop_map(|(first, keys)| Call::Touch { first, keys }),
        2 => (key(), some()).prop_map(|(first, keys)| Call::Settle { first, keys }),
        3 => (key(), some()).prop_map(|(first, keys)| Call::Reach { first, keys }),
        3 => (tier(), key(), any::<bool>()).prop_map(|(tier, key, present)| Call::Answer { tier, key, present }),
        9 => (0usize..9, 0usize..5, prop::bool::weighted(0.9))
            .prop_map(|(job, copy, good)| Call::Copy { job, copy, good }),
        2 => (0usize..9, some()).prop_map(|(job, made)| Call::Progress { job, made }),
        9 => (0usize..9).prop_map(|job| Call::Complete { job }),
        1 => (0u64..40).prop_map(|job| Call::Repeat { job }),
        1 => Just(Call::Reset),
        1 => tier().prop_map(|tier| Call::Restart { tier }),
    ]
}

fn config(nearest: bool) -> impl Strategy<Value = TierConfig> {
    let eviction = prop_oneof![Just(TierEviction::Lru), Just(TierEviction::Arc)];
    let write = prop_oneof![
        3 => Just(Write::THROUGH),
        1 => (2u32..4, 1u32..6).prop_map(|(offers, tracked)| Write::After { offers, tracked }),
        2 => (0u32..4).prop_map(|ahead| Write::Back { ahead }),
    ];
    let contents = prop_oneof![
        3 => Just(Contents::Own),
        1 => (0u32..4).prop_map(|remembered| Contents::Asked { remembered }),
    ];
    (1u32..8, eviction, write, contents, any::<bool>()).prop_map(
        move |(slots, eviction, write, contents, staged)| TierConfig {
            eviction,
            write,
            contents,
            staged: staged && !nearest,
            ..TierConfig::new(Medium::Host, BlockCount(slots))
        },
    )
}

#[test]
fn what_is_read_is_what_was_stored() {
    let runs = Runs { cases: 300, rng_seed: RngSeed::Fixed(5), failure_persistence: None, ..Runs::default() };
    let configs = (config(true), prop::collection::vec(config(false), 0..3));
    TestRunner::new(runs)
        .run(&(configs, prop::collection::vec(call(), 1..200)), |((nearest, farther), calls)| {
            let configs: Vec<TierConfig> = [nearest].into_iter().chain(farther).collect();
            let mut world = World::new(&configs);
            for call in calls {
                world.run(call);
                world.check();
            }
            world.wind_down();
            Ok(())
        })
        .unwrap();
}

/// The tiers, the bytes, the copies under way, and what a listener knows.
struct World {
    configs: Vec<TierConfig>,
    tiers: Tiers<Content>,
    device: Vec<(Option<Content>, u64)>,
    slots: Vec<Vec<u64>>,
    jobs: BTreeMap<JobId, Flight>,
    model: Model,
}

/// A job as whoever carries it out sees it.
#[derive(Clone, Debug)]
struct Flight {
    transfers: Vec<Transfer<Content>>,
    copies: Vec<Copied>,
    /// The first so many were reported.
    reported: usize,
    late: bool,
    pinned: Vec<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Copied {
    NotYet,
    Well,
    Badly,
}

impl World {
    fn new(configs: &[TierConfig]) -> World {
        World {
            configs: configs.to_vec(),
            tiers: Tiers::new(configs, 0).unwrap(),
            device: vec![(None, RUBBISH); BLOCKS as usize],
            slots: configs.iter().map(|config| vec![RUBBISH; config.slots.0 as usize]).collect(),
            jobs: BTreeMap::new(),
            model: Model::new(configs),
        }
    }

    fn run(&mut self, call: Call) {
        self.note_busy();
        match call {
            Call::Compute { block, key } => {
                if self.tiers.is_idle(BlockId(block)) {
                    self.device[block as usize] = (Some(key), bytes(key));
                }
            }
            Call::Offer { occasion, first, blocks } => {
                let items = self.held(first, blocks);
                let wanted = self.model.wanted(occasion, &items);
                let expected = self.model.room_for(0, &wanted);
                self.begin(|tiers| tiers.offer(occasion, &items), expected);
            }
            Call::Store { tier, first, blocks } => {
                let items = self.held(first, blocks);
                let keys: Vec<Content> = items.iter().map(|item| item.0).collect();
                let expected = self.model.exists(tier).and_then(|()| self.model.room_for(tier, &keys));
                self.begin(|tiers| tiers.store(TierId(tier), &items), expected);
            }
            Call::Promote { tier, first, keys } => {
                let keys: Vec<Content> = (first..first + keys).collect();
                let expected = self.model.promotion(tier, &keys);
                self.begin(|tiers| tiers.promote(TierId(tier), &keys), expected);
            }
            Call::Flush { tier, most } => {
                let expected = self.model.flush(tier, most as usize);
                self.begin(|tiers| tiers.flush(TierId(tier), BlockCount(most)), expected);
            }
            Call::Load { first, keys, block } => self.load(first, keys, block),
            Call::Pin { first, keys } => self.pin((first..first + keys).collect()),
            Call::Touch { first, keys } => {
                let keys: Vec<Content> = (first..first + keys).collect();
                self.tiers.touch(&keys);
                keys.iter().rev().for_each(|&key| self.model.touch(key));
            }
            Call::Settle { first, keys } => {
                let keys: Vec<Content> = (first..first + keys).collect();
                self.tiers.settle(&keys);
                keys.iter().rev().for_each(|&key| self.model.settle(key));
            }
            Call::Reach { first, keys } => self.reach((first..first + keys).collect()),
            Call::Answer { tier, key, present } => self.answer(tier, key, present),
            Call::Copy { job, copy, good } => self.copy(job, copy, good),
            Call::Progress { job, made } => self.progress(job, made as usize),
            Call::Complete { job } => self.complete(job),
            Call::Repeat { job } => {
                if !self.jobs.contains_key(&JobId(job)) {
                    self.refused(|tiers| tiers.complete(JobId(job), Outcome::All).map(drop));
                    self.refused(|tiers| tiers.progress(JobId(job), 1));
                }
            }
            Call::Reset => {
                self.tiers.reset();
                self.model.reset();
                self.jobs.values_mut().for_each(|flight| flight.late = true);
            }
            Call::Restart { tier } => self.restart(tier),
        }
    }

    /// What the device has in these blocks.
    fn held(&self, first: u32, blocks: u32) -> Vec<(Content, BlockId)> {
        let blocks = (first..first + blocks).map(BlockId).filter(|block| block.0 < BLOCKS);
        blocks.filter_map(|block| Some((self.device[block.0 as usize].0?, block))).collect()
    }

    /// A call that fails changes nothing.
    fn refused(&mut self, call: impl FnOnce(&mut Tiers<Content>) -> Result<(), TierError>) {
        let before = format!("{:?}", self.tiers);
        assert!(call(&mut self.tiers).is_err(), "it was to be refused");
        assert_eq!(format!("{:?}", self.tiers), before);
    }

    fn begin(
        &mut self,
        call: impl FnOnce(&mut Tiers<Content>) -> Result<Store, TierError>,
        expected: Result<Plan, TierError>,
    ) {
        let before = if expected.is_err() { format!("{:?}", self.tiers) } else { String::new() };
        match (call(&mut self.tiers), expected) {
            (Ok(Store::Begun { job, copies, evicted }), Ok(Plan::Copy { tier, keys, victims })) => {
                let transfers = self.tiers.transfers(job).unwrap().to_vec();
                let copied: Vec<Content> = transfers.iter().map(|transfer| transfer.key).collect();
                assert_eq!(
                    (copied, copies.0 as usize, evicted.0 as usize),
                    (keys, transfers.len(), victims.len())
                );
                victims.iter().for_each(|&key| self.model.tiers[tier].evict(key));
                self.fly(job, transfers);
            }
            (Ok(Store::Nothing), Ok(Plan::Nothing)) => {}
            (Ok(Store::NoRoom { need, free, evictable }), Ok(Plan::NoRoom(numbers))) => {
                assert_eq!([need, free, evictable].map(|blocks| blocks.0 as usize), numbers);
            }
            (Err(error), Err(expected)) => {
                assert_eq!(error, expected);
                assert_eq!(format!("{:?}", self.tiers), before);
            }
            (answer, expected) => panic!("{answer:?} instead of {expected:?}"),
        }
    }

    /// Notes a job that has begun, after making sure that nobody else is at work on its targets.
    fn fly(&mut self, job: JobId, transfers: Vec<Transfer<Content>>) {
        for transfer in &transfers {
            let users = self.users(transfer.to);
            assert!(users.is_empty(), "{} is written by job {job} and used by {users:?}", transfer.to);
            if let Place::Tier(to) = transfer.to {
                let tier = &mut self.model.tiers[usize::from(to.tier.0)];
                let taken = tier.entries.values().any(|entry| entry.slot == to.slot);
                assert!(!taken, "slot {} holds content", transfer.to);
                tier.enter(transfer.key, Entry { slot: to.slot, writer: Some(job) });
            }
        }
        let copies = vec![Copied::NotYet; transfers.len()];
        self.jobs.insert(job, Flight { transfers, copies, reported: 0, late: false, pinned: Vec::new() });
    }

    /// Jobs that still may read or write a place.
    fn users(&self, place: Place) -> Vec<JobId> {
        let uses = |flight: &Flight| {
            flight.transfers[flight.reported..].iter().any(|other| other.from == place || other.to == place)
        };
        self.jobs.iter().filter(|(_, flight)| uses(flight)).map(|(&job, _)| job).collect()
    }

    /// Notes for the model which slots jobs are at work on.
    fn note_busy(&mut self) {
        self.model.tiers.iter_mut().for_each(|tier| tier.busy.clear());
        for flight in self.jobs.values() {
            let copied = flight.transfers[flight.reported..].iter().flat_map(|copy| [copy.from, copy.to]);
            for place in copied.chain(flight.pinned.iter().copied()) {
                if let Place::Tier(place) = place {
                    self.model.tiers[usize::from(place.tier.0)].busy.insert(place.slot);
                }
            }
        }
    }

    fn load(&mut self, first: Content, keys: u32, block: u32) {
        let items: Vec<(Content, BlockId)> =
            (0..keys).map(|n| (first + n, BlockId((block + n) % BLOCKS))).collect();
        let refusal = items.iter().enumerate().find_map(|(index, &(key, block))| {
            let busy = block == BlockId(0) || !self.users(Place::Device(block)).is_empty();
            match self.model.lookup(key) {
                Lookup::Hit(tier) if self.configs[usize::from(tier.0)].staged => {
                    Some(TierError::Staged { index, tier })
                }
                Lookup::Hit(_) => busy.then_some(TierError::BlockBusy { index, block }),
                _ => Some(TierError::NotThere { index }),
            }
        });
        if refusal.is_some() {
            let before = format!("{:?}", self.tiers);
            assert_eq!(self.tiers.load(&items).err(), refusal);
            return assert_eq!(format!("{:?}", self.tiers), before);
        }
        let job = self.tiers.load(&items).unwrap();
        for (_, block) in items {
            self.device[block.0 as usize] = (None, RUBBISH);
        }
        let transfers = self.tiers.transfers(job).unwrap().to_vec();
        self.fly(job, transfers);
    }

    fn pin(&mut self, keys: Vec<Content>) {
        let missing = keys.iter().position(|&key| self.model.tiers.iter().all(|tier| !tier.has(key)));
        if let Some(index) = missing {
            return self.refused(|tiers| {
                assert_eq!(tiers.pin(&keys), Err(TierError::NotThere { index }));
                Err(TierError::NotThere { index })
            });
        }
        let job = self.tiers.pin(&keys).unwrap();
        let pinned = keys.iter().map(|&key| self.model.nearest(key)).collect();
        self.jobs.insert(job, Flight { transfers: vec![], copies: vec![], reported: 0, late: false, pinned });
    }

    fn reach(&mut self, keys: Vec<Content>) {
        let expected = self.model.reach(&keys);
        assert_eq!(self.tiers.reach(&keys), expected);
        let told: Vec<(TierId, Content)> = self.tiers.questions().collect();
        assert_eq!(told, std::mem::take(&mut self.model.questions));
    }

    fn answer(&mut self, tier: u8, key: Content, present: bool) {
        let asks = |config: &TierConfig| matches!(config.contents, Contents::Asked { .. });
        if !self.configs.get(usize::from(tier)).is_some_and(asks) {
            return self.refused(|tiers| tiers.answer(TierId(tier), key, present));
        }
        let room = self.model.room_for(tier, &[key]).unwrap();
        self.tiers.answer(TierId(tier), key, present).unwrap();
        let model = &mut self.model.tiers[usize::from(tier)];
        match room {
            Plan::Nothing => {}
            Plan::Copy { victims, .. } if present => {
                victims.iter().for_each(|&key| model.evict(key));
                // The bytes are there, wherever the tiers believe them to be.
                let slot = self.tiers.dump(TierId(tier)).unwrap().find(|(there, _)| *there == key).unwrap().1;
                self.slots[usize::from(tier)][slot as usize] = bytes(key);
                model.enter(key, Entry { slot, writer: None });
            }
            _ => model.deny(key),
        }
    }

    fn copy(&mut self, job: usize, copy: usize, good: bool) {
        let Some((&id, flight)) = self.jobs.iter().nth(job) else { return };
        let Some(&transfer) = flight.transfers.get(copy) else { return };
        if flight.copies[copy] == Copied::NotYet {
            self.make(id, copy, transfer, good);
        }
    }

    /// Moves the bytes of one copy.
    fn make(&mut self, job: JobId, copy: usize, transfer: Transfer<Content>, good: bool) {
        let read = match transfer.from {
            Place::Device(block) => self.device[block.0 as usize].1,
            Place::Tier(from) => self.slots[usize::from(from.tier.0)][from.slot as usize],
        };
        assert_eq!(read, bytes(transfer.key), "job {job} reads {} after it was overwritten", transfer.from);
        let written = if good { read } else { RUBBISH };
        match transfer.to {
            Place::Device(block) => self.device[block.0 as usize].1 = written,
            Place::Tier(to) => self.slots[usize::from(to.tier.0)][to.slot as usize] = written,
        }
        self.jobs.get_mut(&job).unwrap().copies[copy] = if good { Copied::Well } else { Copied::Badly };
    }

    fn progress(&mut self, job: usize, made: usize) {
        let Some((&id, flight)) = self.jobs.iter().nth(job) else { return };
        let well = flight.copies.iter().take_while(|&&copied| copied == Copied::Well).count();
        if made < flight.reported || made > flight.transfers.len() {
            return self.refused(|tiers| tiers.progress(id, made as u32));
        }
        let made = made.clamp(flight.reported, well.max(flight.reported));
        self.tiers.progress(id, made as u32).unwrap();
        self.settle(id, made, |_| true, |_| false);
        self.jobs.get_mut(&id).unwrap().reported = made;
    }

    /// Ends a job: what was not copied by now never will be.
    fn complete(&mut self, job: usize) {
        let Some((&id, flight)) = self.jobs.iter().nth(job) else { return };
        let flight = flight.clone();
        let end = flight.transfers.len();
        let well = flight.copies.iter().take_while(|&&copied| copied == Copied::Well).count();
        let bad: Vec<u32> = (flight.reported..end)
            .filter(|&copy| flight.copies[copy] != Copied::Well)
            .map(|copy| copy as u32)
            .collect();
        let blamed = flight.copies.contains(&Copied::Badly);
        let outcome = match bad[..] {
            [] => Outcome::All,
            _ if blamed => Outcome::AllBut(&bad),
            _ => Outcome::First(well as u32),
        };
        let made = |copy: usize| match outcome {
            Outcome::First(made) => copy < made as usize,
            _ => !bad.contains(&(copy as u32)),
        };
        let ended = self.tiers.complete(id, outcome).unwrap();
        let leading = BlockCount((0..end).take_while(|&copy| made(copy)).count() as u32);
        let all = BlockCount((0..end).filter(|&copy| made(copy)).count() as u32);
        let expected = if flight.late { Ended::Late } else { Ended::Counted { leading, made: all } };
        assert_eq!(ended, expected);
        self.settle(id, end, made, |copy| blamed && !made(copy));
        self.jobs.remove(&id);
    }

    /// Tells the model of copies that are over.
    fn settle(
        &mut self,
        job: JobId,
        to: usize,
        made: impl Fn(usize) -> bool,
        blamed: impl Fn(usize) -> bool,
    ) {
        let flight = self.jobs[&job].clone();
        for copy in flight.reported..to {
            let transfer = flight.transfers[copy];
            if let Place::Tier(from) = transfer.from
                && blamed(copy)
                && !flight.late
            {
                self.model.tiers[usize::from(from.tier.0)].lose(transfer.key, from.slot);
            }
            match transfer.to {
                Place::Device(block) if made(copy) => self.device[block.0 as usize].0 = Some(transfer.key),
                Place::Tier(to) if !flight.late => {
                    self.model.written(usize::from(to.tier.0), transfer.key, made(copy));
                }
                _ => {}
            }
        }
    }

    /// Begins again with one tier's content, as a process does that finds its file.
    fn restart(&mut self, tier: u8) {
        let Ok(origin) = self.tiers.origin(TierId(tier)) else { return };
        let dump: Vec<(Content, u32)> = self.tiers.dump(TierId(tier)).unwrap().collect();
        let mut fresh = World::new(&self.configs);
        fresh.tiers = Tiers::new(&self.configs, origin.generation).unwrap();
        fresh.slots[usize::from(tier)].clone_from(&self.slots[usize::from(tier)]);
        // What other machines wrote to a slot counts as well as what this one did.
        assert_eq!(
            fresh.tiers.restore(TierId(tier), origin, dump.clone()),
            Ok(BlockCount(dump.len() as u32))
        );
        for (key, slot) in dump {
            fresh.model.tiers[usize::from(tier)].enter(key, Entry { slot, writer: None });
        }
        fresh.model.known = fresh.model.readable();
        let told = fresh.tiers.events().count();
        assert_eq!(told, fresh.model.known.len());
        *self = fresh;
    }

    fn check(&mut self) {
        self.tiers.check().unwrap();
        for event in self.tiers.events() {
            let known = &mut self.model.known;
            let new = match event {
                TierEvent::Stored { key, tier, .. } => known.insert((tier, key)),
                TierEvent::Removed { key, tier, .. } => known.remove(&(tier, key)),
                TierEvent::Cleared { .. } => {
                    known.clear();
                    true
                }
            };
            assert!(new, "{event:?} was known already");
        }
        assert_eq!(self.model.known, self.model.readable(), "what a listener knows, and what can be read");
        for (tier, slots) in (0..).map(TierId).zip(&self.slots) {
            let model = &self.model.tiers[usize::from(tier.0)];
            let mut ready = 0;
            for (key, slot) in self.tiers.dump(tier).unwrap() {
                assert_eq!(slots[slot as usize], bytes(key), "key {key} in {tier}:{slot}");
                assert_eq!(model.entries[&key].slot, slot);
                ready += 1;
            }
            let stats = self.tiers.stats(tier).unwrap();
            assert_eq!(ready, stats.ready.0);
            let order: Vec<Content> = self.tiers.dump(tier).unwrap().map(|(key, _)| key).collect();
            assert_eq!(order, model.order(), "the order in which tier {tier} gives up");
        }
        for key in 1..KEYS + 5 {
            let hidden = self.model.lookup(key);
            let awaited = self.model.tiers.iter().any(|tier| tier.would_ask(key));
            if hidden != Lookup::Miss || !awaited {
                assert_eq!(self.tiers.lookup(&key), hidden, "key {key}");
            }
        }
    }

    fn wind_down(&mut self) {
        while !self.jobs.is_empty() {
            self.complete(0);
            self.check();
        }
        self.tiers.reset();
        for tier in (0..).map(TierId).take(self.configs.len()) {
            let stats = self.tiers.stats(tier).unwrap();
            assert_eq!(stats.free, self.configs[usize::from(tier.0)].slots, "no slot is lost");
        }
        assert!((1..BLOCKS).all(|block| self.tiers.is_idle(BlockId(block))));
    }
}

/// What should be where, in lists.
struct Model {
    tiers: Vec<ModelTier>,
    questions: Vec<(TierId, Content)>,
    /// What the events say.
    known: BTreeSet<(TierId, Content)>,
}

struct ModelTier {
    config: TierConfig,
    entries: BTreeMap<Content, Entry>,
    once: Vec<Content>,
    again: Vec<Content>,
    once_ghosts: Vec<Content>,
    again_ghosts: Vec<Content>,
    target: usize,
    offers: Vec<(Content, u32)>,
    due: Vec<Content>,
    asked: Vec<Content>,
    denied: Vec<Content>,
    /// Slots that jobs are at work on.
    busy: BTreeSet<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    slot: u32,
    writer: Option<JobId>,
}

#[derive(Debug)]
enum Plan {
    Nothing,
    Copy { tier: usize, keys: Vec<Content>, victims: Vec<Content> },
    NoRoom([usize; 3]),
}

impl Model {
    fn new(configs: &[TierConfig]) -> Model {
        let tiers = configs.iter().map(|&config| ModelTier::new(config)).collect();
        Model { tiers, questions: Vec::new(), known: BTreeSet::new() }
    }

    fn exists(&self, tier: u8) -> Result<(), TierError> {
        let tiers = self.tiers.len();
        let error = TierError::NoTier { tier: TierId(tier), tiers };
        if usize::from(tier) < tiers { Ok(()) } else { Err(error) }
    }

    fn readable(&self) -> BTreeSet<(TierId, Content)> {
        let tiers = (0..).map(TierId).zip(&self.tiers);
        tiers
            .flat_map(|(id, tier)| (1..KEYS + 9).filter(|&key| tier.ready(key)).map(move |key| (id, key)))
            .collect()
    }

    fn lookup(&self, key: Content) -> Lookup {
        let (mut near, mut far) = (Vec::new(), Vec::new());
        for (id, tier) in (0..).map(TierId).zip(&self.tiers) {
            let list = if tier.config.staged { &mut far } else { &mut near };
            match tier.entries.get(&key) {
                Some(Entry { writer: Some(job), .. }) => list.push(Lookup::Pending(*job)),
                Some(_) => list.push(Lookup::Hit(id)),
                None => {}
            }
        }
        let hit = |list: &[Lookup]| list.iter().find(|found| matches!(found, Lookup::Hit(_))).copied();
        let awaited = self.tiers.iter().any(|tier| tier.asked.contains(&key));
        let nowhere = if awaited { Lookup::Retry } else { Lookup::Miss };
        let waiting = || near.first().copied().or_else(|| hit(&far));
        hit(&near).or_else(waiting).or_else(|| far.first().copied()).unwrap_or(nowhere)
    }

    /// A lookup that asks.
    fn ask(&mut self, key: Content) -> Lookup {
        if self.lookup(key) == Lookup::Miss {
            for (id, tier) in (0..).map(TierId).zip(&mut self.tiers) {
                if tier.would_ask(key) {
                    tier.asked.push(key);
                    self.questions.push((id, key));
                }
            }
        }
        self.lookup(key)
    }

    fn reach(&mut self, keys: &[Content]) -> Reach {
        let found: Vec<Lookup> = keys.iter().map(|&key| self.lookup(key)).collect();
        let leading = |is: &dyn Fn(&Lookup) -> bool| {
            BlockCount(found.iter().take_while(|found| is(found)).count() as u32)
        };
        let staged = |tier: &TierId| self.tiers[usize::from(tier.0)].config.staged;
        let coming = leading(&|found| matches!(found, Lookup::Hit(_) | Lookup::Pending(_)));
        let mut reach = Reach {
            loadable: leading(&|found| matches!(found, Lookup::Hit(tier) if !staged(tier))),
            present: leading(&|found| matches!(found, Lookup::Hit(_))),
            coming,
            asked: false,
        };
        let mut behind = keys[coming.0 as usize..].iter();
        if let Some(&next) = behind.next()
            && self.ask(next) == Lookup::Retry
        {
            reach.asked = true;
            behind.for_each(|&key| _ = self.ask(key));
        }
        reach
    }

    fn nearest(&self, key: Content) -> Place {
        let tiers = (0..).map(TierId).zip(&self.tiers);
        let mut places = tiers.filter_map(|(id, tier)| {
            tier.entries.get(&key).map(|entry| Place::Tier(TierSlot { tier: id, slot: entry.slot }))
        });
        places.next().unwrap()
    }

    fn wanted(&mut self, occasion: Occasion, items: &[(Content, BlockId)]) -> Vec<Content> {
        let keys = items.iter().map(|item| item.0);
        match (occasion, self.tiers[0].config.write) {
            (Occasion::Leaving, Write::Back { .. }) => keys.collect(),
            (Occasion::Use, Write::After { .. }) => keys.filter(|&key| self.tiers[0].offered(key)).collect(),
            _ => Vec::new(),
        }
    }

    /// Whether content may go from a tier: not before the next has it, if that one is written back.
    fn may_go(&self, tier: usize, key: Content) -> bool {
        let below = &self.tiers[tier + 1..];
        let back = below.first().is_some_and(|next| matches!(next.config.write, Write::Back { .. }));
        !back || below.iter().any(|tier| tier.ready(key))
    }

    fn room_for(&self, tier: u8, keys: &[Content]) -> Result<Plan, TierError> {
        self.room_beside(tier, keys, keys)
    }

    /// Room for what of `keys` is not there, given up by others than `kept`.
    fn room_beside(&self, tier: u8, keys: &[Content], kept: &[Content]) -> Result<Plan, TierError> {
        let index = usize::from(tier);
        let tier = &self.tiers[index];
        let mut new: Vec<Content> = Vec::new();
        for &key in keys {
            if !tier.has(key) && !new.contains(&key) {
                new.push(key);
            }
        }
        if new.is_empty() {
            return Ok(Plan::Nothing);
        }
        let free = tier.free();
        let needed = new.len().saturating_sub(free);
        let victims = tier.victims(needed, |key| !kept.contains(&key) && self.may_go(index, key));
        if victims.len() < needed {
            return Ok(Plan::NoRoom([new.len(), free, victims.len()]));
        }
        Ok(Plan::Copy { tier: index, keys: new, victims })
    }

    fn promotion(&self, tier: u8, keys: &[Content]) -> Result<Plan, TierError> {
        self.exists(tier)?;
        let (near, far) = self.tiers.split_at(usize::from(tier) + 1);
        let mut new = Vec::new();
        for (index, &key) in keys.iter().enumerate() {
            if near.iter().any(|tier| tier.has(key)) {
                continue;
            }
            if !far.iter().any(|tier| tier.ready(key)) {
                return Err(TierError::NotThere { index });
            }
            new.push(key);
        }
        self.room_beside(tier, &new, keys)
    }

    fn flush(&mut self, tier: u8, most: usize) -> Result<Plan, TierError> {
        self.exists(tier)?;
        if tier == 0 {
            return Err(TierError::NoTier { tier: TierId(0), tiers: self.tiers.len() });
        }
        let (here, above) = (usize::from(tier), usize::from(tier) - 1);
        let mut keys: Vec<Content> = match self.tiers[here].config.write {
            Write::Back { ahead } => {
                let upper = &self.tiers[above];
                let next = upper.all_in_order((ahead as usize).min(most).saturating_sub(upper.free()));
                let missing = |key: &Content| upper.ready(*key) && !self.may_go(above, *key);
                next.into_iter().filter(missing).filter(|&key| !self.tiers[here].has(key)).collect()
            }
            Write::After { .. } => {
                let due = self.tiers[here].due.clone();
                due.into_iter().filter(|&key| self.tiers[above].ready(key)).take(most).collect()
            }
        };
        let victims = self.tiers[here].victims(keys.len().saturating_sub(self.tiers[here].free()), |key| {
            !keys.contains(&key) && self.may_go(here, key)
        });
        keys.truncate(self.tiers[here].free() + victims.len());
        self.room_for(tier, &keys)
    }

    fn offer_below(&mut self, tier: usize, key: Content) {
        if let Some(below) = self.tiers.get_mut(tier + 1)
            && !below.has(key)
            && matches!(below.config.write, Write::After { .. })
            && below.offered(key)
            && !below.due.contains(&key)
        {
            below.due.push(key);
        }
    }

    fn touch(&mut self, key: Content) {
        for tier in 0..self.tiers.len() {
            if self.tiers[tier].ready(key) {
                self.tiers[tier].touch(key);
                self.offer_below(tier, key);
            }
        }
    }

    fn settle(&mut self, key: Content) {
        for tier in &mut self.tiers {
            for list in [&mut tier.once, &mut tier.again] {
                if let Some(place) = list.iter().position(|&other| other == key) {
                    list.remove(place);
                    list.push(key);
                }
            }
        }
    }

    fn written(&mut self, tier: usize, key: Content, good: bool) {
        if good {
            self.tiers[tier].entries.get_mut(&key).unwrap().writer = None;
            self.offer_below(tier, key);
        } else {
            self.tiers[tier].forget(key);
        }
    }

    fn reset(&mut self) {
        for tier in &mut self.tiers {
            *tier = ModelTier::new(tier.config);
        }
        self.questions.clear();
    }
}

impl ModelTier {
    fn new(config: TierConfig) -> ModelTier {
        ModelTier {
            config,
            entries: BTreeMap::new(),
            once: Vec::new(),
            again: Vec::new(),
            once_ghosts: Vec::new(),
            again_ghosts: Vec::new(),
            target: 0,
            offers: Vec::new(),
            due: Vec::new(),
            asked: Vec::new(),
            denied: Vec::new(),
            busy: BTreeSet::new(),
        }
    }

    fn has(&self, key: Content) -> bool {
        self.entries.contains_key(&key)
    }

    fn ready(&self, key: Content) -> bool {
        self.entries.get(&key).is_some_and(|entry| entry.writer.is_none())
    }

    fn free(&self) -> usize {
        let mut used = self.busy.clone();
        used.extend(self.entries.values().map(|entry| entry.slot));
        self.config.slots.0 as usize - used.len()
    }

    fn would_ask(&self, key: Content) -> bool {
        let asks = matches!(self.config.contents, Contents::Asked { .. });
        asks && !self.has(key) && !self.asked.contains(&key) && !self.denied.contains(&key)
    }

    fn order(&self) -> Vec<Content> {
        self.once.iter().chain(&self.again).copied().filter(|&key| self.ready(key)).collect()
    }

    /// The rule of ARC, of which LRU is the case that never uses the second list.
    fn all_in_order(&self, most: usize) -> Vec<Content> {
        let (mut once, mut again) = (self.once.clone(), self.again.clone());
        let mut order = Vec::new();
        while order.len() < most && !(once.is_empty() && again.is_empty()) {
            let from_once = if once.len() >= self.target { !once.is_empty() } else { again.is_empty() };
            order.push(if from_once { once.remove(0) } else { again.remove(0) });
        }
        order
    }

    fn victims(&self, count: usize, may: impl Fn(Content) -> bool) -> Vec<Content> {
        let idle =
            |key: &Content| self.ready(*key) && !self.busy.contains(&self.entries[key].slot) && may(*key);
        let mut once: Vec<Content> = self.once.iter().copied().filter(idle).collect();
        let mut again: Vec<Content> = self.again.iter().copied().filter(idle).collect();
        let mut left = self.once.len();
        let mut victims = Vec::new();
        while victims.len() < count && !(once.is_empty() && again.is_empty()) {
            if (left >= self.target && !once.is_empty()) || again.is_empty() {
                victims.push(once.remove(0));
                left -= 1;
            } else {
                victims.push(again.remove(0));
            }
        }
        victims
    }

    fn offered(&mut self, key: Content) -> bool {
        let Write::After { offers, tracked } = self.config.write else { panic!("it is written back") };
        let counted = self.offers.iter().find(|offer| offer.0 == key).map_or(0, |offer| offer.1) + 1;
        self.offers.retain(|offer| offer.0 != key);
        self.offers.push((key, counted));
        let surplus = self.offers.len().saturating_sub(tracked as usize);
        self.offers.drain(..surplus);
        counted >= offers
    }

    fn enter(&mut self, key: Content, entry: Entry) {
        let (once, again) = (self.once_ghosts.len(), self.again_ghosts.len());
        let slots = self.config.slots.0 as usize;
        if self.once_ghosts.contains(&key) {
            self.target = slots.min(self.target + (again / once).max(1));
            self.again.push(key);
        } else if self.again_ghosts.contains(&key) {
            self.target = self.target.saturating_sub((once / again).max(1));
            self.again.push(key);
        } else {
            self.once.push(key);
        }
        for list in
            [&mut self.once_ghosts, &mut self.again_ghosts, &mut self.due, &mut self.asked, &mut self.denied]
        {
            list.retain(|&other| other != key);
        }
        assert!(self.entries.insert(key, entry).is_none());
    }

    fn touch(&mut self, key: Content) {
        self.once.retain(|&other| other != key);
        self.again.retain(|&other| other != key);
        match self.config.eviction {
            TierEviction::Lru => self.once.push(key),
            TierEviction::Arc => self.again.push(key),
        }
    }

    fn evict(&mut self, key: Content) {
        let arc = self.config.eviction == TierEviction::Arc;
        let ghosts = if self.once.contains(&key) { &mut self.once_ghosts } else { &mut self.again_ghosts };
        if arc {
            ghosts.push(key);
            let surplus = ghosts.len().saturating_sub(self.config.slots.0 as usize);
            ghosts.drain(..surplus);
        }
        self.forget(key);
    }

    fn forget(&mut self, key: Content) {
        self.entries.remove(&key).unwrap();
        self.once.retain(|&other| other != key);
        self.again.retain(|&other| other != key);
    }

    fn lose(&mut self, key: Content, slot: u32) {
        if self.entries.get(&key).is_some_and(|entry| entry.slot == slot) {
            self.forget(key);
        }
    }

    fn deny(&mut self, key: Content) {
        let Contents::Asked { remembered } = self.config.contents else { panic!("nobody asked") };
        self.asked.retain(|&other| other != key);
        self.denied.retain(|&other| other != key);
        self.denied.push(key);
        let surplus = self.denied.len().saturating_sub(remembered as usize);
        self.denied.drain(..surplus);
    }
}
