//! What a cache is made of, fixed for its life.

use crate::{BlockCount, BlockSize, TokenCount};

/// The shape of a cache. [`Config::new`] gives the usual values for all but the two sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Physical blocks, the null block included: a device with room for `n` blocks offers `n - 1`.
    pub block_count: BlockCount,
    /// Whether full blocks are remembered and shared. Off, no token is hashed.
    pub prefix_caching: bool,
    /// Key of the default block hash, [`Xxh3`](crate::Xxh3). Processes that are to agree on hashes share it. Where tenants must not be able
    /// to construct colliding prompts it is random and secret: the hash is keyed, yet not cryptographic.
    pub hash_seed: u64,
    /// Tokens behind a block that its hash covers as well: as many as a draft head (EAGLE, MTP) reads ahead, whose K
    /// and V stand in the same blocks. A block is named, and shared, once they are known.
    pub hash_lookahead: TokenCount,
    /// The longest a sequence may get (the model's context). Room is never reserved past it.
    pub sequence_tokens_max: TokenCount,
    /// Whether content that is lost is listed for [`KvCache::drain_lost`](crate::KvCache::drain_lost), by whoever
    /// keeps it elsewhere.
    pub report_lost: bool,
}

impl Config {
    /// Prefix caching on, hash seed 0, sequences of any length.
    pub const fn new(block_size: BlockSize, block_count: BlockCount) -> Config {
        Config {
            block_size,
            block_count,
            prefix_caching: true,
            hash_seed: 0,
            hash_lookahead: TokenCount(0),
            sequence_tokens_max: TokenCount(u32::MAX),
            report_lost: false,
        }
    }
}
