//! Calls read from bytes, against a memory that remembers what was written to it.
//!
//! Every slot of every group holds the name of what a model would have written there: a hash of all tokens up to that
//! place, and of the adapter and the salt. A step makes the copies it was told to make, reads everything its
//! attention would read and compares it, and writes. So whatever the cache does wrong with blocks shows as a wrong
//! value read, whichever rule it broke; nothing here knows how the cache decides.
//!
//! Beside it `check()` runs after every call, and a replica of the index that hears nothing but events.

mod behind;

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use behind::Behind;
use quayline_kv_cache::evict::{Fair, Policy, PolicyName, Quota};
use quayline_kv_cache::kind::{ChunkedLocal, Full, SlidingWindow};
use quayline_kv_cache::*;

type Cache = KvCache<Xxh3, Fair<Policy>>;

const SEQUENCES: u64 = 6;
const TENANTS: u32 = 3;
const TOKENS_MAX: u32 = 96;

/// What is asked of the cache, one byte after another. When there is no more, zeroes follow.
struct Script<'a>(&'a [u8]);

impl Script<'_> {
    fn below(&mut self, end: u32) -> u32 {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        u32::from(first) % end.max(1)
    }

    fn one_in(&mut self, many: u32) -> bool {
        self.below(many) + 1 == many
    }

    /// Tokens that often begin alike: counting up, then something else.
    fn tokens(&mut self, length_max: u32) -> Vec<TokenId> {
        let (alike, length, other) = (self.below(length_max), self.below(length_max), self.below(3));
        (0..length).map(|index| if index < alike { index } else { 1000 * other + index }).collect()
    }
}

/// Runs the calls that `bytes` spell, and panics at the first thing that is wrong.
pub(crate) fn run(bytes: &[u8]) {
    let mut script = Script(bytes);
    let mut world = World::new(&mut script);
    while !script.0.is_empty() {
        world.call(&mut script);
        world.audit();
    }
    world.wind_down();
}

#[derive(Clone, Copy, Debug)]
enum Attention {
    Full,
    Window(u32),
    Chunked(u32),
}

impl Attention {
    /// The first token that one at `position` attends to.
    fn from(self, position: u32) -> u32 {
        match self {
            Attention::Full => 0,
            Attention::Window(window) => (position + 1).saturating_sub(window),
            Attention::Chunked(chunk) => position / chunk * chunk,
        }
    }

    fn group(self) -> Group {
        let tokens = TokenCount;
        match self {
            Attention::Full => Group::new(Full),
            Attention::Window(window) => Group::new(SlidingWindow::new(tokens(window)).expect("not empty")),
            Attention::Chunked(chunk) => Group::new(ChunkedLocal::new(tokens(chunk)).expect("not empty")),
        }
    }
}

#[derive(Clone, Default)]
struct Sequence {
    key: u32,
    tenant: TenantId,
    tokens: Vec<TokenId>,
    computed: u32,
    /// Where it stood before, and the tokens that are on their way, if there are any.
    loading: Option<(u32, u32, u32)>,
    /// Whether they come from a tier, and whether that has begun.
    fetches: Option<bool>,
}

impl Sequence {
    /// What a model writes at a place: a function of everything up to there.
    fn value(&self, position: u32) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.key, self.tokens.get(..=position as usize)).hash(&mut hasher);
        hasher.finish() | 1
    }
}

struct World {
    cache: Cache,
    attention: Vec<Attention>,
    block_size: u32,
    sequences: BTreeMap<u64, Sequence>,
    /// By group and slot.
    memory: Vec<BTreeMap<u64, u64>>,
    replica: Replica<BlockHash>,
    behind: Option<Behind>,
    writes: u64,
}

