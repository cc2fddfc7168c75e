//! What the oracle asks: caches of every shape, and calls of every kind.

mod tiers;

use std::sync::LazyLock;

use proptest::prelude::*;
use quayline_kv_cache::kind::{ChunkedLocal, Cross, Full, Recurrent, SlidingWindow};
use quayline_kv_cache::*;

use super::model::{self, Key, Kind, Shape};
pub(crate) use tiers::tiers;

/// The keys that sequences are opened with. Some differ only behind a beginning that they share.
pub(crate) static KEYS: LazyLock<Vec<Key>> = LazyLock::new(|| {
    let items = |items: &[(&str, u32)]| items.iter().map(|&(id, first)| item(id, first)).collect();
    let plain = Key::default;
    vec![
        plain(),
        Key { salt: Some("a"), ..plain() },
        Key { adapter: Some(("a", "")), ..plain() },
        Key { adapter: Some(("a", "elsewhere")), ..plain() },
        Key { media: items(&[("x", 3)]), ..plain() },
        Key { media: items(&[("x", 4)]), ..plain() },
        Key { media: items(&[("x", 3), ("y", 8)]), ..plain() },
        Key { media: items(&[("y", 3), ("x", 9)]), salt: Some("a"), ..plain() },
        Key { embeds: Some(vec![[1; 32], [2; 32]]), ..plain() },
        Key { embeds: Some(vec![[1; 32], [3; 32]]), ..plain() },
    ]
});

/// An item; its name says how many tokens it has.
pub(crate) fn item(id: &str, first: u32) -> Media {
    let tokens = if id == "x" { 5 } else { 2 };
    Media { id: id.into(), first: TokenIndex(first), tokens: TokenCount(tokens) }
}

/// One call. Sequences are numbers below [`SEQUENCES`], so that calls meet open and closed ones.
#[derive(Clone, Debug)]
pub(crate) enum Call {
    Open {
        sequence: u64,
        key: usize,
        tenant: u32,
        tokens: Vec<TokenId>,
        reuse: Reuse,
    },
    /// A request comes, as they mostly do: it is opened, finds what it finds, and is computed in one step.
    Serve {
        sequence: u64,
        key: usize,
        tenant: u32,
        tokens: Vec<TokenId>,
    },
    Encoder {
        sequence: u64,
        tokens: u32,
    },
    /// An item is told, so many tokens behind those that are known.
    Media {
        sequence: u64,
        id: &'static str,
        ahead: u32,
    },
    Push {
        sequence: u64,
        tokens: Vec<TokenId>,
    },
    Lookup {
        sequence: u64,
    },
    Claim {
        sequence: u64,
        claim: Claim,
        from: From,
        commit: bool,
    },
    Settle {
        sequence: u64,
        behind: u32,
    },
    Loaded {
        sequence: u64,
        behind: u32,
        failed: bool,
    },
    Fork {
        parent: u64,
        child: u64,
    },
    Truncate {
        sequence: u64,
        keep: u32,
    },
    Rollback {
        sequence: u64,
        tokens: u32,
    },
    Trim {
        sequence: u64,
        room: u32,
    },
    Withdraw {
        sequence: u64,
    },
    Release {
        sequence: u64,
    },
    Close {
        sequence: u64,
    },
    Evict {
        blocks: Vec<BlockId>,
    },
    /// The device forgets what it has, the tiers do not.
    EvictAll,
    EvictHash {
        sequence: u64,
        index: usize,
    },
    Pin {
        pin: u64,
        sequence: u64,
        tokens: u32,
        until: Option<u64>,
    },
    PinHashes {
        pin: u64,
        sequence: u64,
        count: u32,
    },
    Unpin {
        pin: u64,
    },
    Expire {
        now: u64,
    },
    Quota {
        tenant: u32,
        share: u32,
        limit: u32,
    },
    /// A sequence offers what it has computed to the nearest tier.
    Computed {
        sequence: u64,
        behind: u32,
    },
    /// A sequence claims what it finds in the tiers.
    Fetch {
        sequence: u64,
        whole: bool,
    },
    Load {
        sequence: u64,
    },
    Flush {
        tier: u8,
        most: u32,
    },
    Progress {
        job: usize,
        made: u32,
    },
    /// A job ends: well, after so many copies, or with a bad copy.
    Finish {
        job: usize,
        end: u32,
        copy: u32,
    },
    /// What a sequence has is kept in the nearest tier, and it may give its room back.
    Swap {
        sequence: u64,
        behind: u32,
        release: bool,
    },
    /// A store that others fill says what it has of something it was asked about.
    Answer {
        question: usize,
        present: bool,
    },
    EndStep,
    /// All content is forgotten, by sequences that were closed before or by none.
    Reset {
        close: bool,
    },
    /// The process ends and begins again. What lies on disks is still there.
    Restart,
}

/// What a claim takes for computed.
#[derive(Clone, Debug)]
pub(crate) enum From {
    /// Where the sequence stands, or its hit.
    Usual,
    /// The same, and all known tokens behind it are new.
    Rest,
    /// The number in the claim, which is often nonsense.
    Claimed,
}

pub(crate) const SEQUENCES: u64 = 6;

