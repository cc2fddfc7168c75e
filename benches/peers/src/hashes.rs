//! Block hashes: `dynamo-tokens` beside ours, and whether our encoding of Dynamo's says the same.

use std::hint::black_box;

use dynamo_kv_hashing::compute_salt_hash;
use dynamo_tokens::{TokenBlockMmInfo, TokenBlockSequence, Tokens};
use quayline_kv_cache::hash::{
    Adapter, Blake3, BlockHash, BlockHasher, Content, Dynamo, Encoding, Extra, Media, Sha256, Vllm, Xxh3,
};
use quayline_kv_cache::{TokenCount, TokenIndex};

use crate::{BLOCK, PROMPT_BLOCKS, Prompt, Random, line, median, timed};

/// Random prompts with and without adapter, salt and images have the same hashes in both.
pub fn agree() {
    let mut random = Random(3);
    for case in 0..1000 {
        let tokens: Prompt = (0..5 * BLOCK).map(|_| random.below(1 << 32) as u32).collect();
        let adapter = (case % 2 == 1).then(|| format!("adapter {case}"));
        let salt = (case % 3 == 1).then(|| format!("salt {case}"));
        let mut media = Vec::new();
        if case % 5 > 2 {
            let first = random.below(20) as u32;
            let tokens = 1 + random.below(30) as u32;
            media.push(Media { id: random.0.to_string(), first: TokenIndex(first), tokens: TokenCount(tokens) });
        }
        let runs: Vec<TokenBlockMmInfo> = media
            .iter()
            .map(|item| TokenBlockMmInfo {
                mm_hash: item.id.parse().expect("made of a number"),
                offset: item.first.0 as usize,
                length: item.tokens.0 as usize,
            })
            .collect();
        let seed = compute_salt_hash(salt.as_deref(), adapter.as_deref()).expect("names are short");
        let theirs = TokenBlockSequence::new_with_mm(Tokens::from(tokens.clone()), &runs, BLOCK as u32, Some(seed))
            .expect("the image is inside");
        let mut hasher = Dynamo::new();
        let mut parent: Option<BlockHash<8>> = None;
        for (index, (block, theirs)) in tokens.chunks(BLOCK).zip(theirs.blocks()).enumerate() {
            let first = index as u32 * BLOCK as u32;
            let overlaps = |item: &&Media| item.first.0 < first + BLOCK as u32 && item.end() > first.into();
            let overlapping: Vec<Media> = media.iter().filter(overlaps).cloned().collect();
            let extra = Extra {
                adapter: adapter.as_deref().map(|name| Adapter { name, path: "" }),
                salt: salt.as_deref(),
                media: &overlapping,
                first: TokenIndex(first),
                embeds: None,
            };
            let content = Content { extra: Some(&extra), ..Content::plain(block) };
            assert_eq!(hasher.local(&content), theirs.block_hash(), "case {case}, block {index}");
            let ours = hasher.block(parent, &content);
            assert_eq!(u64::from_be_bytes(ours.0), theirs.sequence_hash(), "case {case}, block {index}");
            parent = Some(ours);
        }
    }
}

pub fn compare() {
    let mut random = Random(4);
    let prompt: Prompt = (0..PROMPT_BLOCKS * BLOCK).map(|_| random.below(128_000) as u32).collect();
    let dynamo = per_block(|| {
        let sequence = TokenBlockSequence::from_slice(black_box(&prompt), BLOCK as u32, Some(1337));
        assert_eq!(sequence.blocks().len(), PROMPT_BLOCKS);
        black_box(sequence);
    });
    line("hash, XXH3-128 (the default)", chain(Xxh3::new(1337), &prompt), dynamo);
    line("hash, Dynamo's", chain(Dynamo::new(), &prompt), dynamo);
    line("hash, BLAKE3", chain(Blake3::new([7; 32]), &prompt), dynamo);
    line("hash, SHA-256", chain(Sha256::new([7; 32]), &prompt), dynamo);
    line("hash, vLLM's sha256_cbor", chain(Vllm::sha256(Encoding::Cbor), &prompt), dynamo);
    line("hash, vLLM's sha256", chain(Vllm::sha256(Encoding::Pickle), &prompt), dynamo);
}

fn chain<H: BlockHasher>(mut hasher: H, prompt: &Prompt) -> f64 {
    let mut hashes = Vec::new();
    per_block(|| {
        hashes.clear();
        for block in black_box(prompt).chunks_exact(BLOCK) {
            hashes.push(hasher.block(hashes.last().copied(), &Content::plain(block)));
        }
        assert_eq!(hashes.len(), PROMPT_BLOCKS);
        black_box(&hashes);
    })
}

fn per_block(mut work: impl FnMut()) -> f64 {
    const REPEATS: usize = 200;
    median(|| (timed(|| (0..REPEATS).for_each(|_| work())), REPEATS * PROMPT_BLOCKS))
}
