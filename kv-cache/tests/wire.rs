//! What vLLM would put on the wire, to the byte: `wire/golden.txt` was written by vLLM's encoder (`wire/golden.py`).

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use quayline_kv_cache::hash::Vllm;
use quayline_kv_cache::tier::{Medium, TierId};
use quayline_kv_cache::*;

const GPU: Location = Location::Device;
const CPU: Location = Location::Tier { tier: TierId(0), medium: Medium::Host };
const DISK: Location = Location::Tier { tier: TierId(1), medium: Medium::Disk };
const REMOTE: Location = Location::Tier { tier: TierId(2), medium: Medium::Remote };

fn size(tokens: u32) -> BlockSize {
    BlockSize::new(tokens).unwrap()
}

/// A digest of sixteen bytes that count up.
fn name(first: u8) -> BlockHash {
    BlockHash(std::array::from_fn(|index| first + u8::try_from(index).unwrap()))
}

fn stored<'a>(blocks: &'a [BlockHash], tokens: &'a [TokenId]) -> Stored<'a, BlockHash> {
    let (first, group, key) = (TokenIndex(0), GroupId(0), SequenceKey::default());
    Stored { blocks, parent: None, tokens, lookahead: &[], first, group, location: GPU, sequence: None, key }
}

fn removed<'a>(first: u8, location: Location) -> Event<'a, BlockHash> {
    Event::Removed { block: name(first), group: GroupId(0), location }
}

