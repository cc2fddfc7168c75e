//! Asking for room: a claim is answered by an admission, an admission is committed.

use crate::sequence::Table;
use crate::{BlockCount, BlockHasher, BlockId, Eviction, GroupId, KvCache, Lru, OverLimit, TokenCount, Xxh3};

/// Whether a sequence may read what others left in the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reuse {
    /// Take cached blocks where the prefix matches, leave full blocks for others.
    #[default]
    ReadWrite,
    /// Compute every token, leave full blocks for others. For requests that need the model's output at every
    /// prompt token (prompt logprobs): a hit would skip the very work they asked for.
    WriteOnly,
}

/// The longest cached prefix that a sequence may use: whole blocks (or parts, see
/// [`Config::match_unit`](crate::Config::match_unit)), at most all known tokens but one, since the last token must be
/// computed for the model to say anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hit {
    /// Tokens that need no computing.
    pub tokens: TokenCount,
    /// The blocks that hold them, all groups together.
    pub blocks: BlockCount,
    /// Where the tokens end that the groups of full attention have, if another group has less. A step that ends there
    /// leaves the others what the next sequence needs to begin there ([`KvCache::chunk`]).
    pub junction: Option<TokenCount>,
}

/// What a sequence wants to compute next, and under which conditions it gets the room.
///
/// ```text
///  0           computed       + external       + new_tokens                  + lookahead
///  |-- has K and V --|-- loaded --|-- computed in this step --|-- may be written, never shared --|
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Tokens whose K and V exist when the step begins. In the first claim of a sequence that holds no blocks
    /// these are the tokens of its [`Hit`], or fewer whole blocks of it.
    pub computed: TokenCount,
    /// Tokens behind those whose K and V come from elsewhere (another tier, another machine). They get room, and
    /// nothing from them on is shared before [`KvCache::loaded`] says that they are there.
    pub external: TokenCount,
    /// Tokens to compute in this step; at least one, unless something is loaded. May reach past the known tokens
    /// (drafts): those get room and are not shared.
    pub new_tokens: TokenCount,
    /// Further tokens to have room for, such as those a draft model will propose.
    pub lookahead: TokenCount,
    /// Admit only if the whole known sequence would fit now, not only this step's part of it. Without it a
    /// long prompt is let in by its first chunk and fights for room in the middle.
    ///
    /// If something is `external`, the rest of that room is set aside for the sequence until it claims it, so that
    /// loads that are under way do not wait for one another's blocks. Copies of blocks that it shares come out of
    /// that room too.
    pub whole_sequence: bool,
    /// Free blocks that must be left over. For waiting sequences, while others run.
    pub watermark: BlockCount,
}

impl Claim {
    /// Tokens that have K and V after the step.
    #[inline]
    pub const fn computed_after(&self) -> TokenCount {
        self.computed.plus(self.external).plus(self.new_tokens)
    }
}

/// The answer to a [`Claim`].
#[derive(Debug)]
pub enum Admission<'a, H: BlockHasher = Xxh3, E: Eviction = Lru> {
    /// There is room. Commit to take it; drop to leave everything as it was.
    Admit(Reservation<'a, H, E>),
    /// Not in this step: what it would begin from is a state that this very step computes. It is there once
    /// [`KvCache::end_step`] was called. Nothing has changed.
    NextStep,
    /// Not now: `need + watermark + reserved` is more than `free`. Nothing has changed.
    Wait {
        /// Blocks the claim would take out of the free list: new ones, copies, and cached ones that nobody uses.
        need: BlockCount,
        /// The claim's watermark.
        watermark: BlockCount,
        /// Free blocks that are set aside for others, whose K and V are on their way.
        reserved: BlockCount,
        /// Blocks that are free.
        free: BlockCount,
    },
    /// Not now: the limit of the sequence's tenant forbids it ([`Fair`](crate::evict::Fair)), whatever is free. Nothing
    /// has changed.
    OverLimit(OverLimit),
    /// Not ever: the sequence alone would hold more blocks than there are. Nothing has changed.
    Never {
        /// Blocks it would hold.
        need: BlockCount,
        /// Blocks there are, all free ones and all used ones.
        blocks: BlockCount,
    },
}

/// Room that is there for the taking. It borrows the cache, so nothing can happen between the check and the
/// commit, and remembers the lookup, so nothing is looked up twice.
#[derive(Debug)]
#[must_use = "a reservation takes no room until it is committed"]
pub struct Reservation<'a, H: BlockHasher = Xxh3, E: Eviction = Lru> {
    cache: &'a mut KvCache<H, E>,
    plan: Plan,
}

