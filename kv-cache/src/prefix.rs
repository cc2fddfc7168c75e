//! The index of full blocks by their hash and group.
//!
//! One hash may have several physical copies: two sequences computed the same tokens at the same time, or one
//! of them was not allowed to read. All copies stay, since a block table only ever grows at its end; a lookup
//! gives the oldest that is still there, and forgetting one copy leaves the others found.

use crate::buckets::Buckets;
use crate::{BlockCount, BlockId, Digest, GroupId};

/// The copies of a hash form a ring through `next` and `prev`; the index knows the oldest. A block outside
/// of the index has 0 for its `next`, and the null block is never in it.
#[derive(Clone, Debug)]
pub(crate) struct Prefix<D> {
    /// By group: the oldest copy of each hash.
    pub(crate) index: Vec<Buckets>,
    /// By block, and only where there are several groups: the one it is found in.
    group: Vec<u8>,
    pub(crate) hash: Vec<D>,
    pub(crate) next: Vec<u32>,
    pub(crate) prev: Vec<u32>,
    blocks: u32,
    version: u64,
}

impl<D: Digest> Prefix<D> {
    /// An index for `blocks` blocks in `groups` groups. With several groups nobody knows which one gets how many
    /// blocks, so that each begins with its share and grows.
    pub(crate) fn new(blocks: BlockCount, groups: u8) -> Self {
        let length = blocks.get() as usize;
        Prefix {
            index: vec![Buckets::with_room_for(length / usize::from(groups)); groups.into()],
            group: if groups > 1 { vec![0; length] } else { Vec::new() },
            hash: vec![D::default(); length],
            next: vec![0; length],
            prev: vec![0; length],
            blocks: 0,
            version: 0,
        }
    }

    /// How many blocks are in the index, every copy counted.
    pub(crate) fn blocks(&self) -> BlockCount {
        BlockCount(self.blocks)
    }

    /// Changes whenever a lookup could give another answer.
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    pub(crate) fn contains(&self, block: BlockId) -> bool {
        self.next[block.index()] != 0
    }

    pub(crate) fn hash(&self, block: BlockId) -> Option<D> {
        self.contains(block).then(|| self.hash[block.index()])
    }

    /// The group that a block in the index is found in.
    #[inline]
    pub(crate) fn group(&self, block: BlockId) -> GroupId {
        GroupId(self.group.get(block.index()).copied().unwrap_or(0))
    }

    /// The oldest copy of `hash` in `group`.
    #[inline]
    pub(crate) fn get(&self, group: GroupId, hash: D) -> Option<BlockId> {
        self.find(group, hash).map(|place| BlockId(self.index[group.index()].number(place)))
    }

    /// Appends the cached blocks of the longest prefix of `hashes` to `found`.
    ///
    /// The index of a large pool is not in the processor's cache, and one probe waits for two reads of memory.
    /// So hashes are taken sixteen at a time: first all guesses, whose reads overlap, then the answers.
    pub(crate) fn longest(&self, group: GroupId, hashes: &[D], found: &mut Vec<BlockId>) {
        let index = &self.index[group.index()];
        for hashes in hashes.chunks(16) {
            let mut guesses = [0; 16];
            for (guess, hash) in guesses.iter_mut().zip(hashes) {
                *guess = index.guess(hash.tag());
            }
            for (&guess, &hash) in guesses.iter().zip(hashes) {
                let guessed = guess != 0 && self.hash[guess as usize] == hash;
                let block = if guessed { Some(BlockId(guess)) } else { self.get(group, hash) };
                let Some(block) = block else { return };
                found.push(block);
            }
        }
    }

