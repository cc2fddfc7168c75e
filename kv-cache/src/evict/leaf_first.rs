//! Least recently used, but never a beginning before its ends.

use super::leaves::Leaves;
use super::links::Links;
use super::{Eviction, Facts, Wanted, order_by_picking};
use crate::{BlockCount, BlockId};

/// Of the cached blocks on which no other free block hangs, the least recently used goes first.
///
/// With sequences that hold all their blocks from the first on, this is the order of [`Lru`](super::Lru), which
/// frees a sequence from its end. It differs where that does not hold: a beginning whose copy is in use elsewhere, an
/// attention window that gave its beginning back early, a tenant's quota.
#[derive(Clone, Debug)]
pub struct LeafFirst {
    /// One list: what holds nothing.
    worthless: Links,
    leaves: Leaves,
    freed: u64,
}

impl LeafFirst {
    /// A fresh policy. 33 bytes a block.
    pub fn new(blocks: BlockCount) -> Self {
        LeafFirst { worthless: worthless(blocks), leaves: Leaves::new(blocks.get()), freed: 0 }
    }
}

/// The list of worthless blocks, with all blocks but the null block in it.
pub(super) fn worthless(blocks: BlockCount) -> Links {
    let mut worthless = Links::new(blocks.get(), 1);
    for block in 1..blocks.get() {
        worthless.push_last(0, block);
    }
    worthless
}

impl Eviction for LeafFirst {
    fn free(&mut self, worthless: &[BlockId], kept: impl Iterator<Item = (BlockId, Facts)>) {
        let mut front = None;
        for &block in worthless {
            self.leaves.begin_anew(block);
            self.worthless.push_behind(0, front, block.get());
            front = Some(block.get());
        }
        for (block, facts) in kept {
            self.freed += 1;
            self.leaves.insert(block, facts.before, (self.freed, 0));
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.leaves.remove(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.worthless.first(0).map(BlockId).or(self.leaves.first());
        let block = block.expect("no more blocks are picked than are free");
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        order_by_picking(self, self.worthless.len(0) as usize + self.leaves.len())
    }

    fn take(&mut self, block: BlockId, _wanted: Wanted) {
        if self.leaves.contains(block) {
            self.leaves.remove(block);
        } else {
            self.worthless.remove(0, block.get());
        }
        self.leaves.begin_anew(block);
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
    }

    fn check(&self) -> Result<(), BlockId> {
        self.worthless.broken(0).map(BlockId).or(self.leaves.broken()).map_or(Ok(()), Err)
    }
}