fn taken<D: Digest>(
    unit: u32,
    names: BlockNames,
    events: &[Event<'_, D>],
    seconds: f64,
    rank: Option<u32>,
) -> Vec<u8> {
    let mut batch = EventBatch::new(size(unit), names);
    (0..).zip(events).for_each(|(number, event)| batch.add(number, event));
    assert!(batch.is_whole());
    let taken = batch.take(seconds, rank).unwrap();
    assert_eq!((batch.len(), batch.take(seconds, rank)), (0, None));
    taken
}

/// As most of the golden batches are made.
fn sent(unit: u32, events: &[Event<'_, BlockHash>]) -> Vec<u8> {
    taken(unit, BlockNames::Low64, events, 1.5, Some(0))
}

fn golden(title: &str) -> String {
    let line = include_str!("wire/golden.txt").lines().find_map(|line| line.strip_prefix(title));
    line.unwrap().strip_prefix(": ").unwrap().to_owned()
}

fn compare(title: &str, sent: &[u8]) {
    let sent: String = sent.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(sent, golden(title), "{title}");
}

#[test]
fn plain_blocks_and_ranks() {
    let blocks = [name(0), name(240)];
    compare("plain", &sent(4, &[Event::Stored(stored(&blocks, &[1, 2, 3, 4, 5, 6, 7, 8]))]));
    compare("without a rank", &taken(4, BlockNames::Low64, &[removed(16, GPU)], 1_700_000_000.25, None));
    let group = Event::Removed { block: name(16), group: GroupId(200), location: GPU };
    compare("a rank of two bytes", &taken(4, BlockNames::Low64, &[group], 0.0, Some(300)));
}

fn item(id: &str, first: u32, tokens: u32) -> Media {
    Media { id: id.into(), first: TokenIndex(first), tokens: TokenCount(tokens) }
}

#[test]
fn everything_that_a_name_covers() {
    let blocks = [16, 32, 48, 64].map(name);
    let media = [item("aaa", 11, 10), item("bbb", 30, 18), item("ccc", 48, 7)];
    let adapter = Some(Adapter { name: "sql", path: "/adapters/sql" });
    let key = SequenceKey { adapter, salt: Some("salt1"), media: &media, ..SequenceKey::default() };
    let tokens: Vec<TokenId> = (0..64).collect();
    let images = Stored { key, group: GroupId(3), ..stored(&blocks, &tokens) };
    // The fourth and fifth block of a sequence that is given as embeddings.
    let digests = [[9; 32], [9; 32], [9; 32], [1; 32], [2; 32]];
    let key = SequenceKey { embeds: Some(&digests), ..SequenceKey::default() };
    let tokens = [1, 24, 127, 128, 255, 256, 70_000, u32::MAX];
    let first = TokenIndex(12);
    let embeds = Stored { key, parent: Some(name(240)), first, ..stored(&blocks[..2], &tokens) };
    let events = [Event::Stored(images), Event::Stored(embeds)];
    // The first of them is hashed in units of its blocks just as well.
    for (title, names) in [("numbers", BlockNames::Low64), ("bytes", BlockNames::Whole)] {
        compare(title, &taken(4, names, &events, 1.5, Some(0)));
    }
}

#[test]
fn tokens_ahead() {
    let blocks = [name(0), name(16)];
    let ahead = Stored { lookahead: &[900, 901], ..stored(&blocks, &[1, 2, 3, 4]) };
    compare("lookahead", &sent(2, &[Event::Stored(ahead)]));
}

#[test]
fn tiers_are_media_and_moves_within_one_are_no_news() {
    let blocks = [name(0)];
    let host = Stored {
        location: CPU,
        parent: Some(name(16)),
        first: TokenIndex(4),
        ..stored(&blocks, &[1, 2, 3, 4])
    };
    let moved = |from, to| Event::Moved { block: name(0), group: GroupId(0), from, to };
    let events = [
        Event::Stored(host),
        Event::Stored(Stored { location: DISK, ..stored(&blocks, &[]) }),
        moved(CPU, DISK),
        moved(DISK, REMOTE),
        removed(0, REMOTE),
    ];
    compare("tiers", &sent(4, &events));
}

#[test]
fn long_batches_and_names() {
    let (blocks, adapter) = ([name(0)], "l".repeat(40));
    let adapter = Some(Adapter { name: &adapter, path: "" });
    let key = SequenceKey { adapter, ..SequenceKey::default() };
    let mut events = vec![Event::Stored(Stored { key, ..stored(&blocks, &[7]) })];
    events.resize(17, removed(0, GPU));
    compare("seventeen events and a long name", &sent(1, &events));
}

/// Names blocks as the golden file does: each begins sixteen behind the one before.
#[derive(Clone, Debug)]
struct Counting;

impl BlockHasher for Counting {
    type Digest = BlockHash;

    fn block(&mut self, parent: Option<BlockHash>, _: &Content<'_>) -> BlockHash {
        parent.map_or(name(0), |parent| name(parent.0[0] + 16))
    }
}

fn compute<H: BlockHasher>(cache: &mut KvCache<H>, id: SequenceId, tokens: &[TokenId]) {
    cache.open(id, SequenceKey::default(), tokens, Reuse::ReadWrite).unwrap();
    let computed = cache.lookup(id).unwrap().tokens;
    let new_tokens = TokenCount(u32::try_from(tokens.len()).unwrap() - computed.get());
    let claim = Claim { computed, new_tokens, ..Claim::default() };
    let Admission::Admit(room) = cache.reserve(id, claim).unwrap() else { unreachable!("there is room") };
    room.commit();
    cache.close(id).unwrap();
}

#[test]
fn what_has_no_word_is_told_anew() {
    let config = Config { events_max: 3, ..Config::new(size(2), BlockCount(9)) };
    let mut cache = KvCache::with(config, Counting, Lru::new).unwrap();
    let mut batch = EventBatch::new(cache.config().hash_unit(), BlockNames::Low64);
    let hear = |cache: &mut KvCache<Counting>, batch: &mut EventBatch| {
        cache.drain_events(|number, event| batch.add(number, &event));
        batch.is_whole()
    };
    compute(&mut cache, SequenceId(1), &[1, 2, 3, 4, 5]);
    assert!(hear(&mut cache, &mut batch));
    let first = batch.take(1.5, Some(0)).unwrap();

    // Cleared: what there was is forgotten, what was stored since is told.
    assert!(cache.reset());
    compute(&mut cache, SequenceId(2), &[1, 2, 3, 4, 5]);
    assert!(!hear(&mut cache, &mut batch));
    batch.begin_anew(&cache.snapshot().unwrap());
    compare("anew", &batch.take(1.5, Some(0)).unwrap());

    // A message was lost: the next one does not count on it.
    batch.lose();
    assert!(!hear(&mut cache, &mut batch));
    batch.begin_anew(&cache.snapshot().unwrap());
    compare("anew", &batch.take(1.5, Some(0)).unwrap());

    // Nobody listened for more events than are kept.
    for round in 0..3 {
        assert!(cache.reset());
        compute(&mut cache, SequenceId(3 + round), &[1, 2, 3, 4, 5]);
    }
    assert!(!hear(&mut cache, &mut batch));
    batch.begin_anew(&cache.snapshot().unwrap());
    compare("anew", &batch.take(1.5, Some(0)).unwrap());
    assert!(hear(&mut cache, &mut batch), "and goes on from there");
    assert_ne!(first, Vec::new());
}

#[test]
fn vllm_s_own_names_go_out_as_vllm_s() {
    // SHA-256 of CBOR: the last 64 bits, as vLLM sends them.
    let config = Config { events_max: 9, ..Config::new(size(2), BlockCount(9)) };
    let mut cache = KvCache::with(config, Vllm::sha256(hash::Encoding::Cbor), Lru::new).unwrap();
    compute(&mut cache, SequenceId(1), &[1, 2, 3]);
    let name = cache.snapshot().unwrap().stored().next().unwrap().blocks[0];
    let mut batch = EventBatch::new(size(2), BlockNames::Low64);
    cache.drain_events(|number, event| batch.add(number, &event));
    let sent = batch.take(1.5, Some(0)).unwrap();
    let number = [&[0x91, 0xcf][..], &name.bytes()[24..]].concat();
    assert!(sent.windows(number.len()).any(|span| span == number), "{sent:02x?}");
}