pub(crate) fn shape() -> impl Strategy<Value = Shape> {
    let sizes = (1u32..5, prop::collection::vec(group(), 1..4), prop::option::weighted(0.25, 1u32..3));
    let retention = prop_oneof![
        2 => Just(Retention::Prompt),
        2 => Just(Retention::Dense),
        1 => (0u32..9).prop_map(|every| Retention::Every(TokenCount(every))),
    ];
    let rest = (
        prop_oneof![1 => 2u32..12, 5 => 12u32..60],
        prop::bool::weighted(0.9),
        any::<u64>(),
        prop_oneof![5 => Just(u32::MAX), 1 => 8u32..50],
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

pub(crate) fn call() -> impl Strategy<Value = Call> {
    let sequence = || 0..SEQUENCES;
    let reuse = prop_oneof![3 => Just(Reuse::ReadWrite), 1 => Just(Reuse::WriteOnly)];
    let external = prop_oneof![5 => Just(0u32), 1 => 1u32..20];
    let lookahead = prop_oneof![3 => Just(0u32), 1 => 0u32..6];
    let watermark = prop_oneof![4 => Just(0u32), 1 => 1u32..4];
    let claim = (0u32..40, external, 0u32..12, lookahead, any::<bool>(), watermark).prop_map(
        |(computed, external, new_tokens, lookahead, whole_sequence, watermark)| Claim {
            computed: TokenCount(computed),
            external: TokenCount(external),
            new_tokens: TokenCount(new_tokens),
            lookahead: TokenCount(lookahead),
            whole_sequence,
            watermark: BlockCount(watermark),
        },
    );
    let from = prop_oneof![7 => Just(From::Rest), 7 => Just(From::Usual), 2 => Just(From::Claimed)];
    let key = || prop_oneof![3 => Just(0), 2 => 1..KEYS.len()];
    let of_sequence = prop_oneof![
        2 => sequence().prop_map(|sequence| Call::Lookup { sequence }),
        1 => sequence().prop_map(|sequence| Call::Withdraw { sequence }),
        2 => sequence().prop_map(|sequence| Call::Release { sequence }),
        3 => sequence().prop_map(|sequence| Call::Close { sequence }),
        1 => (sequence(), 0u32..9).prop_map(|(sequence, tokens)| Call::Encoder { sequence, tokens }),
        1 => (sequence(), prop_oneof![Just("x"), Just("y")], 0u32..4)
            .prop_map(|(sequence, id, ahead)| Call::Media { sequence, id, ahead }),
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
        2 => (0u32..3, 0u32..20, prop_oneof![Just(u32::MAX), 0u32..60])
            .prop_map(|(tenant, share, limit)| Call::Quota { tenant, share, limit }),
    ];
    let of_tiers = prop_oneof![
        1 => (sequence(), 0u32..3).prop_map(|(sequence, behind)| Call::Computed { sequence, behind }),
        9 => (sequence(), any::<bool>()).prop_map(|(sequence, whole)| Call::Fetch { sequence, whole }),
        1 => sequence().prop_map(|sequence| Call::Load { sequence }),
        6 => (0u8..3, 0u32..6).prop_map(|(tier, most)| Call::Flush { tier, most }),
        1 => (0usize..4, 0u32..5).prop_map(|(job, made)| Call::Progress { job, made }),
        14 => (0usize..4, 0u32..6, 0u32..6).prop_map(|(job, end, copy)| Call::Finish { job, end, copy }),
        2 => (sequence(), 0u32..3, prop::bool::weighted(0.8))
            .prop_map(|(sequence, behind, release)| Call::Swap { sequence, behind, release }),
        5 => (0usize..6, prop::bool::weighted(0.8))
            .prop_map(|(question, present)| Call::Answer { question, present }),
    ];
    prop_oneof![
        14 => (sequence(), key(), 0u32..3, tokens(40))
            .prop_map(|(sequence, key, tenant, tokens)| Call::Serve { sequence, key, tenant, tokens }),
        5 => (sequence(), key(), 0u32..3, tokens(30), reuse)
            .prop_map(|(sequence, key, tenant, tokens, reuse)| Call::Open { sequence, key, tenant, tokens, reuse }),
        6 => (sequence(), tokens(6)).prop_map(|(sequence, tokens)| Call::Push { sequence, tokens }),
        14 => (sequence(), claim, from, prop::bool::weighted(0.9))
            .prop_map(|(sequence, claim, from, commit)| Call::Claim { sequence, claim, from, commit }),
        16 => of_sequence,
        1 => prop::collection::vec((0u32..60).prop_map(BlockId), 0..4).prop_map(|blocks| Call::Evict { blocks }),
        4 => Just(Call::EvictAll),
        3 => of_pins,
        18 => of_tiers,
        4 => Just(Call::EndStep),
        1 => prop::bool::weighted(0.2).prop_map(|close| Call::Reset { close }),
        1 => prop::bool::weighted(0.2).prop_map(|now| if now { Call::Restart } else { Call::EndStep }),
    ]
}

/// Token lists that often begin alike: counting up, then something else.
fn tokens(length_max: u32) -> impl Strategy<Value = Vec<TokenId>> {
    let alike = prop_oneof![Just(length_max), 0..length_max];
    (alike, 0..length_max, 0u32..3).prop_map(|(alike, length, other)| {
        (0..length).map(|index| if index < alike { index } else { 1000 * other + index }).collect()
    })
}
