//! The default policy: the least recently used goes first.
//!
//! The list is threaded through the blocks, so that a block in its middle leaves in O(1) when a hit
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
    /// A fresh policy. 8 bytes a block.
    pub fn new(blocks: BlockCount) -> Self {
        Lru { links: vec![Link { next: 0, prev: 0 }; blocks.get() as usize] }
    }
}

impl Eviction for Lru {
    /// They go behind all that is free.
    #[inline]
    fn free(&mut self, kept: impl Iterator<Item = (BlockId, Facts)>) {
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

    fn of_five(freed: [u32; 5]) -> Lru {
        let mut lru = Lru::new(BlockCount(6));
        let facts = Facts { index: 0, before: None, content: 0 };
        lru.free(freed.into_iter().map(|block| (BlockId(block), facts)));
        lru
    }

    #[test]
    fn blocks_leave_in_the_order_in_which_they_came_but_for_those_revived() {
        let mut lru = of_five([4, 2, 5, 1, 3]);
        lru.revive(BlockId(5));
        lru.revive(BlockId(3));
        assert_eq!(order(&lru), [4, 2, 1]);
        let mut picked = vec![lru.pick(Wanted::default())];
        lru.pick_all([Wanted::default(); 2].into_iter(), &mut picked);
        assert_eq!((picked, order(&lru)), (vec![BlockId(4), BlockId(2), BlockId(1)], vec![]));
    }

    #[test]
    fn a_broken_link_is_found() {
        let mut lru = of_five([1, 2, 3, 4, 5]);
        (lru.links[3].prev, lru.links[4].prev) = (lru.links[4].prev, lru.links[3].prev);
        assert_eq!(lru.check(), Err(BlockId(3)));
    }
}