impl World {
    fn new(script: &mut Script<'_>) -> World {
        let block_size = 1 + script.below(5);
        let blocks = BlockCount(2 + script.below(28));
        let window = 1 + script.below(9);
        let attention = match script.below(6) {
            0 | 1 => vec![Attention::Full],
            2 => vec![Attention::Full, Attention::Window(window)],
            3 => vec![Attention::Window(window)],
            4 => vec![Attention::Full, Attention::Chunked(window)],
            _ => vec![Attention::Full, Attention::Window(window), Attention::Window(2 * window)],
        };
        let size = BlockSize::new(block_size).expect("not zero");
        let retention = match script.below(3) {
            0 => Retention::Prompt,
            1 => Retention::Dense,
            _ => Retention::Every(TokenCount(1 + script.below(9))),
        };
        let unit = BlockSize::new(block_size / 2).ok().filter(|_| block_size.is_multiple_of(2));
        let config = Config {
            groups: attention.iter().map(|attention| attention.group()).collect(),
            prefix_caching: !script.one_in(10),
            match_unit: unit.filter(|_| script.one_in(3)),
            retention,
            hash_lookahead: TokenCount(if script.one_in(4) { script.below(4) } else { 0 }),
            sequence_tokens_max: TokenCount(TOKENS_MAX),
            events_max: 1 << 16,
            residency_every: 1,
            report_lost: true,
            ..Config::new(size, blocks)
        };
        let policy = PolicyName::ALL[script.below(5) as usize];
        let eviction = |blocks| Fair::new(blocks, Policy::new(policy, blocks, size));
        World {
            memory: vec![BTreeMap::new(); attention.len()],
            cache: KvCache::with(config, Xxh3::new(7), eviction).expect("sizes are sound"),
            attention,
            block_size,
            sequences: BTreeMap::new(),
            replica: Replica::new(),
            behind: Behind::new(script),
            writes: 0,
        }
    }

    fn call(&mut self, script: &mut Script<'_>) {
        let id = u64::from(script.below(SEQUENCES as u32));
        let name = SequenceId(id);
        match script.below(36) {
            0..4 => self.open(id, script),
            4..7 => self.push(id, script),
            7..13 => self.step(id, script),
            13 => self.arrive(id, script),
            14 => {
                // What was withdrawn may be computed again, so it is of no matter to the memory.
                assert_eq!(self.cache.withdraw(name).is_ok(), self.sequences.contains_key(&id));
            }
            15 => self.fork(id, script),
            16 => self.cut(id, script),
            17 => {
                if self.sequences.contains_key(&id) {
                    self.release(id);
                }
            }
            18 | 19 => {
                assert_eq!(self.part(id, true), self.sequences.remove(&id).is_some());
            }
            20 => {
                let sequence = self.sequences.get(&id);
                let computed = sequence.map(|of| of.loading.map_or(of.computed, |loading| loading.0));
                let tokens = TokenCount(script.below(computed.unwrap_or(0) + 1));
                assert_eq!(self.cache.settle(name, tokens).is_ok(), computed.is_some());
                assert!(self.cache.settle(name, TokenCount(u32::MAX)).is_err());
            }
            21 => {
                let block = script.below(64);
                let exists = block > 0 && block < self.cache.config().block_count.get();
                assert_eq!(self.cache.evict(&[BlockId(block)]).is_ok(), exists);
            }
            22 => {
                self.cache.set_now(Tick(self.writes));
                for residency in self.cache.drain_residency() {
                    assert!(residency.idle_ticks <= residency.lifetime_ticks);
                }
            }
            23 => self.pin(id, script),
            24 => {
                self.reset();
            }
            25 => {
                let blocks = |count: u32| BlockCount(if count == 0 { u32::MAX } else { count });
                let quota = Quota { share: blocks(script.below(20)), limit: blocks(script.below(40)) };
                self.cache.set_quota(TenantId(script.below(TENANTS)), quota);
            }
            _ => self.tend(id, script),
        }
    }

    fn release(&mut self, id: u64) {
        assert!(self.part(id, false), "it is open");
        let sequence = self.sequences.get_mut(&id).expect("open");
        (sequence.computed, sequence.loading, sequence.fetches) = (0, None, None);
    }

