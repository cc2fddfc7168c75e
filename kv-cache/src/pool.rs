//! The blocks themselves: who is free, and who is used how often.

use crate::blocks::Leaving;
use crate::evict::{Eviction, Facts, Wanted};
use crate::id::count;
use crate::{BlockCount, BlockId};

/// Reference counts, and the free blocks as the eviction policy keeps them.
#[derive(Clone, Debug)]
pub(crate) struct Pool<E> {
    pub(crate) policy: E,
    pub(crate) references: Vec<u32>,
    free: u32,
    /// What a release frees, for as long as it lasts.
    worthless: Vec<BlockId>,
    kept: Vec<Leaving>,
}

impl<E: Eviction> Pool<E> {
    /// All blocks free, and `policy` fresh.
    pub(crate) fn new(blocks: BlockCount, policy: E) -> Self {
        let references = vec![0; blocks.get() as usize];
        Pool { policy, references, free: blocks.get() - 1, worthless: Vec::new(), kept: Vec::new() }
    }

    /// All blocks but the null block.
    pub(crate) fn usable(&self) -> BlockCount {
        BlockCount(count(self.references.len()) - 1)
    }

    pub(crate) fn free(&self) -> BlockCount {
        BlockCount(self.free)
    }

    pub(crate) fn references(&self, block: BlockId) -> u32 {
        self.references[block.index()]
    }

    /// Takes a free block for each thing wanted, and appends it to `taken`. The caller has made sure that there are as
    /// many.
    #[inline]
    pub(crate) fn take(&mut self, wanted: impl ExactSizeIterator<Item = Wanted>, taken: &mut Vec<BlockId>) {
        let blocks = BlockCount(count(wanted.len()));
        assert!(blocks.get() <= self.free, "{blocks} blocks are taken, {} are free", self.free);
        let before = taken.len();
        self.policy.pick_all(wanted, taken);
        let references = self.references.as_mut_slice();
        for block in &taken[before..] {
            references[block.index()] = 1;
        }
        self.free -= blocks.get();
    }

    /// Takes one free block. The caller has made sure that there is one.
    #[inline]
    pub(crate) fn take_one(&mut self, wanted: Wanted) -> BlockId {
        assert!(self.free > 0, "a block is taken, none is free");
        let block = self.policy.pick(wanted);
        self.references[block.index()] = 1;
        self.free -= 1;
        block
    }

    /// A sequence asked for what `block` holds, and uses it from now on; a free one is free no more.
    #[inline]
    pub(crate) fn share(&mut self, block: BlockId) {
        if self.references[block.index()] == 0 {
            self.policy.revive(block);
            self.free -= 1;
        } else {
            self.policy.reused(block);
        }
        self.references[block.index()] += 1;
    }

    /// One more user of `block`, whose content nobody asked for: a fork, a pin.
    pub(crate) fn hold(&mut self, block: BlockId) {
        if self.references[block.index()] == 0 {
            self.policy.revive(block);
            self.free -= 1;
        }
        self.references[block.index()] += 1;
    }

    /// One user less of each of `blocks`, null blocks left out. Those that nobody uses any more are free: `is_found`
    /// says which of them hold something that can be found, `leaving` where they were, `content` what it is.
    #[inline]
    pub(crate) fn release<T>(
        &mut self,
        blocks: impl Iterator<Item = (BlockId, T)>,
        is_found: impl Fn(BlockId) -> bool,
        leaving: impl Fn(T) -> Leaving,
        content: impl Fn(BlockId) -> u32,
    ) {
        let Pool { policy, references, free, worthless, kept } = self;
        let references = references.as_mut_slice();
        for (block, from) in blocks {
            if block == BlockId::NULL {
                continue;
            }
            let references = &mut references[block.index()];
            assert!(*references > 0, "block {block} is released once per user");
            *references -= 1;
            match *references {
                0 if is_found(block) => kept.push(leaving(from)),
                0 => worthless.push(block),
                _ => (),
            }
        }
        *free += count(worthless.len() + kept.len());
        policy.free(
            worthless,
            kept.drain(..).map(|Leaving { block, index, before }| {
                let before = before.filter(|&before| before != BlockId::NULL);
                (block, Facts { index, before, content: content(block) })
            }),
        );
        worthless.clear();
    }

    /// The free blocks, next to be handed out first.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.policy.order()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lru;

    const LEAVING: Leaving = Leaving { block: BlockId(2), index: 0, before: None };

    #[test]
    fn a_block_leaves_the_middle_of_the_list_and_returns_when_its_last_user_goes() {
        let mut pool = Pool::new(BlockCount(5), Lru::new(BlockCount(5)));
        let order = |pool: &Pool<Lru>| pool.free_blocks().map(BlockId::get).collect::<Vec<_>>();
        let release = |pool: &mut Pool<Lru>| {
            pool.release([(LEAVING.block, LEAVING)].into_iter(), |_| true, |leaving| leaving, |_| 0)
        };
        pool.share(BlockId(2));
        pool.share(BlockId(2));
        assert_eq!(order(&pool), [1, 3, 4]);
        release(&mut pool);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4], BlockCount(3)));
        release(&mut pool);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4, 2], BlockCount(4)));
    }
}
