//! What a sequence needs to go on from a given token, block by block: the seam between the cache and the tiers.

use crate::blocks::Leaving;
use crate::id::count;
use crate::kind::Holds;
use crate::sequence::Sequence;
use crate::{BlockCount, BlockHasher, BlockId, BlockSize, Claim, Eviction, GroupId, KvCache, TokenCount};

/// What a block of a cache holds, by name: the same in every process that names blocks alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockKey<D> {
    /// The hash of all tokens up to the end of the block.
    pub digest: D,
    /// The group whose layers it is for.
    pub group: GroupId,
}

/// One block that a sequence needs, and where in it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needed<D> {
    pub(super) key: BlockKey<D>,
    /// The first token that is in it.
    pub(super) start: TokenCount,
    /// The block that the sequence has for it, if it has any.
    pub(super) leaving: Leaving,
}

impl<H: BlockHasher, E: Eviction> KvCache<H, E> {
    /// Blocks are copied whole: a load ends where all groups have full blocks.
    fn whole_blocks(&self) -> BlockSize {
        let groups = self.groups.all.iter().filter(|group| group.holds != Holds::Encoder);
        groups.map(|group| group.size).reduce(BlockSize::common_multiple).unwrap_or(self.groups.unit)
    }

    /// The longest length of at most `tokens` that a load may end at.
    pub(super) fn whole_blocks_in(&self, tokens: TokenCount) -> TokenCount {
        let size = self.whole_blocks();
        size.tokens_in(size.full_blocks(tokens))
    }

    /// How far the blocks of a sequence have names.
    pub(super) fn named_to(&self, sequence: &Sequence<H::Digest>) -> TokenCount {
        self.whole_blocks_in(self.groups.unit.tokens_in(BlockCount(count(sequence.hashes.len()))))
    }

    /// How far a sequence could be loaded: its last token is computed.
    pub(super) fn loadable_to(&self, sequence: &Sequence<H::Digest>) -> TokenCount {
        let before_last = TokenCount(sequence.known.get().saturating_sub(1));
        self.whole_blocks_in(before_last).min(self.named_to(sequence))
    }

    /// The groups that tiers care for, and whether each needs every block up to the end, or only some.
    pub(super) fn groups_that_hold_tokens(&self) -> impl Iterator<Item = (GroupId, bool)> + '_ {
        let groups = self.groups.iter().filter(|(_, group)| group.holds != Holds::Encoder);
        groups.map(|(id, group)| (id, group.holds == Holds::EveryToken))
    }

    /// The blocks of `group` behind the first `from` tokens that are needed to go on from `to`, in token order.
    pub(super) fn needed<'a>(
        &'a self,
        sequence: &'a Sequence<H::Digest>,
        id: GroupId,
        from: TokenCount,
        to: TokenCount,
    ) -> impl Iterator<Item = Needed<H::Digest>> + 'a {
        let group = &self.groups.all[id.index()];
        let external = TokenCount(to.get().saturating_sub(from.get()));
        let claim = Claim { computed: from, external, ..Claim::default() };
        let unneeded = group.unneeded(claim, sequence.prompt);
        let stride = (group.size.get() / self.groups.unit.get()) as usize;
        let blocks = sequence.tables.get(id.index()).map_or(&[][..], |table| &table.blocks);
        let range = group.size.full_blocks(from).get()..group.size.full_blocks(to).get();
        range.filter(move |&index| !unneeded.contains(index)).map(move |index| Needed {
            key: BlockKey { digest: sequence.hashes[(index as usize + 1) * stride - 1], group: id },
            start: group.size.tokens_in(BlockCount(index)),
            leaving: leaving(blocks, index),
        })
    }

    /// The full blocks of a sequence between two lengths that others can find, all groups together.
    pub(super) fn findable(
        &self,
        sequence: &Sequence<H::Digest>,
        from: TokenCount,
        to: TokenCount,
    ) -> Vec<Needed<H::Digest>> {
        let mut found = Vec::new();
        for (id, group) in self.groups.iter().filter(|(_, group)| group.holds != Holds::Encoder) {
            let stride = (group.size.get() / self.groups.unit.get()) as usize;
            let blocks = sequence.tables.get(id.index()).map_or(&[][..], |table| &table.blocks);
            for index in group.size.full_blocks(from).get()..group.size.full_blocks(to).get() {
                let Some(&digest) = sequence.hashes.get((index as usize + 1) * stride - 1) else { break };
                let leaving = leaving(blocks, index);
                if leaving.block != BlockId::NULL && self.hash_of(leaving.block) == Some(digest) {
                    let start = group.size.tokens_in(BlockCount(index));
                    found.push(Needed { key: BlockKey { digest, group: id }, start, leaving });
                }
            }
        }
        found
    }
}

fn leaving(blocks: &[BlockId], index: u32) -> Leaving {
    let at = |index: u32| blocks.get(index as usize).copied();
    Leaving { block: at(index).unwrap_or_default(), index, before: index.checked_sub(1).and_then(at) }
}
