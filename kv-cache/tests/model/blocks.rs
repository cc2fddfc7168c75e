//! Blocks that come and go.

use quayline_kv_cache::evict::{Facts, Wanted};
use quayline_kv_cache::*;

use super::{Leaving, Model, Text};

impl<P: Eviction> Model<P> {
    /// A number for what a name covers, the same for equal content.
    pub(super) fn name(&mut self, group: usize, text: Text) -> u32 {
        let next = self.names.len() as u32;
        *self.names.entry((group, text)).or_insert(next)
    }

    /// What the block at `index` of a table is wanted for.
    pub(super) fn wanted(&mut self, id: u64, group: usize, index: u32) -> Wanted {
        let sequence = &self.sequences[&id];
        let text = self.text(sequence, (index + 1) * self.groups[group].size);
        let (tenant, text) = (sequence.tenant, text.filter(|_| self.config.prefix_caching));
        Wanted { content: text.map(|text| self.name(group, text)), tenant }
    }

    /// Takes a free block.
    pub(super) fn take(&mut self, wanted: Wanted) -> BlockId {
        let may_have = self.policy.allowance(wanted.tenant) > BlockCount(0);
        let block = if self.worthless.is_empty() || !may_have {
            self.policy.pick(wanted)
        } else {
            let block = self.worthless.remove(0);
            self.policy.given(block, wanted);
            block
        };
        self.evictions += u64::from(self.is_cached(block));
        let lost = self.whole_content(block).map(|content| (content.group, content.text.clone()));
        if let (Some((group, text)), true) = (lost, self.behind.is_some()) {
            let content = self.name(group, text);
            self.behind().lost.push((content, block));
        }
        self.content[block.0 as usize].fill(None);
        block
    }

    /// Blocks of which a user has gone, in this order. What holds nothing goes first, what is cached last.
    pub(super) fn let_go(&mut self, leaving: &[Leaving]) {
        let (mut worthless, mut kept) = (Vec::new(), Vec::new());
        for (place, &Leaving { block, index, before }) in leaving.iter().enumerate() {
            let again = leaving[place + 1..].iter().any(|later| later.block == block);
            if block == BlockId::NULL || again || self.users(block) > 0 {
                continue;
            }
            let held = self.content[block.0 as usize].iter().flatten().next();
            match held.map(|content| (content.group, content.text.clone())) {
                None => worthless.push(block),
                Some((group, text)) => {
                    let before = before.filter(|&before| before != BlockId::NULL);
                    kept.push((block, Facts { index, before, content: self.name(group, text) }));
                }
            }
        }
        self.policy.free(kept.into_iter());
        worthless.iter().for_each(|&block| self.policy.emptied(block));
        self.worthless.splice(0..0, worthless);
    }

    /// Makes a block unfindable.
    pub(super) fn forget(&mut self, block: BlockId) {
        if self.is_cached(block) {
            self.content[block.0 as usize].fill(None);
            if self.users(block) == 0 && self.policy.forget(block) {
                self.worthless.insert(0, block);
            }
        }
    }

    /// Gives back all blocks behind as many as `keep` says for each group, and forgets that more was published.
    pub(super) fn give_back(&mut self, id: u64, keep: impl Fn(&Model<P>, usize) -> (usize, u32)) {
        for group in 0..self.groups.len() {
            let (keep, published_max) = keep(self, group);
            let table = &mut self.of(id).tables[group];
            let held = table.blocks.clone();
            table.blocks.truncate(keep);
            table.published = table.published.min(published_max);
            table.published_before = table.published_before.min(published_max);
            let leaving = (keep.min(held.len())..held.len()).rev().map(|index| Leaving {
                block: held[index],
                index: index as u32,
                before: index.checked_sub(1).map(|before| held[before]),
            });
            self.let_go(&leaving.collect::<Vec<_>>());
        }
        self.drop_unwanted_copies();
    }

    pub(super) fn drop_unwanted_copies(&mut self) {
        for index in (0..self.copies.len()).rev() {
            if self.users(self.copies[index].to) == 0 {
                let copy = self.copies.remove(index);
                self.let_go(&[Leaving::source(copy)]);
            }
        }
    }
}
