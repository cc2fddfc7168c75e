//! The hashes that vLLM computes for its blocks, byte for byte (as of 0.33, `vllm/v1/core/kv_cache_utils.py`).
//!
//! A block's hash is that of `(parent, (token, ...), extra)`, encoded as CBOR or as a pickle. The parent of a first
//! block is the hash of a text, by default `vllm-none-hash`. `extra` is None or a tuple of, in this order,
//!
//! | key | when |
//! |---|---|
//! | `("lora", name, path)` | the sequence has an adapter |
//! | `("mm", id, offset)` | for each item that overlaps the block; the offset counts from the block's beginning |
//! | `("cache_salt", salt)` | first block, if the salt is not empty |
//! | `("prompt_embeds", digest)` | the sequence is given as embeddings |
//!
//! With lookahead tokens `extra` becomes `(extra, token, ...)`, and its items are those that overlap the block or
//! these tokens.

use std::fmt;

use super::cbor::Cbor;
use super::pickle::Pickle;
use super::{BlockHash, BlockHasher, Content, Extra};

/// How a block is spelled before it is hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// Python's pickle, protocol 5: vLLM's default.
    Pickle,
    /// Canonical CBOR: vLLM's `_cbor` algorithms.
    Cbor,
}

/// Hashes blocks as vLLM does under `--prefix-caching-hash-algo`.
#[derive(Clone)]
pub struct Vllm<const BYTES: usize> {
    encoder: Encoder,
    digest: fn(&[u8]) -> BlockHash<BYTES>,
    /// The parent of a first block.
    none: BlockHash<BYTES>,
}

/// The text whose hash stands before every first block unless `PYTHONHASHSEED` is set.
#[cfg(feature = "sha2")]
const SEED: &str = "vllm-none-hash";

#[cfg(feature = "sha2")]
impl Vllm<32> {
    /// Algorithm `sha256` (pickle) or `sha256_cbor`.
    pub fn sha256(encoding: Encoding) -> Self {
        Vllm::sha256_with_seed(encoding, SEED)
    }

    /// The same in a cluster whose `PYTHONHASHSEED` is `seed`.
    pub fn sha256_with_seed(encoding: Encoding, seed: &str) -> Self {
        use sha2::Digest as _;
        Vllm::new(encoding, seed, |bytes| BlockHash(sha2::Sha256::digest(bytes).into()))
    }
}

impl Vllm<16> {
    /// Algorithm `xxhash` (pickle) or `xxhash_cbor`, where `PYTHONHASHSEED` is `seed`. Without that variable vLLM
    /// draws a random seed for these two, and nobody else can know its hashes.
    pub fn xxhash(encoding: Encoding, seed: &str) -> Self {
        Vllm::new(encoding, seed, |bytes| BlockHash(xxhash_rust::xxh3::xxh3_128(bytes).to_be_bytes()))
    }
}

impl<const BYTES: usize> Vllm<BYTES> {
    fn new(encoding: Encoding, seed: &str, digest: fn(&[u8]) -> BlockHash<BYTES>) -> Self {
        let mut encoder = match encoding {
            Encoding::Pickle => Encoder::Pickle(Pickle::default()),
            Encoding::Cbor => Encoder::Cbor(Cbor::default()),
        };
        let none = digest(match &mut encoder {
            Encoder::Pickle(pickle) => alone(pickle, seed),
            Encoder::Cbor(cbor) => alone(cbor, seed),
        });
        Vllm { encoder, digest, none }
    }

    /// What a first block has for a parent.
    pub const fn none_hash(&self) -> BlockHash<BYTES> {
        self.none
    }
}

impl<const BYTES: usize> BlockHasher for Vllm<BYTES> {
    type Digest = BlockHash<BYTES>;

    fn block(&mut self, parent: Option<BlockHash<BYTES>>, content: &Content<'_>) -> BlockHash<BYTES> {
        let is_first = parent.is_none();
        let parent = parent.unwrap_or(self.none);
        (self.digest)(match &mut self.encoder {
            Encoder::Pickle(pickle) => block(pickle, parent.bytes(), content, is_first),
            Encoder::Cbor(cbor) => block(cbor, parent.bytes(), content, is_first),
        })
    }
}

impl<const BYTES: usize> fmt::Debug for Vllm<BYTES> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encoding = match self.encoder {
            Encoder::Pickle(_) => Encoding::Pickle,
            Encoder::Cbor(_) => Encoding::Cbor,
        };
        f.debug_struct("Vllm").field("encoding", &encoding).field("none", &self.none).finish()
    }
}

#[derive(Clone)]
enum Encoder {
    Pickle(Pickle),
    Cbor(Cbor),
}

