//! Cost-aware: keep longest what is dear to compute again and often asked for.

use super::ghosts::Ghosts;
use super::leaves::Leaves;
use super::{Eviction, Facts, Wanted, order_by_picking};
use crate::{BlockCount, BlockId, BlockSize, TokenCount};

/// Of the cached blocks on which no other free block hangs, the one of the lowest rank goes first, and of those with
/// the same rank the least recently used:
///
/// ```text
///  rank = floor + uses * (1 + position / doubles_after), rounded down
/// ```
///
/// `uses` counts the sequences that had the block, also before it was lost and came back, if that was lately. The
/// bracket is what computing it again costs: a late block attends to all before it, an early one to few. `floor` is the
/// rank of what was evicted last, so that whoever is not asked for is overtaken by those who come later.
///
/// GreedyDual-Size-Frequency (Cherkasova, HP Labs report 98-69, 1998) with blocks of one size, over the leaves only: a
/// late block is worth nothing without those before it.
#[derive(Clone, Debug)]
pub struct CostAware {
    leaves: Leaves,
    /// By block: how many sequences had its content, [`USES_MAX`] at most.
    uses: Vec<u32>,
    /// By block: the name of its content, while it is free and has one.
    content: Vec<u32>,
    /// One list, with uses for notes.
    lost: Ghosts,
    floor: u64,
    freed: u64,
    /// Blocks of a sequence after which one costs twice as much as the first.
    doubles_after: u64,
}

/// No block counts for more uses, so that what was popular yesterday goes within a day.
const USES_MAX: u32 = 255;

/// More than the 30,000 of arithmetic alone: on real conversations, blocks that were kept for their cost mostly
/// waited in
/// vain, and pushed out others that were wanted. See the simulator.
const DOUBLES_AFTER: TokenCount = TokenCount(131_072);

impl CostAware {
    /// A fresh policy for which a block costs twice as much as the first one when 131,072 tokens are before it.
    pub fn new(blocks: BlockCount, block_size: BlockSize) -> Self {
        CostAware::with_cost(blocks, block_size, DOUBLES_AFTER)
    }

    /// A fresh policy for which a block costs twice as much as the first one when `doubles_after` tokens are before
    /// it. 61 bytes a block.
    ///
    /// A transformer of `p` parameters, `l` layers and width `d` spends about `2p` operations on a token and `4ld` on
    /// each token before it, so that its cost doubles after `p / 2ld` tokens: 30,000 for a Llama of 8 billion. Less
    /// than that weighs position more; a huge number weighs uses alone.
    pub fn with_cost(blocks: BlockCount, block_size: BlockSize, doubles_after: TokenCount) -> Self {
        CostAware {
            leaves: Leaves::new(blocks.get()),
            uses: vec![0; blocks.get() as usize],
            content: vec![0; blocks.get() as usize],
            lost: Ghosts::new(blocks.get() - 1, 1),
            floor: 0,
            freed: 0,
            doubles_after: u64::from(doubles_after.get() / block_size.get()).max(1),
        }
    }

    /// How many sequences had a content before it was lost, if that was lately. Then it is lost no more.
    fn uses_before(&mut self, wanted: Wanted) -> u32 {
        let known = wanted.content.and_then(|content| self.lost.take(content));
        known.map_or(0, |(_, uses)| uses)
    }

    /// A block is given to a content that `uses` sequences had before.
    fn begin(&mut self, block: BlockId, uses: u32) {
        self.leaves.begin_anew(block);
        self.uses[block.index()] = uses;
        self.use_once_more(block);
    }

    fn use_once_more(&mut self, block: BlockId) {
        let uses = &mut self.uses[block.index()];
        *uses = (*uses + 1).min(USES_MAX);
    }

    fn rank(&self, block: BlockId, index: u32) -> u64 {
        let cost_per_use = self.doubles_after + u64::from(index);
        self.floor + u64::from(self.uses[block.index()]) * cost_per_use / self.doubles_after
    }
}

impl Eviction for CostAware {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            self.freed += 1;
            self.content[block.index()] = facts.content;
            let rank = (self.rank(block, facts.index), self.freed);
            self.leaves.insert(block, facts.before, rank);
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.leaves.remove(block);
        self.use_once_more(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.leaves.first().expect("no more blocks are picked than are free");
        self.floor = self.floor.max(self.leaves.rank(block).0);
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        order_by_picking(self, self.leaves.len())
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let uses = self.uses_before(wanted);
        self.lost.remember(0, self.content[block.index()], self.uses[block.index()]);
        self.leaves.remove(block);
        self.begin(block, uses);
    }

    fn given(&mut self, block: BlockId, wanted: Wanted) {
        let uses = self.uses_before(wanted);
        self.begin(block, uses);
    }

    fn reused(&mut self, block: BlockId) {
        self.use_once_more(block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.leaves.remove(block);
        true
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        self.leaves.drain(let_go);
        while self.lost.len(0) > 0 {
            self.lost.forget_oldest(0);
        }
        self.floor = 0;
    }

    fn check(&self) -> Result<(), BlockId> {
        match self.leaves.broken() {
            Some(block) => Err(block),
            None if self.lost.is_sound() => Ok(()),
            None => Err(BlockId::NULL),
        }
    }
}
