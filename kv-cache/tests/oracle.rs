//! Random calls against the model of `model/`, over caches of one to three groups of every kind. After every call the
//! cache is audited and every number in it compared.
//!
//! `QUAYLINE_ORACLE_CALLS=1000000 cargo test --release -p quayline-kv-cache --test oracle` makes a million of them.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

mod model;

use std::cell::Cell;
use std::collections::BTreeMap;

use model::{Kind, Model, Shape, Verdict};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::kind::{ChunkedLocal, Cross, Full, Recurrent, SlidingWindow};
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
    Encoder { sequence: u64, tokens: u32 },
    Push { sequence: u64, tokens: Vec<TokenId> },
    Lookup { sequence: u64 },
    Claim { sequence: u64, claim: Claim, from: From, commit: bool },
    Settle { sequence: u64, behind: u32 },
    Loaded { sequence: u64, behind: u32, failed: bool },
    Fork { parent: u64, child: u64 },
    Truncate { sequence: u64, keep: u32 },
    Rollback { sequence: u64, tokens: u32 },
    Trim { sequence: u64, room: u32 },
    Withdraw { sequence: u64 },
    Release { sequence: u64 },
    Close { sequence: u64 },
    Evict { blocks: Vec<BlockId> },
    EvictHash { sequence: u64, index: usize },
    EndStep,
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

/// Calls of a run that fits in a few seconds.
const CALLS: usize = 50_000;

