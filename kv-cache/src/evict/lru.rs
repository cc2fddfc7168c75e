//! The default policy: blocks without worth first, then the least recently used.
//!
//! The free list is threaded through the blocks, so that a block in its middle leaves in O(1) when a hit
//! revives it. Block 0 is never handed out; its links serve as the two ends of the list.
//!
//! ```text
//!  next[0] = first to be handed out  ->  ...  ->  prev[0] = last to be handed out
//! ```

use super::{Eviction, Facts, Wanted};
use crate::{BlockCount, BlockId};

/// One list in order of the last use.
#[derive(Clone, Debug)]
pub struct Lru {
    next: Vec<u32>,
    prev: Vec<u32>,
}

impl Lru {
    /// Blocks 1 to `blocks - 1` are free and worthless.
    pub fn new(blocks: BlockCount) -> Self {
        let last = blocks.get() - 1;
        Lru { next: (1..=last).chain([0]).collect(), prev: [last].into_iter().chain(0..last).collect() }
    }
}

impl Eviction for Lru {
    /// The worthless ones become the next to be handed out, in the order given; the others go behind all that
    /// is free.
    ///
    /// ```text
    ///  0 -> worthless ... front -> head ... back -> kept ... back -> 0
    ///       grows at its end       was free         grows at its end
    /// ```
    #[inline]
    fn free(&mut self, blocks: impl Iterator<Item = (BlockId, Option<Facts>)>) {
        let (mut front, mut head, mut back) = (0, self.next[0], self.prev[0]);
        for (block, facts) in blocks {
            if facts.is_none() {
                self.link(front, block.get());
                front = block.get();
            } else if back == 0 {
                (head, back) = (block.get(), block.get());
            } else {
                self.link(back, block.get());
                back = block.get();
            }
        }
        self.link(front, head);
        self.link(if back == 0 { front } else { back }, 0);
    }

    #[inline]
    fn revive(&mut self, block: BlockId) {
        self.link(self.prev[block.index()], self.next[block.index()]);
    }

    #[inline]
    fn pick(&mut self, wanted: impl Iterator<Item = Wanted>, mut show: impl FnMut(BlockId)) {
        let mut first = self.next[0];
        for _ in wanted {
            show(BlockId(first));
            first = self.next[first as usize];
        }
        self.link(0, first);
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(Some(self.next[0]), |&block| Some(self.next[block as usize]))
            .take_while(|&block| block != 0)
            .map(BlockId)
    }

    fn check(&self) -> Result<(), BlockId> {
        let mut before = BlockId::NULL;
        for block in self.order().take(self.next.len()).chain([BlockId::NULL]) {
            if self.prev[block.index()] != before.get() {
                return Err(block);
            }
            before = block;
        }
        Ok(())
    }
}

impl Lru {
    /// Makes `after` the one that follows `before`.
    fn link(&mut self, before: u32, after: u32) {
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(lru: &Lru) -> Vec<u32> {
        assert_eq!(lru.check(), Ok(()));
        lru.order().map(BlockId::get).collect()
    }

    fn take(lru: &mut Lru, n: usize) -> Vec<BlockId> {
        let mut taken = Vec::new();
        lru.pick(std::iter::repeat_n(Wanted::default(), n), |block| taken.push(block));
        taken
    }

    fn free(lru: &mut Lru, blocks: impl IntoIterator<Item = BlockId>, keep: impl Fn(BlockId) -> bool) {
        let facts = Facts { index: 0, before: None, content: 0 };
        lru.free(blocks.into_iter().map(|block| (block, keep(block).then_some(facts))));
    }

    #[test]
    fn worthless_blocks_go_first_in_the_order_given() {
        let mut lru = Lru::new(BlockCount(6));
        let blocks = take(&mut lru, 5);
        free(&mut lru, [blocks[4]], |_| false);
        free(&mut lru, [blocks[3], blocks[2]], |_| false);
        free(&mut lru, [blocks[1], blocks[0]], |_| false);
        assert_eq!(order(&lru), [2, 1, 4, 3, 5]);
    }

    #[test]
    fn kept_blocks_go_last_and_a_mixed_release_splits() {
        let mut lru = Lru::new(BlockCount(8));
        let blocks = take(&mut lru, 5);
        free(&mut lru, blocks.into_iter().rev(), |block| block.get() <= 3);
        assert_eq!(order(&lru), [5, 4, 6, 7, 3, 2, 1]);
    }

    #[test]
    fn all_blocks_can_be_out_and_come_back() {
        let mut lru = Lru::new(BlockCount(5));
        let blocks = take(&mut lru, 4);
        assert_eq!(order(&lru), []);
        free(&mut lru, blocks.into_iter().rev(), |block| block.get() <= 2);
        assert_eq!(order(&lru), [4, 3, 2, 1]);
    }

    #[test]
    fn a_broken_link_is_found() {
        let mut lru = Lru::new(BlockCount(8));
        lru.prev.swap(3, 4);
        assert_eq!(lru.check(), Err(BlockId(3)));
    }
}
