//! The default policy: blocks without worth first, then the least recently used.
//!
//! The free list is threaded through the blocks, so that a block in its middle leaves in O(1) when a hit
//! revives it. Block 0 is never handed out; its links serve as the two ends of the list.
//!
//! ```text
//!  next of 0 = first to be handed out  ->  ...  ->  prev of 0 = last to be handed out
//! ```

use super::{Eviction, Facts, Wanted};
use crate::{BlockCount, BlockId};

/// One list in order of the last use.
#[derive(Clone, Debug)]
pub struct Lru {
    /// By block.
    links: Vec<Link>,
}

/// The neighbours of a free block.
#[derive(Clone, Copy, Debug)]
struct Link {
    next: u32,
    prev: u32,
}

impl Lru {
    /// Blocks 1 to `blocks - 1` are free and worthless.
    pub fn new(blocks: BlockCount) -> Self {
        let last = blocks.get() - 1;
        let inner = (1..last).map(|block| Link { next: block + 1, prev: block - 1 });
        let first = Link { next: 1, prev: last };
        Lru { links: [first].into_iter().chain(inner).chain([Link { next: 0, prev: last - 1 }]).collect() }
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
    fn free(&mut self, worthless: &[BlockId], kept: impl Iterator<Item = (BlockId, Facts)>) {
        let (mut front, head) = (0, self.links[0].next);
        for &block in worthless {
            self.link(front, block.get());
            front = block.get();
        }
        self.link(front, head);
        let mut back = self.links[0].prev;
        for (block, _) in kept {
            self.link(back, block.get());
            back = block.get();
        }
        self.link(back, 0);
    }

    #[inline]
    fn revive(&mut self, block: BlockId) {
        let Link { next, prev } = self.links[block.index()];
        self.link(prev, next);
    }

    #[inline]
    fn pick(&mut self, _wanted: Wanted) -> BlockId {
        let first = self.links[0].next;
        self.link(0, self.links[first as usize].next);
        BlockId(first)
    }

    #[inline]
    fn pick_all(&mut self, wanted: impl Iterator<Item = Wanted>, picked: &mut Vec<BlockId>) {
        let links = self.links.as_slice();
        let mut first = links[0].next;
        picked.extend(wanted.map(|_| {
            let block = BlockId(first);
            first = links[first as usize].next;
            block
        }));
        self.link(0, first);
    }

    fn order(&self) -> impl Iterator<Item = BlockId> + '_ {
        std::iter::successors(Some(self.links[0].next), |&block| Some(self.links[block as usize].next))
            .take_while(|&block| block != 0)
            .map(BlockId)
    }

    fn check(&self) -> Result<(), BlockId> {
        let mut before = BlockId::NULL;
        for block in self.order().take(self.links.len()).chain([BlockId::NULL]) {
            if self.links[block.index()].prev != before.get() {
                return Err(block);
            }
            before = block;
        }
        Ok(())
    }
}

impl Lru {
    /// Makes `after` the one that follows `before`.
    #[inline]
    fn link(&mut self, before: u32, after: u32) {
        self.links[before as usize].next = after;
        self.links[after as usize].prev = before;
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
        lru.pick_all(std::iter::repeat_n(Wanted::default(), n), &mut taken);
        taken
    }

    fn free(lru: &mut Lru, blocks: impl IntoIterator<Item = BlockId>, keep: impl Fn(BlockId) -> bool) {
        let facts = Facts { index: 0, before: None, content: 0 };
        let (kept, worthless): (Vec<_>, Vec<_>) = blocks.into_iter().partition(|&block| keep(block));
        lru.free(&worthless, kept.into_iter().map(|block| (block, facts)));
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
        (lru.links[3].prev, lru.links[4].prev) = (lru.links[4].prev, lru.links[3].prev);
        assert_eq!(lru.check(), Err(BlockId(3)));
    }
}
