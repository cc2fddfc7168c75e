//! A trace through the real cache: every prompt opens a sequence, claims its room, and is closed before the next one
//! comes.
//!
//! A trace names blocks and has no tokens, a cache has tokens and names blocks itself. So block `n` of the trace
//! becomes two tokens `n n`, which fill a block of the cache: what a block holds enters into nothing but its hash.
//! Behind the prompt stands one more token, for a cache never serves the last token of a sequence. It takes a block
//! of its own, which is never full and so never cached, and for which the cache gets one block more than was asked
//! for. With that, a cache of `n` blocks under LRU is the textbook's: look up the longest leading run, touch the
//! prompt's blocks from the last to the first, evict down to `n`.

use quayline_kv_cache::evict::{Policy, PolicyName};
use quayline_kv_cache::{
    Admission, BlockCount, BlockSize, Claim, Config, Error, KvCache, Reuse, SequenceId, SequenceKey,
    TokenCount, TokenId, Xxh3,
};

use crate::prompts::Prompts;
use crate::trace::BLOCK_TOKENS;

/// What a cache had of the prompts when they came.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Blocks of all prompts.
    pub blocks: u64,
    /// Blocks that were found, each as part of a leading run.
    pub hit_blocks: u64,
    /// Tokens of all prompts.
    pub tokens: u64,
    /// Tokens of the blocks found.
    pub hit_tokens: u64,
    /// What computing all prompts would cost, in tokens at the beginning of a prompt.
    pub work: f64,
    /// What computing the blocks found would have cost.
    pub hit_work: f64,
    /// Prompts that are larger than the cache, and were not served from it.
    pub refused: u64,
}

/// Tokens before a token after which it costs twice as much as the first one: a Llama of 8 billion parameters, with 32
/// layers and 4,096 wide, spends 2 * 8e9 operations on a token and 4 * 32 * 4,096 on each one before it.
pub const WORK_DOUBLES_AFTER: f64 = 30_000.0;

impl Share {
    /// Counts a prompt of which the first `hits` blocks were found.
    pub fn count(&mut self, blocks: usize, tokens: u32, hits: usize) {
        let work = |tokens: u64| {
            let tokens = tokens as f64;
            tokens + tokens * tokens / (2.0 * WORK_DOUBLES_AFTER)
        };
        let tokens = u64::from(tokens);
        let hit_tokens = tokens.min(hits as u64 * u64::from(BLOCK_TOKENS));
        self.blocks += blocks as u64;
        self.hit_blocks += hits as u64;
        self.tokens += tokens;
        self.hit_tokens += hit_tokens;
        self.work += work(tokens);
        self.hit_work += work(hit_tokens);
    }

    /// Share of the blocks that were found.
    pub fn of_blocks(&self) -> f64 {
        self.hit_blocks as f64 / self.blocks as f64
    }

    /// Share of the tokens that were found.
    pub fn of_tokens(&self) -> f64 {
        self.hit_tokens as f64 / self.tokens as f64
    }

    /// Share of the work that was saved.
    pub fn of_work(&self) -> f64 {
        self.hit_work / self.work
    }
}

/// Replays prompts through a cache that keeps up to `capacity` of their blocks.
///
/// # Errors
/// When there cannot be a cache of this size.
pub fn replay(prompts: &Prompts, capacity: u32, policy: PolicyName) -> Result<Share, Error> {
    let size = BlockSize::new(TOKENS)?;
    // The null block, and the block of the token behind the prompt.
    let blocks = BlockCount(capacity.saturating_add(2));
    let config = Config::new(size, blocks);
    let block_size = BlockSize::new(BLOCK_TOKENS)?;
    let hasher = Xxh3::new(config.hash_seed);
    let mut cache = KvCache::with(config, hasher, |n| Policy::new(policy, n, block_size))?;
    let mut share = Share::default();
    let mut tokens: Vec<TokenId> = Vec::new();
    for (number, prompt) in (1..).zip(prompts.iter()) {
        tokens.clear();
        tokens.extend(prompt.blocks.iter().flat_map(|&block| [block; TOKENS as usize]));
        tokens.push(0);
        let sequence = SequenceId(number);
        cache.open(sequence, SequenceKey::default(), &tokens, Reuse::ReadWrite)?;
        let computed = cache.lookup(sequence)?.tokens;
        let known = cache.known(sequence)?;
        let new_tokens = TokenCount(known.get() - computed.get());
        let claim = Claim { computed, new_tokens, ..Claim::default() };
        let hits = match cache.reserve(sequence, claim)? {
            Admission::Admit(reservation) => reservation.commit().cached.get() / TOKENS,
            _ => {
                share.refused += 1;
                0
            }
        };
        cache.close(sequence)?;
        share.count(prompt.blocks.len(), prompt.tokens, hits as usize);
    }
    Ok(share)
}

/// Tokens that stand for a block of the trace.
const TOKENS: u32 = 2;