/// What a committed claim changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant<'a> {
    /// Tokens that came out of the cache with this claim.
    pub cached: TokenCount,
    /// Blocks added to the end of the table, behind the cached ones. Their content is old: write before you read.
    /// Of the first group; [`Grant::new_blocks_in`] tells of the others.
    pub new_blocks: &'a [BlockId],
    /// What must be copied before the step writes, in this order.
    pub copies: &'a [BlockCopy],
    /// Until more than this many tokens are computed, a further claim without lookahead would change nothing:
    /// it needs no block and fills none. Such claims may be left out, as long as nothing is withdrawn or released.
    pub covered: TokenCount,
    tables: &'a [Table],
}

impl<'a> Grant<'a> {
    #[inline]
    pub(crate) fn new(
        cached: TokenCount,
        covered: TokenCount,
        tables: &'a [Table],
        copies: &'a [BlockCopy],
    ) -> Grant<'a> {
        Grant { cached, new_blocks: tables[0].new_blocks(), copies, covered, tables }
    }

    /// Blocks added to the end of the table of `group`; the null block where the group needs none. Empty for a group
    /// that the cache does not have.
    pub fn new_blocks_in(self, group: GroupId) -> &'a [BlockId] {
        self.tables.get(group.index()).map_or(&[], Table::new_blocks)
    }
}

/// An order to copy the beginning of a block: the sequence goes on in a block of its own where it shared one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockCopy {
    /// The group whose layers are copied.
    pub group: GroupId,
    /// The entry of the block table that this is about.
    pub index: u32,
    /// Where the content is. The block stays as it is until [`KvCache::end_step`].
    pub from: BlockId,
    /// Where it goes.
    pub to: BlockId,
    /// How many tokens of it, from the beginning of the block. A group that holds a state copies the state.
    pub tokens: TokenCount,
}

/// The numbers of a reservation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    /// Place of the sequence among the open ones.
    pub(crate) place: u32,
    /// What was asked.
    pub(crate) claim: Claim,
    /// What it comes to, all groups together.
    pub(crate) need: Need,
}

/// The blocks that a claim is about.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Need {
    /// Cached and to be shared.
    pub(crate) hits: u32,
    /// Of these, blocks that nobody uses: they leave the free list.
    pub(crate) revived: u32,
    /// Own copies of blocks that are shared and will be written into.
    pub(crate) copies: u32,
    /// New blocks of this claim.
    pub(crate) new: u32,
    /// New blocks of this claim, or of the whole sequence if that is asked and more.
    pub(crate) beyond: u32,
}

impl Need {
    /// What leaves the free list, or must be able to.
    #[inline]
    pub(crate) fn blocks(&self) -> u32 {
        self.revived + self.copies + self.beyond
    }

    #[inline]
    pub(crate) fn count_hits(&mut self, found: &[BlockId], references: impl Fn(BlockId) -> u32) {
        for &block in found.iter().filter(|&&block| block != BlockId::NULL) {
            self.hits += 1;
            self.revived += u32::from(references(block) == 0);
        }
    }
}

/// Cached content that went when its block was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost<D> {
    /// The name under which it was found.
    pub digest: D,
    /// The group in which it was found.
    pub group: GroupId,
    /// The block that held it, until the step writes.
    pub block: BlockId,
}

impl<'a, H: BlockHasher, E: Eviction> Reservation<'a, H, E> {
    pub(crate) fn new(cache: &'a mut KvCache<H, E>, plan: Plan) -> Self {
        Reservation { cache, plan }
    }

    /// Cached blocks that the claim will share.
    pub fn hit_blocks(&self) -> BlockCount {
        BlockCount(self.plan.need.hits)
    }

    /// Blocks that the claim will get from the free list: new ones, and copies of shared ones.
    pub fn new_blocks(&self) -> BlockCount {
        BlockCount(self.plan.need.new + self.plan.need.copies)
    }

    /// Takes the room: shares the cached blocks, adds new ones, and publishes every block that this step
    /// fills, so that a sequence admitted later in the same step already shares them.
    ///
    /// If the step is then not computed, [`KvCache::withdraw`] takes the publication back.
    ///
    /// Cost: O(blocks taken and published); nothing for a decode step that stays in its block. Memory is
    /// allocated only when a table outgrows every table that used its buffer before.
    #[inline]
    pub fn commit(self) -> Grant<'a> {
        self.cache.commit(self.plan)
    }
}