/// Writes one value of nested sequences. The bytes are kept as scratch from value to value.
pub(super) trait Encode {
    fn begin(&mut self);
    /// Begins a sequence of so many items ...
    fn open(&mut self, items: usize);
    /// ... and ends it.
    fn close(&mut self, items: usize);
    fn bytes(&mut self, bytes: &[u8]);
    fn text(&mut self, text: &str);
    /// A text that is a literal in vLLM's source.
    fn tag(&mut self, tag: &'static str);
    fn integer(&mut self, integer: i64);
    fn none(&mut self);
    fn end(&mut self) -> &[u8];
}

fn alone<'a>(encoder: &'a mut impl Encode, text: &str) -> &'a [u8] {
    encoder.begin();
    encoder.text(text);
    encoder.end()
}

fn block<'a>(encoder: &'a mut impl Encode, parent: &[u8], content: &Content<'_>, is_first: bool) -> &'a [u8] {
    encoder.begin();
    encoder.open(3);
    encoder.bytes(parent);
    encoder.open(content.tokens.len());
    content.tokens.iter().for_each(|&token| encoder.integer(token.into()));
    encoder.close(content.tokens.len());
    if content.lookahead.is_empty() {
        write_extra(encoder, content.extra, is_first);
    } else {
        encoder.open(1 + content.lookahead.len());
        write_extra(encoder, content.extra, is_first);
        content.lookahead.iter().for_each(|&token| encoder.integer(token.into()));
        encoder.close(1 + content.lookahead.len());
    }
    encoder.close(3);
    encoder.end()
}

fn write_extra(encoder: &mut impl Encode, extra: Option<&Extra<'_>>, is_first: bool) {
    let extra = extra.copied().unwrap_or_default();
    let salt = extra.salt.filter(|salt| is_first && !salt.is_empty());
    let keys = usize::from(extra.adapter.is_some())
        + extra.media.len()
        + usize::from(salt.is_some())
        + usize::from(extra.embeds.is_some());
    if keys == 0 {
        return encoder.none();
    }
    encoder.open(keys);
    if let Some(adapter) = extra.adapter {
        encoder.open(3);
        encoder.tag("lora");
        encoder.text(adapter.name);
        encoder.text(adapter.path);
        encoder.close(3);
    }
    for item in extra.media {
        encoder.open(3);
        encoder.tag("mm");
        encoder.text(&item.id);
        encoder.integer(item.offset_from(extra.first));
        encoder.close(3);
    }
    if let Some(salt) = salt {
        encoder.open(2);
        encoder.tag("cache_salt");
        encoder.text(salt);
        encoder.close(2);
    }
    if let Some(digest) = extra.embeds {
        encoder.open(2);
        encoder.tag("prompt_embeds");
        encoder.bytes(digest);
        encoder.close(2);
    }
    encoder.close(keys);
}

#[cfg(all(test, feature = "sha2"))]
mod tests {
    use super::*;
    use crate::hash::{Adapter, Media};
    use crate::{TokenCount, TokenId, TokenIndex};

