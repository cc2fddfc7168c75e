//! The blocks with what is in them: the pool that says who uses them, and the index that says what is found in
//! them. What a block held is forgotten when it is handed out, not before.

use std::ops::Range;

use crate::event::Stored;
use crate::evict::{Eviction, Wanted};
use crate::id::count;
use crate::pool::Pool;
use crate::prefix::{AT_ONCE, Due, Prefix};
use crate::residency::Watch;
use crate::{BlockCopy, BlockId, Digest, GroupId, Lost, TenantId};

/// A block that leaves a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaving {
    pub(crate) block: BlockId,
    /// Its place in the table.
    pub(crate) index: u32,
    /// The block before it, if its content is of no use without that one's.
    pub(crate) before: Option<BlockId>,
}

impl Leaving {
    /// The block that a copy was made of.
    pub(crate) fn source(copy: BlockCopy) -> Leaving {
        Leaving { block: copy.from, index: copy.index, before: None }
    }
}

/// 32 bits by which policies know a content.
pub(crate) fn name(group: GroupId, hash: &impl Digest) -> u32 {
    hash.tag() ^ u32::from(group.0).wrapping_mul(0x9E37_79B9)
}

/// Pool and index together.
#[derive(Clone, Debug)]
pub(crate) struct Blocks<D, E> {
    pub(crate) pool: Pool<E>,
    pub(crate) prefix: Prefix<D>,
    /// Cached blocks that lost their content to a new one.
    pub(crate) evictions: u64,
    pub(crate) lost: Vec<Lost<D>>,
    pub(crate) report_lost: bool,
    pub(crate) watch: Option<Box<Watch>>,
}

impl<D: Digest, E: Eviction> Blocks<D, E> {
    /// Hands out a free block for each of `places`, whose `content` is known or not, and appends it to `taken`. The
    /// caller has made sure that there are as many.
    #[inline]
    pub(crate) fn take(
        &mut self,
        tenant: TenantId,
        places: Range<u32>,
        content: impl Fn(u32) -> Option<u32>,
        taken: &mut Vec<BlockId>,
    ) {
        let picked = self.pool.take(tenant, places, content, taken);
        let picked = &taken[picked..];
        if let Some(first) = picked.iter().position(|&block| self.prefix.contains(block)) {
            for picked in picked[first..].chunks(AT_ONCE) {
                self.prefix.touch_blocks(picked);
                picked.iter().for_each(|&block| self.lose(block));
            }
        }
    }

    /// Hands out one block.
    pub(crate) fn take_one(&mut self, wanted: Wanted) -> BlockId {
        let block = self.pool.take_one(wanted);
        self.lose(block);
        block
    }

    /// What a block that is handed out held cannot be found any more.
    #[inline]
    fn lose(&mut self, block: BlockId) {
        if self.report_lost || self.watch.is_some() {
            self.report(block);
        }
        self.evictions += u64::from(self.prefix.remove(block));
    }

    /// Tells those who want to know what is about to be lost.
    #[cold]
    fn report(&mut self, block: BlockId) {
        if !self.prefix.contains(block) {
            return;
        }
        if self.report_lost {
            self.lost.extend(self.prefix.content(block));
            self.prefix.remember(block);
        }
        if let Some(watch) = &mut self.watch {
            watch.lost(block);
        }
    }

    /// One user less of each of `blocks`. Null blocks are passed over.
    pub(crate) fn release(&mut self, blocks: impl Iterator<Item = Leaving>) {
        self.release_each(blocks.map(|leaving| (leaving.block, leaving)), |leaving| leaving);
    }

    /// One user less of each block of a table from `first` on, last one first.
    #[inline]
    pub(crate) fn release_behind(&mut self, table: &[BlockId], first: u32) {
        let blocks = (first..count(table.len())).rev().map(|index| (table[index as usize], index));
        self.release_each(blocks, |index| {
            let before = index.checked_sub(1).map(|before| table[before as usize]);
            Leaving { block: table[index as usize], index, before }
        });
    }

    #[inline]
    fn release_each<T>(
        &mut self,
        blocks: impl Iterator<Item = (BlockId, T)>,
        leaving: impl Fn(T) -> Leaving,
    ) {
        let Blocks { pool, prefix, .. } = self;
        let content = |block| prefix.first_hash(block).map_or(0, |hash| name(prefix.group(block), &hash));
        pool.release(blocks, |block| prefix.contains(block), leaving, content);
    }

    /// Lets others find what is `due`. `stored` says how to tell it.
    #[inline]
    pub(crate) fn publish<'a>(
        &mut self,
        group: GroupId,
        due: &[Due<D>],
        stored: impl Fn(&Due<D>) -> Stored<'a, D>,
    ) where
        D: 'a,
    {
        let Blocks { prefix, watch, .. } = self;
        if due.len() > 2 {
            prefix.touch(group, due.iter().map(|due| due.hash));
        }
        let entered = prefix.enter(group, due);
        if let Some(watch) = watch {
            let new = due.iter().enumerate().filter(|(bit, _)| entered.new_blocks >> bit & 1 == 1);
            new.for_each(|(_, due)| watch.published(prefix.block(due.entry)));
        }
        if let Some(events) = &mut prefix.events {
            for (bit, due) in due.iter().enumerate() {
                events.stored(due.entry as usize, stored(due), entered.first_copies >> bit & 1 == 1);
            }
        }
    }
}
