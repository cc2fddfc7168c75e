//! Free blocks as the tree they form: a block hangs on the one before it in the table that it left, and is of no use
//! without it. Only leaves, on which no free block hangs, may be handed out.

use super::heap::{Heap, Rank};
use crate::BlockId;

/// The findable free blocks, their leaves by rank. O(log n) per block, nothing allocated after `new`.
///
/// A block is freed while the one before it is still in use, or in the same breath. One that comes later, because a
/// transfer has kept it, hangs on nothing. So the tree has no circle, and where there is a free block there is a leaf.
#[derive(Clone, Debug)]
pub(crate) struct Leaves {
    leaves: Heap,
    /// By block: whether it is here.
    here: Vec<bool>,
    /// By block: what it hangs on, and which life of that block is meant. 0 for nothing.
    before: Vec<(u32, u32)>,
    /// By block: how many hang on it.
    hanging: Vec<u32>,
    /// By block: how often it was given to something new.
    life: Vec<u32>,
    len: usize,
}

impl Leaves {
    pub(crate) fn new(blocks: u32) -> Self {
        let length = blocks as usize;
        Leaves {
            leaves: Heap::new(blocks),
            here: vec![false; length],
            before: vec![(0, 0); length],
            hanging: vec![0; length],
            life: vec![0; length],
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The rank that a block has, or had.
    pub(crate) fn rank(&self, block: BlockId) -> Rank {
        self.leaves.rank(block.get())
    }

    /// The leaf of the lowest rank.
    pub(crate) fn first(&self) -> Option<BlockId> {
        self.leaves.first().map(BlockId)
    }

    /// Enters a block that hangs on `before`, which is still in use.
    pub(crate) fn insert(&mut self, block: BlockId, before: Option<BlockId>, rank: Rank) {
        self.leaves.set_rank(block.get(), rank);
        (self.here[block.index()], self.len) = (true, self.len + 1);
        let before = before.filter(|&before| !self.here[before.index()]);
        self.before[block.index()] = before.map_or((0, 0), |before| {
            self.hanging[before.index()] += 1;
            (before.get(), self.life[before.index()])
        });
        if self.hanging[block.index()] == 0 {
            self.leaves.push(block.get());
        }
    }

    /// Takes a block out. What hangs on it stays: it goes on holding the same content.
    pub(crate) fn remove(&mut self, block: BlockId) {
        (self.here[block.index()], self.len) = (false, self.len - 1);
        self.leaves.remove(block.get());
        let (before, life) = std::mem::take(&mut self.before[block.index()]);
        let before = BlockId(before);
        if before == BlockId::NULL || self.life[before.index()] != life {
            return;
        }
        self.hanging[before.index()] -= 1;
        if self.hanging[before.index()] == 0 && self.here[before.index()] {
            self.leaves.push(before.get());
        }
    }

    /// Takes all blocks out and appends them to `out`, the leaf of the lowest rank first.
    pub(crate) fn drain(&mut self, out: &mut Vec<BlockId>) {
        while let Some(block) = self.first() {
            self.remove(block);
            out.push(block);
        }
    }

    /// A block that is not here is given to something new: nothing hangs on it now.
    pub(crate) fn begin_anew(&mut self, block: BlockId) {
        self.life[block.index()] = self.life[block.index()].wrapping_add(1);
        self.hanging[block.index()] = 0;
    }

    /// A block whose place in the tree is wrong.
    pub(crate) fn broken(&self) -> Option<BlockId> {
        let mut hanging = vec![0; self.hanging.len()];
        for (&(before, life), &here) in self.before.iter().zip(&self.here) {
            if here && before != 0 && self.life[before as usize] == life {
                hanging[before as usize] += 1;
            }
        }
        let unsound = (0u32..).map(BlockId).zip(&self.here).find_map(|(block, &here)| {
            let leaf = here && hanging[block.index()] == 0;
            let sound = hanging[block.index()] == self.hanging[block.index()]
                && leaf == self.leaves.contains(block.get());
            (!sound).then_some(block)
        });
        unsound.or(self.leaves.broken().map(BlockId))
    }
}