    const FIRST: [TokenId; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

    fn both() -> [Vllm<32>; 2] {
        [Vllm::sha256(Encoding::Pickle), Vllm::sha256(Encoding::Cbor)]
    }

    /// What vLLM says, as a pickle and as CBOR. Computed with Python's own pickle and hashlib.
    #[track_caller]
    fn is(content: Content<'_>, expected: [&str; 2]) {
        let hashes = both().map(|mut vllm| vllm.block(None, &content).to_string());
        assert_eq!(hashes, expected);
    }

    #[track_caller]
    fn is_with(extra: Extra<'_>, expected: [&str; 2]) {
        is(Content { extra: Some(&extra), ..Content::plain(&FIRST) }, expected);
    }

    fn media(id: &str, first: u32, tokens: u32) -> Media {
        Media { id: id.into(), first: TokenIndex(first), tokens: TokenCount(tokens) }
    }

    #[test]
    fn plain_blocks_chain_from_the_hash_of_a_text() {
        let none = both().map(|vllm| vllm.none_hash().to_string());
        assert_eq!(
            none,
            [
                "066b1e8987e027138e98701c46128929378935f9b6cd1549105ae6b4f0d71198",
                "9bd96a485ad84efdafb72ee48a1d7a69bcead0f8f0433173941b276b9581eef0"
            ]
        );
        is(
            Content::plain(&FIRST),
            [
                "fe8fa5dda3210d0ca2031e37cbe3b001186773cd1c710beb2d45fcb51d434798",
                "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
            ],
        );
        let second: Vec<TokenId> = (16..32).collect();
        let chained = both().map(|mut vllm| {
            let parent = vllm.block(None, &Content::plain(&FIRST));
            vllm.block(Some(parent), &Content::plain(&second)).to_string()
        });
        assert_eq!(
            chained,
            [
                "8be7aaa33831156d316f1f463ae57e643deb63f42e633e2d631df88815cc4629",
                "c300ec275d7bf08af8fc63e76cdc0086911bbc7091e03c5cf892553bef84ef0c"
            ]
        );
        is(
            Content::plain(&[5]),
            [
                "92b6415c9587c9e2bd70818b16406dc713e7cc19ffa91be533188ee94f328006",
                "e853e3ee36eca800b7c070084e0d8e3c372b5fb28c286cc30a5796ff62712df3",
            ],
        );
        is(
            Content::plain(&[5, 6, 7]),
            [
                "85c7cf02c5bbc9f7eb879223d4b43e4bb0981e1f78eb40c21a1eb4abfa47f538",
                "7f13c291fcd54aeb553ba75192a2c6ec154d24ad4c6ccd1c7c1d567b0d9d47a5",
            ],
        );
    }

    #[test]
    fn numbers_of_every_width_are_spelled_as_python_spells_them() {
        let tokens =
            [0, 1, 255, 256, 65_535, 65_536, 0x7fff_ffff, 0x8000_0000, u32::MAX, 23, 24, 7, 8, 9, 10, 11];
        is(
            Content::plain(&tokens),
            [
                "a8656f6bea5c40bfc36324c9efef263f50f949a3cbda4f2ea6dec8ab42f64943",
                "41cfb20c2686967cb60953e5f76d2e6c3a794bd30d093679e2a1dca473c80f6b",
            ],
        );
        let long: Vec<TokenId> = (1 << 31..(1 << 31) + 20_000).collect();
        is(
            Content::plain(&long),
            [
                "bdbe097e9c0f26a1c6ed56b84f2b67af7b28fae45bde7c6fdea3fe095614e228",
                "c593740bcc0e8cac8ac7dafb4193bbd9b76b7c6e8d6d06a1a1b7d20f3043c0ce",
            ],
        );
    }

    #[test]
    fn a_salt_is_in_the_first_block_and_not_if_it_is_empty() {
        fn salted(salt: &str) -> Extra<'_> {
            Extra { salt: Some(salt), ..Extra::default() }
        }
        is_with(
            salted("salt1"),
            [
                "a00e3e4add2d321c6dc41da43a1d7f039dd3120795c328e45ad93f7e821d0c77",
                "d5d12f19983da5bf554a6edbb10aa6ffac8228cc94da98f6e9466f9e69c97af0",
            ],
        );
        is_with(
            salted("a"),
            [
                "3a829f0539d3fc466ecb0a98675d6c3525ac5e6e55c514c11493ed5395a6c869",
                "dc4e508e90ade15354e0024993c0c18b1d72682e466666337a10981dedde21bb",
            ],
        );
        is_with(
            salted(&"s".repeat(70_000)),
            [
                "76895b8042a723d94ce4104ba5de3d9ab953b0a19dd68e9847e11c0c3e61d056",
                "cb06895ccbdefb9c77f420545a21859423678c94c5a7b3ee8d9a0bc3ff990c2f",
            ],
        );
        is_with(
            salted(""),
            [
                "fe8fa5dda3210d0ca2031e37cbe3b001186773cd1c710beb2d45fcb51d434798",
                "dc918a88b139e5afe60b88eda27508d4aee16c10fdc354791efea06206ac0749",
            ],
        );
        let extra = salted("salt1");
        for mut vllm in both() {
            let parent = vllm.block(None, &Content::plain(&FIRST));
            let plain = vllm.block(Some(parent), &Content::plain(&FIRST));
            let content = Content { extra: Some(&extra), ..Content::plain(&FIRST) };
            assert_eq!(vllm.block(Some(parent), &content), plain);
        }
    }

    #[test]
    fn an_adapter_counts_by_name_and_path() {
        let adapted = |name, path| Extra { adapter: Some(Adapter { name, path }), ..Extra::default() };
        is_with(
            adapted("sql", "/adapters/sql"),
            [
                "334fcc5b0f9200356e1ab671d4c92581368274499071edf30549f9017248485d",
                "8197107baf430f7cae998e7d0478285e7ffc745b2972fac1fddad421bc54a1d2",
            ],
        );
        is_with(
            adapted("a", "a"),
            [
                "ca80580e0c95953291cb984b3a2989ef548e6fab81720104f4de9498c8fc33d7",
                "ff9a621e9e1c7207fd120a81f70a8058c048b44a66be8407999549c1a15d8dfc",
            ],
        );
        is_with(
            adapted("", ""),
            [
                "0feefdd2caa510fb440fe7d5e04daa9b1743dba2c7fa474d37445cdf0c532297",
                "b2222bfd1a1979cdce661a16ee28d8136d447a75a6b410bb7134f873fe735e68",
            ],
        );
    }

