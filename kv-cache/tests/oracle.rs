//! Random calls against a dumb model that keeps whole token lists and compares them, and knows no hash, no
//! linked list and no index. After every call the cache is audited and every number in it compared.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

use std::collections::BTreeMap;

use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::*;

/// The keys that sequences are opened with; content is shared only under the same one.
const KEYS: [SequenceKey<'static>; 3] = [
    SequenceKey { adapter: None, salt: None, media: &[], embeds: None, tenant: TenantId(0) },
    SequenceKey { adapter: None, salt: Some("a"), media: &[], embeds: None, tenant: TenantId(0) },
    SequenceKey {
        adapter: Some(Adapter { name: "a", path: "" }),
        salt: None,
        media: &[],
        embeds: None,
        tenant: TenantId(0),
    },
];

/// One call. Sequences are numbers below [`SEQUENCES`], so that calls meet open and closed ones.
#[derive(Clone, Debug)]
enum Call {
    Open { sequence: u64, key: usize, tokens: Vec<TokenId>, reuse: Reuse },
    Push { sequence: u64, tokens: Vec<TokenId> },
    Lookup { sequence: u64 },
    Claim { sequence: u64, claim: Claim, from: From, commit: bool },
    Withdraw { sequence: u64 },
    Release { sequence: u64 },
    Close { sequence: u64 },
    Reset,
}

/// What a claim takes for computed.
#[derive(Clone, Debug)]
enum From {
    /// Where the sequence stands, or its hit.
    Usual,
    /// The number in the claim, which is often nonsense.
    Claimed,
}

const SEQUENCES: u64 = 6;

#[test]
fn the_cache_does_what_the_model_does() {
    // 400 runs of up to 150 calls, the same ones every time. A failing run is shrunk before it is printed.
    let runs =
        Runs { cases: 400, rng_seed: RngSeed::Fixed(20), failure_persistence: None, ..Runs::default() };
    let strategy = (config(), prop::collection::vec(call(), 1..150));
    TestRunner::new(runs)
        .run(&strategy, |(config, calls)| {
            let cache = KvCache::new(config.clone()).unwrap();
            let mut pair = Pair { cache, model: Model::new(config) };
            for call in calls {
                pair.run(call);
            }
            pair.wind_down();
            Ok(())
        })
        .unwrap();
}

fn config() -> impl Strategy<Value = Config> {
    (
        1u32..5,
        2u32..26,
        prop::bool::weighted(0.9),
        any::<u64>(),
        prop_oneof![4 => Just(u32::MAX), 1 => 8u32..30],
    )
        .prop_map(|(block_size, blocks, prefix_caching, hash_seed, tokens_max)| Config {
            prefix_caching,
            hash_seed,
            sequence_tokens_max: TokenCount(tokens_max),
            ..Config::new(BlockSize::new(block_size).unwrap(), BlockCount(blocks))
        })
}

fn call() -> impl Strategy<Value = Call> {
    let sequence = 0..SEQUENCES;
    let reuse = prop_oneof![2 => Just(Reuse::ReadWrite), 1 => Just(Reuse::WriteOnly)];
    let claim = (0u32..40, 0u32..12, prop_oneof![3 => Just(0u32), 1 => 0u32..6], any::<bool>(), 0u32..4)
        .prop_map(|(computed, new_tokens, lookahead, whole_sequence, watermark)| Claim {
            computed: TokenCount(computed),
            external: TokenCount(0),
            new_tokens: TokenCount(new_tokens),
            lookahead: TokenCount(lookahead),
            whole_sequence,
            watermark: BlockCount(watermark),
        });
    let from = prop_oneof![9 => Just(From::Usual), 1 => Just(From::Claimed)];
    prop_oneof![
        6 => (sequence.clone(), prop_oneof![4 => Just(0), 1 => 1..KEYS.len()], tokens(30), reuse)
            .prop_map(|(sequence, key, tokens, reuse)| Call::Open { sequence, key, tokens, reuse }),
        6 => (sequence.clone(), tokens(6)).prop_map(|(sequence, tokens)| Call::Push { sequence, tokens }),
        2 => sequence.clone().prop_map(|sequence| Call::Lookup { sequence }),
        12 => (sequence.clone(), claim, from, prop::bool::weighted(0.9))
            .prop_map(|(sequence, claim, from, commit)| Call::Claim { sequence, claim, from, commit }),
        1 => sequence.clone().prop_map(|sequence| Call::Withdraw { sequence }),
        2 => sequence.clone().prop_map(|sequence| Call::Release { sequence }),
        3 => sequence.prop_map(|sequence| Call::Close { sequence }),
        1 => Just(Call::Reset),
    ]
}

