//! Indexers that know of the cache what its events tell, and nothing else, find for every prompt what the cache finds:
//! one of vLLM's kind, one of Dynamo's, and one that keeps names of its own. Prompts differ in tokens, adapter, salt,
//! images and embeddings.

#![expect(clippy::unwrap_used, reason = "a test may fail where it stands")]

use std::collections::{BTreeMap, BTreeSet};

use quayline_kv_cache::hash::{Blake3, Dynamo, Encoding, Sha256, Vllm};
use quayline_kv_cache::*;

const SIZE: u32 = 4;

fn unit() -> BlockSize {
    BlockSize::new(SIZE).unwrap()
}

fn config() -> Config {
    Config { events_max: 1000, ..Config::new(unit(), BlockCount(30)) }
}

fn image(id: &str, first: u32, tokens: u32) -> Media {
    Media { id: id.into(), first: TokenIndex(first), tokens: TokenCount(tokens) }
}

/// Everything that prompts of equal tokens can differ in.
fn keys<T>(see: impl FnOnce(&[SequenceKey<'_>]) -> T) -> T {
    let plain = SequenceKey::default();
    let adapter = |name, path| Some(Adapter { name, path });
    see(&[
        plain,
        SequenceKey { adapter: adapter("sql", "v1"), ..plain },
        SequenceKey { adapter: adapter("law", "v1"), ..plain },
        SequenceKey { salt: Some("tenant"), ..plain },
        SequenceKey { salt: Some("tenant"), adapter: adapter("sql", "v1"), ..plain },
        SequenceKey { media: &[image("cat", 2, 5)], ..plain },
        SequenceKey { media: &[image("cat", 2, 5), image("dog", 7, 2)], ..plain },
        SequenceKey { media: &[image("dog", 2, 5)], salt: Some("tenant"), ..plain },
        SequenceKey { embeds: Some(&[[1; 32], [2; 32], [3; 32]]), ..plain },
        SequenceKey { embeds: Some(&[[1; 32], [2; 32], [4; 32]]), ..plain },
    ])
}

/// Computes a prompt and forgets the sequence; its blocks stay cached.
fn serve<H: BlockHasher>(cache: &mut KvCache<H>, key: SequenceKey<'_>, tokens: &[TokenId]) {
    let id = SequenceId(1);
    cache.open(id, key, tokens, Reuse::ReadWrite).unwrap();
    let computed = cache.lookup(id).unwrap().tokens;
    let new_tokens = TokenCount(u32::try_from(tokens.len()).unwrap() - computed.get());
    let Admission::Admit(room) =
        cache.reserve(id, Claim { computed, new_tokens, ..Claim::default() }).unwrap()
    else {
        unreachable!("there is room for every prompt");
    };
    room.commit();
    cache.close(id).unwrap();
}

/// What the cache would find of a prompt.
fn hit<H: BlockHasher>(cache: &mut KvCache<H>, key: SequenceKey<'_>, tokens: &[TokenId]) -> u32 {
    let id = SequenceId(2);
    cache.open(id, key, tokens, Reuse::ReadWrite).unwrap();
    let hit = cache.lookup(id).unwrap().tokens.get();
    cache.close(id).unwrap();
    hit
}

/// A prompt as a router has it: what an event would tell of all its tokens but the last, which is computed in any case.
fn asked<'a, D>(key: SequenceKey<'a>, tokens: &'a [TokenId]) -> Stored<'a, D> {
    let (tokens, lookahead) = (&tokens[..tokens.len() - 1], &[][..]);
    let (first, group, location) = (TokenIndex(0), GroupId(0), Location::Device);
    Stored { blocks: &[], parent: None, tokens, lookahead, first, group, location, sequence: None, key }
}

/// Who hears events and is asked where a prompt's beginning is.
trait Indexer<H: BlockHasher> {
    fn hear(&mut self, cache: &mut KvCache<H>);
    /// How many blocks of a prompt it knows to be there.
    fn longest(&mut self, key: SequenceKey<'_>, tokens: &[TokenId]) -> usize;
}

/// Prompts that begin alike and go on apart.
fn prompts() -> impl Iterator<Item = Vec<TokenId>> {
    [13, 8, 17].into_iter().flat_map(|length| {
        [0, 1].map(|other| (0..length).map(|at| if at < 9 { at } else { at + 100 * other }).collect())
    })
}

/// Serves prompts under every key, and compares after each what the indexer finds of all of them.
fn play<H: BlockHasher>(cache: &mut KvCache<H>, indexer: &mut impl Indexer<H>) {
    let mut found = BTreeSet::new();
    keys(|keys| {
        for (round, tokens) in prompts().enumerate() {
            for (which, &key) in keys.iter().enumerate().filter(|(which, _)| (which + round) % 3 > 0) {
                serve(cache, key, &tokens);
                if (which, round) == (6, 2) {
                    assert!(cache.reset());
                }
                indexer.hear(cache);
                for &key in keys {
                    let blocks = hit(cache, key, &tokens) / SIZE;
                    assert_eq!(indexer.longest(key, &tokens), blocks as usize, "{tokens:?} with {key:?}");
                    found.insert(blocks);
                }
            }
        }
    });
    assert!(cache.stats().evictions > 0, "content was lost");
    assert_eq!(found, [0, 1, 2, 3, 4].into(), "some prompts were found in part");
}

/// By the last 64 bits of vLLM's names, and by group: what [`EventBatch`] sends.
#[derive(Default)]
struct VllmIndexer(BTreeSet<(u64, GroupId)>);

impl Indexer<Vllm<32>> for VllmIndexer {
    fn hear(&mut self, cache: &mut KvCache<Vllm<32>>) {
        let VllmIndexer(known) = self;
        cache.drain_events(|_, event| match event {
            Event::Stored(stored) => {
                known.extend(stored.blocks.iter().map(|block| (block.low64(), stored.group)));
            }
            Event::Removed { block, group, .. } => assert!(known.remove(&(block.low64(), group))),
            Event::Cleared { .. } => known.clear(),
            Event::Moved { .. } => unreachable!("there are no tiers"),
        });
    }

    fn longest(&mut self, key: SequenceKey<'_>, tokens: &[TokenId]) -> usize {
        let names = asked::<()>(key, tokens).names(&mut Vllm::sha256(Encoding::Cbor), None, unit());
        names.iter().take_while(|name| self.0.contains(&(name.low64(), GroupId(0)))).count()
    }
}

#[test]
fn an_indexer_of_vllms_kind_finds_what_the_cache_finds() {
    let mut cache = KvCache::with(config(), Vllm::sha256(Encoding::Cbor), Lru::new).unwrap();
    play(&mut cache, &mut VllmIndexer::default());
}

/// Dynamo's router keeps for each block the engine's name, by which it is removed, beside the hash of its content
/// alone, by which prompts are looked up (`KvCacheStoredBlockData`: `block_hash`, `tokens_hash`).
#[derive(Default)]
struct DynamoIndexer {
    /// By the engine's name: the engine's name of the parent, and the content.
    blocks: BTreeMap<u64, (Option<u64>, u64)>,
}

fn tokens_hashes<D>(stored: &Stored<'_, D>) -> Vec<u64> {
    let mut hashes = Vec::new();
    stored.contents(unit(), |content| hashes.push(Dynamo::new().local(content)));
    hashes
}

impl Indexer<Sha256> for DynamoIndexer {
    fn hear(&mut self, cache: &mut KvCache<Sha256>) {
        cache.drain_events(|_, event| match event {
            Event::Stored(stored) => {
                let mut parent = stored.parent.map(|parent| parent.low64());
                for (block, tokens_hash) in stored.blocks.iter().zip(tokens_hashes(&stored)) {
                    assert!(self.blocks.insert(block.low64(), (parent, tokens_hash)).is_none());
                    parent = Some(block.low64());
                }
            }
            Event::Removed { block, .. } => assert!(self.blocks.remove(&block.low64()).is_some()),
            Event::Cleared { .. } => self.blocks.clear(),
            Event::Moved { .. } => unreachable!("there are no tiers"),
        });
    }

    fn longest(&mut self, key: SequenceKey<'_>, tokens: &[TokenId]) -> usize {
        let mut parent = None;
        let mut is_there = |&tokens_hash: &u64| {
            let child = self.blocks.iter().find(|(_, told)| **told == (parent, tokens_hash));
            parent = child.map(|(&name, _)| name);
            parent.is_some()
        };
        tokens_hashes(&asked::<()>(key, tokens)).iter().take_while(|hash| is_there(hash)).count()
    }
}

#[test]
fn an_indexer_of_dynamos_kind_finds_what_the_cache_finds() {
    let mut cache = KvCache::with(config(), Sha256::new([7; 32]), Lru::new).unwrap();
    play(&mut cache, &mut DynamoIndexer::default());
}

/// Keeps names of its own, under a key that the cache does not know. Often it hears too late, and begins anew.
#[derive(Default)]
struct LateIndexer {
    next: u64,
    /// By the cache's names.
    own: BTreeMap<BlockHash, BlockHash<32>>,
    holes: u32,
}

impl LateIndexer {
    fn hasher() -> Blake3 {
        Blake3::new([3; 32])
    }

    fn store(&mut self, stored: &Stored<'_, BlockHash>) {
        let parent = stored.parent.map(|parent| self.own[&parent]);
        let names = stored.names(&mut Self::hasher(), parent, unit());
        self.own.extend(stored.blocks.iter().copied().zip(names));
    }
}

impl Indexer<Xxh3> for LateIndexer {
    fn hear(&mut self, cache: &mut KvCache) {
        let mut is_whole = true;
        cache.drain_events(|number, event| {
            is_whole &= number == self.next;
            if !is_whole {
                return;
            }
            self.next += 1;
            match event {
                Event::Stored(stored) => self.store(&stored),
                Event::Removed { block, .. } => assert!(self.own.remove(&block).is_some()),
                Event::Cleared { .. } => self.own.clear(),
                Event::Moved { .. } => unreachable!("there are no tiers"),
            }
        });
        if !is_whole {
            let snapshot = cache.snapshot().unwrap();
            *self = LateIndexer { next: snapshot.next_event(), holes: self.holes + 1, ..Self::default() };
            snapshot.stored().for_each(|stored| self.store(&stored));
        }
    }

    fn longest(&mut self, key: SequenceKey<'_>, tokens: &[TokenId]) -> usize {
        let known: BTreeSet<_> = self.own.values().collect();
        let names = asked::<()>(key, tokens).names(&mut Self::hasher(), None, unit());
        names.iter().take_while(|name| known.contains(name)).count()
    }
}

#[test]
fn an_indexer_that_heard_too_late_finds_what_the_cache_finds() {
    let mut cache = KvCache::new(Config { events_max: 3, ..config() }).unwrap();
    let mut indexer = LateIndexer::default();
    play(&mut cache, &mut indexer);
    assert!(indexer.holes > 1, "{}", indexer.holes);
}
