//! The index of full blocks by their hash and group.
//!
//! One hash may have several physical copies: two sequences computed the same tokens at the same time, or one
//! of them was not allowed to read. All copies stay, since a block table only ever grows at its end; a lookup
//! gives the oldest that is still there, and forgetting one copy leaves the others found.

use std::hint::black_box;

use crate::buckets::Buckets;
use crate::event::Events;
use crate::tier::BlockKey;
use crate::{BlockCount, BlockId, Digest, GroupId, Lost};

/// The copies of a hash form a ring through `next` and `prev`; the index knows the oldest.
///
/// An entry is a block or, where parts of blocks are shared, a part: block `b` has the entries `b * parts` to
/// `b * parts + parts - 1`. An entry outside of the index has 0 for its `next`, and the null block is never in it.
#[derive(Clone, Debug)]
pub(crate) struct Prefix<D> {
    /// By group: the oldest copy of each hash.
    pub(crate) index: Vec<Buckets>,
    /// By block, and only where there are several groups: the one it is found in.
    group: Vec<u8>,
    pub(crate) entries: Vec<Entry<D>>,
    /// Parts that every block has room for: as many as the blocks of the group with the most.
    parts: u32,
    parts_of: Vec<u32>,
    /// Who wants to hear of every change.
    pub(crate) events: Option<Box<Events<D>>>,
    blocks: u32,
    version: u64,
}

/// Blocks that are asked for before an answer is needed.
pub(crate) const AT_ONCE: usize = 64;

/// A block on its way into the index, or a part of one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Due<D> {
    pub(crate) hash: D,
    /// Its entry.
    pub(crate) entry: u32,
    /// Which entry of the table it comes from.
    pub(crate) from: u32,
}

/// What was new of those that were due, a bit for each.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entered {
    /// Nothing of its block could be found before.
    pub(crate) new_blocks: u64,
    /// Its hash could not be found before.
    pub(crate) first_copies: u64,
}

/// What is found in a block, or in a part of it, and the neighbours in the ring of its copies.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry<D> {
    pub(crate) hash: D,
    pub(crate) next: u32,
    pub(crate) prev: u32,
}

impl<D> Entry<D> {
    #[inline]
    pub(crate) fn is_found(&self) -> bool {
        self.next != 0
    }
}

impl<D: Digest> Prefix<D> {
    /// An index for `blocks` blocks in groups whose blocks have so many parts. With several groups nobody knows which
    /// one gets how many blocks, so that each begins with its share and grows.
    pub(crate) fn new(blocks: BlockCount, parts_of: Vec<u32>, events: Option<Box<Events<D>>>) -> Self {
        let (groups, parts) = (parts_of.len(), parts_of.iter().copied().max().unwrap_or(1));
        let entries =
            blocks.get().checked_mul(parts).expect("the entries of a pool are counted in u32") as usize;
        let blocks = blocks.get() as usize;
        Prefix {
            index: vec![Buckets::with_room_for(entries / groups); groups],
            group: if groups > 1 { vec![0; blocks] } else { Vec::new() },
            entries: vec![Entry::default(); entries],
            parts,
            parts_of,
            events,
            blocks: 0,
            version: 0,
        }
    }

    /// How many blocks are in the index, every copy counted.
    #[inline]
    pub(crate) fn blocks(&self) -> BlockCount {
        BlockCount(self.blocks)
    }