/// Token lists that often begin alike: counting up, then something else.
fn tokens(length_max: u32) -> impl Strategy<Value = Vec<TokenId>> {
    (0..length_max, 0..length_max, 0u32..3).prop_map(|(alike, length, other)| {
        (0..length).map(|index| if index < alike { index } else { 1000 * other + index }).collect()
    })
}

/// The cache and the model, told the same.
struct Pair {
    cache: KvCache,
    model: Model,
}

impl Pair {
    fn run(&mut self, call: Call) {
        let Pair { cache, model } = self;
        match call {
            Call::Open { sequence, key, tokens, reuse } => {
                let answer = cache.open(SequenceId(sequence), KEYS[key], &tokens, reuse);
                assert_eq!(answer, model.open(sequence, key, &tokens, reuse));
            }
            Call::Push { sequence, tokens } => {
                assert_eq!(cache.push(SequenceId(sequence), &tokens), model.push(sequence, &tokens));
            }
            Call::Lookup { sequence } => {
                assert_eq!(cache.lookup(SequenceId(sequence)), model.lookup(sequence));
            }
            Call::Claim { sequence, mut claim, from, commit } => {
                if matches!(from, From::Usual) {
                    claim.computed = model.usual_start(sequence);
                }
                self.claim(sequence, claim, commit);
            }
            Call::Withdraw { sequence } => {
                assert_eq!(cache.withdraw(SequenceId(sequence)), model.withdraw(sequence));
            }
            Call::Release { sequence } => {
                assert_eq!(cache.release(SequenceId(sequence)), model.release(sequence));
            }
            Call::Close { sequence } => {
                assert_eq!(cache.close(SequenceId(sequence)), model.close(sequence));
            }
            Call::Reset => assert_eq!(cache.reset(), model.reset()),
        }
        self.compare();
    }

    fn claim(&mut self, sequence: u64, claim: Claim, commit: bool) {
        let expected = self.model.reserve(sequence, claim);
        match (self.cache.reserve(SequenceId(sequence), claim), expected) {
            (Err(error), expected) => assert_eq!(Err(error), expected),
            (Ok(Admission::Wait { need, free, .. }), expected) => {
                assert_eq!(Ok(Verdict::Wait(need.0, free.0)), expected)
            }
            (Ok(Admission::OverLimit(_)), _) => unreachable!("there are no quotas"),
            (Ok(Admission::NextStep), _) => unreachable!("there is no state to wait for"),
            (Ok(Admission::Never { need, .. }), expected) => assert_eq!(Ok(Verdict::Never(need.0)), expected),
            (Ok(Admission::Admit(reservation)), expected) => {
                let (hits, new) = (reservation.hit_blocks().0 as usize, reservation.new_blocks().0 as usize);
                assert_eq!(Ok(Verdict::Admit { hits, new }), expected);
                if commit {
                    let grant = reservation.commit();
                    let (cached, new_blocks, covered) =
                        (grant.cached, grant.new_blocks.to_vec(), grant.covered);
                    assert_eq!((cached.0, new_blocks), self.model.commit(sequence, claim, hits, new));
                    let computed = claim.computed.0 + claim.new_tokens.0;
                    assert_eq!(covered.0, self.model.covered(sequence, computed));
                }
            }
        }
    }

