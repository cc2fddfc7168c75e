//! XXH3-128 under a seed: the default, because it is fast.

use xxhash_rust::const_xxh3::const_custom_default_secret;
use xxhash_rust::xxh3::{xxh3_128_with_secret, xxh3_128_with_seed};

use super::message::Chained;
use super::{BlockHash, BlockHasher, Content};
use crate::TokenId;

/// XXH3-128, keyed by a seed, about 19 ns a block of 16 tokens. Not cryptographic: where tenants do not trust each
/// other, keep the seed random and secret and give each its salt.
#[derive(Clone, Debug)]
pub struct Xxh3 {
    key: Key,
    chained: Chained<16>,
}

#[derive(Clone, Copy, Debug)]
struct Key {
    seed: u64,
    /// What XXH3 derives from the seed for every message longer than [`LONG`]; derived once.
    secret: [u8; 192],
}

/// Up to this many bytes XXH3 works from the seed, beyond from the secret (xxHash specification, XXH3).
const LONG: usize = 240;

/// Tokens in most people's blocks. Their message has a length that the compiler knows.
const USUAL: usize = 16;

impl Xxh3 {
    /// A hasher under `seed`. Processes that are to agree on hashes share it.
    pub fn new(seed: u64) -> Self {
        let key = Key { seed, secret: const_custom_default_secret(seed) };
        Xxh3 { key, chained: Chained::new(|message| key.digest(message)) }
    }
}

impl Key {
    #[inline]
    fn digest(&self, message: &[u8]) -> [u8; 16] {
        let hash = if message.len() <= LONG {
            xxh3_128_with_seed(message, self.seed)
        } else {
            xxh3_128_with_secret(message, &self.secret)
        };
        hash.to_be_bytes()
    }

    /// The same for a message of known length, whose bytes need not be gathered in memory first.
    #[inline(always)]
    fn usual(&self, parent: BlockHash, tokens: &[TokenId; USUAL]) -> [u8; 16] {
        let mut message = [0; 16 + 4 * USUAL];
        let (head, body) = message.split_at_mut(16);
        head.copy_from_slice(parent.bytes());
        for (bytes, token) in body.as_chunks_mut::<4>().0.iter_mut().zip(tokens) {
            *bytes = token.to_le_bytes();
        }
        self.digest(&message)
    }
}

impl BlockHasher for Xxh3 {
    type Digest = BlockHash<16>;

    #[inline]
    fn block(&mut self, parent: Option<BlockHash>, content: &Content<'_>) -> BlockHash {
        let Xxh3 { key, chained } = self;
        if let (Some(parent), true, Ok(tokens)) = (parent, content.is_plain(), content.tokens.try_into()) {
            return BlockHash(key.usual(parent, tokens));
        }
        chained.block(parent, content, |message| key.digest(message))
    }

    fn run(&mut self, tokens: &[TokenId], unit: usize, hashes: &mut Vec<BlockHash>) {
        for tokens in tokens.chunks_exact(unit) {
            let hash = match (hashes.last(), tokens.try_into()) {
                (Some(&parent), Ok(tokens)) => BlockHash(self.key.usual(parent, tokens)),
                (parent, _) => self.block(parent.copied(), &Content::plain(tokens)),
            };
            hashes.push(hash);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::{Adapter, EmbedsDigest, Extra, Media};
    use crate::{TokenCount, TokenIndex};

    #[test]
    fn what_adds_nothing_to_a_block_does_not_change_its_hash() {
        let mut hasher = Xxh3::new(7);
        let nothing = Extra { first: TokenIndex(16), ..Extra::default() };
        for parent in [None, Some(BlockHash([1; 16]))] {
            let plain = Content::plain(&[1, 2, 3]);
            let beside = Content { extra: Some(&nothing), ..plain };
            assert_eq!(hasher.block(parent, &beside), hasher.block(parent, &plain));
        }
    }

    #[test]
    fn every_part_of_the_content_changes_the_hash() {
        let adapter = |name, path| Extra { adapter: Some(Adapter { name, path }), ..Extra::default() };
        let media = |id: &str, first| vec![Media { id: id.into(), first, tokens: TokenCount(3) }];
        let (near, far, other) =
            (media("a", TokenIndex(1)), media("a", TokenIndex(2)), media("b", TokenIndex(1)));
        let (black, white): (EmbedsDigest, EmbedsDigest) = ([0; 32], [255; 32]);
        let extras = [
            None,
            Some(Extra { salt: Some(""), ..Extra::default() }),
            Some(Extra { salt: Some("a"), ..Extra::default() }),
            Some(adapter("a", "")),
            Some(adapter("", "a")),
            Some(Extra { media: &near, ..Extra::default() }),
            Some(Extra { media: &far, ..Extra::default() }),
            Some(Extra { media: &other, ..Extra::default() }),
            Some(Extra { embeds: Some(&black), ..Extra::default() }),
            Some(Extra { embeds: Some(&white), ..Extra::default() }),
        ];
        let mut hashes = Vec::new();
        for seed in [1, 2] {
            let mut hasher = Xxh3::new(seed);
            for extra in &extras {
                let content = Content { extra: extra.as_ref(), ..Content::plain(&[1, 2, 3, 4]) };
                let first = hasher.block(None, &content);
                hashes.extend([
                    first,
                    hasher.block(None, &Content { tokens: &[1, 2, 3, 5], ..content }),
                    hasher.block(None, &Content { lookahead: &[5], ..content }),
                    hasher.block(None, &Content { lookahead: &[6], ..content }),
                    hasher.block(Some(first), &content),
                ]);
            }
        }
        let all = hashes.len();
        hashes.sort();
        hashes.dedup();
        assert_eq!(hashes.len(), all);
    }

    #[test]
    fn the_same_input_names_the_same_block_on_every_machine() {
        let mut hasher = Xxh3::new(42);
        let root = xxh3_128_with_seed(&[0; 27], 42).to_be_bytes();
        let long: Vec<u32> = (7..107).collect();
        for (tokens, parent) in [(&long[..4], None), (&long[..16], Some(BlockHash(root))), (&long, None)] {
            let message: Vec<u8> =
                root.into_iter().chain(tokens.iter().flat_map(|token| token.to_le_bytes())).collect();
            let hash = hasher.block(parent, &Content::plain(tokens));
            assert_eq!(
                hash.bytes(),
                &xxh3_128_with_seed(&message, 42).to_be_bytes(),
                "{} tokens",
                tokens.len()
            );
        }
    }
}