    /// Changes whenever a lookup could give another answer.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.version
    }

    /// Whether anything of `block` can be found.
    #[inline]
    pub(crate) fn contains(&self, block: BlockId) -> bool {
        if self.parts == 1 { self.entries[block.index()].is_found() } else { self.contains_from(block, 0) }
    }

    /// Whether the part `first` of `block`, or a later one, can be found.
    pub(crate) fn contains_from(&self, block: BlockId, first: u32) -> bool {
        (first..self.parts).any(|part| self.hash(block, part).is_some())
    }

    /// The hash under which a part of `block` is found.
    #[inline]
    pub(crate) fn hash(&self, block: BlockId, part: u32) -> Option<D> {
        let entry = self.entries.get(self.entry(block, part) as usize)?;
        entry.is_found().then_some(entry.hash)
    }

    /// The hash under which a block is found, or its first part that is.
    #[inline]
    pub(crate) fn first_hash(&self, block: BlockId) -> Option<D> {
        if self.parts == 1 {
            self.hash(block, 0)
        } else {
            (0..self.parts).find_map(|part| self.hash(block, part))
        }
    }

    /// The group that a block in the index is found in.
    #[inline]
    pub(crate) fn group(&self, block: BlockId) -> GroupId {
        GroupId(self.group.get(block.index()).copied().unwrap_or(0))
    }

    /// What a cached block holds, if it is full.
    pub(crate) fn content(&self, block: BlockId) -> Option<Lost<D>> {
        let group = self.group(block);
        let last = self.parts_of[group.index()] - 1;
        self.hash(block, last).map(|digest| Lost { digest, group, block })
    }

    /// The oldest copy of `hash` in `group`.
    #[inline]
    pub(crate) fn get(&self, group: GroupId, hash: D) -> Option<BlockId> {
        self.find(group, hash).map(|place| self.block(self.index[group.index()].number(place)))
    }

    /// Appends the cached blocks of the longest prefix of a sequence to `found`. Each block ends at one of every
    /// `stride` hashes.
    ///
    /// The index of a large pool is not in the processor's cache, and one probe waits for two reads of memory. So
    /// many blocks are looked for at once, in three passes that wait for nothing within: where they would be, who is
    /// there, and whether that is who was meant. It begins with one, since of many prompts nothing is cached.
    pub(crate) fn longest(&self, group: GroupId, mut hashes: &[D], stride: usize, found: &mut Vec<BlockId>) {
        let index = &self.index[group.index()];
        let mut at_once = 1;
        while hashes.len() >= stride {
            let (now, later) = hashes.split_at(hashes.len().min(at_once * stride));
            let ends = || now.iter().skip(stride - 1).step_by(stride);
            self.touch(group, ends().copied());
            let (mut there, mut is_meant) = ([0; AT_ONCE], [false; AT_ONCE]);
            for (there, hash) in there.iter_mut().zip(ends()) {
                *there = index.first_under(hash.tag());
            }
            for ((is_meant, &there), hash) in is_meant.iter_mut().zip(&there).zip(ends()) {
                *is_meant = (there != 0) & (self.entries[there as usize].hash == *hash);
            }
            for ((&is_meant, &there), &hash) in is_meant.iter().zip(&there).zip(ends()) {
                let block = if is_meant { Some(self.block(there)) } else { self.get(group, hash) };
                let Some(block) = block else { return };
                found.push(block);
            }
            (hashes, at_once) = (later, AT_ONCE.min(8 * at_once));
        }
    }

    /// Reads where `hashes` would be found, for whoever is about to enter or remove them: each of these is a read of
    /// memory in a large index, and so they overlap.
    #[inline]
    pub(crate) fn touch(&self, group: GroupId, hashes: impl Iterator<Item = D>) {
        let index = &self.index[group.index()];
        black_box(hashes.fold(0, |sum, hash| sum ^ index.touch(hash.tag())));
    }

    /// The same for what is found in `blocks`, or in their first parts.
    pub(crate) fn touch_blocks(&self, blocks: &[BlockId]) {
        let hash = |block: BlockId| self.entries[self.entry(block, 0) as usize].hash;
        if let [index] = self.index.as_slice() {
            black_box(blocks.iter().fold(0, |sum, &block| sum ^ index.touch(hash(block).tag())));
        } else {
            let index = |block| &self.index[self.group(block).index()];
            black_box(blocks.iter().fold(0, |sum, &block| sum ^ index(block).touch(hash(block).tag())));
        }
    }

    /// Enters blocks, or parts of them, that are not in the index, each as the newest copy of its hash in `group`.
    pub(crate) fn enter(&mut self, group: GroupId, due: &[Due<D>]) -> Entered {
        let mut entered = Entered::default();
        let Prefix { index, entries, group: group_of, parts, .. } = self;
        let (index, entries, parts) = (&mut index[group.index()], entries.as_mut_slice(), *parts);
        index.reserve(due.len());
        for (bit, due) in due.iter().enumerate() {
            let this = due.entry;
            debug_assert!(!entries[this as usize].is_found(), "entry {this} is published once");
            let is_new_block = parts == 1 || !is_block_found(entries, this / parts, parts);
            entered.new_blocks |= u64::from(is_new_block) << bit;
            if let Some(group_of) = group_of.get_mut((this / parts) as usize) {
                *group_of = group.0;
            }
            let is_this = |entry: u32| entries[entry as usize].hash == due.hash;
            let oldest = index.find_or_insert(due.hash.tag(), this, is_this);
            entries[this as usize] = Entry { hash: due.hash, next: this, prev: this };
            match oldest {
                Some(place) => join(entries, this, index.number(place)),
                None => entered.first_copies |= 1 << bit,
            }
        }
        self.blocks += entered.new_blocks.count_ones();
        self.version += 1;
        entered
    }

    /// Listeners will be told what this block is about when a tier has it, if all its parts are in the index.
    pub(crate) fn remember(&mut self, block: BlockId) {
        let group = self.group(block);
        let parts = self.parts_of[group.index()];
        let (entry, last) = (self.entry(block, 0), self.hash(block, parts - 1));
        let is_whole = (0..parts).all(|part| self.hash(block, part).is_some());
        if let (Some(events), Some(digest), true) = (&mut self.events, last, is_whole) {
            events.remember(BlockKey { digest, group }, entry as usize, parts);
        }
    }

    /// Forgets this copy in all its parts. Answers whether any was in the index.
    #[inline]
    pub(crate) fn remove(&mut self, block: BlockId) -> bool {
        if self.parts == 1 {
            return self.remove_part(block, 0);
        }
        (0..self.parts).fold(false, |any, part| self.remove_part(block, part) | any)
    }

    /// Forgets a part of this copy. Answers whether it was in the index.
    #[inline]
    pub(crate) fn remove_part(&mut self, block: BlockId, part: u32) -> bool {
        let (this, group) = (self.entry(block, part), self.group(block));
        let Entry { hash, next, .. } = self.entries[this as usize];
        if next == 0 {
            return false;
        }
        if next == this {
            let index = &mut self.index[group.index()];
            let place = index.find(hash.tag(), |oldest| oldest == this);
            index.remove(place.expect("the hash of a published block is indexed"));
            if let Some(events) = &mut self.events {
                events.removed(hash, group);
            }
        } else {
            self.leave(this, group);
        }
        let Entry { next, prev, .. } = &mut self.entries[this as usize];
        (*next, *prev) = (0, 0);
        self.blocks -= u32::from(self.parts == 1 || !self.contains(block));
        self.version += 1;
        true
    }

    /// Takes a copy that is not alone out of its ring.
    #[cold]
    fn leave(&mut self, this: u32, group: GroupId) {
        let Entry { hash, next, prev } = self.entries[this as usize];
        let index = &mut self.index[group.index()];
        if let Some(place) = index.find(hash.tag(), |oldest| oldest == this) {
            index.replace(place, next);
        }
        self.entries[prev as usize].next = next;
        self.entries[next as usize].prev = prev;
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.index.iter_mut().for_each(Buckets::clear);
        self.entries.fill(Entry::default());
        self.blocks = 0;
        self.version += 1;
        if let Some(events) = &mut self.events {
            events.cleared();
        }
    }

    /// The oldest copy of everything in the index: its entry, its group and its hash.
    pub(crate) fn all(&self) -> impl Iterator<Item = (usize, GroupId, D)> + '_ {
        (0..).map(GroupId).zip(&self.index).flat_map(move |(group, index)| {
            index.all().map(move |bucket| {
                let entry = bucket.number as usize;
                (entry, group, self.entries[entry].hash)
            })
        })
    }

    /// The block that an entry belongs to.
    #[inline]
    pub(crate) fn block(&self, entry: u32) -> BlockId {
        BlockId(if self.parts == 1 { entry } else { entry / self.parts })
    }

    #[inline]
    pub(crate) fn entry(&self, block: BlockId, part: u32) -> u32 {
        block.get() * self.parts + part
    }

    #[inline]
    fn find(&self, group: GroupId, hash: D) -> Option<usize> {
        self.index[group.index()].find(hash.tag(), |entry| self.entries[entry as usize].hash == hash)
    }
}

