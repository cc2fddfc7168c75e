//! Least recently used, but never a beginning before its ends.

use super::leaves::Leaves;
use super::{Eviction, Facts, Wanted, order_by_picking};
use crate::{BlockCount, BlockId};

/// Of the cached blocks on which no other free block hangs, the least recently used goes first.
///
/// With sequences that hold all their blocks from the first on, this is the order of [`Lru`](super::Lru), which
/// frees a sequence from its end. It differs where that does not hold: a beginning whose copy is in use elsewhere, an
/// attention window that gave its beginning back early, a tenant's quota.
#[derive(Clone, Debug)]
pub struct LeafFirst {
    leaves: Leaves,
    freed: u64,
}

impl LeafFirst {
    /// A fresh policy. 25 bytes a block.
    pub fn new(blocks: BlockCount) -> Self {
        LeafFirst { leaves: Leaves::new(blocks.get()), freed: 0 }
    }
}

impl Eviction for LeafFirst {
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
        for (block, facts) in kept {
            self.freed += 1;
            self.leaves.insert(block, facts.before, (self.freed, 0));
        }
    }

    fn revive(&mut self, block: BlockId) {
        self.leaves.remove(block);
    }

    fn pick(&mut self, wanted: Wanted) -> BlockId {
        let block = self.leaves.first().expect("no more blocks are picked than are free");
        self.take(block, wanted);
        block
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        order_by_picking(self, self.leaves.len())
    }

    fn take(&mut self, block: BlockId, _wanted: Wanted) {
        self.leaves.remove(block);
        self.leaves.begin_anew(block);
    }

    fn given(&mut self, block: BlockId, _wanted: Wanted) {
        self.leaves.begin_anew(block);
    }

    fn forget(&mut self, block: BlockId) -> bool {
        self.leaves.remove(block);
        true
    }

    fn reset(&mut self, let_go: &mut Vec<BlockId>) {
        self.leaves.drain(let_go);
    }

    fn check(&self) -> Result<(), BlockId> {
        self.leaves.broken().map_or(Ok(()), Err)
    }
}