    #[test]
    fn items_count_by_id_and_offset_from_the_block() {
        let two = [media("aaa", 11, 10), media("bbb", 30, 18)];
        is_with(
            Extra { media: &two, first: TokenIndex(16), ..Extra::default() },
            [
                "83a7c0525bbc71f9b466653420559060fc48957a22c268c20166b1483cea1822",
                "12551e0202a8957b9f6cf1b6597a4b03a6548aa6b3c782dff3f7f1d4339a55fb",
            ],
        );
        let many: Vec<Media> = (0..300).map(|index| media(&format!("id{index}"), index, 1)).collect();
        is_with(
            Extra { media: &many, first: TokenIndex(1), ..Extra::default() },
            [
                "8059c8d241659bfc56f8824eb250061526eedd16329d95e81f3ecab3e459f1c7",
                "44ca389d7001f9e8a2f0b2ef3484793f57f4544e86b2692d935ab0a8f9545b8f",
            ],
        );
        let far = [media("aaa", 0, u32::MAX)];
        let extra = Extra { media: &far, first: TokenIndex(3_000_000_000), ..Extra::default() };
        let hashes = both().map(|mut vllm| {
            let parent = vllm.block(None, &Content::plain(&FIRST));
            vllm.block(Some(parent), &Content { extra: Some(&extra), ..Content::plain(&FIRST) }).to_string()
        });
        assert_eq!(
            hashes,
            [
                "a95f4b62991d99dab953a9bb21190d9307fb0e0913eb34a7c60340fb348aa0d9",
                "0e2ae1cebe6b402c49fa8c077e7ad7244a44770d2da6f79c9f0159aa2d6bc4c4"
            ]
        );
    }

    #[test]
    fn all_keys_together_come_in_one_order() {
        use sha2::Digest as _;
        let digest = sha2::Sha256::digest(b"x").into();
        let items = [media("aaa", 0, 40_001), media("bbb", 40_003, 2), media("c", 40_009, 1)];
        let extra = Extra {
            adapter: Some(Adapter { name: "sql", path: "x" }),
            salt: Some(&"é".repeat(200)),
            media: &items,
            first: TokenIndex(40_000),
            embeds: Some(&digest),
        };
        is_with(
            extra,
            [
                "c2eb8bd47510ef96b2d2fcfdbc389078fa37a4a4cbf34dfb8357a71338f3ff9c",
                "ef81744b56521c1348cce4078df80b0e4d917cf6a09867892f6f2a54e75ea763",
            ],
        );
    }

    #[test]
    fn lookahead_tokens_stand_behind_the_keys() {
        let ahead = |lookahead| Content { lookahead, ..Content::plain(&FIRST) };
        is(
            ahead(&[16]),
            [
                "c693822db2654e476b8e689d24fa440ee866d211499a72b6549399eabf168912",
                "1a03e3bff7362b4e108971b22cd90214feb4d49d9d43cc5131a8a5498cc3b214",
            ],
        );
        is(
            ahead(&[16, 17, 18]),
            [
                "7c3e8460d0d635ac2338208d094abe61fa793d65e2af3a7f2264a11965068def",
                "8956f82c84c44435fd21fb499bd701933cbd1e0919ef7db620494e4b12a1c98a",
            ],
        );
        let extra = Extra { salt: Some("salt1"), ..Extra::default() };
        is(
            Content { extra: Some(&extra), ..ahead(&[16, 17]) },
            [
                "53435c23076ee67e29cf92af149ab778b1ee179cbcc91b48a89983f84ac321cd",
                "0aba5371d0e485b9d4366d93682a739a884f99d443d25b20134ea1c9f723f8f5",
            ],
        );
    }

    #[test]
    fn a_seed_of_ones_own_and_the_short_form_of_events() {
        let mut vllm = Vllm::sha256_with_seed(Encoding::Cbor, "vllm-none-hash");
        let hash = vllm.block(None, &Content::plain(&FIRST));
        assert_eq!(crate::hash::Digest::low64(&hash), 0x1efe_a062_06ac_0749);
        assert_ne!(Vllm::sha256_with_seed(Encoding::Cbor, "0").none_hash(), vllm.none_hash());
        let mut xxhash = Vllm::xxhash(Encoding::Cbor, "0");
        let message = [&[0x83, 0x50][..], xxhash.none_hash().bytes(), &[0x81, 5, 0xf6]].concat();
        let expected = xxhash_rust::xxh3::xxh3_128(&message).to_be_bytes();
        assert_eq!(xxhash.block(None, &Content::plain(&[5])), BlockHash(expected));
    }
}