    fn open(&mut self, id: u64, script: &mut Script<'_>) {
        let key = script.below(5);
        let keys = [
            SequenceKey::default(),
            SequenceKey::default(),
            SequenceKey { salt: Some("a"), ..SequenceKey::default() },
            SequenceKey { adapter: Some(Adapter { name: "a", path: "" }), ..SequenceKey::default() },
            SequenceKey { embeds: Some(&[[1; 32]]), ..SequenceKey::default() },
        ];
        let tenant = TenantId(script.below(TENANTS));
        let key_of_tenant = SequenceKey { tenant, ..keys[key as usize] };
        let reuse = if script.one_in(6) { Reuse::WriteOnly } else { Reuse::ReadWrite };
        let tokens = script.tokens(40);
        let opened = self.cache.open(SequenceId(id), key_of_tenant, &tokens, reuse);
        assert_eq!(opened.is_ok(), !self.sequences.contains_key(&id));
        if opened.is_ok() {
            let key = key.max(1);
            self.sequences.insert(id, Sequence { key, tenant, tokens, ..Sequence::default() });
        }
    }

    fn push(&mut self, id: u64, script: &mut Script<'_>) {
        let tokens = script.tokens(8);
        let pushed = self.cache.push(SequenceId(id), &tokens);
        let Some(sequence) = self.sequences.get_mut(&id) else { return assert!(pushed.is_err()) };
        let fits = sequence.tokens.len() + tokens.len() <= TOKENS_MAX as usize;
        assert_eq!(pushed.is_ok(), fits);
        if fits {
            sequence.tokens.extend(tokens);
        }
    }

    /// One sequence computes some of its tokens, in a step of its own.
    fn step(&mut self, id: u64, script: &mut Script<'_>) {
        let name = SequenceId(id);
        let Some(sequence) = self.sequences.get(&id).cloned() else {
            let claim = Claim { new_tokens: TokenCount(1), ..Claim::default() };
            assert!(matches!(self.cache.reserve(name, claim), Err(Error::NotOpen { .. })));
            return;
        };
        let computed = match self.cache.lookup(name) {
            Ok(hit) if script.one_in(8) => self.shorter(hit.tokens.get()),
            Ok(hit) => hit.tokens.get(),
            Err(_) => sequence.computed,
        };
        let known = sequence.tokens.len() as u32;
        let left = known.saturating_sub(computed);
        if self.cache.lookup(name).is_ok()
            && computed == self.cache.lookup(name).map_or(0, |hit| hit.tokens.get())
        {
            match self.look_behind(id) {
                None => return,
                Some(0) => {}
                Some(external) => return self.fetch(id, computed, external, script.one_in(4)),
            }
        }
        let external = if script.one_in(6) { script.below(left.max(1)) } else { 0 };
        let chunk = if script.one_in(2) { script.below(left.max(1)) } else { left - external };
        let claim = Claim {
            computed: TokenCount(computed),
            external: TokenCount(external),
            new_tokens: TokenCount(if script.one_in(12) { script.below(20) } else { chunk }),
            lookahead: TokenCount(if script.one_in(4) { script.below(6) } else { 0 }),
            whole_sequence: script.one_in(4),
            watermark: BlockCount(if script.one_in(6) { script.below(6) } else { 0 }),
        };
        if !self.claim(id, claim) {
            return;
        }
        if sequence.loading.is_none() {
            self.read(id, computed);
        }
        // Drafts are computed too, and do not count: none of them is ever right.
        let after = claim.computed_after().get().min(known.max(computed));
        if external == 0 && sequence.loading.is_none() {
            self.write(id, computed, claim.computed_after().get());
            self.offer(id, after);
        }
        let sequence = self.sequences.get_mut(&id).expect("open");
        sequence.computed = after;
        if external > 0 {
            // What is computed behind a load is written when the step runs: after the load has arrived.
            sequence.loading = Some((computed, computed, computed + external));
        }
        self.cache.end_step();
    }

