//! Cost-aware: keep longest what is dear to compute again and often asked for.

use super::ghosts::Ghosts;
use super::leaf_first::worthless;
use super::leaves::Leaves;
use super::links::Links;
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
    /// One list: what holds nothing.
    worthless: Links,
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
    /// it. 69 bytes a block.
    ///
    /// A transformer of `p` parameters, `l` layers and width `d` spends about `2p` operations on a token and `4ld` on
    /// each token before it, so that its cost doubles after `p / 2ld` tokens: 30,000 for a Llama of 8 billion. Less
    /// than that weighs position more; a huge number weighs uses alone.
    pub fn with_cost(blocks: BlockCount, block_size: BlockSize, doubles_after: TokenCount) -> Self {
        CostAware {
            worthless: worthless(blocks),
            leaves: Leaves::new(blocks.get()),
            uses: vec![0; blocks.get() as usize],
            content: vec![0; blocks.get() as usize],
            lost: Ghosts::new(blocks.get() - 1, 1),
            floor: 0,
            freed: 0,
            doubles_after: u64::from(doubles_after.get() / block_size.get()).max(1),
        }
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
    fn free(&mut self, worthless: &[BlockId], kept: impl Iterator<Item = (BlockId, Facts)>) {
        let mut front = None;
        for &block in worthless {
            self.leaves.begin_anew(block);
            self.worthless.push_behind(0, front, block.get());
            front = Some(block.get());
        }
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
        let block = self.worthless.first(0).map(BlockId).unwrap_or_else(|| {
            let block = self.leaves.first().expect("no more blocks are picked than are free");
            self.floor = self.floor.max(self.leaves.rank(block).0);
            block
        });
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        order_by_picking(self, self.worthless.len(0) as usize + self.leaves.len())
    }

    fn take(&mut self, block: BlockId, wanted: Wanted) {
        let known = wanted.content.and_then(|content| self.lost.take(content));
        if self.leaves.contains(block) {
            self.lost.remember(0, self.content[block.index()], self.uses[block.index()]);
            self.leaves.remove(block);
        } else {
            self.worthless.remove(0, block.get());
        }
        self.leaves.begin_anew(block);
        self.uses[block.index()] = known.map_or(0, |(_, uses)| uses);
        self.use_once_more(block);
    }

    fn reused(&mut self, block: BlockId) {
        self.use_once_more(block);
    }

    fn forget(&mut self, block: BlockId) {
        self.leaves.remove(block);
        self.leaves.begin_anew(block);
        self.worthless.push_behind(0, None, block.get());
    }

    fn reset(&mut self) {
        while let Some(block) = self.leaves.first() {
            self.forget(block);
        }
        while self.lost.len(0) > 0 {
            self.lost.forget_oldest(0);
        }
        self.floor = 0;
    }

    fn check(&self) -> Result<(), BlockId> {
        let broken = self.worthless.broken(0).map(BlockId).or(self.leaves.broken());
        match broken {
            Some(block) => Err(block),
            None if self.lost.is_sound() => Ok(()),
            None => Err(BlockId::NULL),
        }
    }
}
