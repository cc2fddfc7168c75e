//! A sequence's block table: which physical block holds which of its tokens.

use std::ops::Range;

use crate::{BlockId, BlockSize, Slot, TokenIndex};

/// The blocks of one sequence in token order: token `t` is in block `blocks[t / block_size]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockTable<'a> {
    blocks: &'a [BlockId],
    block_size: BlockSize,
}

impl<'a> BlockTable<'a> {
    pub(crate) fn new(blocks: &'a [BlockId], block_size: BlockSize) -> Self {
        BlockTable { blocks, block_size }
    }

    /// The blocks, first tokens first.
    pub fn blocks(self) -> &'a [BlockId] {
        self.blocks
    }

    /// Tokens per block.
    pub fn block_size(self) -> BlockSize {
        self.block_size
    }

    /// Where the token at `index` lives, or none past the last block.
    pub fn slot(self, index: TokenIndex) -> Option<Slot> {
        let size = self.block_size.get();
        let block = self.blocks.get((index.0 / size) as usize)?;
        Some(Slot(u64::from(block.get()) * u64::from(size) + u64::from(index.0 % size)))
    }

    /// Where the tokens of `range` live, in order. Ends early at the end of the last block.
    pub fn slots(self, range: Range<TokenIndex>) -> impl Iterator<Item = Slot> + 'a {
        (range.start.0..range.end.0).map_while(move |index| self.slot(TokenIndex(index)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lives_in_its_block_at_its_offset() {
        let blocks = [BlockId(5), BlockId(2)];
        let table = BlockTable::new(&blocks, BlockSize::new(4).unwrap());
        assert_eq!(table.slot(TokenIndex(3)), Some(Slot(23)));
        let slots: Vec<Slot> = table.slots(TokenIndex(3)..TokenIndex(10)).collect();
        assert_eq!(slots, [23, 8, 9, 10, 11].map(Slot), "and the table ends where its blocks end");
    }
}
