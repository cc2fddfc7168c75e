//! Which free block is handed out next, and so whose content is lost.

mod lru;

use std::fmt::Debug;

use crate::BlockId;

pub use lru::Lru;

/// What a policy may judge a free block by. A block that nobody can find has no worth, and no facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// The block's place in the table it leaves: 0 is the beginning of the sequence.
    pub index: u32,
}

/// Keeps the free blocks and chooses among them. Used blocks are none of its business: it hears of a block when
/// its last user goes, and forgets it when it is handed out or revived.
///
/// A fresh policy holds blocks 1 to n - 1, worthless, and hands them out in this order.
pub trait Eviction: Debug {
    /// These blocks are free from now on. Those without facts hold nothing that can be found.
    fn free(&mut self, blocks: impl Iterator<Item = (BlockId, Option<Facts>)>);

    /// A free block has a user again, because its content was asked for.
    fn revive(&mut self, block: BlockId);

    /// Hands out `count` free blocks, one by one. There are as many.
    fn pick(&mut self, count: u32, show: impl FnMut(BlockId));

    /// The free blocks, next to be handed out first: for reports and audits.
    fn order(&self) -> impl Iterator<Item = BlockId> + '_;

    /// Whether what the policy keeps besides the order is sound; else a block where it is not.
    ///
    /// # Errors
    /// The block.
    fn check(&self) -> Result<(), BlockId> {
        Ok(())
    }
}
