//! Random calls to the tiers against a dumb model, with bytes: a device, a host and disks made of arrays. Copies are
//! made one by one, in any order, as late as a job allows, some fail and leave rubbish, some report twice or after a
//! reset. What can be read is always what was stored, and nothing goes that was not reported.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the tiers of this test are tiny")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::tier::*;
use quayline_kv_cache::{BlockCount, BlockId};
use shelves::{Content, Entry, Model, Plan};

mod shelves;

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