    fn compare(&self) {
        let Pair { cache, model } = self;
        cache.check().unwrap();
        let free: Vec<BlockId> = cache.free_blocks().collect();
        assert_eq!(free, model.free, "order of the free list");
        let stats = cache.stats();
        assert_eq!(stats.free.0 + stats.used.0 + 1, cache.config().block_count.0, "free + used + null = all");
        assert_eq!(stats.free.0 as usize, model.free.len());
        assert_eq!((stats.first, stats.again, stats.evictions), (model.first, model.again, model.evictions));
        assert_eq!(stats.cached.0 as usize, model.content.iter().flatten().count());
        assert_eq!(stats.sequences as usize, model.sequences.len());
        for (&id, sequence) in &model.sequences {
            assert_eq!(cache.table(SequenceId(id)).unwrap().blocks(), sequence.table, "table of {id}");
        }
        self.compare_content();
    }

    /// Hashes are equal where whole token lists are, and only there.
    fn compare_content(&self) {
        let mut hashes = BTreeMap::new();
        for (block, content) in (0..).map(BlockId).zip(&self.model.content) {
            assert_eq!(self.cache.references(block), self.model.users(block), "users of {block}");
            let hash = self.cache.hash_of(block);
            assert_eq!(hash.is_some(), content.is_some(), "whether {block} is published");
            if let (Some(hash), Some(content)) = (hash, content) {
                let known = hashes.entry(hash).or_insert(&content.tokens);
                assert_eq!(*known, &content.tokens, "two contents under one hash");
            }
        }
        let mut contents: Vec<_> =
            self.model.content.iter().flatten().map(|content| &content.tokens).collect();
        contents.sort();
        contents.dedup();
        assert_eq!(contents.len(), hashes.len(), "one content under two hashes");
    }

    fn wind_down(&mut self) {
        for sequence in 0..SEQUENCES {
            self.run(Call::Close { sequence });
        }
        self.run(Call::Reset);
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
    }
}

#[derive(Debug, PartialEq)]
enum Verdict {
    Admit { hits: usize, new: usize },
    Wait(u32, u32),
    Never(u32),
}

struct Model {
    config: Config,
    size: usize,
    free: Vec<BlockId>,
    /// By block: what others find in it.
    content: Vec<Option<Content>>,
    sequences: BTreeMap<u64, Sequence>,
    publications: u64,
    first: HitStats,
    again: HitStats,
    evictions: u64,
}

/// All tokens up to the end of the block, under the key they were computed with.
#[derive(Clone)]
struct Content {
    tokens: (usize, Vec<TokenId>),
    published_as: u64,
}

struct Sequence {
    key: usize,
    reuse: Reuse,
    tokens: Vec<TokenId>,
    table: Vec<BlockId>,
    computed: u32,
    published: usize,
    published_before: usize,
    was_released: bool,
}

impl Model {
    fn new(config: Config) -> Self {
        Model {
            size: config.block_size.get() as usize,
            free: (1..config.block_count.0).map(BlockId).collect(),
            content: vec![None; config.block_count.0 as usize],
            config,
            sequences: BTreeMap::new(),
            publications: 0,
            first: HitStats::default(),
            again: HitStats::default(),
            evictions: 0,
        }
    }

    fn users(&self, block: BlockId) -> u32 {
        self.sequences
            .values()
            .map(|sequence| sequence.table.iter().filter(|&&held| held == block).count() as u32)
            .sum()
    }

    fn get(&mut self, id: u64) -> Result<&mut Sequence, Error> {
        self.sequences.get_mut(&id).ok_or(Error::NotOpen { sequence: SequenceId(id) })
    }

    fn must_fit(&self, id: u64, tokens: usize) -> Result<(), Error> {
        let (tokens, max) = (tokens as u64, self.config.sequence_tokens_max);
        if tokens <= max.0.into() {
            Ok(())
        } else {
            Err(Error::TooManyTokens { sequence: SequenceId(id), tokens, max })
        }
    }