    /// Room for what a tier has, and the load.
    fn fetch(&mut self, id: u64, computed: u32, external: u32, whole_sequence: bool) {
        let [tokens, external_tokens] = [computed, external].map(TokenCount);
        let claim = Claim { computed: tokens, external: external_tokens, whole_sequence, ..Claim::default() };
        if self.claim(id, claim) {
            let sequence = self.sequences.get_mut(&id).expect("open");
            (sequence.computed, sequence.fetches) = (computed + external, Some(false));
            sequence.loading = Some((computed, computed, computed + external));
            self.cache.end_step();
            self.load(id);
        }
    }

    /// Takes the room for a claim, if it gets it, saves what that pushes out, and makes the copies it brings about.
    fn claim(&mut self, id: u64, claim: Claim) -> bool {
        let Ok(Admission::Admit(reservation)) = self.cache.reserve(SequenceId(id), claim) else {
            return false;
        };
        let new: usize = reservation.new_blocks().get() as usize;
        let grant = reservation.commit();
        let mut handed_out: Vec<BlockId> = (0..self.attention.len() as u8)
            .flat_map(|group| grant.new_blocks_in(GroupId(group)).to_vec())
            .filter(|&block| block != BlockId::NULL)
            .collect();
        assert!(handed_out.len() <= new);
        handed_out.sort();
        assert!(handed_out.windows(2).all(|two| two[0] != two[1]), "twice in one step: {handed_out:?}");
        let tenant = self.cache.tenant(self.sequences[&id].tenant);
        assert!(new == 0 || tenant.used <= tenant.quota.limit, "{tenant:?}");
        self.rescue();
        self.copy();
        true
    }

    /// Whole blocks of a hit, but not all of them.
    fn shorter(&self, hit: u32) -> u32 {
        if self.attention.len() > 1 || hit == 0 { hit } else { (hit - 1) / self.block_size * self.block_size }
    }

    fn copy(&mut self) {
        for copy in self.cache.copies() {
            let memory = &mut self.memory[usize::from(copy.group.0)];
            for offset in 0..u64::from(copy.tokens.get()) {
                let [from, to] = [copy.from, copy.to]
                    .map(|block| u64::from(block.get()) * u64::from(self.block_size) + offset);
                let value = memory.get(&from).copied().unwrap_or(0);
                memory.insert(to, value);
            }
        }
    }

    /// What the token at `position` attends to is what this sequence's own model would have written.
    fn read(&self, id: u64, position: u32) {
        let sequence = &self.sequences[&id];
        for (group, attention) in (0..).zip(&self.attention) {
            let table = self.cache.table_in(SequenceId(id), GroupId(group)).expect("open");
            for at in attention.from(position)..position {
                let block = table.blocks()[(at / self.block_size) as usize];
                assert_ne!(block, BlockId::NULL, "sequence {id}, group {group}, token {at} of {position}");
                let slot = table.slot(TokenIndex(at)).expect("in the table");
                let found = self.memory[usize::from(group)].get(&slot.get());
                let expected = sequence.value(at);
                assert_eq!(found, Some(&expected), "sequence {id}, group {group}, token {at} of {position}");
            }
        }
    }

    fn write(&mut self, id: u64, from: u32, to: u32) {
        let sequence = &self.sequences[&id];
        for group in 0..self.attention.len() {
            let table = self.cache.table_in(SequenceId(id), GroupId(group as u8)).expect("open");
            for at in from..to {
                let Some(block) = table.blocks().get((at / self.block_size) as usize) else { continue };
                if *block == BlockId::NULL {
                    continue;
                }
                let slot = table.slot(TokenIndex(at)).expect("in the table");
                self.writes += 1;
                // A draft's K and V are nobody's.
                let is_known = (at as usize) < sequence.tokens.len();
                let value = if is_known { sequence.value(at) } else { self.writes << 1 };
                self.memory[group].insert(slot.get(), value);
            }
        }
    }

