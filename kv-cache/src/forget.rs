//! What is given up: tokens that nobody attends to any more, and content that must not be found again.

use crate::blocks::Blocks;
use crate::evict::Eviction;
use crate::hash::BlockHasher;
use crate::kind::Holds;
use crate::pool::Pool;
use crate::prefix::Prefix;
use crate::{BlockCount, BlockId, Digest, Error, KvCache, Lost, SequenceId, TokenCount};

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// The steps that compute a sequence's first `tokens` tokens are done: blocks of windowed groups that no later
    /// token attends to are given back, and their places in the table are null. Answers which, in the order in which
    /// they were: of each group the last first.
    ///
    /// Call it before a claim, with the computed tokens less those of steps still under way, whose attention may yet
    /// read behind the window. Without it nothing breaks, but windows hold on to everything. While a load is under way
    /// nothing behind its beginning is done: if it fails, the sequence goes on from there.
    ///
    /// # Errors
    /// [`Error::NotOpen`]; [`Error::NotComputed`] when no claim was granted for so many tokens, or they are being
    /// loaded.
    pub fn settle(&mut self, sequence: SequenceId, tokens: TokenCount) -> Result<&[BlockId], Error> {
        let place = self.sequences.place(sequence)?;
        let KvCache { groups, blocks, sequences, settled, .. } = self;
        let sequence = sequences.at_mut(place);
        let computed = sequence.loading.map_or(sequence.computed, |loading| loading.begin);
        if tokens > computed {
            return Err(Error::NotComputed { sequence: sequence.id, tokens, computed });
        }
        settled.clear();
        for (group, table) in groups.all.iter().zip(sequence.tables.iter_mut()) {
            if matches!(group.holds, Holds::NeededTokens | Holds::State) {
                let skipped = group.skipped_blocks(tokens, sequence.prompt);
                blocks.release(table.drop_blocks(skipped).inspect(|leaving| settled.push(leaving.block)));
            }
        }
        self.drop_unwanted_copies();
        Ok(&self.settled)
    }

    /// Makes `blocks` unfindable: their content is not what their hash says, as after a load that failed. They keep
    /// their users and pins and, under LRU, their place among the free. Answers how many could be found before.
    ///
    /// # Errors
    /// [`Error::NoSuchBlock`], and then none is forgotten.
    pub fn evict(&mut self, blocks: &[BlockId]) -> Result<BlockCount, Error> {
        if let Some(&block) = blocks.iter().find(|&&block| !self.exists(block)) {
            let last = BlockId(self.config.block_count.get() - 1);
            return Err(Error::NoSuchBlock { block, last });
        }
        let Blocks { pool, prefix, .. } = &mut self.blocks;
        let before = prefix.blocks();
        for &block in blocks {
            forget(block, pool, prefix);
        }
        Ok(BlockCount(before.get() - prefix.blocks().get()))
    }

    /// Makes all copies of a hash unfindable, in every group. Answers how many there were.
    pub fn evict_hash(&mut self, hash: H::Digest) -> BlockCount {
        let KvCache { groups, blocks, .. } = self;
        let before = blocks.prefix.blocks();
        for (group, _) in groups.iter() {
            while let Some(block) = blocks.prefix.get(group, hash) {
                forget(block, &mut blocks.pool, &mut blocks.prefix);
            }
        }
        BlockCount(before.get() - blocks.prefix.blocks().get())
    }

    /// Forgets all cached content, as after a change of weights. Refuses, with `false` and no change, while
    /// any sequence holds a block. Pins end. The order of the free blocks stays as it is under LRU.
    pub fn reset(&mut self) -> bool {
        let idle = self.copies.is_empty() && self.sequences.iter().all(|of| of.tables.are_empty());
        if idle {
            self.unpin_all();
            self.blocks.prefix.clear();
            self.blocks.pool.reset();
        }
        idle
    }

    /// What was lost since the last call: cached content whose block was handed out. Whoever wants to keep it
    /// elsewhere copies it before the step writes. Empty unless [`Config::report_lost`](crate::Config::report_lost).
    pub fn drain_lost(&mut self) -> impl Iterator<Item = Lost<H::Digest>> + '_ {
        self.blocks.lost.drain(..)
    }
}

/// Makes a block unfindable.
fn forget<D: Digest>(block: BlockId, pool: &mut Pool<impl Eviction>, prefix: &mut Prefix<D>) {
    if prefix.contains(block) {
        prefix.remove(block);
        pool.forget(block);
    }
}