#[test]
fn the_cache_does_what_the_model_does() {
    let (wanted, made) = (calls_wanted(), Cell::new(0));
    // Runs of up to 150 calls, the same ones every time. A failing run is shrunk before it is printed.
    let runs =
        Runs { cases: u32::MAX, rng_seed: RngSeed::Fixed(20), failure_persistence: None, ..Runs::default() };
    let strategy = (shape(), prop::collection::vec(call(), 1..150));
    let mut runner = TestRunner::new(runs);
    while made.get() < wanted {
        let once = Runs { cases: 100, ..runner.config().clone() };
        let mut some = TestRunner::new_with_rng(once, runner.new_rng());
        let result = some.run(&strategy, |(shape, calls)| {
            let cache = KvCache::new(shape.config.clone()).unwrap();
            let mut pair = Pair { cache, model: Model::new(&shape) };
            made.set(made.get() + calls.len());
            for call in calls {
                pair.run(call);
            }
            pair.wind_down();
            Ok(())
        });
        result.unwrap();
    }
    eprintln!("{} calls", made.get());
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to run longer")]
fn calls_wanted() -> usize {
    std::env::var("QUAYLINE_ORACLE_CALLS").map_or(CALLS, |calls| calls.parse().unwrap())
}

fn shape() -> impl Strategy<Value = Shape> {
    let sizes = (1u32..5, prop::collection::vec(group(), 1..4), prop::option::weighted(0.25, 1u32..3));
    let retention = prop_oneof![
        2 => Just(Retention::Prompt),
        2 => Just(Retention::Dense),
        1 => (0u32..9).prop_map(|every| Retention::Every(TokenCount(every))),
    ];
    let rest = (
        2u32..40,
        prop::bool::weighted(0.9),
        any::<u64>(),
        prop_oneof![4 => Just(u32::MAX), 1 => 8u32..30],
        prop_oneof![2 => Just(u32::MAX), 1 => 1u32..9],
        retention,
        prop::bool::weighted(0.15),
        prop_oneof![5 => Just(0u32), 1 => 1u32..3],
    );
    (sizes, rest).prop_map(|((base, kinds, parts), rest)| {
        let (blocks, prefix_caching, hash_seed, tokens_max, step_max, retention, draft_head, ahead) = rest;
        // Parts divide every block, so all sizes are multiples of one.
        let unit = parts.map(|parts| base.min(parts));
        let size = |factor: u32| unit.map_or(base, |unit| unit * base) * factor;
        let groups: Vec<model::Group> =
            kinds.iter().map(|&(kind, factor)| model::Group { kind, size: size(factor) }).collect();
        let mut config = Config::new(BlockSize::new(size(1)).unwrap(), BlockCount(blocks));
        config.groups = groups
            .iter()
            .map(|group| real(group.kind).with_block_size(BlockSize::new(group.size).unwrap()))
            .collect();
        config.match_unit = unit.map(|unit| BlockSize::new(unit).unwrap());
        config.sequence_tokens_max = TokenCount(tokens_max);
        config.step_tokens_max = TokenCount(step_max);
        config.hash_lookahead = TokenCount(ahead);
        let config = Config { prefix_caching, hash_seed, retention, draft_head, ..config };
        Shape { config, groups }
    })
}

/// A kind and by how much its blocks are larger.
fn group() -> impl Strategy<Value = (Kind, u32)> {
    let kind = prop_oneof![
        6 => Just(Kind::Full),
        3 => (1u32..10, prop_oneof![2 => Just(0u32), 1 => 1u32..6])
            .prop_map(|(window, sinks)| Kind::Window { window, sinks }),
        1 => (1u32..10).prop_map(|window| Kind::WindowBehindPrompt { window }),
        2 => (1u32..10).prop_map(|chunk| Kind::Local { chunk }),
        2 => Just(Kind::State),
        1 => Just(Kind::Cross),
    ];
    (kind, prop_oneof![4 => Just(1u32), 1 => 2u32..4])
}

fn real(kind: Kind) -> Group {
    let window = |window| SlidingWindow::new(TokenCount(window)).unwrap();
    match kind {
        Kind::Full => Group::new(Full),
        Kind::Window { window: length, sinks } => Group::new(window(length).with_sinks(TokenCount(sinks))),
        Kind::WindowBehindPrompt { window: length } => Group::new(window(length).with_prompt()),
        Kind::Local { chunk } => Group::new(ChunkedLocal::new(TokenCount(chunk)).unwrap()),
        Kind::State => Group::new(Recurrent),
        Kind::Cross => Group::new(Cross),
    }
}

fn call() -> impl Strategy<Value = Call> {
    let sequence = || 0..SEQUENCES;
    let reuse = prop_oneof![3 => Just(Reuse::ReadWrite), 1 => Just(Reuse::WriteOnly)];
    let external = prop_oneof![5 => Just(0u32), 1 => 1u32..20];
    let lookahead = prop_oneof![3 => Just(0u32), 1 => 0u32..6];
    let claim = (0u32..40, external, 0u32..12, lookahead, any::<bool>(), 0u32..4).prop_map(
        |(computed, external, new_tokens, lookahead, whole_sequence, watermark)| Claim {
            computed: TokenCount(computed),
            external: TokenCount(external),
            new_tokens: TokenCount(new_tokens),
            lookahead: TokenCount(lookahead),
            whole_sequence,
            watermark: BlockCount(watermark),
        },
    );
    let from = prop_oneof![9 => Just(From::Usual), 1 => Just(From::Claimed)];
    let key = prop_oneof![6 => Just(0), 1 => 1..KEYS.len()];
    let of_sequence = prop_oneof![
        2 => sequence().prop_map(|sequence| Call::Lookup { sequence }),
        1 => sequence().prop_map(|sequence| Call::Withdraw { sequence }),
        2 => sequence().prop_map(|sequence| Call::Release { sequence }),
        3 => sequence().prop_map(|sequence| Call::Close { sequence }),
        1 => (sequence(), 0u32..9).prop_map(|(sequence, tokens)| Call::Encoder { sequence, tokens }),
        4 => (sequence(), 0u32..9).prop_map(|(sequence, behind)| Call::Settle { sequence, behind }),
        3 => (sequence(), 0u32..9, prop::bool::weighted(0.3))
            .prop_map(|(sequence, behind, failed)| Call::Loaded { sequence, behind, failed }),
        3 => (sequence(), sequence()).prop_map(|(parent, child)| Call::Fork { parent, child }),
        1 => (sequence(), 0u32..40).prop_map(|(sequence, keep)| Call::Truncate { sequence, keep }),
        2 => (sequence(), 0u32..5).prop_map(|(sequence, tokens)| Call::Rollback { sequence, tokens }),
        1 => (sequence(), 0u32..40).prop_map(|(sequence, room)| Call::Trim { sequence, room }),
        1 => (sequence(), 0usize..6).prop_map(|(sequence, index)| Call::EvictHash { sequence, index }),
    ];
    prop_oneof![
        6 => (sequence(), key, tokens(30), reuse)
            .prop_map(|(sequence, key, tokens, reuse)| Call::Open { sequence, key, tokens, reuse }),
        6 => (sequence(), tokens(6)).prop_map(|(sequence, tokens)| Call::Push { sequence, tokens }),
        14 => (sequence(), claim, from, prop::bool::weighted(0.9))
            .prop_map(|(sequence, claim, from, commit)| Call::Claim { sequence, claim, from, commit }),
        16 => of_sequence,
        1 => prop::collection::vec((0u32..40).prop_map(BlockId), 0..4).prop_map(|blocks| Call::Evict { blocks }),
        4 => Just(Call::EndStep),
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
        let id = SequenceId;
        match call {
            Call::Open { sequence, key, tokens, reuse } => {
                let answer = cache.open(id(sequence), KEYS[key], &tokens, reuse);
                assert_eq!(answer, model.open(sequence, key, &tokens, reuse));
            }
            Call::Encoder { sequence, tokens } => {
                assert_eq!(cache.encoder(id(sequence), TokenCount(tokens)), model.encoder(sequence, tokens));
            }
            Call::Push { sequence, tokens } => {
                assert_eq!(cache.push(id(sequence), &tokens), model.push(sequence, &tokens));
            }
            Call::Lookup { sequence } => assert_eq!(cache.lookup(id(sequence)), model.lookup(sequence)),
            Call::Claim { sequence, mut claim, from, commit } => {
                if matches!(from, From::Usual) {
                    claim.computed = model.usual_start(sequence);
                }
                self.claim(sequence, claim, commit);
            }
            Call::Settle { sequence, behind } => {
                let tokens = self.computed(sequence).saturating_sub(behind.saturating_sub(1));
                let tokens = if behind == 0 { tokens + 1 } else { tokens };
                let answer = self.cache.settle(id(sequence), TokenCount(tokens)).map(<[_]>::to_vec);
                assert_eq!(answer, self.model.settle(sequence, tokens));
            }
            Call::Loaded { sequence, behind, failed } => {
                let tokens = self.computed(sequence).saturating_sub(behind);
                if failed {
                    let answer = self.cache.load_failed(id(sequence), TokenCount(tokens));
                    assert_eq!(answer, self.model.load_failed(sequence, tokens));
                } else {
                    let answer = self.cache.loaded(id(sequence), TokenCount(tokens));
                    assert_eq!(answer, self.model.loaded(sequence, tokens));
                }
            }
            Call::Fork { parent, child } => {
                assert_eq!(cache.fork(id(parent), id(child)), model.fork(parent, child));
            }
            Call::Truncate { sequence, keep } => {
                assert_eq!(cache.truncate(id(sequence), TokenCount(keep)), model.truncate(sequence, keep));
            }
            Call::Rollback { sequence, tokens } => {
                assert_eq!(
                    cache.rollback(id(sequence), TokenCount(tokens)),
                    model.rollback(sequence, tokens)
                );
            }
            Call::Trim { sequence, room } => {
                assert_eq!(cache.trim(id(sequence), TokenCount(room)), model.trim(sequence, room));
            }
            Call::Withdraw { sequence } => assert_eq!(cache.withdraw(id(sequence)), model.withdraw(sequence)),
            Call::Release { sequence } => assert_eq!(cache.release(id(sequence)), model.release(sequence)),
            Call::Close { sequence } => assert_eq!(cache.close(id(sequence)), model.close(sequence)),
            Call::Evict { blocks } => assert_eq!(cache.evict(&blocks), model.evict(&blocks)),
            Call::EvictHash { sequence, index } => {
                let hash = cache.hashes(id(sequence)).ok().and_then(|hashes| hashes.get(index).copied());
                if let Some(hash) = hash {
                    assert_eq!(cache.evict_hash(hash), model.evict_hash(sequence, index));
                }
            }
            Call::EndStep => {
                cache.end_step();
                model.end_step();
            }
            Call::Reset => assert_eq!(cache.reset(), model.reset()),
        }
        self.compare();
    }

    fn computed(&self, sequence: u64) -> u32 {
        self.model.sequences.get(&sequence).map_or(0, |sequence| sequence.computed)
    }

    fn claim(&mut self, sequence: u64, claim: Claim, commit: bool) {
        let expected = self.model.reserve(sequence, claim);
        match (self.cache.reserve(SequenceId(sequence), claim), expected) {
            (Err(error), Err(expected)) => assert_eq!(error, expected),
            (Ok(Admission::NextStep), Ok(Verdict::NextStep)) => (),
            (Ok(Admission::Wait { need, reserved, free, .. }), Ok(Verdict::Wait(a, b, c))) => {
                assert_eq!((need.0, reserved.0, free.0), (a, b, c));
            }
            (Ok(Admission::Never { need, .. }), Ok(Verdict::Never(expected))) => assert_eq!(need.0, expected),
            (Ok(Admission::Admit(reservation)), Ok(Verdict::Admit { hits, new })) => {
                assert_eq!((reservation.hit_blocks().0, reservation.new_blocks().0), (hits, new));
                if commit {
                    let grant = reservation.commit();
                    let granted = self.model.commit(sequence, claim);
                    let groups = (0..granted.new.len()).map(|group| GroupId(group as u8));
                    let new: Vec<_> = groups.map(|group| grant.new_blocks_in(group).to_vec()).collect();
                    assert_eq!((grant.cached.0, &new), (granted.cached, &granted.new));
                    assert_eq!(grant.copies, granted.copies);
                    assert_eq!(grant.covered.0, self.model.covered(sequence), "covered");
                    let taken = new.into_iter().flatten().chain(granted.copies.iter().map(|copy| copy.to));
                    let mut taken: Vec<_> = taken.filter(|&block| block != BlockId::NULL).collect();
                    let all = taken.len();
                    taken.sort_unstable();
                    taken.dedup();
                    assert_eq!(taken.len(), all, "no block is handed out twice, across groups");
                }
            }
            (answer, expected) => unreachable!("{answer:?}, {expected:?} expected"),
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
        assert_eq!((stats.cached.0, stats.reserved.0), (model.cached(), model.set_aside()));
        assert_eq!(stats.sequences as usize, model.sequences.len());
        assert_eq!(cache.copies(), model.copies);
        for (&id, sequence) in &model.sequences {
            for (group, table) in (0..).map(GroupId).zip(&sequence.tables) {
                let blocks = cache.table_in(SequenceId(id), group).unwrap().blocks();
                assert_eq!(blocks, table.blocks, "table of {id} in {group}");
            }
            assert_eq!(cache.known(SequenceId(id)).unwrap().0 as usize, sequence.tokens.len());
        }
        self.compare_content();
    }

    /// Hashes are equal where whole token lists are, and only there.
    fn compare_content(&self) {
        let Pair { cache, model } = self;
        let mut hashes = BTreeMap::new();
        let mut contents = BTreeMap::new();
        for block in (1..model.content.len() as u32).map(BlockId) {
            assert_eq!(cache.references(block), model.users(block), "users of {block}");
            assert_eq!(cache.is_cached(block), model.is_cached(block), "whether {block} is published");
            let (hash, content) = (cache.hash_of(block), model.whole_content(block));
            assert_eq!(hash.is_some(), content.is_some(), "whether {block} is published in full");
            if let (Some(hash), Some(content)) = (hash, content) {
                assert_eq!(
                    *hashes.entry(hash).or_insert(&content.tokens),
                    &content.tokens,
                    "two under one hash"
                );
                assert_eq!(*contents.entry(&content.tokens).or_insert(hash), hash, "one under two hashes");
            }
        }
    }

    fn wind_down(&mut self) {
        for sequence in 0..SEQUENCES {
            self.run(Call::Close { sequence });
        }
        self.run(Call::EndStep);
        self.run(Call::Reset);
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
    }
}