    fn open(&mut self, id: u64, key: usize, tokens: &[TokenId], reuse: Reuse) -> Result<(), Error> {
        if self.sequences.contains_key(&id) {
            return Err(Error::AlreadyOpen { sequence: SequenceId(id) });
        }
        self.must_fit(id, tokens.len())?;
        let sequence = Sequence {
            key,
            reuse,
            tokens: tokens.to_vec(),
            table: Vec::new(),
            computed: 0,
            published: 0,
            published_before: 0,
            was_released: false,
        };
        self.sequences.insert(id, sequence);
        Ok(())
    }

    fn push(&mut self, id: u64, tokens: &[TokenId]) -> Result<(), Error> {
        let known = self.get(id)?.tokens.len();
        self.must_fit(id, known + tokens.len())?;
        self.get(id)?.tokens.extend(tokens);
        Ok(())
    }

    /// Blocks whose content is a beginning of the sequence, oldest copy of each, until one is missing.
    fn hit(&self, id: u64) -> Vec<BlockId> {
        let sequence = &self.sequences[&id];
        let mut hit = Vec::new();
        if sequence.reuse == Reuse::WriteOnly {
            return hit;
        }
        for end in (self.size..sequence.tokens.len()).step_by(self.size) {
            let wanted = (sequence.key, sequence.tokens[..end].to_vec());
            let copies = (0..).map(BlockId).zip(&self.content).filter_map(|(block, content)| {
                content
                    .as_ref()
                    .filter(|content| content.tokens == wanted)
                    .map(|content| (content.published_as, block))
            });
            match copies.min() {
                Some((_, block)) => hit.push(block),
                None => break,
            }
        }
        hit
    }

    fn lookup(&mut self, id: u64) -> Result<Hit, Error> {
        let held = BlockCount(self.get(id)?.table.len() as u32);
        if held.0 > 0 {
            return Err(Error::Started { sequence: SequenceId(id), held });
        }
        let blocks = self.hit(id).len();
        Ok(Hit {
            tokens: TokenCount((blocks * self.size) as u32),
            blocks: BlockCount(blocks as u32),
            junction: None,
        })
    }

    fn usual_start(&mut self, id: u64) -> TokenCount {
        match self.sequences.get(&id) {
            None => TokenCount(0),
            Some(sequence) if sequence.table.is_empty() => self.lookup(id).unwrap().tokens,
            Some(sequence) => TokenCount(sequence.computed),
        }
    }

    fn reserve(&mut self, id: u64, claim: Claim) -> Result<Verdict, Error> {
        let sequence = SequenceId(id);
        let held = self.get(id)?.table.len();
        if claim.new_tokens.0 == 0 {
            return Err(Error::EmptyClaim { sequence });
        }
        let computed = claim.computed;
        let mut hits = Vec::new();
        if held == 0 {
            hits = self.hit(id);
            let cached = TokenCount((hits.len() * self.size) as u32);
            if computed > cached || !(computed.0 as usize).is_multiple_of(self.size) {
                return Err(Error::NotCached { sequence, computed, cached });
            }
            hits.truncate(computed.0 as usize / self.size);
        } else if computed.0 as usize > held * self.size {
            return Err(Error::NoRoomBefore {
                sequence,
                computed,
                room: TokenCount((held * self.size) as u32),
            });
        }
        let room =
            (computed.0 + claim.new_tokens.0 + claim.lookahead.0).min(self.config.sequence_tokens_max.0);
        let has = held + hits.len();
        let new = (room as usize).div_ceil(self.size).saturating_sub(has);
        let whole =
            if claim.whole_sequence { self.sequences[&id].tokens.len().div_ceil(self.size) } else { 0 };
        let unused = hits.iter().filter(|block| self.free.contains(block)).count();
        let beyond = new.max(whole.saturating_sub(has));
        let need = beyond + unused;
        if need + claim.watermark.0 as usize > self.free.len() {
            if has + beyond >= self.content.len() {
                return Ok(Verdict::Never((has + beyond) as u32));
            }
            return Ok(Verdict::Wait(need as u32, self.free.len() as u32));
        }
        Ok(Verdict::Admit { hits: hits.len(), new })
    }

