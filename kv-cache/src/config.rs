//! What a cache is made of, fixed for its life.

use std::sync::Arc;

use crate::kind::{Full, Kind};
use crate::{BlockCount, BlockSize, TokenCount};

/// The shape of a cache. [`Config::new`] gives the usual values for all but the two sizes.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tokens per block.
    pub block_size: BlockSize,
    /// Physical blocks, the null block included: a device with room for `n` blocks offers `n - 1`.
    pub block_count: BlockCount,
    /// The groups of layers. Layers of one group share a block table; all groups take their blocks from one pool.
    pub groups: Vec<Group>,
    /// Whether full blocks are remembered and shared. Off, no token is hashed.
    pub prefix_caching: bool,
    /// Share down to this many tokens, less than a block: what matches of the block where a prompt begins to differ
    /// is copied. Divides the size of every block. Costs an index entry for each such piece instead of each block.
    pub match_unit: Option<BlockSize>,
    /// Which prefixes stay usable in groups that do not keep every token.
    pub retention: Retention,
    /// Whether a draft head (EAGLE, MTP) shares the blocks. Its K and V of a token depend on the token after it, so
    /// of what is found the last part is computed again. Not needed where hashes cover the tokens that follow.
    pub draft_head: bool,
    /// Key of the default block hash, [`Xxh3`](crate::Xxh3). Processes that are to agree on hashes share it. Where
    /// tenants must not be able to construct colliding prompts it is random and secret: the hash is keyed, yet not
    /// cryptographic.
    pub hash_seed: u64,
    /// Tokens behind a block that its hash covers as well: as many as a draft head (EAGLE, MTP) reads ahead, whose K
    /// and V stand in the same blocks. A block is named, and shared, once they are known.
    pub hash_lookahead: TokenCount,
    /// The longest a sequence may get (the model's context). Room is never reserved past it.
    pub sequence_tokens_max: TokenCount,
    /// The most tokens of one sequence that a step computes. Bounds what a sequence of a windowed group ever holds at
    /// once, and with it what [`Claim::whole_sequence`](crate::Claim::whole_sequence) asks for.
    pub step_tokens_max: TokenCount,
    /// The most blocks that [pins](crate::KvCache::pin) may hold together.
    pub pinned_blocks_max: BlockCount,
    /// Whether content that is lost is listed for [`KvCache::drain_lost`](crate::KvCache::drain_lost), by whoever
    /// keeps it elsewhere.
    pub report_lost: bool,
    /// How many events are kept for [`KvCache::drain_events`](crate::KvCache::drain_events) until they are heard; 0
    /// for a cache that tells nothing. Costs, when it tells, the tokens of each block once more, and 60 bytes a block.
    pub events_max: u32,
    /// Of every how many-th block it is measured how long its content stays
    /// ([`KvCache::drain_residency`](crate::KvCache::drain_residency)); 0 for none.
    pub residency_every: u32,
}

impl Config {
    /// One group of full attention, prefix caching on, hash seed 0, sequences and steps of any length, a quarter of the
    /// blocks for pins.
    pub fn new(block_size: BlockSize, block_count: BlockCount) -> Config {
        Config {
            block_size,
            block_count,
            groups: vec![Group::new(Full)],
            prefix_caching: true,
            match_unit: None,
            retention: Retention::default(),
            draft_head: false,
            hash_seed: 0,
            hash_lookahead: TokenCount(0),
            sequence_tokens_max: TokenCount(u32::MAX),
            step_tokens_max: TokenCount(u32::MAX),
            pinned_blocks_max: BlockCount(block_count.0 / 4),
            report_lost: false,
            events_max: 0,
            residency_every: 0,
        }
    }

    /// Tokens that one hash covers: what all block sizes are multiples of.
    pub fn hash_unit(&self) -> BlockSize {
        self.match_unit.unwrap_or_else(|| {
            let sizes = self.groups.iter().map(|group| group.size(self.block_size));
            sizes.reduce(BlockSize::common_divisor).unwrap_or(self.block_size)
        })
    }
}

/// Layers that share a block table: they have the same kind of attention.
#[derive(Clone, Debug)]
pub struct Group {
    /// What the group needs of its blocks.
    pub kind: Arc<dyn Kind>,
    /// Tokens per block, if not those of [`Config::block_size`]. All groups' blocks have the same bytes, so one whose
    /// tokens take less (latent attention) puts more of them into a block.
    pub block_size: Option<BlockSize>,
}

impl Group {
    /// A group with the cache's own block size.
    pub fn new(kind: impl Kind + 'static) -> Group {
        Group { kind: Arc::new(kind), block_size: None }
    }

    /// The same with blocks of `size` tokens.
    #[must_use]
    pub fn with_block_size(self, size: BlockSize) -> Group {
        Group { block_size: Some(size), ..self }
    }

    pub(crate) fn size(&self, otherwise: BlockSize) -> BlockSize {
        self.block_size.unwrap_or(otherwise)
    }
}

/// Which prefixes stay usable in groups that keep a window or a state: those that end at one of these places, cut to
/// whole blocks of every group. Groups of full attention keep all.
///
/// Blocks that could end no such prefix are not published, so that a long answer does not push out what is worth more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Retention {
    /// The end of the prompt, and where it was found to part from what others left
    /// ([`Hit::junction`](crate::Hit::junction)).
    #[default]
    Prompt,
    /// These, and every so many tokens. Every 0 tokens is never: these alone, as with vLLM's retention interval of 0.
    Every(TokenCount),
    /// Everywhere.
    Dense,
}
