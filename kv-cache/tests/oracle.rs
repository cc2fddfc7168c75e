//! Random calls against the model of `model/`, over caches of one to three groups of every kind. After every call the
//! cache is audited and every number in it compared.
//!
//! `QUAYLINE_ORACLE_CALLS=1000000 cargo test --release -p quayline-kv-cache --test oracle` makes a million of them;
//! `QUAYLINE_ORACLE_SEED` makes others.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]
#![expect(clippy::cast_possible_truncation, reason = "the pools of this test are tiny")]

mod model;
mod plain;

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use model::{Kind, Model, Shape, Verdict};
use plain::{PlainArc, PlainCost, PlainFair, PlainLeafFirst, PlainLru, PlainSlru};
use proptest::prelude::*;
use proptest::test_runner::{Config as Runs, RngSeed, TestRunner};
use quayline_kv_cache::evict::{CostAware, Fair, Policy, PolicyName, Quota, Slru};
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
    Open { sequence: u64, key: usize, tenant: u32, tokens: Vec<TokenId>, reuse: Reuse },
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
    Pin { pin: u64, sequence: u64, tokens: u32, until: Option<u64> },
    PinHashes { pin: u64, sequence: u64, count: u32 },
    Unpin { pin: u64 },
    Expire { now: u64 },
    Quota { tenant: u32, share: u32, limit: u32 },
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
const CALLS: u64 = 12_000;

#[test]
fn the_cache_does_what_the_model_does() {
    let (wanted, made) = (asked("QUAYLINE_ORACLE_CALLS", CALLS), Cell::new(0));
    let seed = asked("QUAYLINE_ORACLE_SEED", 20);
    // Runs of up to 150 calls, the same ones every time. A failing run is shrunk before it is printed.
    let runs = Runs {
        cases: u32::MAX,
        rng_seed: RngSeed::Fixed(seed),
        failure_persistence: None,
        ..Runs::default()
    };
    let strategy = (shape(), prop::option::weighted(0.8, policy()), prop::collection::vec(call(), 1..150));
    let mut runner = TestRunner::new(runs);
    while made.get() < wanted {
        let once = Runs { cases: 100, ..runner.config().clone() };
        let mut some = TestRunner::new_with_rng(once, runner.new_rng());
        let result = some.run(&strategy, |(shape, chosen, calls)| {
            made.set(made.get() + calls.len() as u64);
            play(&shape, chosen, calls);
            Ok(())
        });
        assert!(result.is_ok(), "seed {seed}: {}", result.unwrap_err());
    }
    eprintln!("{} calls, seed {seed}", made.get());
}

#[expect(clippy::disallowed_methods, reason = "a test may be asked by its environment to run longer")]
fn asked(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |number| number.parse().unwrap())
}

fn policy() -> impl Strategy<Value = PolicyName> {
    (0..PolicyName::ALL.len()).prop_map(|place| PolicyName::ALL[place])
}

/// Of what a late block costs more, so that it shows in small pools.
const DOUBLES_AFTER: u32 = 12;

/// Plays calls with a policy behind quotas, or with LRU alone.
fn play(shape: &Shape, chosen: Option<PolicyName>, calls: Vec<Call>) {
    let (blocks, size) = (shape.config.block_count, shape.config.block_size);
    let Some(chosen) = chosen else {
        return Pair::new(shape, Lru::new, PlainLru::new(blocks), |_, _, _, _| ()).play(calls);
    };
    match chosen {
        PolicyName::Lru => fair(shape, Policy::Lru(Lru::new(blocks)), PlainLru::new(blocks), calls),
        PolicyName::LeafFirst => {
            fair(shape, Policy::new(chosen, blocks, size), PlainLeafFirst::new(blocks), calls);
        }
        PolicyName::Slru => {
            fair(shape, Policy::Slru(Slru::new(blocks, 40)), PlainSlru::new(blocks, 40), calls)
        }
        PolicyName::Arc => fair(shape, Policy::new(chosen, blocks, size), PlainArc::new(blocks), calls),
        PolicyName::Cost => {
            let doubles_after = DOUBLES_AFTER.div_ceil(size.get());
            let cost = CostAware::with_cost(blocks, size, TokenCount(doubles_after * size.get()));
            fair(shape, Policy::Cost(cost), PlainCost::new(blocks, doubles_after), calls);
        }
    }
}