    /// Some or all of what was on its way is there, or the rest never will be.
    fn arrive(&mut self, id: u64, script: &mut Script<'_>) {
        let name = SequenceId(id);
        let Some((begin, from, to)) = self.sequences.get(&id).and_then(|sequence| sequence.loading) else {
            assert!(self.cache.loaded(name, TokenCount(script.below(20))).is_err());
            return;
        };
        match self.sequences[&id].fetches {
            None => {}
            Some(true) => return,
            Some(false) => return self.load(id),
        }
        let tokens = from + script.below(to - from + 1);
        self.write(id, from, tokens);
        if script.one_in(3) {
            let good = self.cache.load_failed(name, TokenCount(tokens)).expect("loading").get();
            assert!(good <= tokens);
            let sequence = self.sequences.get_mut(&id).expect("open");
            (sequence.loading, sequence.computed) = (None, good);
            return;
        }
        // The step that was claimed with the load runs once all of it is there.
        if tokens == to {
            let computed = self.sequences[&id].computed;
            self.write(id, to, computed);
        }
        self.cache.loaded(name, TokenCount(tokens)).expect("loading");
        let sequence = self.sequences.get_mut(&id).expect("open");
        sequence.loading = (tokens < to).then_some((begin, tokens, to));
    }

    fn fork(&mut self, id: u64, script: &mut Script<'_>) {
        let child = u64::from(script.below(SEQUENCES as u32));
        let possible = self.sequences.get(&id).filter(|parent| parent.loading.is_none()).cloned();
        let forked = self.cache.fork(SequenceId(id), SequenceId(child));
        match possible.filter(|_| !self.sequences.contains_key(&child)) {
            None => assert!(forked.is_err()),
            Some(parent) => {
                forked.expect("the parent is open and the child is not");
                self.sequences.insert(child, parent);
            }
        }
    }

    /// Truncate, roll back or trim.
    fn cut(&mut self, id: u64, script: &mut Script<'_>) {
        let (keep, name) = (script.below(TOKENS_MAX), SequenceId(id));
        let known = self.sequences.get(&id).map_or(0, |sequence| sequence.tokens.len() as u32);
        let (forgets, keep, cut) = match script.below(3) {
            0 => (true, keep, self.cache.truncate(name, TokenCount(keep))),
            1 => (true, known.saturating_sub(keep), self.cache.rollback(name, TokenCount(keep))),
            _ => (false, keep, self.cache.trim(name, TokenCount(keep))),
        };
        if let (Some(sequence), Ok(())) = (self.sequences.get_mut(&id), cut) {
            sequence.computed = sequence.computed.min(keep);
            if forgets {
                sequence.tokens.truncate(keep as usize);
            }
        }
    }

    fn pin(&mut self, id: u64, script: &mut Script<'_>) {
        let pin = PinId(u64::from(script.below(3)));
        match script.below(4) {
            0 => {
                let _ = self.cache.unpin(pin);
            }
            1 => {
                self.cache.expire(Tick(u64::from(script.below(40))));
            }
            _ => {
                let until = script.one_in(2).then(|| Tick(u64::from(script.below(40))));
                let tokens = TokenCount(script.below(TOKENS_MAX));
                let pinned = self.cache.pin(pin, SequenceId(id), tokens, until);
                assert_eq!(pinned.is_ok(), self.sequences.contains_key(&id));
            }
        }
    }

    fn audit(&mut self) {
        self.cache.check().expect("every invariant holds");
        let stats = self.cache.stats();
        assert_eq!(stats.free.get() + stats.used.get() + stats.pinned.get(), stats.blocks.get());
        assert_eq!(stats.sequences as usize, self.sequences.len());
        self.hear();
    }

    fn wind_down(mut self) {
        for id in std::mem::take(&mut self.sequences).into_keys() {
            assert!(self.part(id, true), "it is open");
        }
        self.settle_behind();
        self.cache.expire(Tick(u64::MAX));
        for pin in 0..3 {
            let _ = self.cache.unpin(PinId(pin));
        }
        self.audit();
        assert!(self.reset());
        self.audit();
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
    }
}
