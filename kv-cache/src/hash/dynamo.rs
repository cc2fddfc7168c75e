//! The hashes that NVIDIA Dynamo gives blocks (`dynamo-tokens` and `dynamo-kv-hashing` 1.6.1).
//!
//! ```text
//!  seed      = 1337 + XXH3-64(adapter name; 0) + XXH3-64(salt; 1)
//!  block     = XXH3-64(tokens, 4 bytes each; seed)
//!  hash 0    = block 0
//!  hash n    = XXH3-64(hash n-1 | block n; 1337)          all numbers little-endian
//! ```
//!
//! A block that an image overlaps spells each token in 13 bytes: `0 | token | eight zeroes`, or for a placeholder
//! `1 | its place in the image | the image's number`. An image's id is its number if it is one in decimal or, behind
//! `0x`, in hexadecimal; any other id is hashed with XXH3-64. Blocks with lookahead tokens hash these as well, as
//! Dynamo's router does for Eagle. Embeddings, for which Dynamo has no form, are appended.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{BlockHash, BlockHasher, Content, Extra, Media};
use crate::TokenId;

/// XXH3-64 as Dynamo's routers and block managers use it. A public, unkeyed hash of 64 bits: whoever wants to can make
/// two contents of one hash, so do not share such a cache between tenants that do not trust each other.
#[derive(Clone, Debug, Default)]
pub struct Dynamo {
    message: Vec<u8>,
}

const SEED: u64 = 1337;
const PLACEHOLDER: u8 = 1;
const TOKEN: u8 = 0;

impl Dynamo {
    /// A hasher under Dynamo's seed.
    pub fn new() -> Self {
        Dynamo::default()
    }

    /// The hash of a block by itself, which Dynamo's events carry beside the chained one.
    pub fn local(&mut self, content: &Content<'_>) -> u64 {
        let Dynamo { message } = self;
        message.clear();
        let extra = content.extra.copied().unwrap_or_default();
        let tokens = content.tokens.iter().chain(content.lookahead).copied();
        if extra.media.is_empty() {
            tokens.for_each(|token| message.extend_from_slice(&token.to_le_bytes()));
        } else {
            write_slots(tokens, &extra, message);
        }
        message.extend_from_slice(extra.embeds.map_or(&[][..], |digest| digest));
        xxh3_64_with_seed(message, seed(&extra))
    }
}

impl BlockHasher for Dynamo {
    type Digest = BlockHash<8>;

    fn block(&mut self, parent: Option<BlockHash<8>>, content: &Content<'_>) -> BlockHash<8> {
        let local = self.local(content);
        let Some(parent) = parent else { return BlockHash(local.to_be_bytes()) };
        let mut link = [0; 16];
        link[..8].copy_from_slice(&u64::from_be_bytes(parent.0).to_le_bytes());
        link[8..].copy_from_slice(&local.to_le_bytes());
        BlockHash(xxh3_64_with_seed(&link, SEED).to_be_bytes())
    }
}

/// An empty name or salt is none.
fn seed(extra: &Extra<'_>) -> u64 {
    let adapter = extra.adapter.map_or("", |adapter| adapter.name);
    let mut seed = SEED;
    for (text, inner) in [(adapter, 0), (extra.salt.unwrap_or_default(), 1)] {
        if !text.is_empty() {
            seed = seed.wrapping_add(xxh3_64_with_seed(text.as_bytes(), inner));
        }
    }
    seed
}

fn write_slots(tokens: impl Iterator<Item = TokenId>, extra: &Extra<'_>, message: &mut Vec<u8>) {
    for (place, token) in (u64::from(extra.first.0)..).zip(tokens) {
        let covers = |item: &&Media| u64::from(item.first.0) <= place && place < item.end();
        let (tag, small, large) = match extra.media.iter().find(covers) {
            None => (TOKEN, token, 0),
            Some(item) => (PLACEHOLDER, within(item, place), number(&item.id)),
        };
        message.push(tag);
        message.extend_from_slice(&small.to_le_bytes());
        message.extend_from_slice(&large.to_le_bytes());
    }
}

/// How far into its item a place is.
fn within(item: &Media, place: u64) -> u32 {
    u32::try_from(place - u64::from(item.first.0)).expect("an item has at most u32::MAX tokens")
}

fn number(id: &str) -> u64 {
    let number = match id.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => id.parse(),
    };
    number.unwrap_or_else(|_| xxh3_64(id.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hash::Adapter;
    use crate::{TokenCount, TokenIndex};

    fn chain(blocks: &[&[TokenId]]) -> Vec<u64> {
        let mut hasher = Dynamo::new();
        let mut parent = None;
        let mut next = |tokens: &&[TokenId]| {
            let hash = hasher.block(parent, &Content::plain(tokens));
            parent = Some(hash);
            u64::from_be_bytes(hash.0)
        };
        blocks.iter().map(&mut next).collect()
    }

    #[test]
    fn blocks_and_chains_have_the_values_that_dynamo_gives_them() {
        let mut hasher = Dynamo::new();
        let local = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
            .map(|tokens| hasher.local(&Content::plain(&tokens)));
        assert_eq!(local, [14_643_705_804_678_351_452, 16_777_012_769_546_811_212, 483_935_686_894_639_516]);
        assert_eq!(
            chain(&[&[1, 2, 3, 4], &[5, 6, 7, 8], &[9, 10, 11, 12]]),
            [14_643_705_804_678_351_452, 4_945_711_292_740_353_085, 12_583_592_247_330_656_132]
        );
        let tokens: Vec<TokenId> = (0..32).collect();
        assert_eq!(
            chain(&[&tokens[..16], &tokens[16..]]),
            [15_310_707_395_893_867_146, 13_769_157_705_258_532_664]
        );
        assert_eq!(hasher.local(&Content::plain(&tokens[16..])), 15_292_316_782_987_903_195);
    }

    #[test]
    fn its_router_agrees() {
        let tokens: Vec<TokenId> = (1..=40).collect();
        let mut hasher = Dynamo::new();
        assert_eq!(hasher.local(&Content::plain(&tokens[..16])), 0xea06_fc71_a5ee_6e88);
        assert_eq!(hasher.local(&Content::plain(&tokens[16..32])), 0x1fbf_39bd_106b_e0b5);
        assert_eq!(chain(&[&tokens[..16], &tokens[16..32]])[1], 0xad01_835a_37dd_294c);
        let adapter = Some(Adapter { name: "a", path: "ignored" });
        let extra = Extra { adapter, ..Extra::default() };
        let content = Content { extra: Some(&extra), ..Content::plain(&tokens[..16]) };
        assert_eq!(hasher.local(&content), 0xc224_4859_2bbb_4a4f);
    }

    #[test]
    fn an_image_is_spelled_slot_by_slot() {
        let media = [Media { id: "0xff".into(), first: TokenIndex(3), tokens: TokenCount(2) }];
        let extra = Extra { media: &media, first: TokenIndex(4), ..Extra::default() };
        let content = Content { extra: Some(&extra), ..Content::plain(&[8, 9]) };
        let mut message = vec![1, 1, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0];
        message.extend([0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Dynamo::new().local(&content), xxh3_64_with_seed(&message, SEED));
        assert_eq!((number("17"), number("cat")), (17, xxh3_64(b"cat")));
    }
}
