//! The blocks themselves: who is free, and who is used how often.

use std::ops::Range;

use crate::blocks::Leaving;
use crate::evict::{Eviction, Facts, Wanted};
use crate::id::count;
use crate::{BlockCount, BlockId, TenantId};

/// Reference counts, and the free blocks: those that hold nothing on a stack, the others as the eviction policy keeps
/// them.
///
/// ```text
///  handed out next                                                                     last
///  worthless: last, ..., first   |   policy: its first choice, ..., what it wants to keep
/// ```
#[derive(Clone, Debug)]
pub(crate) struct Pool<E> {
    pub(crate) policy: E,
    pub(crate) references: Vec<u32>,
    free: u32,
    /// Free blocks whose content nobody can find. The last is the next to be handed out.
    pub(crate) worthless: Vec<BlockId>,
    /// The others that a release frees, for as long as it lasts.
    kept: Vec<Leaving>,
}

impl<E: Eviction> Pool<E> {
    /// All blocks free and worthless, and `policy` fresh.
    pub(crate) fn new(blocks: BlockCount, policy: E) -> Self {
        let references = vec![0; blocks.get() as usize];
        let worthless = (1..blocks.get()).rev().map(BlockId).collect();
        Pool { policy, references, free: blocks.get() - 1, worthless, kept: Vec::new() }
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

    /// Takes a free block for each of `places`, whose `content` is known or not, and appends it to `taken`: first
    /// blocks that hold nothing, then what the policy picks. Answers where these begin in `taken`. The caller has made
    /// sure that there are as many.
    #[inline]
    pub(crate) fn take(
        &mut self,
        tenant: TenantId,
        places: Range<u32>,
        content: impl Fn(u32) -> Option<u32>,
        taken: &mut Vec<BlockId>,
    ) -> usize {
        let blocks = count(places.len());
        assert!(blocks <= self.free, "{blocks} blocks are taken, {} are free", self.free);
        self.free -= blocks;
        let Pool { policy, references, worthless, .. } = self;
        let references = references.as_mut_slice();
        let wanted = |place| Wanted { content: content(place), tenant };
        let worthless_max = blocks.min(policy.allowance(tenant).get()) as usize;
        let stay = worthless.len().saturating_sub(worthless_max);
        let first = taken.len();
        taken.extend(worthless.drain(stay..).rev());
        let picked = taken.len();
        for (&block, place) in taken[first..].iter().zip(places.clone()) {
            references[block.index()] = 1;
            policy.given(block, wanted(place));
        }
        let rest = places.start + count(picked - first)..places.end;
        if !rest.is_empty() {
            policy.pick_all(rest.map(wanted), taken);
            taken[picked..].iter().for_each(|block| references[block.index()] = 1);
        }
        picked
    }

    /// Takes one free block. The caller has made sure that there is one.
    #[inline]
    pub(crate) fn take_one(&mut self, wanted: Wanted) -> BlockId {
        assert!(self.free > 0, "a block is taken, none is free");
        let may_have = self.policy.allowance(wanted.tenant) > BlockCount(0);
        let block = match self.worthless.pop_if(|_| may_have) {
            Some(block) => {
                self.policy.given(block, wanted);
                block
            }
            None => self.policy.pick(wanted),
        };
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
        let before = worthless.len();
        for (block, from) in blocks {
            if block == BlockId::NULL {
                continue;
            }
            let users = references[block.index()].checked_sub(1).expect("a block is released once per user");
            references[block.index()] = users;
            if users > 0 {
                continue;
            }
            if is_found(block) {
                kept.push(leaving(from));
            } else {
                worthless.push(block);
            }
        }
        let emptied = &mut worthless[before..];
        *free += count(emptied.len() + kept.len());
        emptied.reverse();
        emptied.iter().for_each(|&block| policy.emptied(block));
        policy.free(kept.drain(..).map(|Leaving { block, index, before }| {
            let before = before.filter(|&before| before != BlockId::NULL);
            (block, Facts { index, before, content: content(block) })
        }));
    }

    /// What `block` held cannot be found any more. If it is free, the policy says whether it is handed out in its turn.
    pub(crate) fn forget(&mut self, block: BlockId) {
        if self.references[block.index()] == 0 && self.policy.forget(block) {
            self.worthless.push(block);
        }
    }

    /// All blocks are free, and nothing they hold can be found any more.
    pub(crate) fn reset(&mut self) {
        self.policy.reset(&mut self.worthless);
    }

    /// The free blocks, next to be handed out first.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.worthless.iter().rev().copied().chain(self.policy.order())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Lru;

    /// Of eight blocks, of which the first three can be found.
    fn pool() -> Pool<Lru> {
        Pool::new(BlockCount(8), Lru::new(BlockCount(8)))
    }

    fn order(pool: &Pool<Lru>) -> Vec<u32> {
        let order: Vec<u32> = pool.free_blocks().map(BlockId::get).collect();
        assert_eq!(BlockCount(count(order.len())), pool.free());
        order
    }

    fn take(pool: &mut Pool<Lru>, blocks: u32) -> Vec<u32> {
        let mut taken = Vec::new();
        pool.take(TenantId::default(), 0..blocks, |_| None, &mut taken);
        taken.into_iter().map(BlockId::get).collect()
    }

    fn release(pool: &mut Pool<Lru>, blocks: &[u32]) {
        let blocks = blocks.iter().map(|&block| (BlockId(block), BlockId(block)));
        let leaving = |block| Leaving { block, index: 0, before: None };
        pool.release(blocks, |block| block.get() < 4, leaving, |_| 0);
    }

    #[test]
    fn worthless_blocks_go_first_in_the_order_given_and_a_mixed_release_splits() {
        let mut pool = pool();
        assert_eq!(order(&pool), [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(take(&mut pool, 6), [1, 2, 3, 4, 5, 6]);
        release(&mut pool, &[6]);
        release(&mut pool, &[5, 3, 4]);
        release(&mut pool, &[2, 1]);
        assert_eq!(order(&pool), [5, 4, 6, 7, 3, 2, 1]);
    }

    #[test]
    fn all_blocks_can_be_out_and_come_back() {
        let mut pool = pool();
        take(&mut pool, 3);
        release(&mut pool, &[3, 2, 1]);
        assert_eq!(take(&mut pool, 7), [4, 5, 6, 7, 3, 2, 1]);
        assert_eq!(order(&pool), []);
        release(&mut pool, &[7, 1, 6]);
        assert_eq!(order(&pool), [7, 6, 1]);
    }

    #[test]
    fn a_block_leaves_the_middle_of_the_list_and_returns_when_its_last_user_goes() {
        let mut pool = pool();
        take(&mut pool, 3);
        release(&mut pool, &[1, 2, 3]);
        pool.share(BlockId(2));
        pool.share(BlockId(2));
        assert_eq!(order(&pool), [4, 5, 6, 7, 1, 3]);
        release(&mut pool, &[2]);
        assert_eq!(order(&pool), [4, 5, 6, 7, 1, 3]);
        release(&mut pool, &[2]);
        assert_eq!(order(&pool), [4, 5, 6, 7, 1, 3, 2]);
    }

    #[test]
    fn what_is_forgotten_stays_in_its_place_under_lru() {
        let mut pool = pool();
        take(&mut pool, 3);
        release(&mut pool, &[1, 2, 3]);
        pool.forget(BlockId(2));
        assert_eq!(order(&pool), [4, 5, 6, 7, 1, 2, 3]);
        pool.reset();
        assert_eq!(order(&pool), [4, 5, 6, 7, 1, 2, 3]);
    }
}
