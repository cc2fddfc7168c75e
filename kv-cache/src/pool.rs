//! The blocks themselves: who is free, who is used how often, and who is handed out next.
//!
//! The free list is threaded through the blocks, so that a block in its middle leaves in O(1) when a hit
//! revives it. Block 0 is never handed out; its links serve as the two ends of the list.
//!
//! ```text
//!  next[0] = first to be handed out  ->  ...  ->  prev[0] = last to be handed out
//! ```

use crate::id::count;
use crate::{BlockCount, BlockId};

/// Free list and reference counts.
#[derive(Clone, Debug)]
pub(crate) struct Pool {
    pub(crate) next: Vec<u32>,
    pub(crate) prev: Vec<u32>,
    pub(crate) references: Vec<u32>,
    free: u32,
}

impl Pool {
    /// Blocks 1 to `blocks - 1`, free, in this order.
    pub(crate) fn new(blocks: BlockCount) -> Self {
        let last = blocks.get() - 1;
        Pool {
            next: (1..=last).chain([0]).collect(),
            prev: [last].into_iter().chain(0..last).collect(),
            references: vec![0; blocks.get() as usize],
            free: last,
        }
    }

    /// All blocks but the null block.
    pub(crate) fn usable(&self) -> BlockCount {
        BlockCount(count(self.next.len()) - 1)
    }

    pub(crate) fn free(&self) -> BlockCount {
        BlockCount(self.free)
    }

    pub(crate) fn references(&self, block: BlockId) -> u32 {
        self.references[block.index()]
    }

    /// Takes the first `blocks` free blocks and shows each. The caller has made sure that there are as many.
    #[inline]
    pub(crate) fn take(&mut self, blocks: BlockCount, mut show: impl FnMut(BlockId)) {
        assert!(blocks.get() <= self.free, "{blocks} blocks are taken, {} are free", self.free);
        let mut first = self.next[0];
        for _ in 0..blocks.get() {
            self.references[first as usize] = 1;
            show(BlockId(first));
            first = self.next[first as usize];
        }
        self.link(0, first);
        self.free -= blocks.get();
    }

    /// One more user of `block`; a free one leaves the free list.
    pub(crate) fn retain(&mut self, block: BlockId) {
        if self.references[block.index()] == 0 {
            self.unlink(block);
        }
        self.references[block.index()] += 1;
    }

    /// One user less of each of `blocks`. Of those that nobody uses any more, the worthless ones become the
    /// next to be handed out, in the order given; the others (`keep`) go behind all that is free.
    ///
    /// ```text
    ///  0 -> worthless ... front -> head ... back -> kept ... back -> 0
    ///       grows at its end       was free         grows at its end
    /// ```
    pub(crate) fn release(&mut self, blocks: impl Iterator<Item = BlockId>, keep: impl Fn(BlockId) -> bool) {
        let (mut front, mut head, mut back) = (0, self.next[0], self.prev[0]);
        for block in blocks {
            let references = &mut self.references[block.index()];
            assert!(*references > 0, "block {block} is released once per user");
            *references -= 1;
            if *references > 0 {
                continue;
            }
            if !keep(block) {
                self.link(front, block.get());
                front = block.get();
            } else if back == 0 {
                (head, back) = (block.get(), block.get());
            } else {
                self.link(back, block.get());
                back = block.get();
            }
            self.free += 1;
        }
        self.link(front, head);
        self.link(if back == 0 { front } else { back }, 0);
    }

    /// The free blocks, next to be handed out first.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(Some(self.next[0]), |&block| Some(self.next[block as usize]))
            .take_while(|&block| block != 0)
            .map(BlockId)
    }

    /// Makes `after` the one that follows `before`.
    fn link(&mut self, before: u32, after: u32) {
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
    }

    fn unlink(&mut self, block: BlockId) {
        let (before, after) = (self.prev[block.index()], self.next[block.index()]);
        self.link(before, after);
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(pool: &Pool) -> Vec<u32> {
        pool.free_blocks().map(BlockId::get).collect()
    }

    fn take(pool: &mut Pool, n: u32) -> Vec<BlockId> {
        let mut taken = Vec::new();
        pool.take(BlockCount(n), |block| taken.push(block));
        taken
    }

    #[test]
    fn worthless_blocks_go_first_in_the_order_given() {
        let mut pool = Pool::new(BlockCount(6));
        let blocks = take(&mut pool, 5);
        pool.release([blocks[4]].into_iter(), |_| false);
        pool.release([blocks[3], blocks[2]].into_iter(), |_| false);
        pool.release([blocks[1], blocks[0]].into_iter(), |_| false);
        assert_eq!(order(&pool), [2, 1, 4, 3, 5]);
    }

    #[test]
    fn kept_blocks_go_last_and_a_mixed_release_splits() {
        let mut pool = Pool::new(BlockCount(8));
        let blocks = take(&mut pool, 5);
        pool.release(blocks.into_iter().rev(), |block| block.get() <= 3);
        assert_eq!(order(&pool), [5, 4, 6, 7, 3, 2, 1]);
    }

    #[test]
    fn all_blocks_can_be_out_and_come_back() {
        let mut pool = Pool::new(BlockCount(5));
        let blocks = take(&mut pool, 4);
        assert_eq!((order(&pool), pool.free()), (vec![], BlockCount(0)));
        pool.release(blocks.into_iter().rev(), |block| block.get() <= 2);
        assert_eq!((order(&pool), pool.free()), (vec![4, 3, 2, 1], BlockCount(4)));
        assert_eq!(pool.prev, [1, 2, 3, 4, 0], "and the way back is the same");
    }

    #[test]
    fn a_block_leaves_the_middle_of_the_list_and_returns_when_its_last_user_goes() {
        let mut pool = Pool::new(BlockCount(5));
        pool.retain(BlockId(2));
        pool.retain(BlockId(2));
        assert_eq!(order(&pool), [1, 3, 4]);
        pool.release([BlockId(2)].into_iter(), |_| true);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4], BlockCount(3)));
        pool.release([BlockId(2)].into_iter(), |_| true);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4, 2], BlockCount(4)));
    }
}