fn fair<P: Eviction>(shape: &Shape, policy: Policy, plain: P, calls: Vec<Call>) {
    let blocks = shape.config.block_count;
    let set_quota =
        |cache: &mut KvCache<Xxh3, Fair<Policy>>, model: &mut Model<PlainFair<P>>, tenant, quota| {
            cache.set_quota(tenant, quota);
            model.policy.set_quota(tenant, quota);
        };
    let plain = PlainFair::new(blocks, plain, &[]);
    Pair::new(shape, |blocks| Fair::new(blocks, policy), plain, set_quota).play(calls);
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
        (0u32..20, prop_oneof![3 => Just(10_000u32), 1 => 1u32..6]),
    );
    (sizes, rest).prop_map(|((base, kinds, parts), rest)| {
        let (blocks, prefix_caching, hash_seed, tokens_max, step_max, retention, draft_head, ahead, kept) =
            rest;
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
        config.pinned_blocks_max = BlockCount(kept.0);
        config.events_max = kept.1;
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
    let pin = || 0u64..3;
    let of_pins = prop_oneof![
        3 => (pin(), sequence(), 0u32..40, prop::option::of(0u64..40))
            .prop_map(|(pin, sequence, tokens, until)| Call::Pin { pin, sequence, tokens, until }),
        2 => (pin(), sequence(), 0u32..12)
            .prop_map(|(pin, sequence, count)| Call::PinHashes { pin, sequence, count }),
        2 => pin().prop_map(|pin| Call::Unpin { pin }),
        1 => (0u64..40).prop_map(|now| Call::Expire { now }),
        2 => (0u32..3, 0u32..20, 0u32..40)
            .prop_map(|(tenant, share, limit)| Call::Quota { tenant, share, limit }),
    ];
    prop_oneof![
        6 => (sequence(), key, 0u32..3, tokens(30), reuse)
            .prop_map(|(sequence, key, tenant, tokens, reuse)| Call::Open { sequence, key, tenant, tokens, reuse }),
        6 => (sequence(), tokens(6)).prop_map(|(sequence, tokens)| Call::Push { sequence, tokens }),
        14 => (sequence(), claim, from, prop::bool::weighted(0.9))
            .prop_map(|(sequence, claim, from, commit)| Call::Claim { sequence, claim, from, commit }),
        16 => of_sequence,
        1 => prop::collection::vec((0u32..40).prop_map(BlockId), 0..4).prop_map(|blocks| Call::Evict { blocks }),
        3 => of_pins,
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

/// Sets the quota of a tenant in both.
type SetQuota<E, P> = fn(&mut KvCache<Xxh3, E>, &mut Model<P>, TenantId, Quota);

/// The cache and the model, told the same, and who hears nothing but events.
struct Pair<E: Eviction, P> {
    cache: KvCache<Xxh3, E>,
    model: Model<P>,
    set_quota: SetQuota<E, P>,
    replica: Replica<BlockHash>,
    calls: u32,
}

impl<E: Eviction, P: Eviction> Pair<E, P> {
    fn new(shape: &Shape, policy: impl FnOnce(BlockCount) -> E, plain: P, set_quota: SetQuota<E, P>) -> Self {
        let hasher = Xxh3::new(shape.config.hash_seed);
        let cache = KvCache::with(shape.config.clone(), hasher, policy).unwrap();
        Pair { cache, model: Model::new(shape, plain), set_quota, replica: Replica::new(), calls: 0 }
    }

    fn play(mut self, calls: Vec<Call>) {
        for call in calls {
            self.run(call);
        }
        self.wind_down();
    }

    fn run(&mut self, call: Call) {
        let Pair { cache, model, .. } = self;
        let id = SequenceId;
        match call {
            Call::Open { sequence, key, tenant, tokens, reuse } => {
                let tenant = TenantId(tenant);
                let answer = cache.open(id(sequence), SequenceKey { tenant, ..KEYS[key] }, &tokens, reuse);
                assert_eq!(answer, model.open(sequence, (key, tenant), &tokens, reuse));
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
            Call::Pin { pin, sequence, tokens, until } => {
                let until = until.map(Tick);
                let answer = cache.pin(PinId(pin), id(sequence), TokenCount(tokens), until);
                assert_eq!(answer, model.pin(pin, sequence, tokens, until));
            }
            Call::PinHashes { pin, sequence, count } => {
                if let Ok(hashes) = cache.hashes(id(sequence)) {
                    let hashes = hashes[..hashes.len().min(count as usize)].to_vec();
                    let expected = model.pin_hashes(pin, sequence, hashes.len() as u32);
                    assert_eq!(cache.pin_hashes(PinId(pin), &hashes, None), expected);
                }
            }
            Call::Unpin { pin } => assert_eq!(cache.unpin(PinId(pin)), model.unpin(pin)),
            Call::Expire { now } => assert_eq!(cache.expire(Tick(now)), model.expire(Tick(now))),
            Call::Quota { tenant, share, limit } => {
                let quota = Quota { share: BlockCount(share), limit: BlockCount(limit) };
                (self.set_quota)(cache, model, TenantId(tenant), quota);
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
            (Ok(Admission::OverLimit(refusal)), Ok(Verdict::OverLimit(expected))) => {
                assert_eq!(refusal, expected);
            }
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

    fn compare(&mut self) {
        let Pair { cache, model, .. } = self;
        cache.check().unwrap();
        let free: Vec<BlockId> = cache.free_blocks().collect();
        assert_eq!(free, model.policy.order().collect::<Vec<_>>(), "order of the free list");
        let stats = cache.stats();
        let all = stats.free.0 + stats.used.0 + stats.pinned.0 + 1;
        assert_eq!(all, cache.config().block_count.0, "free + used + pinned + null = all");
        assert_eq!((stats.free.0, stats.pinned.0), (model.free(), model.pinned()));
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
        self.calls += 1;
        if self.calls.is_multiple_of(8) {
            self.hear();
        }
    }

    /// What the events come to is what the model has. Who hears too late begins anew with a snapshot.
    fn hear(&mut self) {
        let Pair { cache, model, replica, .. } = self;
        let mut hole = None;
        cache.drain_events(|number, event| match replica.apply(number, &event) {
            Ok(()) => {}
            Err(ReplicaError::Hole { expected, got }) => hole = Some(got - expected),
            Err(error) => unreachable!("{error}: {event:?}"),
        });
        let snapshot = cache.snapshot().unwrap();
        if hole.is_some() {
            *replica = Replica::of(&snapshot);
        }
        assert_eq!(*replica, Replica::of(&snapshot));
        let there = model.content.iter().flatten().flatten();
        let there: BTreeSet<_> = there.map(|content| (content.group, &content.tokens)).collect();
        assert_eq!(replica.blocks().count(), there.len(), "one name for each content, however many copies");
        let blocks = (1..model.content.len() as u32).map(BlockId);
        for (block, content) in blocks.filter_map(|block| Some((block, model.whole_content(block)?))) {
            let (group, name) = (GroupId(content.group as u8), cache.hash_of(block).unwrap());
            assert!(replica.contains(group, name), "{block} is found and was not told");
        }
        for stored in snapshot.stored() {
            let group = usize::from(stored.group.0);
            let (first, end) = (stored.first.0 as usize, stored.first.0 as usize + stored.tokens.len());
            let is_it = |(of, (_, tokens)): &(usize, &(usize, Vec<TokenId>))| {
                *of == group && tokens.len() >= end && tokens[first..end] == *stored.tokens
            };
            assert!(there.iter().any(is_it), "{stored:?} is nobody's");
        }
    }

    /// Hashes are equal where whole token lists are, and only there.
    fn compare_content(&self) {
        let Pair { cache, model, .. } = self;
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
        self.run(Call::Expire { now: u64::MAX });
        self.run(Call::Reset);
        assert_eq!(self.cache.stats().free, self.cache.stats().blocks, "no block is lost");
    }
}
