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
}

impl<E: Eviction> Pool<E> {
    /// All blocks free, and `policy` fresh.
    pub(crate) fn new(blocks: BlockCount, policy: E) -> Self {
        Pool { policy, references: vec![0; blocks.get() as usize], free: blocks.get() - 1 }
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

    /// Takes a free block for each thing wanted, and shows it. The caller has made sure that there are as many.
    #[inline]
    pub(crate) fn take(
        &mut self,
        wanted: impl ExactSizeIterator<Item = Wanted>,
        mut show: impl FnMut(BlockId),
    ) {
        let blocks = BlockCount(count(wanted.len()));
        assert!(blocks.get() <= self.free, "{blocks} blocks are taken, {} are free", self.free);
        let Pool { policy, references, .. } = self;
        policy.pick(wanted, |block| {
            references[block.index()] = 1;
            show(block);
        });
        self.free -= blocks.get();
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

    /// One user less of each of `blocks`. Those that nobody
    /// uses any more are free, and `facts` says what the policy may know of them, if they can be found.
    #[inline]
    pub(crate) fn release(
        &mut self,
        blocks: impl Iterator<Item = Leaving>,
        facts: impl Fn(Leaving) -> Option<Facts>,
    ) {
        let Pool { policy, references, free } = self;
        policy.free(blocks.filter_map(|leaving| {
            let block = leaving.block;
            let references = &mut references[block.index()];
            assert!(*references > 0, "block {block} is released once per user");
            *references -= 1;
            (*references == 0).then(|| {
                *free += 1;
                (block, facts(leaving))
            })
        }));
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
    const FACTS: Facts = Facts { index: 0, before: None, content: 0 };

    #[test]
    fn a_block_leaves_the_middle_of_the_list_and_returns_when_its_last_user_goes() {
        let mut pool = Pool::new(BlockCount(5), Lru::new(BlockCount(5)));
        let order = |pool: &Pool<Lru>| pool.free_blocks().map(BlockId::get).collect::<Vec<_>>();
        let release = |pool: &mut Pool<Lru>| pool.release([LEAVING].into_iter(), |_| Some(FACTS));
        pool.share(BlockId(2));
        pool.share(BlockId(2));
        assert_eq!(order(&pool), [1, 3, 4]);
        release(&mut pool);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4], BlockCount(3)));
        release(&mut pool);
        assert_eq!((order(&pool), pool.free()), (vec![1, 3, 4, 2], BlockCount(4)));
    }
}
