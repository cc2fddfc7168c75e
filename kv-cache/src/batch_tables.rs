//! The block tables and slots of a batch as flat arrays, the way kernels take them. Their memory is kept from step
//! to step.
//!
//! ```text
//!  sequences          0               1                         2
//!  blocks        [ 7  2  9 |  5 |  1  4 ]                   tables one behind the other
//!  block_starts  [ 0          3    4      6 ]               where each begins; one more for the end
//!  slots         [ 31 8 9 | 20 | 18 ]                       of the tokens that this step computes
//!  token_starts  [ 0        3    4     5 ]
//!  lengths       [ 10         1    7 ]                      tokens with K and V after the step
//! ```

use std::ops::Range;

use crate::id::count;
use crate::{BlockId, BlockTable, Error, SequenceId, TokenCount, TokenIndex};

/// The flat arrays of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchTables {
    blocks: Vec<u32>,
    block_starts: Vec<u32>,
    slots: Vec<i64>,
    token_starts: Vec<u32>,
    lengths: Vec<u32>,
    dense: Vec<u32>,
}

impl Default for BatchTables {
    fn default() -> Self {
        BatchTables {
            blocks: Vec::new(),
            block_starts: vec![0],
            slots: Vec::new(),
            token_starts: vec![0],
            lengths: Vec::new(),
            dense: Vec::new(),
        }
    }
}

/// A slot that is no slot: kernels write nothing there.
pub const NO_SLOT: i64 = -1;

impl BatchTables {
    /// Arrays of no sequence.
    pub fn new() -> Self {
        BatchTables::default()
    }

    /// Forgets the last step and keeps the memory.
    pub fn clear(&mut self) {
        let BatchTables { blocks, block_starts, slots, token_starts, lengths, dense } = self;
        blocks.clear();
        block_starts.truncate(1);
        slots.clear();
        token_starts.truncate(1);
        lengths.clear();
        dense.clear();
    }

    /// Adds a sequence of which this step computes the tokens of `range`. A token that falls into the null block,
    /// because its layers look no longer that far back, gets [`NO_SLOT`].
    ///
    /// Cost: O(blocks up to the end of the range + tokens in it).
    ///
    /// # Errors
    /// [`Error::NoRoomFor`] when the table ends before the range; nothing is added then.
    pub fn push(
        &mut self,
        sequence: SequenceId,
        table: BlockTable<'_>,
        range: Range<TokenIndex>,
    ) -> Result<(), Error> {
        let size = table.block_size();
        let end = TokenCount(range.end.0);
        let needed = size.blocks_for(end).0 as usize;
        let Some(blocks) = table.blocks().get(..needed) else {
            let room = size.tokens_in(crate::BlockCount(count(table.blocks().len())));
            return Err(Error::NoRoomFor { sequence, tokens: end, room });
        };
        self.blocks.extend(blocks.iter().map(|block| block.get()));
        self.block_starts.push(count(self.blocks.len()));
        let size = size.get();
        let mut token = range.start.0;
        while token < range.end.0 {
            let (block, offset) = (blocks[(token / size) as usize], token % size);
            let here = (size - offset).min(range.end.0 - token);
            let slot = i64::from(block.get()) * i64::from(size) + i64::from(offset);
            if block == BlockId::NULL {
                self.slots.extend((0..here).map(|_| NO_SLOT));
            } else {
                self.slots.extend(slot..slot + i64::from(here));
            }
            token += here;
        }
        self.token_starts.push(count(self.slots.len()));
        self.lengths.push(end.0);
        Ok(())
    }

    /// How many sequences were added.
    pub fn sequences(&self) -> usize {
        self.lengths.len()
    }

    /// All tables, one behind the other.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Where each table begins in [`blocks`](BatchTables::blocks), and where the last one ends (FlashInfer's `indptr`).
    pub fn block_starts(&self) -> &[u32] {
        &self.block_starts
    }

    /// Where the K and V of each computed token go: `block * block_size + offset`, or [`NO_SLOT`].
    pub fn slots(&self) -> &[i64] {
        &self.slots
    }

    /// Where each sequence's tokens begin in [`slots`](BatchTables::slots), and where the last one's end
    /// (`cu_seqlens`).
    pub fn token_starts(&self) -> &[u32] {
        &self.token_starts
    }

    /// Tokens of each sequence that have K and V after the step.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// The tables under one another, each filled up with the null block to the longest of them: `[sequences, width]`
    /// row-major, and the width.
    pub fn dense(&mut self) -> (&[u32], usize) {
        let lengths = self.block_starts.windows(2).map(|ends| ends[1] - ends[0]);
        let width = lengths.max().unwrap_or(0) as usize;
        (self.dense_of(width), width)
    }

    /// The same, in rows of `width`, as a captured graph wants them. Longer tables are cut off.
    pub fn dense_of(&mut self, width: usize) -> &[u32] {
        let BatchTables { blocks, block_starts, dense, .. } = self;
        dense.clear();
        for ends in block_starts.windows(2) {
            let table = &blocks[ends[0] as usize..ends[1] as usize];
            let shown = &table[..table.len().min(width)];
            dense.extend_from_slice(shown);
            dense.resize(dense.len() + width - shown.len(), BlockId::NULL.get());
        }
        dense
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockSize;

    fn table(blocks: &[BlockId]) -> BlockTable<'_> {
        BlockTable::new(blocks, BlockSize::new(4).unwrap())
    }

    #[test]
    fn sequences_lie_one_behind_the_other_and_tables_under_one_another() {
        let mut tables = BatchTables::new();
        for _ in 0..2 {
            tables.clear();
            let [a, b, c] = [vec![7, 2, 9], vec![5], vec![0, 4]]
                .map(|blocks: Vec<u32>| blocks.into_iter().map(BlockId).collect::<Vec<_>>());
            tables.push(SequenceId(1), table(&a), TokenIndex(3)..TokenIndex(6)).unwrap();
            tables.push(SequenceId(2), table(&b), TokenIndex(0)..TokenIndex(1)).unwrap();
            tables.push(SequenceId(3), table(&c), TokenIndex(2)..TokenIndex(5)).unwrap();
            assert_eq!(tables.blocks(), [7, 2, 5, 0, 4], "as many blocks as the step reads");
            assert_eq!(tables.block_starts(), [0, 2, 3, 5]);
            assert_eq!(tables.slots(), [31, 8, 9, 20, NO_SLOT, NO_SLOT, 16]);
            assert_eq!(tables.token_starts(), [0, 3, 4, 7]);
            assert_eq!(tables.lengths(), [6, 1, 5]);
            assert_eq!(tables.dense(), (&[7, 2, 5, 0, 0, 4][..], 2));
            assert_eq!(tables.dense_of(3), [7, 2, 0, 5, 0, 0, 0, 4, 0]);
            assert_eq!(tables.dense_of(1), [7, 5, 0]);
        }
    }

    #[test]
    fn a_table_that_is_too_short_is_refused_and_nothing_is_added() {
        let mut tables = BatchTables::new();
        let blocks = [BlockId(1), BlockId(2)];
        let refused = tables.push(SequenceId(9), table(&blocks), TokenIndex(7)..TokenIndex(9));
        let expected =
            Error::NoRoomFor { sequence: SequenceId(9), tokens: TokenCount(9), room: TokenCount(8) };
        assert_eq!(refused, Err(expected));
        assert_eq!(tables, BatchTables::new());
        assert_eq!(tables.dense(), (&[][..], 0));
    }
}
