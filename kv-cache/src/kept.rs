//! Blocks that transfers read or write: they are not handed out before those end, whatever becomes of the sequences
//! that had them.

use std::collections::BTreeMap;

use crate::blocks::Leaving;
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::{BlockId, KvCache};

/// By how many transfers each block is kept, and how it goes when it is let go last.
pub(crate) type Kept = BTreeMap<BlockId, (u32, Leaving)>;

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Keeps a block that a sequence has in its table, for a transfer.
    pub(crate) fn keep(&mut self, leaving: Leaving) {
        self.blocks.pool.hold(leaving.block);
        self.kept.entry(leaving.block).or_insert((0, leaving)).0 += 1;
    }

    /// The transfer has ended. If nobody else has the block, it is free.
    pub(crate) fn let_go(&mut self, block: BlockId) {
        let (times, leaving) = self.kept.get_mut(&block).expect("only kept blocks are let go");
        let leaving = *leaving;
        *times -= 1;
        if *times == 0 {
            self.kept.remove(&block);
        }
        self.blocks.release([leaving].into_iter());
        self.drop_unwanted_copies();
    }
}