    fn commit(&mut self, id: u64, claim: Claim, hits: usize, new: usize) -> (u32, Vec<BlockId>) {
        let shared = if hits > 0 { self.hit(id)[..hits].to_vec() } else { Vec::new() };
        self.free.retain(|block| !shared.contains(block));
        let new_blocks: Vec<BlockId> = self.free.drain(..new).collect();
        for block in &new_blocks {
            self.evictions += u64::from(self.content[block.0 as usize].take().is_some());
        }
        let sequence = self.sequences.get_mut(&id).unwrap();
        if sequence.table.is_empty() && self.config.prefix_caching && sequence.reuse == Reuse::ReadWrite {
            let stats = if sequence.was_released { &mut self.again } else { &mut self.first };
            stats.admissions += 1;
            stats.tokens += sequence.tokens.len() as u64;
            stats.hit_tokens += (hits * self.size) as u64;
        }
        sequence.published += shared.len();
        sequence.published_before = sequence.published;
        sequence.table.extend(shared.into_iter().chain(new_blocks.iter().copied()));
        sequence.computed = (claim.computed.0 + claim.new_tokens.0).min(self.config.sequence_tokens_max.0);
        if self.config.prefix_caching {
            let settled = sequence.tokens.len().min((claim.computed.0 + claim.new_tokens.0) as usize);
            while (sequence.published + 1) * self.size <= settled {
                let block = sequence.table[sequence.published];
                sequence.published += 1;
                let tokens = (sequence.key, sequence.tokens[..sequence.published * self.size].to_vec());
                self.content[block.0 as usize] = Some(Content { tokens, published_as: self.publications });
                self.publications += 1;
            }
        }
        ((hits * self.size) as u32, new_blocks)
    }

    /// The last number of computed tokens that neither fills a block nor needs one.
    fn covered(&self, id: u64, computed: u32) -> u32 {
        let sequence = &self.sequences[&id];
        let changes_something = |tokens: u32| {
            let fills = self.config.prefix_caching && tokens as usize >= (sequence.published + 1) * self.size;
            fills || tokens as usize > sequence.table.len() * self.size
        };
        (computed + 1..).find(|&tokens| changes_something(tokens)).unwrap() - 1
    }

    fn withdraw(&mut self, id: u64) -> Result<(), Error> {
        let sequence = self.get(id)?;
        let taken_back = sequence.table[sequence.published_before..sequence.published].to_vec();
        sequence.published = sequence.published_before;
        for block in taken_back {
            self.content[block.0 as usize] = None;
        }
        Ok(())
    }

    fn release(&mut self, id: u64) -> Result<(), Error> {
        let sequence = self.get(id)?;
        let table = std::mem::take(&mut sequence.table);
        sequence.was_released |= !table.is_empty();
        (sequence.published, sequence.published_before, sequence.computed) = (0, 0, 0);
        let gone: Vec<BlockId> = table.into_iter().rev().filter(|&block| self.users(block) == 0).collect();
        let (kept, worthless): (Vec<_>, Vec<_>) =
            gone.into_iter().partition(|block| self.content[block.0 as usize].is_some());
        self.free = worthless.into_iter().chain(self.free.drain(..)).chain(kept).collect();
        Ok(())
    }

    fn close(&mut self, id: u64) -> Result<(), Error> {
        self.release(id)?;
        self.sequences.remove(&id);
        Ok(())
    }

    fn reset(&mut self) -> bool {
        let idle = self.sequences.values().all(|sequence| sequence.table.is_empty());
        if idle {
            self.content.fill(None);
        }
        idle
    }
}