/// Whether any part of a block can be found.
#[cold]
fn is_block_found<D>(entries: &[Entry<D>], block: u32, parts: u32) -> bool {
    (block * parts..(block + 1) * parts).any(|entry| entries[entry as usize].is_found())
}

/// Puts a copy that is alone before the oldest of a ring, that is, behind the newest.
#[cold]
fn join<D>(entries: &mut [Entry<D>], this: u32, oldest: u32) {
    let newest = std::mem::replace(&mut entries[oldest as usize].prev, this);
    entries[newest as usize].next = this;
    let Entry { next, prev, .. } = &mut entries[this as usize];
    (*next, *prev) = (oldest, newest);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BlockHash;

    const GROUP: GroupId = GroupId(0);

    impl<D: Digest> Prefix<D> {
        fn insert(&mut self, group: GroupId, hash: D, block: BlockId, part: u32) {
            let entry = self.entry(block, part);
            self.enter(group, &[Due { hash, entry, from: 0 }]);
        }
    }

    fn hash(tag: u32, rest: u32) -> BlockHash {
        BlockHash::from_parts(tag, rest)
    }

    #[test]
    fn the_oldest_copy_answers_and_the_others_follow_it() {
        let mut prefix = Prefix::new(BlockCount(10), vec![1], None);
        let shared = hash(7, 1);
        for block in [7, 4, 2, 9] {
            prefix.insert(GROUP, shared, BlockId(block), 0);
        }
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(7)));
        prefix.remove(BlockId(7));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(4)));
        prefix.remove(BlockId(2));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(4)));
        prefix.remove(BlockId(4));
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(9)));
        prefix.insert(GROUP, shared, BlockId(4), 0);
        assert_eq!(prefix.get(GROUP, shared), Some(BlockId(9)));
        prefix.remove(BlockId(9));
        prefix.remove(BlockId(4));
        assert_eq!((prefix.get(GROUP, shared), prefix.blocks()), (None, BlockCount(0)));
    }

    #[test]
    fn hashes_with_equal_tags_are_told_apart() {
        let mut prefix = Prefix::new(BlockCount(4), vec![1], None);
        prefix.insert(GROUP, hash(7, 1), BlockId(1), 0);
        prefix.insert(GROUP, hash(7, 2), BlockId(2), 0);
        assert_eq!(prefix.get(GROUP, hash(7, 1)), Some(BlockId(1)));
        assert_eq!(prefix.get(GROUP, hash(7, 2)), Some(BlockId(2)));
        assert_eq!(prefix.get(GROUP, hash(7, 3)), None);
        prefix.remove(BlockId(1));
        assert_eq!(prefix.get(GROUP, hash(7, 1)), None);
        assert_eq!(prefix.get(GROUP, hash(7, 2)), Some(BlockId(2)));
    }

    #[test]
    fn the_longest_prefix_ends_at_the_first_hole() {
        let mut prefix = Prefix::new(BlockCount(8), vec![1], None);
        let hashes: Vec<BlockHash> = (1..=5).map(|n| hash(n << 29, n)).collect();
        for (block, &hash) in (1..).zip(&hashes) {
            prefix.insert(GROUP, hash, BlockId(block), 0);
        }
        prefix.remove(BlockId(3));
        let mut found = Vec::new();
        prefix.longest(GROUP, &hashes, 1, &mut found);
        assert_eq!(found, [BlockId(1), BlockId(2)]);
    }

    #[test]
    fn groups_and_parts_of_blocks_are_found_apart() {
        let mut prefix = Prefix::new(BlockCount(4), vec![2, 1], None);
        prefix.insert(GroupId(0), hash(7, 1), BlockId(3), 0);
        prefix.insert(GroupId(0), hash(7, 2), BlockId(3), 1);
        prefix.insert(GroupId(1), hash(7, 1), BlockId(2), 0);
        assert_eq!(prefix.get(GroupId(0), hash(7, 1)), Some(BlockId(3)));
        assert_eq!(prefix.get(GroupId(1), hash(7, 1)), Some(BlockId(2)));
        assert_eq!(prefix.get(GroupId(1), hash(7, 2)), None);
        assert_eq!(prefix.blocks(), BlockCount(2));
        prefix.remove_part(BlockId(3), 1);
        assert_eq!((prefix.get(GroupId(0), hash(7, 2)), prefix.blocks()), (None, BlockCount(2)));
        prefix.remove(BlockId(3));
        assert_eq!((prefix.get(GroupId(0), hash(7, 1)), prefix.blocks()), (None, BlockCount(1)));
    }
}