    /// Enters a block that is not in the index, as the newest copy of `hash` in `group`.
    pub(crate) fn insert(&mut self, group: GroupId, hash: D, block: BlockId) {
        debug_assert!(!self.contains(block), "block {block} is published once");
        let this = block.get();
        match self.get(group, hash) {
            None => {
                self.index[group.index()].insert(hash.tag(), this);
                (self.next[block.index()], self.prev[block.index()]) = (this, this);
            }
            Some(oldest) => {
                let newest = self.prev[oldest.index()];
                self.next[newest as usize] = this;
                self.prev[block.index()] = newest;
                self.next[block.index()] = oldest.get();
                self.prev[oldest.index()] = this;
            }
        }
        self.hash[block.index()] = hash;
        if let Some(of_block) = self.group.get_mut(block.index()) {
            *of_block = group.0;
        }
        self.blocks += 1;
        self.version += 1;
    }

    /// Forgets this copy. Does nothing to a block that is not in the index.
    pub(crate) fn remove(&mut self, block: BlockId) {
        if !self.contains(block) {
            return;
        }
        let this = block.get();
        let (before, after) = (self.prev[block.index()], self.next[block.index()]);
        let group = self.group(block);
        let place =
            self.find(group, self.hash[block.index()]).expect("the hash of a published block is indexed");
        let index = &mut self.index[group.index()];
        if after == this {
            index.remove(place);
        } else if index.number(place) == this {
            index.replace(place, after);
        }
        self.next[before as usize] = after;
        self.prev[after as usize] = before;
        (self.next[block.index()], self.prev[block.index()]) = (0, 0);
        self.blocks -= 1;
        self.version += 1;
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.index.iter_mut().for_each(Buckets::clear);
        self.next.fill(0);
        self.prev.fill(0);
        self.blocks = 0;
        self.version += 1;
    }

    #[inline]
    fn find(&self, group: GroupId, hash: D) -> Option<usize> {
        self.index[group.index()].find(hash.tag(), |block| self.hash[block as usize] == hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockHash;

    const GROUP: GroupId = GroupId(0);

    fn hash(tag: u32, rest: u32) -> BlockHash {
        BlockHash::from_parts(tag, rest)
    }

    #[test]
    fn the_oldest_copy_answers_and_the_others_follow_it() {
        let mut prefix = Prefix::new(BlockCount(10), 1);
        let shared = hash(7, 1);
        for block in [7, 4, 2, 9] {
            prefix.insert(GROUP, shared, BlockId(block));
        }
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(7)));
        prefix.remove(BlockId(7));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(4)));
        prefix.remove(BlockId(2));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(4)));
        prefix.remove(BlockId(4));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(9)));
        prefix.insert(GROUP, shared, BlockId(4));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(9)));
        prefix.remove(BlockId(9));
        prefix.remove(BlockId(4));
        assert_eq!((prefix.get(GROUP, shared), prefix.blocks()), (None, BlockCount(0)));
    }

    #[test]
    fn hashes_with_equal_tags_are_told_apart() {
        let mut prefix = Prefix::new(BlockCount(4), 1);
        prefix.insert(GROUP, hash(7, 1), BlockId(1));
        prefix.insert(GROUP, hash(7, 2), BlockId(2));
        assert_eq!(prefix.get(GROUP, hash(7, 1)), Some(BlockId(1)));
        assert_eq!(prefix.get(GROUP, hash(7, 2)), Some(BlockId(2)));
        assert_eq!(prefix.get(GROUP, hash(7, 3)), None);
        prefix.remove(BlockId(1));
        assert_eq!(prefix.get(GROUP, hash(7, 1)), None);
        assert_eq!(prefix.get(GROUP, hash(7, 2)), Some(BlockId(2)));
    }

    #[test]
    fn the_longest_prefix_ends_at_the_first_hole() {
        let mut prefix = Prefix::new(BlockCount(8), 1);
        let hashes: Vec<BlockHash> = (1..=5).map(|n| hash(n << 29, n)).collect();
        for (block, &hash) in (1..).zip(&hashes) {
            prefix.insert(GROUP, hash, BlockId(block));
        }
        prefix.remove(BlockId(3));
        let mut found = Vec::new();
        prefix.longest(GROUP, &hashes, &mut found);
        assert_eq!(found, [BlockId(1), BlockId(2)]);
    }
}
